"""No datagram that lies in a queue is lost when the worker that is to read it is killed.

What a killed worker may lose is the one datagram that it had taken out of the kernel and not answered yet: it reads one
at a time. So over a run no more are missing than workers were killed. The clients count, by numbers of their own.
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.clients import datagram_client
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE

#: Datagrams of one client that are under way at a time. All of them together fit into one socket's queue.
WINDOW = 8
CLIENTS = 16


class Client:
    """Sends numbers, and notes which came back."""

    def __init__(self, address: str) -> None:
        self.sock = datagram_client(address)
        self.sock.setblocking(False)
        self.sent = 0
        self.missing: set[int] = set()
        self.twice = 0

    def fill(self) -> None:
        """Sends as much as may be under way."""
        while len(self.missing) < WINDOW:
            self.sock.send(b"%d" % self.sent)
            self.missing.add(self.sent)
            self.sent += 1

    def read(self) -> None:
        """Notes an answer."""
        number = int(self.sock.recv(100))
        self.twice += number not in self.missing
        self.missing.discard(number)


def exchange(clients: list[Client], until: float) -> Iterator[None]:
    """Keeps the clients talking; comes back every 10 ms."""
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.sock, selectors.EVENT_READ, client)
        while time.monotonic() < until:
            for client in clients:
                client.fill()
            for key, _ in selector.select(0.01):
                key.data.read()
            yield


def finish(clients: list[Client], allowed: int) -> int:
    """Waits for what is under way; how many are missing when no more than may be, or none for as long as patience."""
    deadline = time.monotonic() + DEADLINE
    with selectors.DefaultSelector() as selector:
        for client in clients:
            selector.register(client.sock, selectors.EVENT_READ, client)
        quiet = time.monotonic()
        while time.monotonic() < deadline:
            missing = sum(len(client.missing) for client in clients)
            if missing == 0 or (missing <= allowed and time.monotonic() > quiet + 1):
                break
            for key, _ in selector.select(0.1):
                key.data.read()
                quiet = time.monotonic()
    return sum(len(client.missing) for client in clients)


def run(daemon: Daemon, seconds: float) -> None:
    address = daemon.address
    clients = [Client(address) for _ in range(CLIENTS)]
    began, killed, at = time.monotonic(), list[int](), 0.0
    try:
        for _ in exchange(clients, began + seconds):
            if time.monotonic() - began < at + 0.1:
                continue
            at = time.monotonic() - began
            serving = [pid for pid in daemon.workers().values() if pid not in killed]
            if serving:
                os.kill(serving[len(killed) % len(serving)], signal.SIGKILL)
                killed.append(serving[len(killed) % len(serving)])
        daemon.wait_workers(2, without=killed)
        missing = finish(clients, len(killed))
        dropped = sum(one["drops"] for one in daemon.status()["listeners"])
        sent = sum(client.sent for client in clients)
        assert (dropped, sum(client.twice for client in clients)) == (0, 0)
        assert missing <= len(killed), f"{missing} of {sent} are lost, {len(killed)} workers were killed"
        assert len(killed) > seconds  # a kill every 100 ms, but for the time that successors wait (backoff)
        assert sent > 1000 * seconds
    finally:
        for client in clients:
            client.sock.close()


@pytest.mark.parametrize("seconds", [2, pytest.param(10, marks=pytest.mark.soak)])
def test_workers_killed_every_100_ms_lose_no_queued_datagram(harness: Harness, seconds: float) -> None:
    daemon = harness.daemon(listen=("udp://127.0.0.1:0",), workers=2).run()
    daemon.expect("killed by SIGKILL")
    run(daemon, seconds)
