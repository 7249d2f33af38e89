"""What a change is made with, for its tests: a crew whose children are made up, and a master's state around it."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.options import Settings
from forkd.config.plain import to_plain
from forkd.errors import BootError, ForkdError
from forkd.master.backoff import Slot
from forkd.master.change import Changes
from forkd.master.crew import Crew
from forkd.master.generation import Generation
from forkd.master.logbook import Logbook
from forkd.master.spawn import HELPER, ChildMain, Exit, Worker
from forkd.master.state import State
from forkd.states import Life, Mode
from forkd.system.bound import BoundListener
from forkd.system.channel import Channel, channel_pair
from forkd.system.identity import Identity
from forkd.system.notify import Notifier
from forkd.system.scoreboard import Row
from forkd.system.sockets import bind_listener
from forkd.wire import Message

V4 = "tcp://127.0.0.1:0"
LOG = 99  # no descriptor: nobody logs here


def listener(address: str, **more: Any) -> Listener:
    return Listener(address=parse_address(address), handler="a:b", **more)


class MadeUpCrew:
    """Children that do what a test says."""

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.slots: defaultdict[int, dict[int, Slot]] = defaultdict(dict)
        self.deaths: deque[dict[str, Any]] = deque()
        self.buried: dict[str, int] = {}
        self.helper_said: Callable[[Worker, Message], None] = lambda worker, message: None
        self.helper_ended: Callable[[Worker, Exit], None] = lambda worker, ended: None
        self.complete: tuple[int, int] | None = None  # the generation that serves with so many
        self.forks: Callable[[int], None] | None = None  # what a fork that fails comes to
        self.helpers: list[Worker] = []
        self.mains: list[ChildMain] = []

    def serves(self, generation: int, wanted: int) -> bool:
        return self.complete == (generation, wanted)

    def add(self, slot: int, generation: int, life: Life = Life.BOOTING) -> Worker:
        pid = 1000 + len(self.helpers) + len(self.workers)
        channel, other = channel_pair()
        other.close()
        self.workers[pid] = Worker(pid, slot, generation, cast(Row, None), channel, -1, life, since=0.0, born=0.0)
        return self.workers[pid]

    def spawn(self, slot: int, generation: int, main: ChildMain) -> None:
        assert slot == HELPER
        if self.forks is not None:
            self.slots[generation][slot] = Slot(1, 5.0)
            self.forks(generation)
            return
        self.mains.append(main)
        self.helpers.append(self.add(slot, generation))


class MadeUpLogbook:
    """Opens what a test says, and notes what it is told."""

    def __init__(self) -> None:
        self.descriptor = LOG
        self.error: ForkdError | None = None
        self.told: list[str] = []

    def open_for(self, settings: Settings, present: Generation) -> int:
        if self.error is not None:
            raise self.error
        return self.descriptor

    def turn_over(self, before: Generation, after: Generation) -> None:
        self.told.append(f"{before.number} to {after.number}")

    def close(self, candidate: Generation, present: Generation) -> None:
        self.told.append(f"close {candidate.number}")


class Asker(list[Message]):
    """Who asks for a change: the outcomes that he gets."""

    def __init__(self, descriptor: int = -1) -> None:
        super().__init__()
        self.descriptor = descriptor

    def __call__(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        self.append(message)

    def fileno(self) -> int:
        return self.descriptor


class Stage:
    """A running daemon with two listeners, whose changes a test drives."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.stack = path, stack
        self.crew, self.logbook = MadeUpCrew(), MadeUpLogbook()
        self.settings = Settings(listen=(listener(V4), listener(f"unix:{path}/old")), workers=2, boot_timeout=50.0)
        self.bound = [bind_listener(one) for one in self.settings.listen]
        for one in self.bound:
            stack.callback(one.remove)
        generation = Generation(4, self.settings, self.bound, LOG)
        errands = SimpleNamespace(prepare=lambda *told: self.prepared.append(told) or 17)
        control = SimpleNamespace(fileno=lambda: -1)
        place = SimpleNamespace(lock=-1)
        self.prepared: list[tuple[Any, ...]] = []
        self.state = State(
            generation, 2, cast(Any, None), cast(Any, control), cast(Any, errands), cast(Any, place),
            cast(Crew, self.crew), Notifier({}), Mode.RUNNING,
        )  # fmt: skip
        self.changes = Changes(self.state, cast(Logbook, self.logbook))

    # What is asked

    def ask(self, verb: str, descriptor: int = -1) -> Asker:
        asker = Asker(descriptor)
        self.changes.ask(verb, asker)
        return asker

    # What the helper does

    @property
    def helper(self) -> Worker:
        return self.crew.helpers[-1]

    def say(self, message: Message, helper: Worker | None = None) -> None:
        self.crew.helper_said(helper or self.helper, message)

    def say_settings(self, settings: Settings | None = None) -> Settings:
        told = settings or Settings(
            listen=(listener(V4), listener(f"unix:{self.path}/new"), listener(V4)), workers=3, boot_timeout=70.0
        )
        self.say({"event": "settings", "settings": to_plain(told), "identity": Identity().plain()})
        return told

    def say_bound(self, settings: Settings, place: int) -> BoundListener:
        """Binds a listener as the helper does, in a process that goes away without removing it."""
        bound = bind_listener(settings.listen[place])
        self.stack.callback(bound.close)
        channel: Channel = self.helper.channel
        channel.descriptors += [os.dup(sock.fileno()) for sock in bound.sockets]
        self.say({"event": "bound", "place": place, **bound.described()})
        bound.close()
        return bound

    def end_helper(self, status: int = 0) -> None:
        helper = self.crew.workers.pop(self.helper.pid)
        self.crew.helper_ended(helper, Exit(helper.pid, status, 0))
        helper.channel.close()

    # All of it

    def boot(self) -> Generation:
        """Goes on to where the candidate boots."""
        settings = self.say_settings()
        for place in (1, 2):
            self.say_bound(settings, place)
        self.end_helper()
        assert self.changes.generation is not None
        return self.changes.generation

    def finish(self) -> None:
        """Has the candidate take over."""
        candidate = self.changes.generation
        assert candidate is not None
        view = self.changes.candidate(1.0)
        assert view is not None
        self.crew.complete = (candidate.number, view.wanted)
        self.changes.look()

    def fail_boot(self) -> None:
        """A worker of the change that is under way dies."""
        assert self.changes.current is not None
        self.changes.failed(self.changes.current.number, BootError("worker 2 could not boot", "Traceback\n  of it\n"))

    def end(self) -> None:
        """Gives up what is under way and closes what serves; what the changes have forgotten stays open."""
        self.changes.give_up("the test is over")
        for bound in self.state.generation.bound:
            bound.remove()
        for worker in [*self.crew.workers.values(), *self.crew.helpers]:
            worker.channel.close()
