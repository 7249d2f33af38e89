"""Workers that the system gives no more descriptors: they serve the clients that they have, and go on later.

As it is with real limits (setrlimit(2)), and as it would be with errors that no test can bring about, by strace(1).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic

import pytest

from tests.support.clients import echoes, survives
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program, needs_root
from tests.support.processes import DEADLINE, eventually

TICK = os.sysconf("SC_CLK_TCK")


def cpu_time(pid: int) -> float:
    """Seconds of processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def allow(pid: int, count: int) -> None:
    """Lets a worker have so many descriptors, up to the hard limit that it has."""
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (count, hard))


def start(harness: Harness, workers: int) -> Daemon:
    return harness.daemon(workers=workers).start()


def test_a_worker_without_descriptors_serves_its_clients_on(
    harness: Harness,
) -> None:
    daemon = start(harness, 1)
    daemon.expect("can't accept clients: Too many open files; they wait in the backlog meanwhile")
    worker, address = daemon.workers()[1], daemon.address
    allow(worker, descriptors(worker) + 10)
    clients = [harness.connect(address) for _ in range(10)]
    assert all(echoes(client) for client in clients)
    waiting = [harness.connect(address) for _ in range(5)]
    for client in waiting:
        client.sendall(b"?")
    daemon.wait_log("can't accept clients")
    before, since = cpu_time(worker), monotonic()
    assert select.select(waiting, [], [], 1.5) == ([], [], [])
    spent, passed = cpu_time(worker) - before, monotonic() - since
    assert spent <= 0.05 * passed + 1 / TICK
    assert all(echoes(client) for client in clients)
    clients.pop().close()  # there is one descriptor again, by its own doing
    assert waiting.pop(0).recv(1) == b"?"
    allow(worker, 1000)  # and more by another process's
    assert all(client.recv(1) == b"?" for client in waiting)
    assert len([one for one in daemon.records() if "can't accept" in one]) == 1
    daemon.wait_clients(14)


def test_clients_do_not_wait_for_a_worker_that_takes_none(harness: Harness) -> None:
    daemon = start(harness, 2)
    daemon.expect("can't accept clients: Too many open files")
    first = daemon.workers()[1]
    allow(first, descriptors(first))
    clients = [harness.connect(daemon) for _ in range(40)]
    assert all(echoes(client) for client in clients)
    assert daemon.wait_clients(40)[first] < 5  # there were gaps among its descriptors


@contextmanager
def injected(pid: int, what: str, log: Path) -> Iterator[None]:
    """Has a process's accept4(2) fail."""
    needs_root()
    needs_program("strace")
    command = ["strace", "-p", str(pid), "-o", str(log), "-e", "trace=accept4", "-e", f"inject=accept4:{what}"]
    strace = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: f"TracerPid:\t{strace.pid}\n" in Path(f"/proc/{pid}/status").read_text(), what="the tracing")
        yield
    finally:
        strace.send_signal(signal.SIGINT)
        strace.wait(DEADLINE)


@pytest.mark.parametrize("error", ["ENFILE", "ENOBUFS", "ENOMEM", "ECONNABORTED", "EPROTO"])
def test_what_the_system_or_a_client_lacks_passes(harness: Harness, error: str) -> None:
    daemon = start(harness, 1)
    lacks = error in ("ENFILE", "ENOBUFS", "ENOMEM")
    if lacks:
        daemon.expect("can't accept clients: .*; they wait in the backlog meanwhile")
    worker, log = daemon.workers()[1], harness.directory / "strace"
    staying = harness.connect(daemon)
    assert echoes(staying)
    with injected(worker, f"error={error}:when=1..3", log):
        assert survives(harness.connect(daemon))
        assert echoes(staying)
    assert log.read_text().count(f" {error} ") == 3
    assert len([one for one in daemon.records() if "can't accept" in one]) == int(lacks)
