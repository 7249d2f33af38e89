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

from forkd import drain
from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Recycle, Settings
from forkd.messages import (
    ChildEvent,
    DrainingEvent,
    JsonObject,
    LogCommand,
    ReadyEvent,
    WornEvent,
    decode_event,
    to_plain,
)
from forkd.serve import worker as module
from forkd.serve.handlers import Handler
from forkd.serve.worker import WorkerContext, WorkerProcess
from forkd.system.channel import Channel
from forkd.system.listeners import bind_all
from forkd.system.scoreboard import Field, Scoreboard
from tests.support.processes import DEADLINE

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

    def receive(self) -> list[JsonObject]:
        messages = super().receive()
        self.descriptors = self.coming
        return messages


class RunningWorker:
    """A worker that serves, its master's end of the channel, and clients on the worker's loop."""

    def __init__(self, stack: ExitStack, **recycle: Any) -> None:
        self.stack = stack
        listener = Listener(address=parse_address("tcp://127.0.0.1:0"), handler="test_worker:Polite")
        settings = Settings(listen=(listener,), recycle=Recycle(**{"jitter": 0.0, **recycle}))
        bound = bind_all(settings.listen)
        stack.callback(bound[0].remove)
        self.address = bound[0].sockets[0].getsockname()
        board = Scoreboard(1)
        self.row = row = board.claim()
        board.confine(row)
        stack.callback(board.close)
        ours, theirs = socket.socketpair()
        self.master, self.line = stack.enter_context(ours), Line(stack.enter_context(theirs))
        self.hearing = Channel(ours)
        self.worker = WorkerProcess(WorkerContext(settings, bound, 2, board, row, 1, self.line, os.getppid()))
        self.loop = self.worker.loop
        stack.callback(self.loop.close)
        self.worker.listen_to_master()
        self.worker.begin([Handler("protocol", Polite)])
        self.ended = False

    def run(self) -> None:
        """Runs the worker to its end."""
        self.loop.call_later(DEADLINE, self.loop.stop)
        began = self.loop.time()
        self.loop.run_forever()
        assert self.loop.time() - began < DEADLINE
        self.ended = True

    def end(self) -> None:
        if not self.ended:
            self.worker.close()
            self.run()
        self.worker.clean_up()

    def client(self) -> socket.socket:
        """A client that is not accepted yet."""
        sock = socket.create_connection(self.address, DEADLINE)
        self.stack.callback(sock.close)
        sock.setblocking(False)
        return sock

    def hear(self, sock: socket.socket) -> bytes:
        """What a client hears next, while the worker runs."""
        return self.loop.run_until_complete(asyncio.wait_for(self.loop.sock_recv(sock, 100), DEADLINE))

    def greeted(self) -> socket.socket:
        """A client that is served."""
        sock = self.client()
        assert self.hear(sock) == b"hello"
        return sock

    def beat(self) -> list[ChildEvent]:
        """What the worker tells its master since it was asked last and at two heartbeats."""
        for _ in range(2):
            self.worker.beat()
        return [decode_event(found) for found in self.hearing.receive()]


@pytest.fixture
def start_worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., RunningWorker]]:
    """Makes a worker with these limits; it ends with the test."""
    monkeypatch.setattr(drain._Worker, "drains", False)
    monkeypatch.setattr(module, "set_title", lambda *_: None)
    with ExitStack() as stack:

        def make(**recycle: Any) -> RunningWorker:
            running = RunningWorker(stack, **recycle)
            stack.callback(running.end)
            assert running.hearing.receive() == [to_plain(ReadyEvent())]
            return running

        yield make


# What it tells


def test_a_worker_asks_once_to_be_recycled_and_serves_on(start_worker: Callable[..., RunningWorker]) -> None:
    running = start_worker(connections=2)
    running.greeted()
    assert running.beat() == []
    running.greeted()
    assert running.beat() == [WornEvent("served 2 connections (limit 2)")]
    running.greeted()
    assert running.beat() == []


def test_a_worker_too_old_when_ready_asks_to_be_recycled(
    start_worker: Callable[..., RunningWorker],
) -> None:
    assert start_worker(age=1e-6).beat() == [WornEvent("0s old")]


def test_a_worker_without_limits_is_never_recycled(start_worker: Callable[..., RunningWorker]) -> None:
    running = start_worker()
    running.greeted()
    assert running.beat() == []


