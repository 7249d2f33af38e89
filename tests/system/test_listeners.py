"""Listening sockets: what is bound and how, which process is named when an address is in use, and that an error leaves
nothing behind: no descriptor, no file, and no other process's socket touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import Address, parse_address
from forkd.config.listener import Listener
from forkd.errors import AddressInUse, ForkdError
from forkd.system.listeners import BoundListener, bind_all, bind_listener, find_holder, probe_listener, update_listener
from forkd.system.unix_paths import current_umask
from tests.support.needs import needs_root

V4, V6 = "tcp://127.0.0.1:0", "tcp://[::1]:0"


def listener(address: str | Address, **settings: Any) -> Listener:
    text = address if isinstance(address, str) else str(address)
    return Listener(address=parse_address(text), handler="a:b", **settings)


@contextlib.contextmanager
def bound(address: str | Address, **settings: Any) -> Iterator[BoundListener]:
    made = bind_listener(listener(address, **settings))
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "s"
    assert len(str(found)) < 100
    return found


def refused(address: str | Address, **settings: Any) -> str:
    with pytest.raises(ForkdError) as caught:
        bind_listener(listener(address, **settings))
    assert type(caught.value) is ForkdError
    return str(caught.value)


def in_use(address: str | Address, **settings: Any) -> str:
    with pytest.raises(AddressInUse) as caught:
        bind_listener(listener(address, **settings))
    return str(caught.value)


@pytest.mark.parametrize(("address", "family"), [(V4, socket.AF_INET), (V6, socket.AF_INET6)])
def test_port_0_becomes_the_real_one_and_clients_connect(address: str, family: int) -> None:
    with bound(address) as made:
        (sock,) = made.sockets
        assert made.address.port == sock.getsockname()[1] > 0
        assert made.address.host == parse_address(address).host
        assert made.inode is None
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        with socket.socket(family) as client:
            client.connect((made.address.host, made.address.port))
            accepted, _ = sock.accept()
            accepted.close()


def test_an_ipv6_listener_leaves_ipv4_alone() -> None:
    with bound("tcp://[::]:0") as made:  # the kernel sees to it for every other address
        assert made.sockets[0].getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


def test_host_name_gets_a_socket_for_each_address_on_one_port() -> None:
    hosts = {info[4][0] for info in socket.getaddrinfo("localhost", 0, type=socket.SOCK_STREAM)}
    with bound("tcp://localhost:0") as made:
        assert {sock.getsockname()[0] for sock in made.sockets} == hosts
        assert {sock.getsockname()[1] for sock in made.sockets} == {made.address.port}
        assert str(made.address) == f"tcp://localhost:{made.address.port}"


def test_accepted_sockets_send_small_segments_at_once() -> None:
    with bound(V4) as made, socket.create_connection(("127.0.0.1", made.address.port)):
        accepted, _ = made.sockets[0].accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


def test_a_port_that_was_just_served_can_be_bound_again() -> None:
    """A restart must not wait for the TIME_WAIT of the old daemon's connections."""
    with bound(V4) as made, socket.create_connection(("127.0.0.1", made.address.port)):
        accepted, _ = made.sockets[0].accept()
        accepted.close()
    with bound(made.address) as again:
        assert again.address == made.address


