"""The master: one thread and one loop that waits for signals, control clients, workers' messages and the next deadline.

What is to be done is decided by `plan`, what a state allows stands in `states`, forking and killing is `spawn`'s. This
module holds the state between them, and never blocks: starting and stopping are states that the one loop advances.
"""

from __future__ import annotations

import logging
import random
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from forkd import signals
from forkd.config.options import Settings
from forkd.config.units import MOST_WORKERS
from forkd.errors import BootError
from forkd.master import plan, report
from forkd.master.control import ControlSocket
from forkd.master.requests import Requests
from forkd.master.spawn import ChildMain, Exit, Spawner, Worker
from forkd.master.wakeup import Wakeup
from forkd.signals import Order
from forkd.states import Event, Life, Mode, Turn, next_life, next_mode
from forkd.system.channel import ChannelClosed
from forkd.system.process import set_title
from forkd.system.scoreboard import Scoreboard
from forkd.system.sockets import BoundListener

log = logging.getLogger("forkd.master")

#: Deaths that `forkd status` tells of.
REMEMBERED = 20

#: Reads of a dead worker's channel at most: enough for the longest message, and an end where its own children hold the
#: channel open.
_LAST_READS = 32

#: Characters of a worker's words that are kept; what it says may be anything.
_WORDS = 20_000


