"""A listener's limits in one worker: the reserved slot, several sockets of one listener, and ends of every kind."""

from __future__ import annotations

import asyncio
import logging
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import ConnectionLimits, Listener
from forkd.serve.accept import access
from forkd.serve.accept.acceptor import Serve
from forkd.serve.accept.access import Refusals
from forkd.serve.accept.balance import Waiting
from forkd.serve.accept.limits import ConnectionLimiter, LimitedAcceptor
from forkd.system.listeners import BoundListener
from forkd.system.scoreboard import NOT_ACCEPTING, Field
from forkd.system.shared_counters import SharedCounters
from tests.support.accept_fixture import AcceptFixture, accept_fixtures
from tests.support.processes import DEADLINE

accept = accept_fixtures


class Limited:
    """A worker's listener with limits, of so many sockets."""

    def __init__(
        self, accept: AcceptFixture, sockets: int = 1, serve: Serve | None = None, threads: int = 0, **limits: Any
    ) -> None:
        regions, row = accept.board.regions, accept.row.index
        regions.map_writable(row)
        self.counters = SharedCounters(accept.board, row)
        address = parse_address("tcp://127.0.0.1:1")
        listener = Listener(address=address, handler="a:b", limits=ConnectionLimits(**limits))
        self.sockets = [accept.listen(socket.socket)[0] for _ in range(sockets)]
        self.bound = BoundListener(listener, address, self.sockets)
        self.limiter = ConnectionLimiter(
            self.bound, self.counters, SimpleNamespace(threads=threads, lingering=0) if threads else None
        )
        self.refusals = Refusals(accept.loop, str(address), limits.get("message"), accept.row, self.counters)
        self.acceptors = [
            LimitedAcceptor(accept.loop, sock, serve or accept.server, accept.balance, self.limiter, self.refusals)
            for sock in self.sockets
        ]

    @property
    def slots(self) -> int:
        """Those that are used or reserved, of all workers."""
        return self.limiter.slots_taken


def test_a_slot_is_reserved_before_a_client_comes(accept: AcceptFixture) -> None:
    limited = Limited(accept, connections=2)
    accept.balance.start(limited.acceptors)
    assert limited.slots == 1
    clients = [accept.client(limited.sockets[0]) for _ in range(3)]
    assert [accept.hear(client) for client in clients[:2]] == [b"hello"] * 2
    assert (limited.slots, limited.acceptors[0].queued, accept.row[Field.LOAD]) == (2, False, NOT_ACCEPTING)
    clients[0].close()
    assert accept.hear(clients[2]) == b"hello"
    for client in clients[1:]:
        client.shutdown(socket.SHUT_WR)
        assert accept.hear(client) == b""
    accept.balance.stop()
    assert limited.slots == 0


def test_sockets_of_one_listener_share_the_reserved_slot(accept: AcceptFixture) -> None:
    limited = Limited(accept, sockets=2, connections=1)
    accept.balance.start(limited.acceptors)
    assert (limited.slots, [one.queued for one in limited.acceptors]) == (1, [True, True])
    first, second = (accept.client(one) for one in reversed(limited.sockets))
    assert accept.hear(first) == b"hello"
    assert [one.queued for one in limited.acceptors] == [False, False]
    first.close()
    assert accept.hear(second) == b"hello"


def test_worker_ahead_reserves_no_slot(accept: AcceptFixture) -> None:
    limited = Limited(accept, connections=100)
    accept.balance.start([accept.acceptor, *limited.acceptors])
    accept.other[Field.LOAD] = 0
    accept.clients(7)
    assert not accept.acceptor.queued
    assert limited.slots == 0


def test_a_slot_that_another_worker_releases_is_found(accept: AcceptFixture) -> None:
    limited = Limited(accept, connections=1)
    elsewhere = accept.other.index
    accept.board.regions.map_writable(elsewhere)
    other = ConnectionLimiter(limited.bound, SharedCounters(accept.board, elsewhere))
    assert other.reserve()
    accept.balance.start([accept.acceptor, *limited.acceptors])
    waiting = accept.client(limited.sockets[0])
    accept.turn(accept.clients(1)[0])
    assert not limited.acceptors[0].queued
    other.release_reserved()
    assert accept.hear(waiting) == b"hello"  # by the timer: none of its own connections has ended


@pytest.mark.parametrize(("over", "taken"), [("wait", 2), ("refuse", 4)])
def test_stop_of_an_orphaned_worker_leaves_clients_without_a_slot_to_others(
    accept: AcceptFixture, over: str, taken: int
) -> None:
    limited = Limited(accept, connections=2, over=over)
    of_another = accept.stack.enter_context(limited.sockets[0].dup())
    accept.balance.start(limited.acceptors)
    clients = [accept.client(limited.sockets[0]) for _ in range(4)]
    accept.balance.stop(Waiting.ALL)
    assert [accept.hear(client) for client in clients[:taken]] == [b"hello", b"hello", b"", b""][:taken]
    for _ in range(4 - taken):
        of_another.accept()[0].close()
    with pytest.raises(BlockingIOError):
        of_another.accept()
    assert limited.slots == 2


