"""A host's name that stands for an address which the machine lacks: ::1 of localhost, where IPv6 is off."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.errors import AddressInUse, ForkdError
from forkd.system.host_addresses import bind_host
from forkd.system.listeners import bind_all, bind_listener, probe_listener
from tests.support.clients import datagram_client, dial, echoes
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program, needs_root
from tests.support.network_namespaces import private_network
from tests.support.processes import eventually

LACKING = "does not listen on ::1: Cannot assign requested address"

#: Runs a command with a file of hosts of its own.
_WITH_HOSTS = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"']


@pytest.fixture
def no_ipv6() -> Iterator[None]:
    """A network without IPv6."""
    with private_network():
        Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("0")
        Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        yield


def test_port_that_is_taken_at_another_address_is_chosen_again() -> None:
    tried: list[tuple[Any, ...]] = []

    def bind(family: int, where: tuple[Any, ...]) -> socket.socket:
        tried.append(where)
        if len(tried) in (2, 4):  # another process has the port there
            raise OSError(errno.EADDRINUSE, "in use")
        return socket.create_server(where[:2], family=family)

    def look_up(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, 0, 0, "", (f"127.0.0.{last}", 0)) for last in (1, 2)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", look_up)
        sockets, lacking = bind_host(parse_address("tcp://name:0"), socket.SOCK_STREAM, bind)
    ports = {sock.getsockname()[1] for sock in sockets}
    for sock in sockets:
        sock.close()
    assert (len(tried), len(sockets), len(ports), lacking) == (6, 2, 1, ())
    assert [where[1] for where in tried[::2]] == [0, 0, 0]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name stands for ::1 and 127.0.0.1."""

    def look_up(host: str, port: int, *_: Any, **kind: Any) -> list[tuple[Any, ...]]:
        found = ((socket.AF_INET6, ("::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port)))
        return [(family, kind["type"], 0, "", where) for family, where in found if host != "six" or ":" in where[0]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)


def listener(address: str) -> Listener:
    return Listener(address=parse_address(address), handler="a:b")


@pytest.mark.usefixtures("no_ipv6", "both")
@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_name_is_listened_on_where_the_machine_has_it(scheme: str) -> None:
    address = f"{scheme}://both:0"
    (bound,) = bind_all([listener(address)], slots=2)
    assert {sock.getsockname()[0] for sock in bound.sockets} == {"127.0.0.1"}
    assert bound.lacking == probe_listener(listener(address)) == (f"{address}: {LACKING}",)
    bound.resize(3)
    bound.remove()
    with pytest.raises(ForkdError, match="six is no address of this machine"):
        bind_listener(listener(f"{scheme}://six:0"))


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_name_with_one_address_in_use_is_not_listened_on(scheme: str) -> None:
    held = bind_listener(listener(f"{scheme}://[::1]:0"))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(AddressInUse):
        bind_listener(listener(f"{scheme}://both:{held.address.port}"))
    assert os.listdir("/proc/self/fd") == before
    held.remove()


@pytest.mark.usefixtures("both")
def test_name_is_listened_on_without_the_family(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sockets(socket.socket):
        def __init__(self, family: int = -1, *more: Any, **named: Any) -> None:
            if family == socket.AF_INET6:  # a kernel that was started with ipv6.disable=1
                raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
            super().__init__(family, *more, **named)

    monkeypatch.setattr(socket, "socket", Sockets)
    for scheme in ("tcp", "udp"):
        bound = bind_listener(listener(f"{scheme}://both:0"))
        assert [sock.family for sock in bound.sockets] == [socket.AF_INET]
        assert "::1: Address family not supported by protocol" in bound.lacking[0]
        bound.remove()


@pytest.mark.usefixtures("no_ipv6")
def test_daemon_at_localhost_serves_where_ipv6_is_off(harness: Harness, tmp_path: Path) -> None:
    needs_root()
    needs_program("unshare")
    (tmp_path / "hosts").write_text("::1 localhost\n127.0.0.1 localhost\n")
    settings = tmp_path / "tested.yaml"
    text = "name: tested\nlisten:\n- {address: 'tcp://localhost:7007', handler: 'forkd.builtin:Echo'}\n"
    settings.write_text(text)
    daemon = harness.daemon(target=settings, workers=1, listen=())
    daemon.prefix = [*_WITH_HOSTS, str(tmp_path / "hosts")]
    checked = check(daemon)
    assert checked.returncode == 0, checked.stderr
    assert checked.stderr == f"warning: tcp://localhost:7007: {LACKING}\n"
    daemon.run()
    daemon.wait_log(f"WARNING .* tcp://localhost:7007: {LACKING}")
    with dial("tcp://127.0.0.1:7007") as client:
        assert echoes(client)
    settings.write_text(text + "- {address: 'udp://localhost:7008', handler: 'grams:Who'}\n")
    assert daemon.command("reload").returncode == 0
    daemon.wait_log(f"WARNING .* udp://localhost:7008: {LACKING}")
    with dial("tcp://127.0.0.1:7007") as client, datagram_client("udp://127.0.0.1:7008"):
        assert echoes(client)
    daemon.stop()
    eventually(lambda: daemon.process and daemon.process.poll() is not None, what="its end")


LATE = ("192.0.2.7", "[2001:db8::7]")


@pytest.mark.usefixtures("no_ipv6")
def test_address_that_comes_late_is_served_once_it_is_there(harness: Harness) -> None:
    Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("0")
    Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").write_text("0")
    daemon = harness.daemon(workers=2, listen=tuple(f"tcp://{host}:7007" for host in LATE))
    assert "is no address of this machine (freebind: true listens before it comes)" in check(daemon).stderr
    daemon.options += ["--set", "listen.freebind=true"]
    assert check(daemon).returncode == 0
    daemon.run()
    with pytest.raises(OSError, match=r"unreachable|assign requested address"):
        dial(f"tcp://{LATE[0]}:7007")
    for host in LATE:
        add_address(host)
    for host in LATE:
        with dial(f"tcp://{host}:7007") as client:
            assert echoes(client)
    daemon.stop()
    eventually(lambda: daemon.process and daemon.process.poll() is not None, what="its end")


@pytest.mark.usefixtures("no_ipv6")
def test_datagrams_to_an_address_that_comes_late_are_served(harness: Harness) -> None:
    address = f"udp://{LATE[0]}:7008"
    daemon = harness.daemon(target="grams:Who", workers=1, listen=(address,), settings=("listen.freebind=true",)).run()
    assert daemon.command("scale", 3).returncode == 0  # the sockets of the others are bound so too
    assert daemon.command("reload").returncode == 0
    add_address(LATE[0])
    with datagram_client(address) as client:
        client.send(b"?")
        assert client.recv(100)
    daemon.stop()
    eventually(lambda: daemon.process and daemon.process.poll() is not None, what="its end")


def add_address(host: str) -> None:
    """Gives the loopback an address."""
    length = "128" if ":" in host else "32"
    subprocess.run(["ip", "address", "add", f"{host.strip('[]')}/{length}", "dev", "lo"], check=True, timeout=10)


def check(daemon: Daemon) -> subprocess.CompletedProcess[str]:
    command = [*daemon.prefix, sys.executable, "-m", "forkd", "check", *daemon.target, *daemon.identity]
    options = [option for option in daemon.options if "workers" not in str(option)]
    return subprocess.run([str(one) for one in (*command, *options)], capture_output=True, text=True, check=False)
