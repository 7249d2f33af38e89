"""A worker in this process, its master's end of the channel in the test's hand: what it tells, what it is told, and how
it drains. What becomes of it in a daemon is in `test_daemon` and `test_drain`.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from processes import PATIENCE

from forkd import drain
from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.options import Recycle, Settings
from forkd.serve import worker as module
from forkd.serve.handlers.load import Handler
from forkd.serve.loop import PollLoop
from forkd.serve.worker import Station, Worker
from forkd.system.channel import Channel
from forkd.system.scoreboard import Scoreboard
from forkd.system.sockets import bind_all
from forkd.wire import Message

MIB = 1 << 20


class Polite(asyncio.Protocol):
    """Greets and echoes; when its worker drains it says goodbye and closes, but after `wait` it waits for `bye`."""

    heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"hello")

    def data_received(self, data: bytes) -> None:
        self.heard = data
        self.transport.write(data)
        if data == b"bye":
            self.transport.close()

    def shutdown(self) -> None:
        self.transport.write(b"goodbye")
        if self.heard != b"wait":
            self.transport.close()


class Line(Channel):
    """A channel with which descriptors come as the test has it."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.coming: list[int] = []

    def receive(self) -> list[Message]:
        messages = super().receive()
        self.descriptors = self.coming
        return messages


class Seat:
    """A worker that serves, its master's end of the channel, and clients on the worker's loop."""

    def __init__(self, stack: ExitStack, **recycle: Any) -> None:
        self.stack = stack
        listener = Listener(address=parse_address("tcp://127.0.0.1:0"), handler="test_worker:Polite")
        settings = Settings(listen=(listener,), recycle=Recycle(**{"jitter": 0.0, **recycle}))
        bound = bind_all(settings.listen)
        stack.callback(bound[0].remove)
        self.address = bound[0].sockets[0].getsockname()
        board = Scoreboard(1)
        row = board.claim()
        board.confine(row)
        stack.callback(board.close)
        ours, theirs = socket.socketpair()
        self.master, self.line = stack.enter_context(ours), Line(stack.enter_context(theirs))
        self.hearing = Channel(ours)
        self.loop = PollLoop()
        stack.callback(self.loop.close)
        self.worker = Worker(settings, board, Station(1, row, self.line, os.getppid()), self.loop)
        self.worker.begin(bound, [Handler("protocol", Polite)])
        self.ended = False

    def run(self) -> None:
        """Runs the worker to its end."""
        self.loop.call_later(PATIENCE, self.loop.stop)
        began = self.loop.time()
        self.loop.run_forever()
        assert self.loop.time() - began < PATIENCE
        self.ended = True

    def end(self) -> None:
        if not self.ended:
            self.worker.close()
            self.run()
        self.worker.clean_up()

    def client(self) -> socket.socket:
        """One that nobody has accepted yet."""
        sock = socket.create_connection(self.address, PATIENCE)
        self.stack.callback(sock.close)
        sock.setblocking(False)
        return sock

    def hear(self, sock: socket.socket) -> bytes:
        """What a client hears next, while the worker runs."""
        return self.loop.run_until_complete(asyncio.wait_for(self.loop.sock_recv(sock, 100), PATIENCE))

    def greeted(self) -> socket.socket:
        """A client that is served."""
        sock = self.client()
        assert self.hear(sock) == b"hello"
        return sock

    def beat(self) -> list[Message]:
        """What the worker tells its master since it was asked last and at two heartbeats."""
        for _ in range(2):
            self.worker._beat()
        return self.hearing.receive()


@pytest.fixture
def take_seat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Seat]]:
    """Makes a worker with these limits; it ends with the test."""
    monkeypatch.setattr(drain._Worker, "drains", False)
    monkeypatch.setattr(module, "set_title", lambda *_: None)
    with ExitStack() as stack:

        def make(**recycle: Any) -> Seat:
            seat = Seat(stack, **recycle)
            stack.callback(seat.end)
            assert seat.hearing.receive() == [{"event": "ready"}]
            return seat

        yield make


# What it tells


def test_a_worker_tells_once_that_it_has_served_enough_and_serves_on(take_seat: Callable[..., Seat]) -> None:
    seat = take_seat(connections=2)
    seat.greeted()
    assert seat.beat() == []
    seat.greeted()
    assert seat.beat() == [{"event": "worn", "why": "2 connections, of 2"}]
    seat.greeted()
    assert seat.beat() == []


def test_a_worker_that_was_ready_at_an_age_that_is_too_great_tells_so_after_that(
    take_seat: Callable[..., Seat],
) -> None:
    assert take_seat(age=1e-6).beat() == [{"event": "worn", "why": "0s old"}]


