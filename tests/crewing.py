"""A crew whose children are made up, for its tests: their channels, pipes and rows are real, and the test is at their
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
from forkd.master.crew import Crew
from forkd.master.spawn import ChildMain, Exit, Spawner, Worker
from forkd.states import Life
from forkd.system.channel import Channel, channel_pair
from forkd.system.scoreboard import Field, Scoreboard
from forkd.wire import Message


class Child:
    """A worker, and what is at its side of the fork."""

    def __init__(self, worker: Worker, channel: Channel, stderr: int) -> None:
        self.worker = worker
        self.channel = channel
        self.stderr = stderr

    def say(self, message: Message) -> None:
        self.channel.send(message)

    def write(self, data: bytes) -> None:
        assert os.write(self.stderr, data) == len(data)

    def leave(self) -> None:
        """Its descriptors go as those of a process that ends."""
        self.channel.close()
        if self.stderr >= 0:
            os.close(self.stderr)
            self.stderr = -1


class MadeUpSpawner:
    """Makes children without forking."""

    def __init__(self, stack: ExitStack) -> None:
        self.board = Scoreboard(64)
        stack.callback(self.board.close)
        self.children: list[Child] = []
        self.error: Exception | None = None
        self.signalled: list[tuple[int, signal.Signals]] = []
        self.ended: list[Exit] = []

    def spawn(self, slot: int, generation: int, main: ChildMain, now: float) -> Worker:
        if self.error is not None:
            raise self.error
        row, pid = self.board.claim(), 100_000 + len(self.children)
        row[Field.PID] = pid
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        ours, theirs = channel_pair()
        worker = Worker(pid, slot, generation, row, ours, reader, Life.BOOTING, since=now, born=now)
        self.children.append(Child(worker, theirs, writer))
        return worker

    def signal(self, worker: Worker, signum: signal.Signals) -> None:
        self.signalled.append((worker.pid, signum))

    def reap(self) -> Iterator[Exit]:
        while self.ended:
            yield self.ended.pop(0)


class Deck:
    """The crew, and what it tells the master."""

    def __init__(self, stack: ExitStack) -> None:
        self.selector = stack.enter_context(selectors.DefaultSelector())
        self.spawner = MadeUpSpawner(stack)
        self.failures: list[tuple[int, BootError, bool]] = []
        self.crew = Crew(cast(Spawner, self.spawner), self.selector, lambda *told: self.failures.append(told))

    def child(self, slot: int = 1, generation: int = 1, life: Life = Life.BOOTING) -> Child:
        """A new child; one that serves has said so."""
        self.crew.spawn(slot, generation, lambda row, channel: 0)
        child = self.spawner.children[-1]
        if life is not Life.BOOTING:
            child.say({"event": "ready"})
            self.hear()
            child.worker.life = life
        return child

    def hear(self) -> None:
        """Takes all that has been said and written so far."""
        while events := self.selector.select(0):
            for key, mask in events:
                key.data(mask)

    def end(self, child: Child, status: int = 0) -> None:
        """Ends a child, as if its descriptors were closed with it; `status` is wait(2)'s."""
        child.leave()
        self.bury(child, status)

    def bury(self, child: Child, status: int = 0) -> None:
        """Ends a child whose own children have its descriptors yet."""
        self.spawner.ended.append(Exit(child.worker.pid, status, 1024))
        self.crew.reap()

    def close(self) -> None:
        for child in self.spawner.children:
            child.leave()
            child.worker.channel.close()
            if child.worker.stderr >= 0:
                os.close(child.worker.stderr)
