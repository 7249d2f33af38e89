"""Single-connection mode with what it inherits: an inetd's connection, one of systemd's, or a listener."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import at_end, dial, echoes, read, unshared_port
from tests.support.once_process import OnceProcess
from tests.support.processes import DEADLINE, descendants, eventually

Make = Callable[..., OnceProcess]


@contextlib.contextmanager
def accepted() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A client, and the connection that an inetd would hand over."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()[:2]) as client:
        client.settimeout(DEADLINE)
        connection, _ = server.accept()
        with connection:
            yield client, connection


def inetd(one: OnceProcess, connection: socket.socket, *, quiet: bool = False) -> None:
    """Starts it as an inetd does, with the connection at 0, 1 and 2; or at 0 alone."""
    more = {} if quiet else {"stdout": connection, "stderr": connection}
    one.open(stdin=connection, **more)
    connection.close()


@pytest.mark.parametrize("handler", [None, "forms:as_streams"])
def test_an_inetds_connection_is_served_by_the_process_itself(
    single: Make, tmp_path: Path, handler: str | None
) -> None:
    one = single(handler, "--log", tmp_path / "once.log", listen="fd:0")
    with accepted() as (client, connection):
        inetd(one, connection)
        if handler:
            assert read(client, 8) == b"streams\n"
        assert echoes(client)
        client.shutdown(socket.SHUT_WR)
        assert at_end(client)
    assert one.status() == 0


def test_client_of_an_inetd_gets_only_what_the_handler_sends(
    single: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line, prints, the log: standard output and error lead to the client, and would be sent to it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    one = single("verdicts:prints", "--log", tmp_path / "once.log", listen="fd:0")
    with accepted() as (client, connection):
        inetd(one, connection)
        client.sendall(b"x\n")
        assert read(client, 100) == b"done\n"
    assert one.status() == 0


def test_an_inetds_client_gets_no_error_but_the_log_does(single: Make, tmp_path: Path) -> None:
    one = single("nowhere:Handler", "--log", tmp_path / "once.log", listen="fd:0")
    one.expect("ERROR .* nowhere:Handler: there is no module 'nowhere'")
    with accepted() as (client, connection):
        inetd(one, connection)
        assert at_end(client)
    assert one.status() == 1


def test_an_inetds_status_is_the_verdict(single: Make) -> None:
    one = single("verdicts:InDataReceived", listen="fd:0").expect("ValueError: in data_received")
    with accepted() as (client, connection):
        inetd(one, connection, quiet=True)
        client.sendall(b"x")
        assert at_end(client)
    assert one.status() == 1


def test_a_socketpair_does_as_well(single: Make) -> None:
    one = single(listen="fd:0")
    ours, theirs = socket.socketpair()
    with ours:
        ours.settimeout(DEADLINE)
        inetd(one, theirs, quiet=True)
        assert echoes(ours)
    assert one.status() == 0


@pytest.mark.parametrize(("option", "number"), [(["--adopt"], 0), (["--fd", "0"], 0), (["--fd", "9"], 9)])
def test_an_inetds_connection_gets_the_descriptor_that_is_wanted(single: Make, option: list[str], number: int) -> None:
    one = single("verdicts:Where", *option, listen="fd:0")
    with accepted() as (client, connection):
        inetd(one, connection, quiet=True)
        assert client.makefile().readline().split()[:2] == [str(number), "True"]
    assert one.status() == 0


def test_client_of_other_networks_is_refused_under_an_inetd(single: Make) -> None:
    one = single(None, "--from", "10.0.0.0/8", listen="fd:0").expect("forkd: refused client 127.0.0.1: it is not in")
    with accepted() as (client, connection):
        inetd(one, connection, quiet=True)
        assert at_end(client)
    assert one.status() == 1


NO_HEADER = "fd:0: proxy_protocol: a header is read from connections that this process accepts, and this socket does"


def test_header_of_a_proxy_is_not_read_under_an_inetd(single: Make) -> None:
    one = single(None, "--set=listen.proxy_protocol=[127.0.0.1]", listen="fd:0").expect(f"forkd: {NO_HEADER}")
    with accepted() as (client, connection):
        inetd(one, connection, quiet=True)
        assert at_end(client)
    assert one.status() == 1


def test_header_of_a_proxy_is_not_read_from_inherited_datagrams(single: Make) -> None:
    one = single("grams:Who", "--set=listen.proxy_protocol=[127.0.0.1]", listen="fd:0").expect(f"forkd: {NO_HEADER}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        one.open(stdin=sock)
    assert one.status() == 1


def test_a_listener_is_accepted_from_once(single: Make) -> None:
    one = single(None, listen="fd:0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        one.foreground(stdin=server)
        assert one.address == f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with dial(one.address) as client:
            assert echoes(client)
        assert one.status() == 0
        dial(one.address).close()  # it is ours, and listens on


def test_an_inherited_unix_listener_keeps_its_path(single: Make, tmp_path: Path) -> None:
    one = single(None, listen="fd:0")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        one.foreground(stdin=server)
        with dial(f"unix:{tmp_path}/s") as client:
            assert echoes(client)
        assert one.status() == 0
        assert (tmp_path / "s").exists()
    one.address = ""


def test_descriptor_that_is_no_socket_is_told(single: Make) -> None:
    one = single(None, listen="fd:0").expect("forkd: fd:0: descriptor 0 is a terminal or another device, not a socket")
    one.open()
    assert one.status() == 1


# systemd


@contextlib.contextmanager
def activated(one: OnceProcess, *options: str) -> Iterator[str]:
    """`systemd-socket-activate` with this command behind a port of this machine; yields the address."""
    port = unshared_port()
    command = [sys.executable, "-m", "forkd", *map(str, one.arguments), "--log", str(one.log)]
    environment = [f"--setenv={name}" for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ]
    process = subprocess.Popen(
        ["systemd-socket-activate", *options, *environment, f"--listen=127.0.0.1:{port}", *command],
        cwd=one.harness.directory,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    with process:
        try:
            eventually(lambda: listens(port), what="systemd-socket-activate")
            yield f"tcp://127.0.0.1:{port}"
        finally:
            process.terminate()


def listens(port: int) -> bool:
    """Whether a socket listens there, asked of the kernel: a connection would be one client too many."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(fields[1].endswith(f":{port:04X}") and fields[3] == "0A" for fields in lines)


