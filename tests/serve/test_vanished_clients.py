"""Clients that vanish without a word, on a wire of the test's own: they are gone within what the settings say."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from tests.support.clients import is_free, read
from tests.support.daemon import Daemon, Harness
from tests.support.network_namespaces import Host, wired_hosts
from tests.support.processes import eventually


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with wired_hosts() as made:
        yield made


class Talk:
    """Clients of one daemon's listeners, on both hosts."""

    def __init__(self, daemon: Daemon, here: Host, there: Host, stack: contextlib.ExitStack) -> None:
        self.ports = [int(one["address"].rpartition(":")[2]) for one in daemon.status()["listeners"]]
        self.here, self.there, self.stack = here, there, stack
        self.operator = self._introduced(here, "127.0.0.1", self.ports[0], "operator")

    def client(self, name: str, place: int = 0, host: str = "") -> socket.socket:
        """One on the other host."""
        return self._introduced(self.there, host or self.here.address, self.ports[place], name)

    def _introduced(self, where: Host, host: str, port: int, name: str) -> socket.socket:
        sock = self.stack.enter_context(where.connect(host, port))
        return self._say(sock, name)

    def order(self, words: str) -> None:
        self._say(self.operator, words)

    def _say(self, sock: socket.socket, words: str) -> socket.socket:
        sock.sendall(words.encode())
        assert read(sock, 3) == b"ok\n"
        return sock


def moment(record: str) -> float:
    """When a record was logged, as time.time has it."""
    return datetime.fromisoformat(record.split(maxsplit=1)[0].replace("Z", "+00:00")).timestamp()


KEEPALIVE = {"idle": "1s", "interval": "1s", "count": 2, "user_timeout": "off"}
USER_TIMEOUT = {"idle": "off", "user_timeout": "2s"}
BOTH = {"idle": "1s", "interval": "1s", "count": 127, "user_timeout": "2s"}


@pytest.fixture
def talk(hosts: tuple[Host, Host], harness: Harness, tmp_path: Path) -> Iterator[tuple[Daemon, Talk]]:
    here, there = hosts
    bound = ("0.0.0.0", "0.0.0.0", "0.0.0.0", "[::]")
    alive = (KEEPALIVE, USER_TIMEOUT, BOTH, KEEPALIVE)
    listeners = [
        {"address": f"tcp://{address}:0", "handler": "acked:Acked", "keepalive": one}
        for address, one in zip(bound, alive, strict=True)
    ]
    (tmp_path / "vanish.yaml").write_text(json.dumps({"name": "vanish", "workers": 1, "listen": listeners}))
    daemon = harness.daemon("vanish", target="./vanish.yaml", listen=(), workers=None)
    daemon.prefix = here.prefix
    daemon.is_free = lambda address: here.inside(lambda: is_free(address))
    daemon.run()
    with contextlib.ExitStack() as stack:
        yield daemon, Talk(daemon, here, there, stack)


def test_vanished_clients_are_closed_in_the_time_of_settings(talk: tuple[Daemon, Talk]) -> None:
    daemon, clients = talk
    for name, place, host in (
        ("silent", 0, ""), ("unread", 0, ""), ("little", 1, ""), ("much", 1, ""), ("unwilling", 1, ""),
        ("both", 2, ""), ("six", 3, "fd07::1"),
    ):  # fmt: skip
        clients.client(name, place, host)
    clients.order("pause unread")
    clients.order("speak unwilling 20000000")  # it reads nothing, so most of it waits for its window
    daemon.wait_log("unwilling: [0-9]+ bytes are unacknowledged")
    clients.there.cut()
    cut = time.time()
    clients.order("speak little 10")
    clients.order("speak much 20000000")
    took = {
        name: moment(daemon.wait_log(f"{name}: its connection was lost by TimeoutError")) - cut
        for name in ("silent", "unread", "six", "little", "much", "both", "unwilling")
    }
    # Three seconds of silence, or two without an acknowledgement, or with the window shut. The rest: TCP's timers,
    # which are not exact, and a machine that is busy. Without the settings it takes 15 minutes at least.
    assert max(took.values()) < 10, took
    assert min(took[name] for name in ("little", "much")) > 1.9, took
    for name in ("little", "much"):
        daemon.wait_log(f"{name}: [0-9]+ bytes are unacknowledged after 0.5 s")
        daemon.wait_log(f"{name}: lost by ConnectionAbortedError")
    assert len([one for one in daemon.records() if "has vanished: Connection timed out" in one]) == len(took)
    daemon.wait_clients(1)


def test_what_arrives_late_is_acknowledged_late(talk: tuple[Daemon, Talk]) -> None:
    daemon, clients = talk
    client = clients.client("patient", 1)
    clients.order("speak patient 1000")
    daemon.wait_log("patient: has it")
    assert read(client, 1000) == bytes(1000)
    clients.there.cut()
    clients.order("speak patient 2000")
    daemon.wait_log("patient: 2000 bytes are unacknowledged after 0.5 s")
    clients.there.mend()
    assert read(client, 2000) == bytes(2000)
    eventually(lambda: sum("patient: has it" in one for one in daemon.records()) == 2, what="the acknowledgement")