def test_a_worker_without_limits_is_never_worn(take_seat: Callable[..., Seat]) -> None:
    seat = take_seat()
    seat.greeted()
    assert seat.beat() == []


def memory(monkeypatch: pytest.MonkeyPatch, *samples: int) -> list[int]:
    """Has the worker find these for its memory, one after the other; those that it has not looked at yet."""
    left = list(samples)
    monkeypatch.setattr(module, "resident_memory", lambda: left.pop(0))
    return left


def test_a_worker_that_has_grown_tells_so(
    take_seat: Callable[..., Seat], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = memory(monkeypatch, 100 * MIB, 500 * MIB, 501 * MIB, 600 * MIB)
    assert take_seat(memory=500 * MIB).beat() == [{"event": "worn", "why": "501 MiB of memory"}]
    assert left == [600 * MIB]
    assert caplog.records == []


def test_a_limit_of_memory_that_a_fresh_worker_is_over_is_dropped_with_one_warning(
    take_seat: Callable[..., Seat], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = memory(monkeypatch, 600 * MIB, 700 * MIB)
    assert take_seat(memory=500 * MIB).beat() == []
    assert left == [700 * MIB]
    [record] = caplog.records
    assert record.getMessage().startswith("recycle.memory is ignored: ")
    assert "600 MiB" in record.getMessage()


def test_memory_is_looked_at_for_a_limit_of_memory_alone(
    take_seat: Callable[..., Seat], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch)
    assert take_seat(connections=1000, age=1000.0).beat() == []


def test_luck_is_drawn_for_each_worker(take_seat: Callable[..., Seat], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.5)
    seat = take_seat(connections=4, jitter=1.0)
    seat.greeted()
    assert seat.beat() == []
    seat.greeted()
    assert seat.beat() == [{"event": "worn", "why": "2 connections, of 2"}]


def test_a_worker_that_drains_has_nothing_more_to_tell(take_seat: Callable[..., Seat]) -> None:
    seat = take_seat(connections=1)
    seat.greeted()
    seat.worker.drain()
    assert seat.beat() == []


def test_wear_is_not_told_to_a_master_that_is_gone_and_harms_nobody(take_seat: Callable[..., Seat]) -> None:
    seat = take_seat(age=1e-6)
    seat.master.shutdown(socket.SHUT_RDWR)
    before = seat.worker._next_beat
    seat.worker._beat()
    assert seat.worker._next_beat > before
    seat.loop.selector.epoll.unregister(seat.line.fileno())  # or it would find its master dead, and set an alarm


# What it is told


def test_a_new_log_is_written_to_by_the_descriptor_that_comes_with_the_order(
    take_seat: Callable[..., Seat], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[int] = []
    monkeypatch.setattr(module, "replace_log", logs.append)
    seat = take_seat()
    seat.line.coming = [71, 72]
    seat.hearing.send({"order": "log"})
    seat.greeted()
    assert (logs, seat.line.coming) == ([71], [72])
    seat.hearing.send({"order": "log"})
    seat.greeted()
    assert (logs, seat.line.coming) == ([71, 72], [])


@pytest.mark.parametrize("message", [{"order": "log"}, {"order": "dance"}, {}], ids=str)
def test_an_order_that_makes_no_sense_is_a_line_of_the_log(
    take_seat: Callable[..., Seat],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    message: Message,
) -> None:
    logs: list[int] = []
    monkeypatch.setattr(module, "replace_log", logs.append)
    seat = take_seat()
    seat.line.coming = [] if "log" in message.values() else [71]
    seat.hearing.send(message)
    seat.greeted()
    assert logs == []
    [record] = caplog.records
    assert record.getMessage() == f"the master says what this worker does not understand: {message}"


# How it drains


def test_a_worker_without_clients_ends_as_soon_as_it_drains(take_seat: Callable[..., Seat]) -> None:
    seat = take_seat()
    seat.worker.drain()
    seat.run()
    assert drain.draining()


def test_a_worker_asks_its_clients_to_end_and_ends_with_them(take_seat: Callable[..., Seat]) -> None:
    seat = take_seat()
    clients = [seat.greeted() for _ in range(3)]
    seat.worker.drain()
    seat.run()
    assert [client.recv(100) for client in clients] == [b"goodbye"] * 3
    assert [client.recv(100) for client in clients] == [b""] * 3


def test_a_client_that_comes_in_the_last_moment_is_served_asked_once_and_waited_for(
    take_seat: Callable[..., Seat],
) -> None:
    seat = take_seat()
    client = seat.client()
    client.send(b"wait")
    seat.worker.drain()
    assert seat.hear(client) == b"hellowaitgoodbye"
    client.send(b"bye")
    seat.run()
    assert client.recv(100) == b"bye"
    assert client.recv(100) == b""
