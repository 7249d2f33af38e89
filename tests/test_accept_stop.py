"""A worker that stops taking clients: what it takes yet, what it leaves to others, and what it leaves behind."""

from __future__ import annotations

import errno
import socket

import pytest
from desk import PATIENCE, Desk, Failing, desks, overtake

from forkd.serve.admission import SLACK
from forkd.system.scoreboard import NOBODY, Field

desk = desks


def test_stop_takes_no_more_clients_and_leaves_those_that_are_here(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    [client] = desk.clients(1)
    address, descriptor = desk.listener.getsockname(), desk.listener.fileno()
    desk.balance.stop()
    assert desk.listener.fileno() == -1
    assert descriptor not in desk.loop.selector.served
    assert desk.row[Field.LOAD] == NOBODY
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, PATIENCE)
    desk.turn(client)
    desk.balance.beat()
    desk.balance.stop()


def test_a_client_that_has_woken_the_worker_before_it_stops_is_served(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    client = desk.client()
    desk.balance.stop()
    assert (desk.tally.active, desk.row.active) == (1, 1)  # a worker without clients would end now
    assert desk.row[Field.LOAD] == NOBODY
    assert desk.hear(client) == b"hello"
    desk.turn(client)


def test_it_takes_one_client_for_each_listener_and_leaves_the_others_to_the_other_workers(desk: Desk) -> None:
    second, acceptor = desk.listen(socket.socket)
    of_the_others = [desk.stack.enter_context(listener.dup()) for listener in (desk.listener, second)]
    desk.balance.start([desk.acceptor, acceptor])
    for listener in of_the_others:
        for _ in range(3):
            desk.client(listener)
    desk.balance.stop()
    assert desk.tally.accepted == 2
    for listener in of_the_others:
        for _ in range(2):
            listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_a_client_that_comes_and_goes_while_it_stops_is_over_when_it_has_stopped(desk: Desk) -> None:
    desk.balance.start([desk.acceptor])
    desk.client().close()
    desk.balance.stop()
    assert (desk.tally.accepted, desk.tally.active) == (1, 0)


def test_one_that_had_stepped_out_takes_nobody_when_it_stops(desk: Desk) -> None:
    overtake(desk)
    of_the_others = desk.stack.enter_context(desk.listener.dup())
    desk.balance.stop()
    assert desk.tally.accepted == SLACK + 1
    of_the_others.accept()[0].close()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ECONNABORTED])
def test_what_keeps_it_from_accepting_does_not_keep_it_from_stopping(
    desk: Desk, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener, acceptor = desk.listen(Failing)
    listener.error = error  # type: ignore[attr-defined]
    desk.balance.start([acceptor, desk.acceptor])
    client = desk.client()
    desk.balance.stop()
    assert (listener.fileno(), desk.listener.fileno()) == (-1, -1)
    assert desk.tally.on_closed is None
    assert caplog.records == []
    assert desk.hear(client) == b"hello"


def test_stop_ends_the_wait_of_one_that_had_stepped_out(desk: Desk) -> None:
    clients = overtake(desk)
    desk.balance.stop()
    told: list[str] = []
    desk.tally.on_closed = lambda: told.append("closed")  # as a worker that drains has it
    desk.other[Field.LOAD] = NOBODY
    later = desk.loop.create_future()
    desk.loop.call_later(0.05, later.set_result, None)  # later than the look that must not come
    desk.loop.run_until_complete(later)
    clients[0].close()
    desk.turn(clients[1])
    assert told == ["closed"]
    assert desk.tally.accepted == SLACK + 1
