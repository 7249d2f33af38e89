"""Accepting in one process: the counters on the scoreboard, one listener's acceptor, and a worker's balance.

The sockets, the poll loop and the protocols are real. What several processes make of it is in
`test_balance_processes`, the end of it in `test_balance_stop`.
"""

from __future__ import annotations

import errno
import os
import socket
from time import monotonic_ns

import pytest

from forkd.serve.accept.acceptor import Acceptor
from forkd.serve.accept.balance import SLACK
from forkd.serve.loop import IN
from forkd.system.scoreboard import NOT_ACCEPTING, Field
from tests.support.accept_fixture import FAR, AcceptFixture, Failing, accept_fixtures, overtake

accept = accept_fixtures


def test_connection_stats_count_on_their_row(accept: AcceptFixture) -> None:
    stats, row = accept.stats, accept.row
    for _ in range(3):
        stats.opened()
    stats.closed()
    stats.failed()
    assert (stats.accepted, stats.ended, stats.errors, stats.active) == (3, 1, 1, 2)
    assert (row[Field.ACCEPTED], row[Field.CLOSED], row[Field.ERRORS], row.active) == (3, 1, 1, 2)


def test_a_load_is_shown_while_accepting_and_at_no_other_time(accept: AcceptFixture) -> None:
    stats, row = accept.stats, accept.row
    stats.opened()
    assert row[Field.LOAD] == NOT_ACCEPTING
    stats.set_accepting(True)
    assert row[Field.LOAD] == 1
    stats.opened()
    assert row[Field.LOAD] == 2
    stats.closed()
    assert row[Field.LOAD] == 1
    stats.set_accepting(False)
    stats.opened()
    stats.closed()
    assert row[Field.LOAD] == NOT_ACCEPTING
    assert row.active == 1


def test_connection_stats_tell_of_each_end_after_counting(accept: AcceptFixture) -> None:
    accept.stats.opened()
    accept.stats.opened()
    accept.stats.closed()
    accept.stats.closed()
    assert accept.closed == [1, 0]


def test_clients_are_served_and_counted_until_they_leave(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    clients = accept.clients(3)
    assert accept.row[Field.LOAD] == accept.stats.active == 3
    clients[0].shutdown(socket.SHUT_WR)
    assert accept.hear(clients[0]) == b""
    accept.turn(clients[1])
    assert accept.row[Field.LOAD] == accept.stats.active == 2
    assert accept.row[Field.CLOSED] == 1


def test_acceptor_takes_one_client_for_each_wake_up(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    for _ in range(3):
        accept.client()
    accept.acceptor.ready(IN)
    assert accept.stats.accepted == 1
    accept.acceptor.ready(IN)
    assert accept.stats.accepted == 2


def test_a_wake_up_without_a_client_changes_nothing(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    accept.acceptor.ready(IN)
    assert accept.stats.accepted == 0
    assert accept.acceptor.queued


def test_acceptor_out_of_the_queue_takes_no_client(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    accept.client()
    accept.acceptor.leave()
    accept.acceptor.ready(IN)
    accept.balance.beat()
    assert accept.stats.accepted == 0


def test_heartbeat_takes_a_client_left_by_others(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    accept.client()
    accept.balance.beat()
    assert accept.stats.accepted == 1


def test_accepted_sockets_are_non_blocking_and_not_inheritable(accept: AcceptFixture) -> None:
    taken: list[tuple[socket.socket, object]] = []
    acceptor = Acceptor(accept.loop, accept.listener, lambda sock, peer: taken.append((sock, peer)), accept.balance)
    accept.balance.start([acceptor])
    client = accept.client()
    acceptor.ready(IN)
    [(sock, peer)] = taken
    with sock:
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert (sock.family, sock.type, sock.proto) == (client.family, client.type, accept.listener.proto)
        assert peer == client.getsockname()


def test_worker_ahead_steps_out_until_a_connection_closes(accept: AcceptFixture) -> None:
    clients = overtake(accept)
    accept.stats.closed()  # at once: the loop does not run, so no timer does it
    assert accept.acceptor.queued
    assert accept.hear(clients[-1]) == b"hello"
    accept.stats.opened()  # which was not true


def test_worker_still_ahead_stays_out_when_a_connection_closes(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    clients = accept.clients(SLACK + 3)
    accept.other[Field.LOAD] = 0
    clients += accept.clients(1)
    assert not accept.acceptor.queued
    for _ in range(3):
        clients.pop().close()
        accept.turn(clients[0])
    assert accept.stats.active == SLACK + 1
    assert not accept.acceptor.queued
    clients.pop().close()
    accept.turn(clients[0])
    assert accept.acceptor.queued


def test_worker_ahead_comes_back_when_others_have_caught_up(accept: AcceptFixture) -> None:
    waiting = overtake(accept)[-1]
    accept.other[Field.LOAD] = 5
    assert accept.hear(waiting) == b"hello"


def test_worker_ahead_comes_back_when_others_stop_accepting(accept: AcceptFixture) -> None:
    waiting = overtake(accept)[-1]
    accept.other[Field.LOAD] = NOT_ACCEPTING
    assert accept.hear(waiting) == b"hello"


def test_worker_ahead_of_a_stalled_one_does_not_step_out(accept: AcceptFixture) -> None:
    accept.balance.start([accept.acceptor])
    accept.other[Field.LOAD], accept.other[Field.HEARTBEAT] = 0, monotonic_ns() - FAR
    accept.clients(3 * SLACK)
    assert accept.acceptor.queued


def test_listeners_of_a_worker_step_out_and_return_together(accept: AcceptFixture) -> None:
    listener, acceptor = accept.listen(socket.socket)
    accept.balance.start([accept.acceptor, acceptor])
    accept.other[Field.LOAD] = 0
    clients = accept.clients(SLACK + 1)
    waiting = accept.client(listener)
    accept.turn(clients[0])
    assert (accept.acceptor.queued, acceptor.queued) == (False, False)
    clients.pop().close()
    assert accept.hear(waiting) == b"hello"


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_what_the_machine_lacks_is_a_pause_and_one_line(
    accept: AcceptFixture, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener, acceptor = accept.listen(Failing)
    listener.error = error  # type: ignore[attr-defined]
    accept.balance.start([acceptor, accept.acceptor])
    acceptor.ready(IN)
    acceptor.ready(IN)
    assert (acceptor.queued, accept.acceptor.queued) == (False, False)
    assert accept.hear(accept.client()) == b"hello"  # after the pause
    accept.acceptor.leave()
    acceptor.ready(IN)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert os.strerror(error) in lines[0]


@pytest.mark.parametrize("error", [errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EHOSTUNREACH])
def test_what_a_client_or_the_network_lacks_is_nothing_to_it(
    accept: AcceptFixture, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    listener, acceptor = accept.listen(Failing)
    listener.error = error  # type: ignore[attr-defined]
    accept.balance.start([acceptor, accept.acceptor])
    acceptor.ready(IN)
    assert (acceptor.queued, accept.acceptor.queued) == (True, True)
    assert caplog.records == []
