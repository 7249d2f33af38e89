"""A worker that stops taking clients: what it takes yet, what it leaves to others, and what it leaves behind."""

from __future__ import annotations

import errno
import socket

import pytest

from forkd.serve.accept.balance import REST_SECONDS, SLACK, BalanceState, Waiting
from forkd.system.scoreboard import NOT_ACCEPTING, Field
from tests.support.accept_fixture import AcceptFixture, Failing, accept_fixtures, overtake
from tests.support.processes import DEADLINE

accept = accept_fixtures


def test_stop_takes_no_more_clients_and_keeps_those_here(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    [client] = accept.clients(1)
    address, descriptor = accept.listener.getsockname(), accept.listener.fileno()
    accept.balance.stop()
    assert accept.listener.fileno() == -1
    assert descriptor not in accept.loop.selector.served
    assert accept.row[Field.LOAD] == NOT_ACCEPTING
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, DEADLINE)
    accept.turn(client)
    accept.balance.beat()
    accept.balance.stop()


def test_stop_serves_a_client_that_woke_the_worker_before(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    client = accept.client()
    accept.balance.stop()
    assert (accept.stats.active, accept.row.active) == (1, 1)  # a worker without clients would end now
    assert accept.row[Field.LOAD] == NOT_ACCEPTING
    assert accept.hear(client) == b"hello"
    accept.turn(client)


def test_stop_takes_one_client_for_each_listener(
    accept: AcceptFixture,
) -> None:
    second, acceptor = accept.listen(socket.socket)
    of_the_others = [accept.stack.enter_context(listener.dup()) for listener in (accept.listener, second)]
    accept.balance.start([accept.acceptor, acceptor])
    for listener in of_the_others:
        for _ in range(3):
            accept.client(listener)
    accept.balance.stop()
    assert accept.stats.accepted == 2
    for listener in of_the_others:
        for _ in range(2):
            listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_stop_leaves_clients_to_the_next_daemon(accept: AcceptFixture) -> None:
    kept = accept.stack.enter_context(accept.listener.dup())
    accept.balance.start([accept.acceptor])
    accept.client()
    accept.balance.stop(Waiting.NONE)
    assert (accept.stats.accepted, accept.listener.fileno()) == (0, -1)
    kept.accept()[0].close()


def test_stop_of_an_orphaned_worker_takes_all_that_wait(accept: AcceptFixture) -> None:
    second, acceptor = accept.listen(socket.socket)
    accept.balance.start([accept.acceptor, acceptor])
    clients = [accept.client(listener) for listener in (accept.listener, second) for _ in range(4)]
    accept.balance.stop(Waiting.ALL)
    assert (accept.stats.accepted, accept.listener.fileno(), second.fileno()) == (8, -1, -1)
    assert [accept.hear(client) for client in clients] == [b"hello"] * 8


def test_stop_of_an_orphaned_worker_ends_though_clients_come_all_the_time(
    accept: AcceptFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_another = accept.stack.enter_context(accept.listener.dup())
    accept.balance.start([accept.acceptor])
    accept.client()
    times = iter([0.0, 0.0, REST_SECONDS])
    monkeypatch.setattr(accept.loop, "time", lambda: next(times))

    def serve(sock: socket.socket, _peer: object) -> None:
        sock.close()
        accept.client(of_another)

    monkeypatch.setattr(accept.acceptor, "_serve", serve)
    accept.balance.stop(Waiting.ALL)
    monkeypatch.undo()
    assert accept.stats.accepted == 1
    of_another.accept()[0].close()


def test_stop_counts_a_client_that_comes_and_goes_meanwhile(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    accept.client().close()
    accept.balance.stop()
    assert (accept.stats.accepted, accept.stats.active) == (1, 0)


def test_stop_takes_no_client_after_stepping_out(accept: AcceptFixture) -> None:
    overtake(accept)
    of_the_others = accept.stack.enter_context(accept.listener.dup())
    accept.balance.stop()
    assert accept.stats.accepted == SLACK + 1
    of_the_others.accept()[0].close()


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ECONNABORTED])
def test_stop_works_where_accepting_fails(accept: AcceptFixture, error: int, caplog: pytest.LogCaptureFixture) -> None:
    listener, acceptor = accept.listen(Failing)
    listener.error = error  # type: ignore[attr-defined]
    accept.balance.start([acceptor, accept.acceptor])
    client = accept.client()
    accept.balance.stop()
    assert (listener.fileno(), accept.listener.fileno()) == (-1, -1)
    assert accept.balance.state is BalanceState.STOPPED
    assert caplog.records == []
    assert accept.hear(client) == b"hello"


def test_stop_ends_the_wait_of_one_that_had_stepped_out(accept: AcceptFixture) -> None:
    clients = overtake(accept)
    accept.balance.stop()
    accept.closed.clear()
    accept.other[Field.LOAD] = NOT_ACCEPTING
    later = accept.loop.create_future()
    accept.loop.call_later(0.05, later.set_result, None)  # later than the look that must not come
    accept.loop.run_until_complete(later)
    clients[0].close()
    accept.turn(clients[1])
    assert accept.closed == [SLACK]  # as a worker that drains is told of it
    assert accept.stats.accepted == SLACK + 1
