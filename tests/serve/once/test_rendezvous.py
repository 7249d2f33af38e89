"""The rendezvous: two ends that both connect meet, and each sends what the other gets."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
from collections.abc import Callable
from time import monotonic

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.errors import ForkdError
from forkd.serve.once.rendezvous import Rendezvous
from tests.support.clients import echoes, unshared_port
from tests.support.once_process import OnceProcess
from tests.support.processes import DEADLINE

Make = Callable[..., OnceProcess]


@pytest.fixture
def ports() -> tuple[int, int]:
    """Two ports that are free."""
    first = second = unshared_port()
    while second == first:
        second = unshared_port()
    return first, second


def address(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"


def end(single: Make, ours: int, theirs: int, handler: str | None = None, *more: str) -> OnceProcess:
    """One end, started in the background."""
    made = single(handler, "--rendezvous", address(theirs), *more, listen=address(ours))
    made.log = made.harness.directory / f"{ours}.log"
    return made.start()


@pytest.mark.parametrize("handlers", [("ends:Caller", "ends:Callee"), ("ends:caller", "ends:callee")])
def test_two_ends_meet_and_talk_both_ways(single: Make, ports: tuple[int, int], handlers: tuple[str, str]) -> None:
    here, there = (
        end(single, ours, theirs, handler) for ours, theirs, handler in zip(ports, ports[::-1], handlers, strict=True)
    )
    assert (here.address, there.address) == (address(ports[0]), address(ports[1]))
    assert (here.status(), there.status()) == (0, 0)
    assert "heard b'ping'" in there.text()
    assert "heard b'pong'" in here.text()


def test_end_that_was_there_first_waits_for_the_other(single: Make, ports: tuple[int, int]) -> None:
    first = end(single, *ports)
    assert select.select([], [], [], 0.3) == ([], [], [])  # longer than any short wait between two tries
    with meet(ports[1], ports[0]) as sock:
        assert echoes(sock)
    assert first.status() == 0


def meet(ours: int, theirs: int, seconds: float = DEADLINE) -> socket.socket:
    """Connects from a bound port, again and again until the other end does the same, as any program may."""
    deadline = monotonic() + seconds
    while True:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(DEADLINE)
        sock.bind(("127.0.0.1", ours))
        if sock.connect_ex(("127.0.0.1", theirs)) == 0:
            return sock
        sock.close()
        assert monotonic() < deadline


@pytest.mark.parametrize("program", ["socat", "nc"])
def test_any_program_that_connects_from_the_bound_port_does(single: Make, ports: tuple[int, int], program: str) -> None:
    one = end(single, *ports)
    host = "127.0.0.1"
    command = {
        "socat": ["socat", "-t", "5", "-", f"tcp:{host}:{ports[0]},bind={host}:{ports[1]},reuseaddr"],
        "nc": ["nc", "-N", "-s", host, "-p", str(ports[1]), host, str(ports[0])],
    }
    answer = subprocess.run(command[program], input=b"hello\n", capture_output=True, timeout=30, check=True)
    assert answer.stdout == b"hello\n"
    assert one.status() == 0


def test_a_program_that_was_at_it_before_is_met_too(single: Make, ports: tuple[int, int]) -> None:
    """The other end is refused until this one is there, and hits upon it then."""
    with subprocess.Popen(
        [
            "socat",
            "-t",
            "5",
            "-",
            f"tcp:127.0.0.1:{ports[0]},bind=127.0.0.1:{ports[1]},reuseaddr,retry=500,interval=0.02",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as process:
        one = end(single, *ports)
        answer, _ = process.communicate(b"hello\n", timeout=30)
    assert answer == b"hello\n"
    assert one.status() == 0


def test_short_waits_do_without_the_filter(single: Make, ports: tuple[int, int]) -> None:
    """As on a kernel that has no such thing. The test's end tries without a pause, so that they hit upon each other,
    for which both must run at the same moment: that takes a while where others want the processors too.
    """
    one = single("nofilter:Echo", "--rendezvous", address(ports[1]), listen=address(ports[0])).start()
    with meet(ports[1], ports[0], 4 * DEADLINE) as sock:
        assert echoes(sock)
    assert one.status() == 0


def test_status_is_124_when_the_other_end_is_not_there(single: Make, ports: tuple[int, int]) -> None:
    one = end(single, *ports, None, "--timeout", "100ms")
    assert one.status() == 124
    assert f"no client came within 0.1 s: {address(ports[1])}: no answer" in one.text()


def test_a_port_of_0_is_any_free_one_and_told(single: Make, ports: tuple[int, int]) -> None:
    one = single(None, "--rendezvous", address(ports[1]), listen=address(0))
    result = one.command()
    assert result.stdout.startswith("connecting tcp://127.0.0.1:")
    one.read_line(result.stdout)
    with meet(ports[1], int(one.address.rpartition(":")[2])) as sock:
        assert echoes(sock)
    assert one.status() == 0


def test_a_stop_ends_the_attempt(single: Make, ports: tuple[int, int]) -> None:
    one = end(single, *ports)
    os.kill(one.pid, signal.SIGTERM)
    assert one.status() == 0


def test_the_connection_gets_the_descriptor_that_is_wanted(single: Make, ports: tuple[int, int]) -> None:
    one = end(single, *ports, "verdicts:Where", "--fd", "9")
    with meet(ports[1], ports[0]) as sock:
        assert sock.makefile().readline().split()[:2] == ["9", "True"]
    assert one.status() == 0


def test_a_reset_of_the_other_end_is_heard(single: Make, ports: tuple[int, int]) -> None:
    """The filter is for the refusals before the meeting alone."""
    one = end(single, *ports)
    sock = meet(ports[1], ports[0])
    assert echoes(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    assert one.status() == 0


def test_ipv6_does_as_well(single: Make) -> None:
    port = unshared_port()
    one = single(None, "--rendezvous", f"tcp://[::1]:{port}", listen="tcp://[::1]:0").start()
    with socket.socket(socket.AF_INET6) as sock:
        sock.settimeout(DEADLINE)
        sock.bind(("::1", port))
        sock.connect(("::1", int(one.address.rpartition(":")[2])))
        assert echoes(sock)
    assert one.status() == 0


# What can't be


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ("127.0.0.1:PORT", "localhost:PORT", "is our own address too; a socket would connect to itself"),
        ("0.0.0.0:PORT", "127.0.0.1:PORT", "is our own address too; a socket would connect to itself"),
        ("127.0.0.1:PORT", "0.0.0.0:PORT", "is our own address too; a socket would connect to itself"),
        ("127.0.0.1:PORT", "[::1]:9", "can't meet: one is IPv4, the other IPv6"),
        ("192.0.2.1:PORT", "127.0.0.1:9", "can't connect from tcp://192.0.2.1:"),
        ("127.0.0.1:PORT", "nowhere.invalid:9", "can't look up tcp://nowhere.invalid:9"),
    ],
)
def test_addresses_that_can_not_meet_are_refused(ports: tuple[int, int], ours: str, theirs: str, said: str) -> None:
    one, other = (parse_address(f"tcp://{text.replace('PORT', str(ports[0]))}") for text in (ours, theirs))
    with pytest.raises(ForkdError) as caught:
        Rendezvous(Listener(address=one, handler="forkd.builtin:Echo"), other)
    assert said in str(caught.value)


def test_same_address_for_both_is_told_before_the_start(single: Make, ports: tuple[int, int]) -> None:
    where = address(ports[0])
    result = single(None, "--rendezvous", where, listen=where).command()
    assert result.returncode == 78
    assert f"--rendezvous: once.rendezvous: {where} is our own address too" in result.stderr


def test_the_same_two_ends_can_meet_again_at_once(single: Make, ports: tuple[int, int]) -> None:
    """The kernel keeps the pair of ports back for a while; a fresh socket tries again until it may."""
    for _ in range(2):
        here, there = end(single, *ports, "ends:Caller"), end(single, *ports[::-1], "ends:Callee")
        assert (here.status(), there.status()) == (0, 0)
