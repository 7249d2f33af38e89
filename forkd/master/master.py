"""The master: one thread and one loop that waits for signals, control clients, workers' messages and the next deadline.

What is to be done is decided by `plan`, what a mode allows stands in `states`, the children are `crew`'s, and how one
generation gives way to the next is `change`'s. This module drives them, and never blocks: starting, changing and
stopping are states that the one loop advances.
"""

from __future__ import annotations

import logging
import os
import selectors
import time
from math import inf
from typing import Any

from forkd import signals
from forkd.config.units import MOST_WORKERS
from forkd.errors import BootError
from forkd.master import plan, report
from forkd.master.change import RELOAD, UPGRADE, Changes
from forkd.master.control import ControlSocket, Reply
from forkd.master.crew import Crew
from forkd.master.errands import Errands
from forkd.master.generation import Generation, wanted_workers
from forkd.master.herald import Herald
from forkd.master.heritage import Heritage, Place
from forkd.master.logbook import Logbook
from forkd.master.questions import Question, Questions
from forkd.master.requests import Requests
from forkd.master.spawn import Spawner
from forkd.master.state import State
from forkd.master.wakeup import Wakeup
from forkd.signals import Order
from forkd.states import Event, Life, Mode, Turn, next_mode
from forkd.system.channel import MOST_DESCRIPTORS, Channel
from forkd.system.notify import Notifier, forget_manager
from forkd.system.process import set_title
from forkd.system.scoreboard import Row, Scoreboard
from forkd.wire import Message

log = logging.getLogger("forkd.master")

#: Seconds by which a turn of the loop may be late before it counts as sleep, which is held against nobody.
OVERSLEPT = 0.5


