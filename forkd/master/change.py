"""Reloads and upgrades: how one generation of workers gives way to the next, or does not.

A reload is a transaction. A helper process reads the settings anew and binds what is new; then a whole generation boots
beside the one that serves; when all of it is ready it takes over. Whatever goes wrong on the way, the generation that
serves has not been touched. An upgrade tries the new code in a helper, replaces the master's image, and reloads.

One change at a time: what is asked meanwhile is done after it, once, however often it was asked.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from forkd import signals
from forkd.config.options import Settings
from forkd.config.plain import from_plain
from forkd.errors import BootError, ForkdError
from forkd.master.control import Reply
from forkd.master.generation import Generation, wanted_after
from forkd.master.logbook import Logbook
from forkd.master.plan import Candidate
from forkd.master.spawn import HELPER, Exit, Worker
from forkd.master.state import State
from forkd.master.upgrade import replace_image, try_or_tell
from forkd.states import Mode
from forkd.system.bound import BoundListener
from forkd.system.channel import Channel
from forkd.system.identity import Identity
from forkd.system.process import signal_when_parent_dies
from forkd.system.scoreboard import Row
from forkd.system.sockets import match_listeners
from forkd.wire import Message

log = logging.getLogger("forkd.master")

#: What may be asked for; an upgrade does all that a reload does.
RELOAD, UPGRADE, DIFF = "reload", "upgrade", "diff"


@dataclass(slots=True)
class Change:
    """One change: what was asked, how far it is, and who waits for it."""

    verb: str
    number: int = 0  # of the generation that it is to make
    replies: list[Reply] = field(default_factory=list)
    found: Message = field(default_factory=dict)  # what the helper found, when it is done
    settings: Settings | None = None
    identity: Identity = field(default_factory=Identity)
    fresh: dict[int, BoundListener] = field(default_factory=dict)  # those bound for it, by place in the settings
    candidate: Generation | None = None


class Changes:
    """The change that is under way, and the one after it.

    Args:
        state: the master's.
        logbook: where it logs.
    """

    def __init__(self, state: State, logbook: Logbook) -> None:
        self._state = state
        self._crew = state.crew
        self._logbook = logbook
        self._crew.helper_said, self._crew.helper_ended = self._said, self._helper_ended
        self.current: Change | None = None
        self._next: Change | None = None

    def ask(self, verb: str, reply: Reply | None = None) -> None:
        """Wants a change; `reply` gets the outcome."""
        mode, replies = self._state.mode, [] if reply is None else [reply]
        busy = self.under_way or (mode.value if mode is Mode.STARTING else "")
        if mode not in (Mode.STARTING, Mode.RUNNING):
            log.warning("%s: not now, the daemon is %s", verb, mode.value)
            self._end(Change(verb, replies=replies), {"ok": False, "error": f"the daemon is {mode.value}"})
        elif not busy:
            self._begin(Change(verb, replies=replies))
        elif verb == DIFF:
            self._end(Change(verb, replies=replies), {"ok": False, "error": f"the daemon is busy: {busy}; ask again"})
        else:
            if self._next is None:
                self._next = Change(verb)
            elif verb == UPGRADE:
                self._next.verb = verb
            self._next.replies += replies
            log.info("%s: waits for what is under way: %s", self._next.verb, busy)

    @property
    def generation(self) -> Generation | None:
        """The candidate, when there is one."""
        return self.current.candidate if self.current is not None else None

    @property
    def under_way(self) -> str:
        """The verb of the change that is under way; empty when none is."""
        return self.current.verb if self.current is not None else ""

    def resume(self, replies: list[Reply]) -> None:
        """In a new image of the master: the second half of the upgrade that brought it."""
        self._begin(Change(RELOAD, replies=replies))

    def candidate(self, boot_timeout: float) -> Candidate | None:
        """The generation that is to be, as the plan sees it: with nobody in it while a helper is at work."""
        change = self.current
        if change is None:
            return None
        if change.candidate is None:
            return Candidate(change.number, 0, boot_timeout)
        settings = change.candidate.settings
        return Candidate(change.number, self._wanted(settings), settings.boot_timeout)

    def _wanted(self, settings: Settings) -> int:
        return wanted_after(self._state.generation.settings, self._state.wanted, settings)

    def _begin(self, change: Change) -> None:
        self.current = change
        change.number = 1 + max(self._state.generation.number, *(w.generation for w in self._crew.workers.values()), 0)
        self._crew.slots.pop(change.number, None)  # a generation that failed may have had the same number
        if change.verb != DIFF:
            log.info("%s: begins", change.verb)
        self._help(change)

    def _help(self, change: Change) -> None:
        """Forks a helper that does the first step of a change."""
        state, pid = self._state, os.getpid()

        def main(row: Row, channel: Channel) -> int:
            signal_when_parent_dies(signals.KILL, pid)  # it has copies of the listeners, and may hang
            if change.verb == UPGRADE:
                return try_or_tell(state.heritage([]), channel)
            return state.errands.prepare(state.generation, change.verb, channel)

        self._crew.spawn(HELPER, change.number, main)

    def _said(self, worker: Worker, message: Message) -> None:
        """Takes what a helper says."""
        change = self.current
        if change is None or worker.generation != change.number:
            return
        try:
            match message.get("event"):
                case "settings":
                    change.settings = from_plain(message["settings"])
                    change.identity = Identity.of(message["identity"])
                case "bound":
                    self._bound(change, worker.channel, message)
                case _:
                    change.found = message
        except (ForkdError, ValueError, KeyError, TypeError, IndexError) as error:
            self.fail(f"the helper says what nobody understands: {error}")

    def _bound(self, change: Change, channel: Channel, message: dict[str, Any]) -> None:
        assert change.settings is not None  # noqa: S101 (it comes first)
        place = message["place"]
        change.fresh[place] = BoundListener.taken(message, change.settings.listen[place], channel.descriptors)

    def _helper_ended(self, worker: Worker, ended: Exit) -> None:
        """Goes on with what the helper found, or ends."""
        change = self.current
        if change is None or worker.generation != change.number:
            return
        if ended.status != 0:
            reason, details = _reason(worker, ended, change.found)
            self.fail(reason, details)
        elif change.verb == UPGRADE:
            self._upgrade(change)
        elif change.verb == DIFF:
            self._end(change, {"ok": True, **change.found})
        else:
            self._boot(change)

    def _upgrade(self, change: Change) -> None:
        log.info("upgrade: the new code can start; goes over to it")
        # The watchdog will not hear of us for the time that an interpreter takes to start.
        self._state.notifier.send("WATCHDOG=1")
        # The new image begins with a reload, which is what those who wait have asked for too.
        replies = change.replies + (self._next.replies if self._next is not None else [])
        try:
            replace_image(self._state.heritage([reply.fileno() for reply in replies if reply.fileno() >= 0]))
        except ForkdError as error:
            self.fail(str(error))

    def _boot(self, change: Change) -> None:
        settings, fresh = change.settings, change.fresh
        try:
            assert settings is not None  # noqa: S101 (a helper that ends well has told them)
            present = self._state.generation
            kept = match_listeners(settings.listen, present.bound)
            bound = [one or fresh[place] for place, one in enumerate(kept)]
            log_to = self._logbook.open_for(settings, present)
            change.candidate = Generation(change.number, settings, bound, log_to, change.identity)
            self.fit(self._state.wanted)
        except (ForkdError, KeyError) as error:
            self.fail(str(error))

    def fit(self, wanted: int, *, shrink: bool = False) -> None:
        """Binds the datagram sockets that are missing for so many workers, or for those of the candidate if they are
        more; and lets go those that are too many, if that is meant. Raises ForkdError; then nothing is bound.
        """
        candidate, bound = self.generation, [*self._state.generation.bound]
        if candidate is not None:
            wanted = max(wanted, self._wanted(candidate.settings))
            bound += candidate.bound
        for one in bound:
            one.fit(wanted, shrink=shrink)

    def look(self) -> None:
        """Lets the candidate take over when all of it serves; begins what has waited, when nothing is under way."""
        change = self.current
        if change is None and self._next is not None and self._state.mode is Mode.RUNNING:
            following, self._next = self._next, None
            self._begin(following)
        if change is None or change.candidate is None:
            return
        wanted = self._wanted(change.candidate.settings)
        if self._crew.serves(change.number, wanted):
            self._take_over(change.candidate)
            self._state.refusal = ""
            log.info("%s: done, generation %d serves", change.verb, change.number)
            self._end(change, {"ok": True, "generation": change.number, "workers": wanted})
            self._let_go()

    def _take_over(self, candidate: Generation) -> None:
        """Makes a candidate the generation that serves. The one before it retires, by the next plan."""
        state, before = self._state, self._state.generation
        state.wanted = self._wanted(candidate.settings)
        state.turn_over(candidate)
        before.give_way(candidate)
        self._logbook.turn_over(before, candidate)
        self._crew.slots.pop(before.number, None)

    def failed(self, number: int, error: BootError) -> None:
        """A worker of this generation could not boot, or has died."""
        if self.current is not None and self.current.number == number:
            self.fail(str(error), error.details, logged=True)

    def fail(self, reason: str, details: str = "", *, logged: bool = False, level: int = logging.ERROR) -> None:
        """Ends the change that is under way; the generation that serves goes on untouched.

        Args:
            reason: a sentence.
            details: the lines that belong below it.
            logged: whether those stand in the log already.
            level: how bad that is.
        """
        change = self.current
        if change is None:
            return
        if change.verb != DIFF:
            self._state.refusal = f"{change.verb} failed: {reason}"
        below = f"\n{details.rstrip()}" if details and not logged else ""
        log.log(level, "%s: failed, and nothing has changed: %s%s", change.verb, reason, below)
        for bound in change.fresh.values():
            bound.remove()
        if change.candidate is not None:
            self._logbook.close(change.candidate, self._state.generation)
            self._crew.slots.pop(change.number, None)
        self._end(change, {"ok": False, "error": reason, "details": details})
        self._let_go()

    def _let_go(self) -> None:
        """Lets go the datagram sockets that were bound for what is not to be, or is no more."""
        if self._state.mode in (Mode.STARTING, Mode.RUNNING):
            self.fit(self._state.wanted, shrink=True)

    def abandon(self, kept: Generation) -> None:
        """In a worker: closes what was bound for a generation that is not its own."""
        for bound in self.current.fresh.values() if self.current is not None else ():
            if bound not in kept.bound:
                bound.close()

    def give_up(self, why: str) -> None:
        """Ends what is under way and what waits: the daemon stops."""
        waiting, self._next = self._next, None
        self.fail(why, level=logging.INFO)
        if waiting is not None:
            self._end(waiting, {"ok": False, "error": why})

    def _end(self, change: Change, outcome: Message) -> None:
        if change is self.current:
            self.current = None
        for reply in change.replies:
            reply(outcome)


def _reason(worker: Worker, ended: Exit, found: Message) -> tuple[str, str]:
    """Why a helper failed, in its own words if it had any, and the lines that belong below."""
    if found.get("event") == "failed":
        return str(found.get("reason")), str(found.get("details", ""))
    if worker.cause:  # the master's word
        return worker.cause, "\n".join(worker.words)
    if not worker.words:
        return f"the helper has ended: {ended}", ""
    *details, last = worker.words
    return last.removeprefix("forkd: "), "\n".join(details)