def test_the_backlog_is_the_one_of_the_settings(path: Path) -> None:
    with bound(V4, backlog=7) as made:
        info = made.sockets[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
        assert struct.unpack_from("I", info, 28) == (7,)  # tcpi_sacked, of a listener its longest queue
    with bound(f"unix:{path}", backlog=3), contextlib.ExitStack() as clients:
        waiting = 0
        with contextlib.suppress(BlockingIOError):
            while waiting < 20:
                client = clients.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
                waiting += 1
        assert waiting == 4  # unix(7) lets one more in than the backlog says


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o777])
def test_a_unix_socket_has_the_mode_of_the_settings(path: Path, mode: int) -> None:
    with bound(f"unix:{path}", mode=mode) as made:
        found = path.stat()
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == mode
        assert made.inode == (found.st_dev, found.st_ino)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_umask_decides_without_a_mode_and_is_unchanged(path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with bound(f"unix:{path}"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
        assert current_umask() == mask
    finally:
        assert os.umask(before) == mask


def test_unix_socket_has_the_owner_of_the_settings(path: Path) -> None:
    uid, gid = (12345, 12346) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    with bound(f"unix:{path}", owner=str(uid), group=str(gid)):
        assert (path.stat().st_uid, path.stat().st_gid) == (uid, gid)
    if os.geteuid() == 0:
        with bound(f"unix:{path}", owner="root", group="root"):
            assert (path.stat().st_uid, path.stat().st_gid) == (0, 0)


@pytest.mark.parametrize("settings", [{"owner": "no-such-user-here"}, {"group": "no-such-group-here"}])
def test_an_unknown_owner_is_refused_and_the_path_is_free_again(path: Path, settings: dict[str, str]) -> None:
    assert "' on this machine" in refused(f"unix:{path}", **settings)
    assert not path.exists()


def not_permitted(*_: object) -> None:
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def test_path_is_given_away_after_it_has_its_mode(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_root()
    chown = os.chown

    def give_away(file: str, uid: int, gid: int) -> None:
        chown(file, uid, gid)
        monkeypatch.setattr(os, "chmod", not_permitted)  # as for a master without CAP_FOWNER

    monkeypatch.setattr(os, "chown", give_away)
    with bound(f"unix:{path}", owner="12345", mode=0o620) as made:
        update_listener(made)
        assert stat.S_IMODE(path.stat().st_mode) == 0o620


def test_owner_that_may_not_be_set_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chown", not_permitted)
    said = refused(f"unix:{path}", owner="12345")
    assert said.endswith("it may not set owner, group or mode of the path: Operation not permitted")
    assert not path.exists()


def test_abstract_socket_has_no_file_and_is_in_use_while_open(tmp_path: Path) -> None:
    name = f"unix:@forkd-test-{os.getpid()}"
    with bound(name) as made, contextlib.chdir(tmp_path):
        assert made.inode is None
        with socket.socket(socket.AF_UNIX) as client:
            client.connect("\0" + name.removeprefix("unix:@"))
        assert in_use(name) == f"{name} is in use by {find_holder(made.address)}"
        assert f"pid {os.getpid()}" in in_use(name)
        assert list(tmp_path.iterdir()) == []


def leave_stale(path: Path, kind: int = socket.SOCK_STREAM) -> None:
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_dead_owners_socket_file_is_replaced(path: Path, kind: int) -> None:
    leave_stale(path, kind)
    probe_listener(listener(f"unix:{path}"))
    with bound(f"unix:{path}") as made, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert made.inode == (path.stat().st_dev, path.stat().st_ino)
    assert not path.exists()


def test_live_owners_path_is_left_alone_and_the_owner_named(path: Path) -> None:
    with bound(f"unix:{path}") as made:
        before = path.stat().st_ino
        assert re.search(rf"^unix:{path} is in use by .+, pid {os.getpid()}$", in_use(f"unix:{path}"))
        assert path.stat().st_ino == before
        made.sockets[0].accept()[0].close()  # that was the probe whether the owner is alive
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def test_an_owner_that_is_too_busy_to_answer_lives_all_the_same(path: Path) -> None:
    with bound(f"unix:{path}", backlog=1), contextlib.ExitStack() as clients:
        for _ in range(2):
            clients.enter_context(socket.socket(socket.AF_UNIX)).connect(str(path))
        assert "in use" in in_use(f"unix:{path}")


def test_a_datagram_sockets_owner_is_left_alone(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        assert "in use" in in_use(f"unix:{path}")


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("attempt", [bind_listener, probe_listener])
def test_file_that_is_no_socket_is_never_removed(
    path: Path, make: Callable[[Path], object], attempt: Callable[[Listener], object]
) -> None:
    make(path)
    before = os.lstat(path)
    with pytest.raises(AddressInUse, match=f"unix:{path} is in use"):
        attempt(listener(f"unix:{path}"))
    assert os.path.samestat(os.lstat(path), before)


@pytest.mark.parametrize("attempt", [bind_listener, probe_listener])
@pytest.mark.parametrize("leads_to", ["nowhere", "a file", "a socket that is served", "a socket that is dead"])
def test_a_symbolic_link_in_place_of_a_socket_is_refused(
    path: Path, attempt: Callable[[Listener], object], leads_to: str
) -> None:
    target = path.with_name("target")
    with socket.socket(socket.AF_UNIX) as other:
        if "socket" in leads_to:
            other.bind(str(target))
        if "served" in leads_to:
            other.listen()
        if leads_to == "a file":
            target.touch()
        path.symlink_to(target)
        with pytest.raises(ForkdError, match=f"unix:{path}: it is a symbolic link; remove it, or name where it leads"):
            attempt(listener(f"unix:{path}"))
    assert path.readlink() == target


def test_mode_is_not_given_to_another_file_at_the_path(path: Path) -> None:
    precious = path.with_name("precious")
    precious.touch(0o600)
    with bound(f"unix:{path}", mode=0o600) as made:
        path.unlink()
        path.symlink_to(precious)
        made.listener = replace(made.listener, mode=0o666)
        update_listener(made)
        assert stat.S_IMODE(precious.stat().st_mode) == 0o600
        path.unlink()
        precious.rename(path)
        update_listener(made)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_removing_leaves_a_successors_socket_file_alone(path: Path) -> None:
    first = bind_listener(listener(f"unix:{path}"))
    path.unlink()
    with bound(f"unix:{path}"):
        first.remove()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_removing_twice_or_after_the_file_has_gone_does_no_harm(path: Path) -> None:
    with bound(f"unix:{path}") as made:
        path.unlink()
        made.remove()
        made.remove()
        assert [sock.fileno() for sock in made.sockets] == [-1]


def test_close_leaves_the_path_to_processes_that_listen(path: Path) -> None:
    with bound(f"unix:{path}") as made:
        other = made.sockets[0].dup()
        made.close()
        with other, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            assert made.sockets[0].fileno() == -1


@pytest.mark.parametrize("address", [V4, V6])
def test_holder_of_a_port_is_named(address: str) -> None:
    with bound(address) as made:
        assert re.search(rf"^{re.escape(str(made.address))} is in use by .+, pid {os.getpid()}$", in_use(made.address))
        with pytest.raises(AddressInUse):
            probe_listener(listener(made.address))
    probe_listener(listener(made.address))
    assert find_holder(made.address) == ""


def test_holder_of_a_wildcard_port_is_named_for_each_address() -> None:
    with socket.socket() as everywhere:
        everywhere.bind(("0.0.0.0", 0))
        everywhere.listen()
        assert f"pid {os.getpid()}" in in_use(f"tcp://127.0.0.1:{everywhere.getsockname()[1]}")


def test_a_holders_name_cannot_paint_on_the_terminal() -> None:
    program = (
        "import setproctitle, socket, sys; setproctitle.setproctitle('\\x1b[31m\\n'); "
        "s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = in_use(f"tcp://127.0.0.1:{int(process.stdout.readline())}")
        process.communicate()
    assert "x1b[31m" in said
    assert f"pid {process.pid}" in said
    assert said.isprintable()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("tcp://192.0.2.1:0", "192.0.2.1 is no address of this machine"),
        ("tcp://[2001:db8::1]:0", "2001:db8::1 is no address of this machine"),
        ("unix:/nowhere-at-all/s", "No such file or directory"),
        ("tcp://a..b:0", ""),
        (f"tcp://{'a' * 64}.b:0", ""),
    ],
)
def test_an_address_that_cannot_be_had_is_told_with_why(address: str, said: str) -> None:
    assert refused(address).startswith(f"can't listen on {address}: {said}")


def test_missing_directory_is_told_by_the_probe_too(tmp_path: Path) -> None:
    with pytest.raises(ForkdError, match=f"there is no directory {tmp_path}/a"):
        probe_listener(listener(f"unix:{tmp_path}/a/s"))


def test_a_probe_refuses_an_owner_that_binding_would_refuse(path: Path) -> None:
    with pytest.raises(ForkdError, match="no-such-user-here"):
        probe_listener(listener(f"unix:{path}", owner="no-such-user-here"))


def test_a_probe_leaves_a_free_address_free(path: Path) -> None:
    for address in (V4, f"unix:{path}", f"unix:@forkd-test-{os.getpid()}"):
        probe_listener(listener(address))
    assert not path.exists()


def test_all_listeners_are_bound_in_order(path: Path) -> None:
    made = bind_all((listener(V4), listener(f"unix:{path}"), listener(V4)))
    try:
        assert [one.address.scheme for one in made] == ["tcp", "unix", "tcp"]
        assert made[0].address != made[2].address
    finally:
        for one in made:
            one.remove()


def test_bind_all_binds_none_when_one_fails(path: Path) -> None:
    name = f"unix:@forkd-test-{os.getpid()}"
    with bound(V4) as taken:
        with pytest.raises(AddressInUse):
            bind_all((listener(f"unix:{path}"), listener(name), listener(taken.address), listener(V4)))
        assert not path.exists()
        with bound(name):
            assert taken.sockets[0].fileno() >= 0