def test_stop_takes_a_last_client_if_there_is_a_slot(accept: AcceptFixture) -> None:
    limited = Limited(accept, sockets=2, connections=1)
    accept.balance.start(limited.acceptors)
    clients = [accept.client(one) for one in limited.sockets]
    accept.balance.stop()
    assert (limited.slots, accept.stats.active) == (1, 1)
    assert accept.hear(clients[0]) == b"hello"


def failing_factory() -> Any:
    raise RuntimeError("no protocol")


def test_a_slot_is_free_again_when_the_handler_cannot_begin(
    accept: AcceptFixture, caplog: pytest.LogCaptureFixture
) -> None:
    server = accept.serve_by(failing_factory)
    limited = Limited(accept, serve=server, connections=1, per_ip=1)
    accept.balance.start(limited.acceptors)
    for _ in range(3):
        assert accept.hear(accept.client(limited.sockets[0])) == b""
    assert caplog.text.count("The protocol factory failed") == 3
    assert limited.slots == 1


def test_a_client_refused_for_its_address_takes_no_slot(accept: AcceptFixture) -> None:
    limited = Limited(accept, connections=2, per_ip=1)
    accept.balance.start(limited.acceptors)
    clients = [accept.client(limited.sockets[0]) for _ in range(3)]
    assert [accept.hear(client) for client in clients] == [b"hello", b"", b""]
    assert (limited.slots, accept.row[Field.REFUSED_PER_IP], accept.stats.accepted) == (2, 2, 1)


def test_refusals_are_one_line_a_minute_with_how_many_there_were(
    accept: AcceptFixture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    limited = Limited(accept, connections=1, over="refuse")
    accept.balance.start(limited.acceptors)
    clients = [accept.client(limited.sockets[0]) for _ in range(5)]
    assert [accept.hear(client) for client in clients] == [b"hello", b"", b"", b"", b""]
    assert [record.getMessage() for record in caplog.records] == ["tcp://127.0.0.1:1: refused 127.0.0.1 (full)"]
    # Where the table of all workers is full, this one still says it no more than once a minute.
    monkeypatch.setattr(limited.counters.rates, "claim", lambda key, limit, seconds: True)
    assert accept.hear(accept.client(limited.sockets[0])) == b""
    assert len(caplog.records) == 1
    limited.refusals._quiet_until.clear()  # a minute later
    assert accept.hear(accept.client(limited.sockets[0])) == b""
    assert caplog.records[-1].getMessage().endswith("(full); 5 since this worker last said so")


def test_refused_clients_that_linger_are_limited(accept: AcceptFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "LINGER", 60.0)
    limited = Limited(accept, connections=1, over="refuse", message="sorry")
    accept.balance.start(limited.acceptors)
    first = accept.client(limited.sockets[0])
    assert accept.hear(first) == b"hello"
    clients = []
    for _ in range(70):
        clients.append(accept.client(limited.sockets[0]))
        assert accept.hear(clients[-1]) == b"sorry"
        assert accept.hear(clients[-1]) == b""
    assert limited.refusals.lingering == 64
    clients[0].sendall(b"x" * 65_536)  # all that one may say
    for client in clients[1:]:
        client.close()
    for _ in range(5):
        accept.turn(first)
    assert limited.refusals.lingering == 0
    assert accept.row[Field.REFUSED_FULL] == 70


def test_a_refused_client_lingers_for_a_limited_time(accept: AcceptFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "LINGER", 0.05)
    limited = Limited(accept, connections=1, over="refuse", message="sorry")
    accept.balance.start(limited.acceptors)
    first, second = (accept.client(limited.sockets[0]) for _ in range(2))
    assert [accept.hear(first), accept.hear(second)] == [b"hello", b"sorry"]
    assert limited.refusals.lingering == 1

    async def none_lingers() -> None:
        while limited.refusals.lingering:
            await asyncio.sleep(0)

    accept.loop.run_until_complete(asyncio.wait_for(none_lingers(), DEADLINE))


def test_worker_with_all_threads_busy_waits_though_others_refuse(accept: AcceptFixture) -> None:
    limited = Limited(accept, connections=5, over="refuse", threads=1)
    accept.balance.start(limited.acceptors)
    first, second = (accept.client(limited.sockets[0]) for _ in range(2))
    assert accept.hear(first) == b"hello"
    assert (limited.acceptors[0].queued, accept.row[Field.LOAD]) == (False, NOT_ACCEPTING)
    first.close()
    assert accept.hear(second) == b"hello"
    assert accept.row[Field.REFUSED_FULL] == 0
