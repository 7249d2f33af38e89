"""Accepting in one process: the tally on the scoreboard, one listener's acceptor, and a worker's balance.

The sockets, the poll loop and the protocols are real. What several processes make of it is in `test_accept_processes`,
the end of it in `test_accept_stop`.
"""

from __future__ import annotations

import errno
import os
import socket
from time import monotonic_ns

import pytest
from desk import FAR, Desk, Failing, desks, overtake

from forkd.serve.accept import Acceptor
from forkd.serve.admission import SLACK
from forkd.serve.loop import IN
from forkd.system.scoreboard import NOBODY, Field

desk = desks


def test_a_tally_counts_on_its_row(desk: Desk) -> None:
    tally, row = desk.tally, desk.row
    for _ in range(3):
        tally.opened()
    tally.closed()
    tally.failed()
    assert (tally.accepted, tally.ended, tally.errors, tally.active) == (3, 1, 1, 2)
    assert (row[Field.ACCEPTED], row[Field.CLOSED], row[Field.ERRORS], row.active) == (3, 1, 1, 2)


def test_a_load_is_shown_while_accepting_and_at_no_other_time(desk: Desk) -> None:
    tally, row = desk.tally, desk.row
    tally.opened()
    assert row[Field.LOAD] == NOBODY
    tally.set_accepting(True)
    assert row[Field.LOAD] == 1
    tally.opened()
    assert row[Field.LOAD] == 2
    tally.closed()
    assert row[Field.LOAD] == 1
    tally.set_accepting(False)
    tally.opened()
    tally.closed()
    assert row[Field.LOAD] == NOBODY
    assert row.active == 1


def test_the_tally_tells_of_each_end_after_it_has_counted_it(desk: Desk) -> None:
    told: list[int] = []
    desk.tally.on_closed = lambda: told.append(desk.tally.active)
    desk.tally.opened()
    desk.tally.opened()
    desk.tally.closed()
    desk.tally.closed()
    assert told == [1, 0]


def test_clients_are_served_and_counted_until_they_leave(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    clients = desk.clients(3)
    assert desk.row[Field.LOAD] == desk.tally.active == 3
    clients[0].shutdown(socket.SHUT_WR)
    assert desk.hear(clients[0]) == b""
    desk.turn(clients[1])
    assert desk.row[Field.LOAD] == desk.tally.active == 2
    assert desk.row[Field.CLOSED] == 1


def test_one_wakening_is_for_one_client(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    for _ in range(3):
        desk.client()
    desk.acceptor.ready(IN)
    assert desk.tally.accepted == 1
    desk.acceptor.ready(IN)
    assert desk.tally.accepted == 2


def test_a_wakening_for_nobody_changes_nothing(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    desk.acceptor.ready(IN)
    assert desk.tally.accepted == 0
    assert desk.acceptor.queued


def test_who_has_left_the_queue_accepts_nobody_even_if_woken_before(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    desk.client()
    desk.acceptor.leave()
    desk.acceptor.ready(IN)
    desk.balance.beat()
    assert desk.tally.accepted == 0


def test_at_a_heartbeat_it_takes_a_client_that_others_have_left_lying(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    desk.client()
    desk.balance.beat()
    assert desk.tally.accepted == 1


def test_accepted_sockets_do_not_block_and_are_not_for_programs_that_a_handler_starts(desk: Desk) -> None:
    taken: list[tuple[socket.socket, object]] = []
    acceptor = Acceptor(desk.loop, desk.listener, lambda sock, peer: taken.append((sock, peer)), desk.balance)
    desk.balance.start([acceptor])
    client = desk.client()
    acceptor.ready(IN)
    [(sock, peer)] = taken
    with sock:
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert (sock.family, sock.type, sock.proto) == (client.family, client.type, desk.listener.proto)
        assert peer == client.getsockname()


def test_who_is_ahead_steps_out_and_comes_back_as_soon_as_a_connection_closes(desk: Desk) -> None:
    clients = overtake(desk)
    desk.tally.closed()  # at once: the loop does not run, so no timer does it
    assert desk.acceptor.queued
    assert desk.hear(clients[-1]) == b"hello"
    desk.tally.opened()  # which was not true


def test_an_end_does_not_bring_back_who_is_still_ahead(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    clients = desk.clients(SLACK + 3)
    desk.other[Field.LOAD] = 0
    clients += desk.clients(1)
    assert not desk.acceptor.queued
    for _ in range(3):
        clients.pop().close()
        desk.turn(clients[0])
    assert desk.tally.active == SLACK + 1
    assert not desk.acceptor.queued
    clients.pop().close()
    desk.turn(clients[0])
    assert desk.acceptor.queued


def test_who_is_ahead_comes_back_when_the_others_have_caught_up(desk: Desk) -> None:
    waiting = overtake(desk)[-1]
    desk.other[Field.LOAD] = 5
    assert desk.hear(waiting) == b"hello"


def test_who_is_ahead_comes_back_when_the_other_takes_no_clients_any_more(desk: Desk) -> None:
    waiting = overtake(desk)[-1]
    desk.other[Field.LOAD] = NOBODY
    assert desk.hear(waiting) == b"hello"


def test_who_is_ahead_of_one_that_stands_still_does_not_step_out(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    desk.other[Field.LOAD], desk.other[Field.HEARTBEAT] = 0, monotonic_ns() - FAR
    desk.clients(3 * SLACK)
    assert desk.acceptor.queued


def test_all_listeners_of_a_worker_step_out_and_come_back_together(desk: Desk) -> None:
    listener, acceptor = desk.listen(socket.socket)
    desk.balance.start([desk.acceptor, acceptor])
    desk.other[Field.LOAD] = 0
    clients = desk.clients(SLACK + 1)
    waiting = desk.client(listener)
    desk.turn(clients[0])
    assert (desk.acceptor.queued, acceptor.queued) == (False, False)
    clients.pop().close()
    assert desk.hear(waiting) == b"hello"


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_what_the_machine_lacks_is_a_pause_and_one_line(
    desk: Desk, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener, acceptor = desk.listen(Failing)
    listener.error = error  # type: ignore[attr-defined]
    desk.balance.start([acceptor, desk.acceptor])
    acceptor.ready(IN)
    acceptor.ready(IN)
    assert (acceptor.queued, desk.acceptor.queued) == (False, False)
    assert desk.hear(desk.client()) == b"hello"  # after the pause
    desk.acceptor.leave()
    acceptor.ready(IN)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert os.strerror(error) in lines[0]


@pytest.mark.parametrize("error", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EHOSTUNREACH])
def test_what_a_client_or_the_network_lacks_is_nothing_to_it(
    desk: Desk, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener, acceptor = desk.listen(Failing)
    listener.error = error  # type: ignore[attr-defined]
    desk.balance.start([acceptor, desk.acceptor])
    acceptor.ready(IN)
    assert (acceptor.queued, desk.acceptor.queued) == (True, True)
    assert caplog.records == []
