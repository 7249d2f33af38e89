"""Accepting in one process: the tally on the scoreboard, one listener's acceptor, and a worker's balance.

The sockets, the poll loop and the protocols are real. The other worker, which this one compares itself with, is a row
of the scoreboard that the test writes. What several processes make of it is in `test_accept_processes`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic_ns

import pytest

from forkd.serve.accept import Acceptor, Balance, Tally
from forkd.serve.admission import SLACK
from forkd.serve.handlers.protocol import ProtocolServer
from forkd.serve.loop import IN, PollLoop
from forkd.serve.transport import Transport
from forkd.system.scoreboard import NOBODY, Field, Row, Scoreboard

PATIENCE = 20.0
FAR = 3600 * 10**9  # nanoseconds


class Echo(asyncio.Protocol):
    """Greets, then echoes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        transport.write(b"hello")

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Failing(socket.socket):
    """A listener whose accept(2) fails."""

    error = 0

    def _accept(self) -> tuple[int, object]:
        raise OSError(self.error, os.strerror(self.error))


class Desk:
    """A worker's accepting half on a loop of its own, and clients that use the same loop."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.loop = PollLoop()
        stack.callback(self.loop.close)
        self.board = Scoreboard(4)
        stack.callback(os.close, self.board.descriptor)
        self.row, self.other = self.new_row(), self.new_row()
        self.tally = Tally(self.row)
        self.balance = Balance(self.loop, self.board, self.tally)
        self.server = ProtocolServer(self.loop, Echo, self.tally, 0)
        self.listener, self.acceptor = self.listen(socket.socket)

    def new_row(self) -> Row:
        row = self.board.claim()
        row[Field.PID] = os.getpid()
        row[Field.HEARTBEAT] = monotonic_ns() + FAR  # never too old for these tests
        return row

    def listen(self, kind: type[socket.socket]) -> tuple[socket.socket, Acceptor]:
        listener = kind(socket.AF_INET, socket.SOCK_STREAM)
        self.stack.callback(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.setblocking(False)
        return listener, Acceptor(self.loop, listener, self.server, self.balance)

    def client(self, listener: socket.socket | None = None) -> socket.socket:
        """One that is connected as far as the kernel goes; nobody has accepted it yet."""
        sock = socket.create_connection((listener or self.listener).getsockname(), PATIENCE)
        self.stack.callback(sock.close)
        sock.setblocking(False)
        return sock

    def hear(self, sock: socket.socket) -> bytes:
        """What a client hears next, while the loop runs."""
        return self.loop.run_until_complete(asyncio.wait_for(self.loop.sock_recv(sock, 100), PATIENCE))

    def clients(self, count: int) -> list[socket.socket]:
        """Clients that are served."""
        made = []
        for _ in range(count):
            made.append(self.client())
            assert self.hear(made[-1]) == b"hello"
        return made

    def turn(self, sock: socket.socket) -> None:
        """Lets the loop go round, by an echo to a client that is served; a listener that waits comes before it."""
        sock.send(b"there and back")
        assert self.hear(sock) == b"there and back"

    def end(self) -> None:
        self.balance.stop()
        for ready in list(self.loop.selector.served.values()):
            owner = getattr(ready, "__self__", None)
            if isinstance(owner, Transport):
                owner.abort()
        self.loop.run_until_complete(asyncio.sleep(0))


@pytest.fixture
def desk() -> Iterator[Desk]:
    with ExitStack() as stack:
        desk = Desk(stack)
        try:
            yield desk
        finally:
            desk.end()


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


def overtake(desk: Desk) -> list[socket.socket]:
    """Serves more clients than it should while the other has none; a further one waits, the last of those returned."""
    desk.balance.start([desk.acceptor])
    desk.other[Field.LOAD] = 0
    clients = desk.clients(SLACK)
    assert desk.acceptor.queued
    clients += desk.clients(1)
    assert not desk.acceptor.queued
    clients.append(desk.client())
    desk.turn(clients[0])
    assert desk.tally.accepted == SLACK + 1
    return clients


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
