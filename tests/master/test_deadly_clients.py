"""Clients whose message ends the worker that reads it, again and again: what becomes of the daemon."""

from __future__ import annotations

import time

import pytest

from tests.support.clients import at_end, echoes
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, eventually

DEAD = r"worker 1 \(pid \d+\) has ended: exit status 3"


def deadly(harness: Harness, *settings: str) -> Daemon:
    daemon = harness.daemon(target="trouble:Trouble", workers=1, settings=settings).run()
    daemon.expect(DEAD)
    return daemon


def kill_worker(harness: Harness, address: str) -> None:
    """One deadly client. It waits in the backlog until there is a worker."""
    with harness.connect(address, 60.0) as client:
        assert client.recv(32)  # the worker's pid
        client.sendall(b"die")
        assert at_end(client)


def test_daemon_that_has_served_outlives_deadly_clients(harness: Harness) -> None:
    daemon = deadly(harness)
    address = daemon.address
    for _ in range(3):
        kill_worker(harness, address)
    eventually(lambda: len(daemon.status()["deaths"]) == 3, what="the records of three deaths")
    with harness.connect(address) as client:
        assert client.recv(32)
        assert echoes(client)
    eventually(lambda: daemon.status()["state"] == "running", what="the end of degraded")


def test_daemon_gives_up_after_the_failures_that_are_set(harness: Harness) -> None:
    daemon = deadly(harness, "give_up_after=3")
    address = daemon.address
    for _ in range(3):
        kill_worker(harness, address)
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 1
    why = "no worker serves, and each has failed 3 times in a row (give_up_after)"
    assert why in daemon.terminal.read_text()
    daemon.terminal.write_text("")  # it has been read


@pytest.mark.soak
def test_daemon_outlives_a_minute_of_deadly_clients(harness: Harness) -> None:
    daemon = deadly(harness)
    address, end = daemon.address, time.monotonic() + 74
    while time.monotonic() < end:
        kill_worker(harness, address)
    with harness.connect(address, 60.0) as client:
        assert client.recv(32)
        assert echoes(client)
