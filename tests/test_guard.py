"""A listener's limits in one worker: the place in hand, several sockets of one listener, and ends of every kind."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import pytest
from desk import Desk, desks

from forkd.config.address import parse_address
from forkd.config.listener import Limits, Listener
from forkd.serve import refusal
from forkd.serve.accept import Serve
from forkd.serve.guard import GuardedAcceptor, guarded
from forkd.serve.handlers.protocol import ProtocolServer
from forkd.system.bound import BoundListener
from forkd.system.counts import Ledger
from forkd.system.memory import WRITE
from forkd.system.scoreboard import NOBODY, Field

desk = desks


class Limited:
    """A worker's listener with limits, of so many sockets."""

    def __init__(self, desk: Desk, sockets: int = 1, serve: Serve | None = None, **limits: Any) -> None:
        regions, row = desk.board.regions, desk.row.index
        if row not in regions._views:
            regions._views[row] = regions._map(row, WRITE)
        self.ledger = Ledger(desk.board, row)
        address = parse_address("tcp://127.0.0.1:1")
        listener = Listener(address=address, handler="a:b", limits=Limits(**limits))
        self.sockets = [desk.listen(socket.socket)[0] for _ in range(sockets)]
        bound = BoundListener(listener, address, self.sockets)
        self.acceptors: list[GuardedAcceptor] = guarded(
            bound, desk.loop, serve or desk.server, desk.balance, self.ledger, desk.row
        )
        self.guard = self.acceptors[0]._guard

    @property
    def places(self) -> int:
        """Those that are taken or in hand, of all workers."""
        return self.ledger.places.total(self.guard._own)


def test_a_place_is_in_hand_before_anybody_comes_and_none_is_left_when_all_have_gone(desk: Desk) -> None:
    limited = Limited(desk, connections=2)
    desk.balance.start(limited.acceptors)
    assert limited.places == 1
    clients = [desk.client(limited.sockets[0]) for _ in range(3)]
    assert [desk.hear(client) for client in clients[:2]] == [b"hello"] * 2
    assert (limited.places, limited.acceptors[0].queued, desk.row[Field.LOAD]) == (2, False, NOBODY)
    clients[0].close()
    assert desk.hear(clients[2]) == b"hello"
    for client in clients[1:]:
        client.shutdown(socket.SHUT_WR)
        assert desk.hear(client) == b""
    desk.balance.stop()
    assert limited.places == 0


def test_sockets_of_one_listener_share_the_place_in_hand(desk: Desk) -> None:
    limited = Limited(desk, sockets=2, connections=1)
    desk.balance.start(limited.acceptors)
    assert (limited.places, [one.queued for one in limited.acceptors]) == (1, [True, True])
    first, second = (desk.client(one) for one in reversed(limited.sockets))
    assert desk.hear(first) == b"hello"
    assert [one.queued for one in limited.acceptors] == [False, False]
    first.close()
    assert desk.hear(second) == b"hello"


def test_who_is_ahead_has_no_place_in_hand_that_others_could_have(desk: Desk) -> None:
    limited = Limited(desk, connections=100)
    desk.balance.start([desk.acceptor, *limited.acceptors])
    desk.other[Field.LOAD] = 0
    desk.clients(7)
    assert not desk.acceptor.queued
    assert limited.places == 0


def test_a_place_that_another_worker_had_is_found_in_time(desk: Desk) -> None:
    limited = Limited(desk, connections=1)
    elsewhere = desk.other.index
    desk.board.regions._views[elsewhere] = desk.board.regions._map(elsewhere, WRITE)
    others = Ledger(desk.board, elsewhere).places
    assert others.claim(limited.guard._own, 1)
    desk.balance.start([desk.acceptor, *limited.acceptors])
    waiting = desk.client(limited.sockets[0])
    desk.turn(desk.clients(1)[0])
    assert not limited.acceptors[0].queued
    others.release(limited.guard._own)
    assert desk.hear(waiting) == b"hello"  # by the timer: none of its own connections has ended


def test_in_the_last_moment_one_is_taken_if_there_is_a_place(desk: Desk) -> None:
    limited = Limited(desk, sockets=2, connections=1)
    desk.balance.start(limited.acceptors)
    clients = [desk.client(one) for one in limited.sockets]
    desk.balance.stop()
    assert (limited.places, desk.tally.active) == (1, 1)
    assert desk.hear(clients[0]) == b"hello"


def failing_factory() -> Any:
    raise RuntimeError("no protocol")


def test_a_place_is_free_again_when_the_handler_can_not_even_begin(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    server = ProtocolServer(desk.loop, failing_factory, desk.tally, 0)
    limited = Limited(desk, serve=server, connections=1, per_ip=1)
    desk.balance.start(limited.acceptors)
    for _ in range(3):
        assert desk.hear(desk.client(limited.sockets[0])) == b""
    assert caplog.text.count("The protocol factory failed") == 3
    assert limited.places == 1


def test_a_client_refused_for_its_address_takes_nobodys_place(desk: Desk) -> None:
    limited = Limited(desk, connections=2, per_ip=1)
    desk.balance.start(limited.acceptors)
    clients = [desk.client(limited.sockets[0]) for _ in range(3)]
    assert [desk.hear(client) for client in clients] == [b"hello", b"", b""]
    assert (limited.places, desk.row[Field.REFUSED_PER_IP], desk.tally.accepted) == (2, 2, 1)


def test_refusals_are_one_line_a_minute_with_how_many_there_were(
    desk: Desk, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    limited = Limited(desk, connections=1, over="refuse")
    desk.balance.start(limited.acceptors)
    clients = [desk.client(limited.sockets[0]) for _ in range(5)]
    assert [desk.hear(client) for client in clients] == [b"hello", b"", b"", b"", b""]
    assert [record.getMessage() for record in caplog.records] == ["tcp://127.0.0.1:1: refused 127.0.0.1 (full)"]
    monkeypatch.setattr(limited.ledger.rates, "claim", lambda key, limit, seconds: True)
    assert desk.hear(desk.client(limited.sockets[0])) == b""
    assert caplog.records[-1].getMessage().endswith("(full); 4 since this worker last said so")


def test_of_those_that_are_told_something_a_few_are_heard_out_and_no_more(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusal, "PATIENCE", 60.0)
    limited = Limited(desk, connections=1, over="refuse", message="sorry")
    desk.balance.start(limited.acceptors)
    first = desk.client(limited.sockets[0])
    assert desk.hear(first) == b"hello"
    clients = []
    for _ in range(70):
        clients.append(desk.client(limited.sockets[0]))
        assert desk.hear(clients[-1]) == b"sorry"
        assert desk.hear(clients[-1]) == b""
    lingering = limited.acceptors[0]._refusals._lingering
    assert len(lingering) == 64
    clients[0].sendall(b"x" * 65_536)  # all that one may say
    for client in clients[1:]:
        client.close()
    for _ in range(5):
        desk.turn(first)
    assert len(lingering) == 0
    assert desk.row[Field.REFUSED_FULL] == 70


def test_one_that_was_told_its_last_and_stays_is_not_waited_for_for_ever(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusal, "PATIENCE", 0.05)
    limited = Limited(desk, connections=1, over="refuse", message="sorry")
    desk.balance.start(limited.acceptors)
    first, second = (desk.client(limited.sockets[0]) for _ in range(2))
    assert [desk.hear(first), desk.hear(second)] == [b"hello", b"sorry"]
    lingering = limited.acceptors[0]._refusals._lingering
    assert len(lingering) == 1
    desk.loop.run_until_complete(asyncio.sleep(0.2))
    assert len(lingering) == 0
