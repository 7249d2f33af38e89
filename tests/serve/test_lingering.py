"""What was written before a close reaches a client that still sends: connections linger, for a bounded time.

Each client sends all that it has before it reads, as many programs do.
"""

from __future__ import annotations

import select
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic

import pytest

from tests.handlers.last_word import ANSWER, LONG_ANSWER
from tests.support.clients import dial
from tests.support.daemon import Daemon, Harness
from tests.support.once_process import OnceProcess
from tests.support.processes import DEADLINE, eventually

UPLOAD = bytes(3_000_000)

TARGETS = "last_word:streams", "last_word:Answering"


def listeners(path: Path, linger: str) -> str:
    """A daemon's settings: each form of handlers, by tcp and by a unix socket."""
    text = "name: tested\nworkers: 1\nlisten:\n"
    for number, target in enumerate(TARGETS):
        for address in ("tcp://127.0.0.1:0", f"unix:{path}/s{number}"):
            text += f"- {{address: '{address}', handler: '{target}', socket: {{linger: {linger}}}}}\n"
    return text


def start(harness: Harness, linger: str) -> Daemon:
    (harness.directory / "tested.yaml").write_text(listeners(harness.directory, linger))
    daemon = harness.daemon(target="tested.yaml", workers=None, listen=())
    return daemon.start()


@pytest.fixture
def daemon(harness: Harness) -> Daemon:
    return start(harness, "20s")


def addresses(daemon: Daemon) -> list[str]:
    return [one["address"] for one in daemon.status()["listeners"]]


def upload(address: str, first: bytes = b"x") -> bytes | OSError:
    """All that a client gets which sends 3 MB before it reads; or the error that it gets instead."""
    got = b""
    with dial(address) as sock:
        try:
            sock.sendall(first + UPLOAD)
            while data := sock.recv(1 << 20):
                got += data
        except OSError as error:
            return error
    return got


def test_last_answer_reaches_clients_that_still_send(daemon: Daemon) -> None:
    for address in addresses(daemon):
        with ThreadPoolExecutor(7) as pool:
            answers = [*pool.map(upload, [address] * 7)]
        assert [answer if isinstance(answer, OSError) else len(answer) for answer in answers] == [len(ANSWER)] * 7
        assert upload(address, b"E") == ANSWER
        assert upload(address, b"L") == LONG_ANSWER  # neither side has room for all that the other sends
    daemon.wait_clients(0)


def test_last_answer_reaches_a_client_that_sends_slowly(daemon: Daemon) -> None:
    for address in addresses(daemon):
        with dial(address) as sock:
            sock.sendall(b"0123456789")
            assert select.select([sock], [], [], DEADLINE)[0]
            for _ in range(20):
                sock.sendall(b"more")  # what comes after the answer is no reason for a reset
            got = b""
            while data := sock.recv(1 << 20):
                got += data
            assert got == ANSWER
            assert daemon.wait_clients(1)  # it lingers, and counts
            sock.sendall(b"more")
        daemon.wait_clients(0)


def test_lingering_connection_ends_with_its_time(harness: Harness) -> None:
    daemon = start(harness, "0.2s")
    for address in addresses(daemon):
        with dial(address) as sock:
            sock.sendall(b"0123456789")
            daemon.wait_clients(0)  # although this one stays
    daemon.stop()


def test_abort_and_linger_off_reset_at_once(harness: Harness, daemon: Daemon) -> None:
    for address in addresses(daemon):
        assert isinstance(upload(address, b"A"), ConnectionError)
        daemon.wait_clients(0)
    (harness.directory / "tested.yaml").write_text(listeners(harness.directory, "off"))
    assert daemon.command("reload").returncode == 0
    for address in addresses(daemon):
        with dial(address) as sock:
            sock.sendall(b"0123456789")
            daemon.wait_clients(0)


def test_drain_waits_for_lingering_clients_but_a_quit_does_not(daemon: Daemon) -> None:
    address = addresses(daemon)[0]
    with dial(address) as first, dial(address) as second:
        for sock in (first, second):
            sock.sendall(b"0123456789")
        old = {*daemon.wait_clients(2)}
        assert daemon.command("reload").returncode == 0
        first.close()
        eventually(lambda: {*daemon.workers("draining").values()} == old, what="the drain")
        began = monotonic()
        daemon.stop()
        assert monotonic() - began < 15


@pytest.mark.parametrize("target", TARGETS)
def test_once_lingers_for_its_client(harness: Harness, target: str) -> None:
    once = OnceProcess(harness, target).start()
    assert upload(once.address) == ANSWER
    assert once.status() == 0


def test_client_that_has_sent_its_end_is_not_waited_for(daemon: Daemon) -> None:
    for address in addresses(daemon):
        with dial(address) as sock:
            sock.sendall(b"0123456789")
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 20):
                pass
            daemon.wait_clients(0)