@pytest.mark.parametrize("address", ["fd:", "fd:connection", "fd:3"])
def test_a_connection_of_systemds_is_served(single: Make, address: str) -> None:
    """As with `Accept=yes` in a socket unit."""
    one = single(None, listen=address)
    with activated(one, "--accept", "--fdname=connection") as where:
        for _ in range(2):  # a process for each
            with dial(where) as client:
                assert echoes(client)
        eventually(lambda: len(descendants(os.getpid())) <= 1, what="the end of both")
    assert one.text().count("serving client 127.0.0.1:") == 2


def test_a_listener_of_systemds_is_accepted_from_once(single: Make) -> None:
    """As with `Accept=no`: the first client's attempt starts it, and it is the client."""
    one = single(None, listen="fd:web")
    with activated(one, "--fdname=web") as where, dial(where) as client:
        assert echoes(client)
    assert "serving client 127.0.0.1:" in one.text()


def test_name_unknown_to_systemd_is_told_with_the_known_names(single: Make, tmp_path: Path) -> None:
    program = f"""
import os, sys
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="2", LISTEN_FDNAMES="api:admin")
os.execv(sys.executable, [sys.executable, "-m", "forkd", "once", "--listen", "fd:web", "--log", "{tmp_path}/once.log"])
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1
    assert result.stderr == "forkd: fd:web: systemd handed over no socket of that name; there are api, admin\n"