def memory(monkeypatch: pytest.MonkeyPatch, *samples: int) -> list[int]:
    """Has the worker find these for its memory, one after the other; those that it has not looked at yet."""
    left = list(samples)
    monkeypatch.setattr(module, "resident_memory", lambda: left.pop(0))
    return left


def test_a_worker_that_has_grown_tells_so(
    start_worker: Callable[..., RunningWorker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = memory(monkeypatch, 100 * MIB, 500 * MIB, 501 * MIB, 600 * MIB)
    assert start_worker(memory=500 * MIB).beat() == [WornEvent("501 MiB of memory")]
    assert left == [600 * MIB]
    assert caplog.records == []


def test_a_memory_limit_below_a_new_worker_is_dropped(
    start_worker: Callable[..., RunningWorker], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    left = memory(monkeypatch, 600 * MIB, 700 * MIB)
    assert start_worker(memory=500 * MIB).beat() == []
    assert left == [700 * MIB]
    [record] = caplog.records
    assert record.getMessage().startswith("recycle.memory is ignored: ")
    assert "600 MiB" in record.getMessage()


def test_memory_is_looked_at_for_a_limit_of_memory_alone(
    start_worker: Callable[..., RunningWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory(monkeypatch)
    assert start_worker(connections=1000, age=1000.0).beat() == []


def test_jitter_is_drawn_for_each_worker(
    start_worker: Callable[..., RunningWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.5)
    running = start_worker(connections=4, jitter=1.0)
    running.greeted()
    assert running.beat() == []
    running.greeted()
    assert running.beat() == [WornEvent("served 2 connections (limit 2)")]


def test_a_worker_that_drains_has_nothing_more_to_tell(start_worker: Callable[..., RunningWorker]) -> None:
    running = start_worker(connections=1)
    running.greeted()
    running.worker.drain()
    assert running.beat() == [DrainingEvent()]
    assert running.beat() == []


def test_recycling_without_a_master_does_no_harm(start_worker: Callable[..., RunningWorker]) -> None:
    running = start_worker(age=1e-6)
    running.master.shutdown(socket.SHUT_RDWR)
    before = running.row[Field.HEARTBEAT]
    running.worker.beat()
    assert running.row[Field.HEARTBEAT] > before
    running.loop.selector.epoll.unregister(running.line.fileno())  # or it would find its master dead, and set an alarm


# What it is told


def test_a_new_log_comes_with_its_descriptor(
    start_worker: Callable[..., RunningWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    logs: list[int] = []
    monkeypatch.setattr(module, "replace_log", logs.append)
    running = start_worker()
    running.line.coming = [71, 72]
    running.hearing.send(LogCommand())
    running.greeted()
    assert (logs, running.line.coming) == ([71], [72])
    running.hearing.send(LogCommand())
    running.greeted()
    assert (logs, running.line.coming) == ([71, 72], [])


@pytest.mark.parametrize("message", [to_plain(LogCommand()), {"order": "dance"}, {}], ids=str)
def test_an_order_that_makes_no_sense_is_a_line_of_the_log(
    start_worker: Callable[..., RunningWorker],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    message: JsonObject,
) -> None:
    logs: list[int] = []
    monkeypatch.setattr(module, "replace_log", logs.append)
    running = start_worker()
    running.line.coming = [] if "log" in message.values() else [71]
    running.hearing.send(message)
    running.greeted()
    assert logs == []
    [record] = caplog.records
    assert record.getMessage().startswith("invalid message from the master: ")


# How it drains


def test_a_worker_without_clients_ends_as_soon_as_it_drains(start_worker: Callable[..., RunningWorker]) -> None:
    running = start_worker()
    running.worker.drain()
    running.run()
    assert drain.draining()


def test_a_worker_asks_its_clients_to_end_and_ends_with_them(start_worker: Callable[..., RunningWorker]) -> None:
    running = start_worker()
    clients = [running.greeted() for _ in range(3)]
    running.worker.drain()
    running.run()
    assert [client.recv(100) for client in clients] == [b"goodbye"] * 3
    assert [client.recv(100) for client in clients] == [b""] * 3


def test_a_client_of_the_last_moment_is_served_and_notified(
    start_worker: Callable[..., RunningWorker],
) -> None:
    running = start_worker()
    client = running.client()
    client.send(b"wait")
    running.worker.drain()
    assert running.hear(client) == b"hellowaitgoodbye"
    client.send(b"bye")
    running.run()
    assert client.recv(100) == b"bye"
    assert client.recv(100) == b""
