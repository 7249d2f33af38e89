"""A pool whose children are not forked, for its tests: their channels, pipes and rows are real, and the test has their
other ends.
"""

from __future__ import annotations

import os
import selectors
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from typing import cast

from forkd.errors import BootError
from forkd.master.spawn import ChildMain, Exit, Spawner, Worker
from forkd.master.workers import HelperExited, HelperSaid, PoolEvent, WorkerExited, WorkerPool
from forkd.messages import JsonObject, Message, ReadyEvent
from forkd.states import WorkerState
from forkd.system.channel import Channel, channel_pair
from forkd.system.scoreboard import Field, Scoreboard


class Child:
    """A worker, and what the child has of it."""

    def __init__(self, worker: Worker, channel: Channel, stderr: int) -> None:
        self.worker = worker
        self.channel = channel
        self.stderr = stderr

    def say(self, message: Message | JsonObject) -> None:
        self.channel.send(message)

    def write(self, data: bytes) -> None:
        assert os.write(self.stderr, data) == len(data)

    def leave(self) -> None:
        """Closes its descriptors, as the end of a process does."""
        self.channel.close()
        if self.stderr >= 0:
            os.close(self.stderr)
            self.stderr = -1


class FakeSpawner:
    """Makes children without forking."""

    def __init__(self, stack: ExitStack) -> None:
        self.board = Scoreboard(64)
        stack.callback(self.board.close)
        self.children: list[Child] = []
        self.error: Exception | None = None
        self.signals: list[tuple[int, signal.Signals]] = []
        self.ended: list[Exit] = []

    def spawn(self, slot: int, generation: int, main: ChildMain, now: float) -> Worker:
        if self.error is not None:
            raise self.error
        row, pid = self.board.claim(), 100_000 + len(self.children)
        row[Field.PID] = pid
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        ours, theirs = channel_pair()
        worker = Worker(pid, slot, generation, row, ours, reader, WorkerState.BOOTING, since=now, forked_at=now)
        self.children.append(Child(worker, theirs, writer))
        return worker

    def signal(self, worker: Worker, signum: signal.Signals) -> None:
        self.signals.append((worker.pid, signum))

    def reap(self) -> Iterator[Exit]:
        while self.ended:
            yield self.ended.pop(0)


class FakeChildren:
    """The pool, and the events that the master would take from it."""

    def __init__(self, stack: ExitStack) -> None:
        self.selector = stack.enter_context(selectors.DefaultSelector())
        self.spawner = FakeSpawner(stack)
        self.pool = WorkerPool(cast(Spawner, self.spawner), self.selector)
        self.events: list[PoolEvent] = []

    def child(self, slot: int = 1, generation: int = 1, state: WorkerState = WorkerState.BOOTING) -> Child:
        """A new child; one that serves has said so."""
        self.pool.spawn(slot, generation, lambda row, channel: 0)
        child = self.spawner.children[-1]
        if state is not WorkerState.BOOTING:
            child.say(ReadyEvent())
            self.read()
            child.worker.state = state
        return child

    def read(self) -> None:
        """Takes all that has been said and written so far."""
        while events := self.selector.select(0):
            for key, mask in events:
                key.data(mask)
            self.take_events()

    def take_events(self) -> None:
        """Takes what the master would be told."""
        self.events += self.pool.take_events()

    @property
    def exits(self) -> list[WorkerExited]:
        """The workers that have ended."""
        return [event for event in self.events if isinstance(event, WorkerExited)]

    @property
    def failures(self) -> list[tuple[int, BootError, bool]]:
        """Of each that had not been told to end the generation, why it ended, and whether it had served."""
        return [
            (event.worker.generation, event.failure, event.worker.ready_at is not None)
            for event in self.exits
            if event.failure is not None
        ]

    @property
    def helper_events(self) -> list[HelperSaid | HelperExited]:
        """What helpers have said, and their ends."""
        return [event for event in self.events if isinstance(event, HelperSaid | HelperExited)]

    def end(self, child: Child, status: int = 0) -> None:
        """Ends a child, as if its descriptors were closed with it; `status` is wait(2)'s."""
        child.leave()
        self.reap(child, status)

    def reap(self, child: Child, status: int = 0) -> None:
        """Ends a child whose own children have its descriptors yet."""
        self.spawner.ended.append(Exit(child.worker.pid, status, 1024))
        self.pool.reap()
        self.take_events()

    def close(self) -> None:
        for child in self.spawner.children:
            child.leave()
            child.worker.channel.close()
            if child.worker.stderr >= 0:
                os.close(child.worker.stderr)