class Master:
    """The state of a running master.

    Args:
        settings: the daemon's.
        listeners: bound; the master's until the end.
        board: the scoreboard.
        control: the control socket, on `selector`.
        selector: what the loop waits with.
        child_main: what a forked worker runs.
        abandon: closes, in a forked child, what else is the master's alone (the pid file's lock).
        on_ready: called once, when every wanted worker serves.
    """

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[BoundListener],
        board: Scoreboard,
        *,
        wanted: int,
        control: ControlSocket,
        selector: selectors.BaseSelector,
        child_main: ChildMain,
        abandon: Callable[[], None],
        on_ready: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.listeners = listeners
        self.wanted = wanted
        self.mode = Mode.STARTING
        self.started = time.time()
        self.workers: dict[int, Worker] = {}
        self.deaths: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self.last_failure: BootError | None = None  # the last one
        self._gave_up = False
        self._slots: dict[int, plan.Slot] = {}
        self._control = control
        self._selector = selector
        self._on_ready = on_ready
        self._requests = Requests(self)
        self._spawner = Spawner(child_main, board, self._abandon)
        self._abandon_more = abandon
        self._wakeup = Wakeup()

    def run(self) -> None:
        """Runs the daemon to its end.

        Raises:
            BootError: it gave up, because workers can't be had.
        """
        set_title(self.settings.name, "master")
        self._wakeup.install()
        self._selector.register(self._wakeup, selectors.EVENT_READ, lambda mask: self._signalled())
        self._control.serve(self._requests.answer)
        log.info("listens on %s; workers: %d", ", ".join(str(bound.address) for bound in self.listeners), self.wanted)
        while self.mode is not Mode.OVER:
            self._turn()
        self._requests.settle()
        if self._gave_up:
            raise self.last_failure or BootError("no worker could be started")

    def _turn(self) -> None:
        """One turn of the loop: do what is due, then wait for what comes next."""
        self._note_events()
        self._requests.settle()
        due = plan.make_plan(time.monotonic(), self._pool())
        for action in due.actions:
            self._perform(action)
        if due.actions or self.mode is Mode.OVER:
            return
        timeout = None if due.deadline is None else max(0.0, due.deadline - time.monotonic())
        for key, mask in self._selector.select(timeout):
            key.data(mask)

    def _pool(self) -> plan.Pool:
        views = tuple(plan.WorkerView(w.pid, w.slot, w.life, w.since) for w in self.workers.values())
        settings = self.settings
        return plan.Pool(self.mode, self.wanted, views, self._slots, settings.boot_timeout, settings.drain_timeout)

    def _perform(self, action: plan.Action) -> None:
        match action:
            case plan.Spawn(slot):
                self._spawn(slot)
            case plan.Retire(pid):
                self._tell(self.workers[pid], Turn.RETIRE, signals.DRAIN)
            case plan.Close(pid):
                worker = self.workers[pid]
                # One that boots has no client and no handler for CLOSE, whose default is to dump core.
                booting = worker.life is Life.BOOTING
                self._tell(worker, Turn.CLOSE, signals.DRAIN if booting else signals.CLOSE)
            case plan.Kill(pid, cause):
                worker = self.workers[pid]
                worker.cause = worker.cause or cause
                worker.killed_as = worker.life
                log.error("kills worker %d (pid %d): %s", worker.slot, pid, cause)
                self._tell(worker, Turn.KILL, signals.KILL)
            case plan.GiveUp():
                self._gave_up = True
                self._event(Event.GAVE_UP)

    def _tell(self, worker: Worker, turn: Turn, signum: signal.Signals) -> None:
        self._live(worker, turn)
        self._spawner.signal(worker, signum)

    def _live(self, worker: Worker, turn: Turn) -> None:
        life = next_life(worker.life, turn)
        if life is not worker.life:
            worker.life, worker.since = life, time.monotonic()

    def _event(self, event: Event) -> None:
        before, self.mode = self.mode, next_mode(self.mode, event)
        if self.mode is not before:
            log.info("%s (%s)", self.mode.value, event.value)
        if self.mode in (Mode.DRAINING, Mode.CLOSING):  # whoever comes now is refused rather than left waiting
            for bound in self.listeners:
                bound.remove()

    def _note_events(self) -> None:
        """The events that are states of the pool."""
        if self.mode is Mode.STARTING and self.settled():
            self._event(Event.ALL_READY)
            self._on_ready()
        if not self.workers:
            self._event(Event.EMPTY)

    @property
    def drain_timeout(self) -> float:
        """Seconds that open connections have to end after a stop."""
        return self.settings.drain_timeout

    def status(self) -> dict[str, Any]:
        """The state of the daemon, fit for JSON."""
        return report.status(self)

    def settled(self) -> bool:
        """Whether there are just the workers that are wanted, and all serve."""
        staying = [worker for worker in self.workers.values() if worker.life in (Life.BOOTING, Life.SERVING)]
        serving = {worker.slot for worker in staying if worker.life is Life.SERVING}
        return len(staying) == self.wanted and serving == set(range(1, self.wanted + 1))

    # Workers

    def _spawn(self, slot: int) -> None:
        now = time.monotonic()
        try:
            worker = self._spawner.spawn(slot, now)
        except (OSError, OverflowError) as error:
            self.last_failure = BootError(f"can't make worker {slot}: {error}")
            log.error("%s", self.last_failure)
            self._slots[slot] = plan.after_fork_failed(self._slots.get(slot, plan.Slot()), now, random.random())  # noqa: S311
            return
        self.workers[worker.pid] = worker
        self._selector.register(worker.channel, selectors.EVENT_READ, lambda mask: self._hear(worker))
        log.debug("worker %d boots, pid %d", slot, worker.pid)

    def _hear(self, worker: Worker) -> None:
        """Takes what a worker says; it is a claim about itself, and changes nothing but its own fate."""
        try:
            messages = worker.channel.receive()
        except ChannelClosed:
            self._stop_hearing(worker)
            messages = []
        for message in messages:
            event = message.get("event")
            if event == "ready":
                if worker.life is Life.BOOTING:
                    worker.ready_at = time.monotonic()
                    log.info("worker %d is ready, pid %d", worker.slot, worker.pid)
                self._live(worker, Turn.READY)
            elif event == "failed":
                self._could_not_boot(worker, str(message.get("reason"))[:_WORDS], str(message.get("details"))[:_WORDS])
            else:
                log.warning("worker %d (pid %d) says what nobody understands", worker.slot, worker.pid)

    def _stop_hearing(self, worker: Worker) -> None:
        if worker.heard:
            worker.heard = False
            self._selector.unregister(worker.channel)
            worker.channel.close()

    def _could_not_boot(self, worker: Worker, reason: str, details: str) -> None:
        worker.cause, worker.details = f"could not boot: {reason}", details
        self.last_failure = BootError(f"worker {worker.slot} could not boot: {reason}", details)

    def _reap(self) -> None:
        for ended in self._spawner.reap():
            worker = self.workers.pop(ended.pid, None)
            if worker is not None:
                self._bury(worker, ended)

    def _bury(self, worker: Worker, ended: Exit) -> None:
        for _ in range(_LAST_READS):  # its last words may still lie in the channel
            if worker.heard:
                self._hear(worker)
        self._stop_hearing(worker)
        now = time.monotonic()
        served = 0.0 if worker.ready_at is None else now - worker.ready_at
        self._slots[worker.slot] = plan.after_death(
            self._slots.get(worker.slot, plan.Slot()),
            worker.killed_as or worker.life,
            now,
            served,
            random.random(),  # noqa: S311
        )
        expected = worker.life in (Life.DRAINING, Life.CLOSING)
        if worker.ready_at is None and not expected and not worker.details:
            why = f"could not boot: {worker.cause}" if worker.cause else f"ended before it was ready: {ended}"
            self.last_failure = BootError(f"worker {worker.slot} {why}")
            worker.cause = worker.cause or "it ended before it was ready"
        self.deaths.append(report.certificate(worker, ended, now, expected=expected))
        # One that drained on somebody else's word (a signal to the whole process group) has done nothing wrong.
        level = logging.INFO if expected or ended.status == 0 else logging.ERROR
        log.log(level, "%s", report.obituary(worker, ended))
        self._live(worker, Turn.EXIT)
        worker.row.clear()

    def _abandon(self) -> None:
        """In a forked child: closes all that is the master's alone."""
        self._selector.close()
        self._wakeup.close()
        self._control.close()
        for worker in self.workers.values():
            worker.channel.close()
        self._abandon_more()

    # Orders

    def _signalled(self) -> None:
        for row in self._wakeup.arrived():
            self.order(row.order, row.signal.name)

    def order(self, order: Order, source: str) -> None:
        """Does what a signal, or a request, asks."""
        match order:
            case Order.REAP:
                self._reap()
            case Order.STOP:
                log.info("stops, by %s", source)
                self._event(Event.STOP)
            case Order.QUIT:
                log.info("stops at once, by %s", source)
                self._event(Event.QUIT)
            case Order.MORE | Order.FEWER:
                self.scale(self.wanted + (1 if order is Order.MORE else -1), source)
            case Order.NOTHING:
                log.info("ignores %s", source)

    def scale(self, wanted: int, source: str) -> None:
        """Wants another number of workers from now on."""
        self.wanted = min(MOST_WORKERS, max(1, wanted))
        log.info("wants %d workers, by %s", self.wanted, source)