class Master:
    """A master.

    Args:
        generation: the first one.
        board: the scoreboard.
        control: the control socket, on `selector`.
        selector: what the loop waits with.
        errands: what its children do.
        place: what outlasts this image.
    """

    def __init__(
        self,
        generation: Generation,
        board: Scoreboard,
        *,
        control: ControlSocket,
        selector: selectors.BaseSelector,
        errands: Errands,
        place: Place,
    ) -> None:
        self._crew = Crew(Spawner(board, self._abandon), selector, failed=self._failed)
        wanted = wanted_workers(generation.settings)
        notifier = Notifier(os.environ)
        self.state = State(generation, wanted, board, control, errands, place, self._crew, notifier)
        self._selector = selector
        self._logbook = Logbook(errands.log_target)
        self._changes = Changes(self.state, self._logbook)
        self._questions = Questions()
        self._crew.answered = self._questions.answered
        self._requests = Requests(self)
        self._wakeup = Wakeup()
        self._expected = inf  # when the next turn should begin
        self._gave_up = False

    def run(self, heritage: Heritage | None = None) -> None:
        """Runs the daemon to its end.

        Args:
            heritage: the state of the image before this one, which goes on.

        Raises:
            BootError: it gave up, because workers can't be had.
        """
        state = self.state
        set_title(state.generation.settings.name, "master")
        self._wakeup.install()
        self._selector.register(self._wakeup, selectors.EVENT_READ, lambda mask: self._signalled())
        state.control.serve(self._requests.answer)
        self._herald = Herald(state, resumed=heritage is not None)
        if heritage is None:
            addresses = ", ".join(str(bound.address) for bound in state.generation.bound)
            log.info("listens on %s; workers: %d", addresses, state.wanted)
        else:
            state.inherit(heritage)
            log.info("goes on as another image; workers: %d", len(state.workers))
            self._crew.reap()  # whoever ended in between
            self._changes.resume([state.control.adopt(descriptor) for descriptor in heritage.clients])
        while state.mode is not Mode.OVER:
            self._turn()
        self._requests.settle()
        if self._gave_up:
            raise state.last_failure or BootError("no worker could be started")

    def _turn(self) -> None:
        """One turn of the loop: do what is due, then wait for what comes next."""
        now = time.monotonic()
        if now > self._expected + OVERSLEPT:
            log.warning("was not there for %.1f s", now - self._expected)
            self.state.awake = now
        self._note_events()
        asked_until = self._questions.settle()  # first: what is over by now is answered now, and else waited for
        self._requests.settle()
        candidate = self._changes.candidate(self.state.generation.settings.boot_timeout)
        due = plan.make_plan(now, self.state.pool(now, candidate))
        tell_again = self._herald.tell(now, self._changes.under_way)
        for action in due.actions:
            self._perform(action)
        # Reckoned from the beginning of this turn: it may be in the middle of one that the master is stopped.
        if due.actions or self.state.mode is Mode.OVER:
            self._expected = now
            return
        deadline = min((when for when in (due.deadline, tell_again, asked_until) if when is not None), default=None)
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._expected = inf if deadline is None else deadline
        for key, mask in self._selector.select(timeout):
            key.data(mask)

    def _perform(self, action: plan.Action) -> None:
        crew, workers = self._crew, self._crew.workers
        match action:
            case plan.Spawn(slot, candidate):
                generation = self._changes.generation if candidate else self.state.generation
                if generation is not None:  # a candidate may have failed by an action before this one
                    self._spawn(slot, generation)
            case plan.Retire(pid, why):
                crew.tell(workers[pid], Turn.RETIRE, signals.DRAIN, why)
            case plan.Close(pid):
                # One that boots has no client and no handler for CLOSE, whose default is to dump core.
                booting = workers[pid].life is Life.BOOTING
                crew.tell(workers[pid], Turn.CLOSE, signals.DRAIN if booting else signals.CLOSE)
            case plan.Dump(pid, cause):
                crew.dump(workers[pid], cause)
            case plan.Kill(pid, cause):
                log.error("kills %s (pid %d): %s", workers[pid].name, pid, cause)
                crew.tell(workers[pid], Turn.KILL, signals.KILL, cause)
            case plan.GiveUp():
                self._gave_up = True
                self._event(Event.GAVE_UP)

    def _spawn(self, slot: int, generation: Generation) -> None:
        def main(row: Row, channel: Channel) -> int:
            present = self.state.generation
            if generation is not present:
                present.close_all_but(generation)
            self._changes.abandon(generation)
            return self.state.errands.serve(generation, slot, row, channel)

        self._crew.spawn(slot, generation.number, main)

    def _event(self, event: Event) -> None:
        state = self.state
        before, state.mode = state.mode, next_mode(state.mode, event)
        if state.mode is before:
            return
        log.info("%s (%s)", state.mode.value, event.value)
        if state.mode in (Mode.DRAINING, Mode.CLOSING):
            state.succeeded = state.succeeded or state.control.displaced
            self._changes.give_up("the daemon stops")
            state.forsake(state.generation.bound)
            for bound in state.generation.bound:  # whoever comes now is refused rather than left waiting
                bound.lent = state.succeeded  # then the path is the successor's
                bound.remove()

    def _note_events(self) -> None:
        """The events that are states of the pool."""
        if self.state.mode is Mode.STARTING and self.state.settled():
            self._event(Event.ALL_READY)
            self.state.errands.on_ready()
        self._changes.look()
        if not self.state.workers:
            self._event(Event.EMPTY)

    def _failed(self, number: int, error: BootError, had_served: bool) -> None:
        if number != self.state.generation.number:
            self._changes.failed(number, error)
        elif not had_served:
            self.state.last_failure = error

    def _abandon(self) -> None:
        """In a forked child: closes all that is the master's alone."""
        self._selector.close()
        self._wakeup.close()
        self.state.control.close()
        self.state.notifier.close()
        forget_manager()
        self._crew.abandon()
        self.state.errands.abandon()

    def status(self) -> dict[str, Any]:
        """The state of the daemon, fit for JSON."""
        return report.status(self.state, self._changes.under_way)

    def ask_workers(self, what: Message) -> Question:
        """Asks all workers a question."""
        return self._questions.ask(self._crew.workers.values(), what)

    # Orders

    def _signalled(self) -> None:
        for row in self._wakeup.arrived():
            self.order(row.order, row.signal.name)

    def order(self, order: Order, source: str) -> None:
        """Does what a signal, or a request, asks."""
        match order:
            case Order.REAP:
                self._crew.reap()
            case Order.STOP:
                log.info("stops, by %s", source)
                self._event(Event.STOP)
            case Order.QUIT:
                log.info("stops at once, by %s", source)
                self._event(Event.QUIT)
            case Order.MORE | Order.FEWER:
                self.scale(self.state.wanted + (1 if order is Order.MORE else -1), source)
            case Order.REOPEN:
                self._logbook.reopen(self.state.generation, self._crew)
            case Order.RELOAD:
                self.change(RELOAD)
            case Order.UPGRADE:
                self.change(UPGRADE)

    def scale(self, wanted: int, source: str) -> None:
        """Wants another number of workers from now on."""
        self.state.wanted = min(MOST_WORKERS, max(1, wanted))
        log.info("wants %d workers, by %s", self.state.wanted, source)

    def change(self, verb: str, reply: Reply | None = None) -> None:
        """Reloads or upgrades, or tells what a reload would change."""
        if self._requests.succession:  # the other master has taken its listeners from those of today
            log.warning("%s: not now, a restart is under way", verb)
            if reply is not None:
                reply({"ok": False, "error": "a restart is under way"})
            return
        self._changes.ask(verb, reply)

    def hand_over(self, reply: Reply) -> None:
        """Lends the lock and the listeners to another master, which is to succeed this one."""
        bound = self.state.generation.bound
        sockets = [sock.fileno() for one in bound for sock in one.sockets]
        if len(sockets) >= MOST_DESCRIPTORS:
            reply({"ok": False, "error": f"{len(sockets)} sockets are too many to hand over; stop and start it"})
            return
        reply({"ok": True, "listeners": [one.described() for one in bound]}, [self.state.place.lock, *sockets])
