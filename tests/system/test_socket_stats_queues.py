"""The accept queue: what the status tells of it, against clients that wait in it and clients that find it full."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from forkd.system.socket_stats import AcceptQueue, accept_queue_of
from tests.support.clients import echoes, endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually

BACKLOG = 3


@contextmanager
def stopped(daemon: Daemon) -> Iterator[None]:
    """A context within which the daemon accepts no client."""
    pids = [*daemon.workers().values()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def queue(daemon: Daemon, number: int = 0) -> dict[str, Any]:
    one = daemon.status()["listeners"][number]
    return {key: one[key] for key in ("queue", "queue_limit", "drops")}


def knock(harness: Harness, address: str) -> socket.socket:
    """A client that does not wait for its connection."""
    family, where = endpoint(address)
    sock = harness.closing(socket.socket(family))
    sock.setblocking(False)
    with suppress(BlockingIOError):
        sock.connect(where)
    return sock


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0"])
def test_a_queue_that_runs_over_is_told_of(harness: Harness, address: str) -> None:
    daemon = harness.daemon(listen=(address,), settings=(f"listen.backlog={BACKLOG}",)).start()
    assert queue(daemon) == {"queue": 0, "queue_limit": BACKLOG, "drops": 0}
    with stopped(daemon):
        first = harness.connect(daemon)
        assert queue(daemon) == {"queue": 1, "queue_limit": BACKLOG, "drops": 0}
        clients = [first, *(knock(harness, daemon.address) for _ in range(2 * BACKLOG))]
        # One more than the limit is let in (`sk_acceptq_is_full`).
        eventually(lambda: queue(daemon)["queue"] == BACKLOG + 1, what="a full queue")
        drops = eventually(lambda: queue(daemon)["drops"], what="drops")
        assert drops >= len(clients) - BACKLOG - 1
        text = daemon.command("status").stdout
        assert re.search(
            rf"^LISTENER +HANDLER +CLIENTS +QUEUE +DROPS +RESETS\n{re.escape(daemon.address)} .* 4/3 +\d+ +\d+$",
            text,
            re.M,
        )
    for client in clients:  # the kernel tries again for those that found it full
        client.settimeout(20)
    assert all(echoes(client) for client in clients[: BACKLOG + 1])
    eventually(lambda: queue(daemon)["queue"] == 0, what="an empty queue")
    assert queue(daemon)["drops"] >= drops


def test_a_unix_listeners_queue_is_told_of(harness: Harness) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"unix:{directory}/socket"
        daemon = harness.daemon(listen=("tcp://127.0.0.1:0", path), settings=("listen.backlog=5",)).start()
        with stopped(daemon):
            clients = [harness.connect(path) for _ in range(2)]
            assert queue(daemon, 1) == {"queue": 2, "queue_limit": 5, "drops": None}
            assert re.search(rf"^{path} .* 2/5 +- +-$", daemon.command("status").stdout, re.MULTILINE)
            assert queue(daemon)["queue"] == 0
        assert all(echoes(client) for client in clients)
        daemon.stop()


def test_socket_that_does_not_listen_has_no_queue() -> None:
    with socket.socket() as sock, socket.socket(socket.AF_UNIX) as local:
        assert accept_queue_of(sock) == AcceptQueue(None, None, None)
    for closed in (sock, local):  # as those of a daemon that stops
        assert accept_queue_of(closed) == AcceptQueue(None, None, None)
