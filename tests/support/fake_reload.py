"""What a change is made with, for its tests: a pool whose children are not forked, and a master's state around it."""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.serialize import to_plain
from forkd.config.settings import Settings
from forkd.errors import BootError, ForkdError
from forkd.master.generation import Generation
from forkd.master.plan import Slot
from forkd.master.reload import Changes, LogFiles
from forkd.master.spawn import HELPER, ChildMain, Exit, Worker
from forkd.master.state import DaemonState
from forkd.master.workers import WorkerPool
from forkd.messages import (
    BoundEvent,
    ChildEvent,
    ErrorReply,
    InvalidMessage,
    JsonObject,
    KeptEvent,
    Reply,
    SettingsEvent,
    decode_event,
)
from forkd.states import MasterState, WorkerState
from forkd.system.channel import Channel, channel_pair
from forkd.system.handler_metrics import SeriesTotals
from forkd.system.identity import Identity
from forkd.system.listeners import BoundListener, bind_listener
from forkd.system.notify import Notifier
from forkd.system.scoreboard import Row

V4 = "tcp://127.0.0.1:0"
LOG = 99  # no descriptor: nothing logs here


def listener(address: str, **more: Any) -> Listener:
    return Listener(address=parse_address(address), handler="a:b", **more)


class FakeWorkerPool:
    """Children that do what a test says."""

    def __init__(self) -> None:
        self.workers: dict[int, Worker] = {}
        self.slots: defaultdict[int, dict[int, Slot]] = defaultdict(dict)
        self.exit_records: deque[dict[str, Any]] = deque()
        self.exited_totals: dict[int, dict[str, int]] = {}
        self.exited_listeners: dict[str, list[int]] = {}
        self.handler_metrics = SeriesTotals()
        self.exit_counts: dict[str, int] = {}
        self.complete: tuple[int, int] | None = None  # the generation that serves with so many
        self.replaced_take: bool = False  # whether those before it take clients yet
        self.fork_error: BootError | None = None
        self.helpers: list[Worker] = []
        self.mains: list[ChildMain] = []

    def serves(self, generation: int, wanted: int) -> bool:
        return self.complete == (generation, wanted)

    def take_clients(self, before: int) -> bool:
        return self.replaced_take

    def add(self, slot: int, generation: int, state: WorkerState = WorkerState.BOOTING) -> Worker:
        pid = 1000 + len(self.helpers) + len(self.workers)
        channel, other = channel_pair()
        other.close()
        self.workers[pid] = Worker(pid, slot, generation, cast(Row, None), channel, -1, state, since=0.0, forked_at=0.0)
        return self.workers[pid]

    def spawn(self, slot: int, generation: int, main: ChildMain) -> None:
        assert slot == HELPER
        if self.fork_error is not None:
            self.slots[generation][slot] = Slot(1, 5.0)
            raise self.fork_error
        self.mains.append(main)
        self.helpers.append(self.add(slot, generation))


class FakeLogFiles:
    """Opens what a test says, and notes what it is told."""

    def __init__(self) -> None:
        self.descriptor = LOG
        self.error: ForkdError | None = None
        self.told: list[str] = []

    def open_for(self, settings: Settings, identity: Identity, present: Generation) -> int:
        if self.error is not None:
            raise self.error
        return self.descriptor

    def switch(self, before: Generation, after: Generation) -> None:
        self.told.append(f"{before.number} to {after.number}")

    def discard(self, candidate: Generation, present: Generation) -> None:
        self.told.append(f"discard {candidate.number}")


class Asker(list[Reply]):
    """A client that asks for a change: the outcomes that it gets."""

    def __init__(self, descriptor: int = -1) -> None:
        super().__init__()
        self.descriptor = descriptor
        self.is_owner = True

    def reply(self, reply: Reply, descriptors: Sequence[int] = ()) -> None:
        self.append(reply)

    def fileno(self) -> int:
        return self.descriptor

    def keep(self) -> None:
        """As of a client; no other takes its place."""

    @property
    def succeeded(self) -> list[bool]:
        """Of each outcome, whether it is no error."""
        return [not isinstance(reply, ErrorReply) for reply in self]

    @property
    def errors(self) -> list[str]:
        """The errors among the outcomes."""
        return [reply.error for reply in self if isinstance(reply, ErrorReply)]


