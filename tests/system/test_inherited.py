"""Inherited sockets: what systemd says of them is read once and taken out of the environment, each is found by its
address and taken once, and what can't be served is told with what there is.

Each test runs in a fresh interpreter, since what a process was started with is the process's own.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.values import UNIX, parse_network
from forkd.errors import ForkdError
from forkd.system.inherited import check_inherited
from tests.support.clients import dial
from tests.support.daemon import Harness, forkd

# Runs what the test says with sockets at 3, 4, … and the variables that systemd would set for them.
_START = """\
import os, sys
numbers, names, pid, program = sys.argv[1].split(), sys.argv[2], sys.argv[3], sys.argv[4]
kept = [os.dup(int(number)) for number in numbers]
kept = [os.dup2(one, 60 + place) for place, one in enumerate(kept)]
for place, one in enumerate(kept):
    os.dup2(one, 3 + place)
os.closerange(3 + len(kept), 100)
if pid != "none":
    os.environ["LISTEN_PID"] = str(os.getpid()) if pid == "mine" else pid
    os.environ["LISTEN_FDS"] = str(len(kept))
if names:
    os.environ["LISTEN_FDNAMES"] = names
os.execv(sys.executable, [sys.executable, "-c", program])
"""

_TAKE = """\
import os, socket, sys
from forkd.config.address import parse_address
from forkd.errors import ForkdError
from forkd.system.inherited import address_of, is_listening, systemd_sockets, take_inherited
def take(text):
    try:
        return take_inherited(parse_address(text))
    except ForkdError as error:
        print(error)
        return []
"""


def started_with(
    sockets: Sequence[socket.socket],
    program: str,
    *,
    names: str = "",
    pid: str = "mine",
    stdin: int = subprocess.DEVNULL,
) -> list[str]:
    """The lines that a program prints which was started with these sockets."""
    numbers = [sock.fileno() for sock in sockets]
    result = subprocess.run(
        [sys.executable, "-c", _START, " ".join(map(str, numbers)), names, pid, _TAKE + program],
        pass_fds=numbers,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=stdin,
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.splitlines()


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    """Three listening sockets: two of tcp and an abstract one."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        found.append(stack.enter_context(socket.socket(socket.AF_UNIX)))
        found[-1].bind(f"\0forkd-test-{os.getpid()}")
        found[-1].listen()
        yield found


def address(sock: socket.socket) -> str:
    name = sock.getsockname()
    return f"unix:@{name[1:].decode()}" if isinstance(name, bytes) else f"tcp://{name[0]}:{name[1]}"


def test_the_first_one_is_taken_by_no_name(sockets: list[socket.socket]) -> None:
    program = (
        "for one in take('fd:'): print(one.number, one.sock.fileno(), address_of(one.sock), is_listening(one.sock))"
    )
    assert started_with(sockets, program) == [f"3 3 {address(sockets[0])} True"]


def test_each_is_found_by_its_name_and_all_of_one_name_together(sockets: list[socket.socket]) -> None:
    program = "for name in ('fd:b', 'fd:a'): print(name, *[address_of(one.sock) for one in take(name)])"
    assert started_with(sockets, program, names="a:b:a") == [
        f"fd:b {address(sockets[1])}",
        f"fd:a {address(sockets[0])} {address(sockets[2])}",
    ]


def test_sockets_without_names_are_unknown_as_systemd_has_it(sockets: list[socket.socket]) -> None:
    assert started_with(sockets, "print(systemd_sockets())") == ["{3: 'unknown', 4: 'unknown', 5: 'unknown'}"]


def test_programs_started_later_inherit_no_sockets_nor_variables(sockets: list[socket.socket]) -> None:
    program = """
systemd_sockets()
print([os.get_inheritable(number) for number in (3, 4, 5)], [name for name in os.environ if name.startswith("LISTEN")])
(one,) = take("fd:4")
print(one.sock.getblocking(), one.sock.get_inheritable())
"""
    assert started_with(sockets, program, names="a:b:c") == ["[False, False, False] []", "False False"]


@pytest.mark.parametrize("pid", ["1", "none"])
def test_variables_for_another_process_are_left_alone(sockets: list[socket.socket], pid: str) -> None:
    program = "take('fd:'); take('fd:web'); print([name for name in os.environ if name.startswith('LISTEN')])"
    first, second, variables = started_with(sockets, program, names="web:api:x", pid=pid)
    assert first.startswith("fd:: systemd handed over no sockets (LISTEN_FDS and LISTEN_PID of this process")
    assert second.startswith("fd:web: systemd handed over no sockets")
    assert variables == "[]"