def _decoded(message: JsonObject) -> ChildEvent | InvalidMessage:
    """What the pool makes of what a helper sends."""
    try:
        return decode_event(message)
    except InvalidMessage as error:
        return error


class FakeReload:
    """A running daemon with two listeners, whose changes a test drives."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self.path, self.stack = path, stack
        self.pool, self.log_files = FakeWorkerPool(), FakeLogFiles()
        self.settings = Settings(listen=(listener(V4), listener(f"unix:{path}/old")), workers=2, boot_timeout=50.0)
        self.bound = [bind_listener(one) for one in self.settings.listen]
        for one in self.bound:
            stack.callback(one.remove)
        generation = Generation(4, self.settings, self.bound, LOG)
        entry_points = SimpleNamespace(prepare=self._prepare)
        control = SimpleNamespace(fileno=lambda: -1, hand_over=lambda waiting: waiting, share=lambda group: None)
        launch = SimpleNamespace(lock=-1)
        self.prepared: list[tuple[Any, ...]] = []
        self.state = DaemonState(
            generation, 2, cast(Any, None), cast(Any, control), cast(Any, entry_points), cast(Any, launch),
            cast(WorkerPool, self.pool), Notifier({}), MasterState.RUNNING,
        )  # fmt: skip
        self.changes = Changes(self.state, cast(LogFiles, self.log_files))

    def _prepare(self, *told: Any) -> int:
        self.prepared.append(told)
        return 17

    # What is asked

    def ask(self, verb: str, descriptor: int = -1) -> Asker:
        asker = Asker(descriptor)
        self.changes.ask(verb, asker)
        return asker

    # What the helper does

    @property
    def helper(self) -> Worker:
        return self.pool.helpers[-1]

    def say(self, message: ChildEvent | JsonObject, helper: Worker | None = None) -> None:
        self.changes.helper_said(helper or self.helper, _decoded(message) if isinstance(message, dict) else message)

    def say_settings(self, settings: Settings | None = None) -> Settings:
        told = settings or Settings(
            listen=(listener(V4), listener(f"unix:{self.path}/new"), listener(V4)), workers=3, boot_timeout=70.0
        )
        self.say(SettingsEvent(to_plain(told), Identity().to_plain()))
        return told

    def say_kept(self, place: int, index: int) -> None:
        """Keeps a listener that is there."""
        self.say(KeptEvent(place, index))

    def say_bound(self, settings: Settings, place: int) -> BoundListener:
        """Binds a listener as the helper does, in a process that goes away without removing it."""
        bound = bind_listener(settings.listen[place])
        self.stack.callback(bound.close)
        channel: Channel = self.helper.channel
        channel.descriptors += [os.dup(sock.fileno()) for sock in bound.sockets]
        self.say(BoundEvent(place, bound.describe()))
        bound.close()
        return bound

    def end_helper(self, status: int = 0) -> None:
        helper = self.pool.workers.pop(self.helper.pid)
        self.changes.helper_exited(helper, Exit(helper.pid, status, 0))
        helper.channel.close()

    # All of it

    def boot(self) -> Generation:
        """Goes on to where the candidate boots."""
        settings = self.say_settings()
        self.say_kept(0, 0)
        for place in (1, 2):
            self.say_bound(settings, place)
        self.end_helper()
        assert self.changes.candidate is not None
        return self.changes.candidate

    def finish(self, now: float = 0.0) -> None:
        """Has the candidate take over."""
        candidate = self.changes.candidate
        assert candidate is not None
        view = self.changes.candidate_view(1.0)
        assert view is not None
        self.pool.complete = (candidate.number, view.wanted)
        self.changes.advance(now)

    def fail_boot(self) -> None:
        """A worker of the change that is under way dies."""
        assert self.changes.current is not None
        self.changes.generation_failed(
            self.changes.current.number, BootError("worker 2 could not boot", "Traceback\n  of it\n")
        )

    def end(self) -> None:
        """Gives up what is under way and closes what serves; what the changes have forgotten stays open."""
        self.changes.cancel("the test is over")
        for bound in self.state.generation.bound:
            bound.remove()
        for worker in [*self.pool.workers.values(), *self.pool.helpers]:
            worker.channel.close()