def test_forked_daemon_finds_the_sockets_of_its_starter(sockets: list[socket.socket]) -> None:
    program = """
child = os.fork()
if child == 0:
    print(len(take("fd:")), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""
    assert started_with(sockets, program) == ["1"]


def test_a_number_means_any_socket_that_is_open(sockets: list[socket.socket]) -> None:
    program = "for one in take('fd:4'): print(address_of(one.sock))"
    assert started_with(sockets, program, pid="none") == [address(sockets[1])]


def test_a_name_that_is_not_there_is_told_with_those_that_are(sockets: list[socket.socket]) -> None:
    assert started_with(sockets, "take('fd:web')", names="api:admin:api") == [
        "fd:web: systemd handed over no socket of that name; there are api, admin"
    ]


def test_missing_descriptor_is_told_with_the_sockets_there_are(sockets: list[socket.socket]) -> None:
    assert started_with(sockets[:2], "systemd_sockets(); take('fd:7')", names="api:admin") == [
        "fd:7: there is no descriptor 7 here; there are sockets at 3 (api), 4 (admin)"
    ]
    assert started_with([], "take('fd:7')", pid="none") == ["fd:7: there is no descriptor 7 here"]


def test_a_socket_is_taken_once(sockets: list[socket.socket]) -> None:
    program = "kept = take('fd:'); take('fd:3')"
    assert started_with(sockets, program) == ["fd:3: descriptor 3 is another listener's already"]


def test_descriptor_that_can_not_be_served_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open(tmp_path / "file", "rb") as file:
        assert started_with([], "take('fd:0')", pid="none", stdin=file.fileno()) == [
            "fd:0: descriptor 0 is a file, not a socket"
        ]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        assert started_with([sock], "take('fd:')") == [
            "fd:: descriptor 3 is a socket of AF_UNIX SOCK_SEQPACKET; "
            "forkd serves AF_INET, AF_INET6 and AF_UNIX, SOCK_STREAM and SOCK_DGRAM"
        ]


def test_a_number_of_sockets_that_is_none_is_told() -> None:
    program = "os.environ['LISTEN_FDS'] = 'x'; take('fd:')"
    assert started_with([], program) == ["LISTEN_FDS is 'x', not a number of sockets, in the environment"]


def test_standard_descriptors_of_the_socket_lead_to_null(sockets: list[socket.socket]) -> None:
    program = """
(one,) = take("fd:0")
print(one.number, one.sock.fileno() > 2, sorted(one.standard), os.readlink("/proc/self/fd/0"))
"""
    assert started_with([], program, pid="none", stdin=sockets[0].fileno()) == ["0 True [0] /dev/null"]
    program = "(one,) = take('fd:'); print(one.number, sorted(one.standard))"
    assert started_with(sockets, program, stdin=sockets[0].fileno()) == ["3 [0]"]


def test_a_daemon_serves_a_listener_that_it_inherits(harness: Harness) -> None:
    """`forkd run` with a socket that this process has bound, under its number and as it really listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        daemon = harness.daemon(listen=(f"fd:{sock.fileno()}",))
        daemon.run(pass_fds=(sock.fileno(),))
        assert daemon.address == address(sock)
        assert harness.connect(daemon).getpeername() == sock.getsockname()
        daemon.stop()
        dial(address(sock)).close()  # it is ours, and listens on


@pytest.mark.parametrize(
    ("family", "kind", "setting", "said"),
    [
        (
            socket.AF_INET,
            socket.SOCK_STREAM,
            "proxy_protocol=[unix]",
            "proxy_protocol unix is for a unix socket, and tcp:",
        ),
        (socket.AF_UNIX, socket.SOCK_STREAM, "proxy_protocol=[127.0.0.1]", "proxy_protocol names networks, and what"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, "proxy_protocol=[unix]", "proxy_protocol is of connections and of udp://"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "allow=[127.0.0.1]", "allow means the addresses that clients come from"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "limits.per_ip=1", "limits.per_ip means the addresses that clients come"),
    ],
)
def test_settings_that_can_not_hold_at_an_inherited_socket_are_told(
    harness: Harness, family: int, kind: int, setting: str, said: str
) -> None:
    with socket.socket(family, kind) as sock:
        sock.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(harness.directory / "sock"))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        where = (f"--run-directory={harness.directory}", f"--listen=fd:{sock.fileno()}", f"--set=listen.{setting}")
        result = forkd("run", *where, cwd=harness.directory, pass_fds=[sock.fileno()])
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr.splitlines()[-1].startswith(f"forkd: fd:{sock.fileno()}: {said}")


def test_settings_may_hold_at_some_of_the_sockets_of_one_name(harness: Harness) -> None:
    path = harness.directory / "sock"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(path))
        unix.listen()
        like = Listener(address=parse_address("fd:web"), handler="a:b", allow=(parse_network("127.0.0.1"),))
        check_inherited(like, [unix, tcp])
        mixed = replace(like, allow=(), proxy_protocol=(UNIX, parse_network("127.0.0.1")))
        check_inherited(mixed, [unix, tcp])
        with pytest.raises(ForkdError, match=r"fd:web: allow means .*sock has none"):
            check_inherited(like, [unix])


def test_a_daemon_refuses_a_connection_for_a_listener(harness: Harness) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "forkd", "run", *harness.daemon().identity, "--listen", "fd:0"]
        result = subprocess.run(
            list(map(str, command)), stdin=theirs.fileno(), capture_output=True, text=True, timeout=60, check=False
        )
    assert result.returncode == 1
    assert result.stderr.startswith("forkd: fd:0: does not listen, so it is a connection; a listening socket is wanted")
