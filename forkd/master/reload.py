"""How one generation of workers gives way to the next, or does not: reloads, upgrades, and what a reload would change.

A reload is a transaction. A helper process reads the settings again, says which listeners it keeps and binds what is
new; then a whole generation, the candidate, boots beside the one that serves; when all of it is ready it takes over,
and the reload is done as soon as the workers that it replaces take no more clients. Whatever goes wrong before, the
generation that serves has not been touched. An upgrade tries the new code in a helper, replaces the master's image, and
reloads. `Changes` has one change under way at a time: what is asked meanwhile is done after it, once, however often it
was asked.

`LogFiles` are the master's: opened here, reopened when they were rotated, changed with the settings. The log's
descriptor keeps its number for the daemon's life; what it leads to changes. Workers get a new file by their channels,
since they may not be allowed to open it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from forkd import signals
from forkd.config.listener import Listener
from forkd.config.serialize import from_plain
from forkd.config.settings import Settings
from forkd.errors import BootError, ForkdError
from forkd.master.admin.loading import load_extras
from forkd.master.control_socket import ControlClient
from forkd.master.generation import Generation, wanted_after
from forkd.master.plan import Candidate
from forkd.master.spawn import HELPER, Exit, Worker
from forkd.master.state import DaemonState
from forkd.master.upgrade import changed_file, replace_image, try_or_tell
from forkd.master.workers import DRAINING_SECONDS, WorkerPool
from forkd.messages import (
    BoundEvent,
    ChangedReply,
    ChildEvent,
    DifferencesEvent,
    DifferencesReply,
    ErrorReply,
    FailedEvent,
    InvalidMessage,
    KeptEvent,
    LogCommand,
    Reply,
    SettingsEvent,
    shorten,
)
from forkd.states import MasterState
from forkd.system.channel import Channel
from forkd.system.identity import Identity
from forkd.system.listeners import BoundListener
from forkd.system.logs import log_to_stderr, open_log, replace_log, separate_log, start_logging
from forkd.system.process import signal_when_parent_dies
from forkd.system.scoreboard import Row

log = logging.getLogger("forkd.master")

_MOST_TEXT = 40_000  # bytes of a reason, and of the lines below it, that are kept

#: What may be asked for; an upgrade does all that a reload does.
RELOAD, UPGRADE, DIFF = "reload", "upgrade", "diff"


class LogFiles:
    """Opens the log and hands it to the master and the workers.

    Args:
        target: where these settings have the daemon log: a file, the journal, or None for where it was started.
    """

    def __init__(self, target: Callable[[Settings], Path | str | None]) -> None:
        self._target = target

    def reopen(self, generation: Generation, pool: WorkerPool) -> None:
        """Reopens the log file, for the master and the workers; where that can't be done the open one stays."""
        path = self._target(generation.settings)
        if not isinstance(path, Path):
            log.info("log reopen ignored: not logging to a file")
            return
        try:
            descriptor = open_log(path, generation.identity)
        except ForkdError as error:
            log.error("log reopen failed, the open file stays: %s", error)
            return
        pool.send_all(LogCommand(), partial(separate_log, descriptor))
        replace_log(descriptor)
        log.info("log file %s reopened", path)

    def open_for(self, settings: Settings, identity: Identity, present: Generation) -> int:
        """The descriptor to log to by these settings, the present one where they say the same. Raises ForkdError."""
        target = self._target(settings)
        if target == self._target(present.settings):
            return present.log
        return log_to_stderr() if target is None else open_log(target, identity)

    def switch(self, before: Generation, after: Generation) -> None:
        """Has the master log as the new generation does."""
        if after.log != before.log:
            # A log that went to standard error leaves it where it was: a later reload may want it back.
            replace_log(after.log, output=self._target(before.settings) is not None)
            after.log = before.log
        settings = after.settings
        start_logging(settings.name, settings.log.level, settings.log.form, after.log)

    def discard(self, candidate: Generation, present: Generation) -> None:
        """Closes what was opened for a candidate that has failed."""
        if candidate.log != present.log:
            os.close(candidate.log)


@dataclass(slots=True)
class Change:
    """One change: what was asked, how far it is, and the clients that wait for its outcome.

    Attributes:
        number: of the generation that it is to make.
        settings, identity: as its helper has read them.
        listeners: by place in the settings, those that its helper keeps and those that it has bound.
        bound: the latter.
        differences: what its helper says that a reload would change.
        failure: why its helper says that it failed.
        candidate: the generation that boots, once its helper has ended well, until it takes over.
        done_by: when it is done, of a generation that has taken over, whatever the workers before it do.
    """

    verb: str
    number: int = 0
    clients: list[ControlClient] = field(default_factory=list)
    settings: Settings | None = None
    identity: Identity = field(default_factory=Identity)
    listeners: dict[int, BoundListener] = field(default_factory=dict)
    bound: list[BoundListener] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    failure: FailedEvent | None = None
    candidate: Generation | None = None
    done_by: float | None = None

    def take_event(self, event: ChildEvent | InvalidMessage, channel: Channel, present: Generation) -> None:
        """Takes what its helper has sent.

        Args:
            event: the message.
            channel: the helper's, with the descriptors of listeners.
            present: the generation that serves.

        Raises:
            ForkdError, ValueError, LookupError, TypeError: it makes no sense.
        """
        match event:
            case SettingsEvent():
                self.settings, self.identity = from_plain(event.settings), Identity.from_plain(event.identity)
            case KeptEvent():
                self._keep(event, present)
            case BoundEvent():
                listener = _all_listeners(self._told_settings())[event.place]
                if event.place in self.listeners:
                    raise ValueError(f"listener {event.place} twice")
                bound = BoundListener.from_description(event.listener, listener, channel.descriptors)
                self.listeners[event.place] = bound
                self.bound.append(bound)
            case DifferencesEvent():
                self.differences = event.differences
            case FailedEvent():
                self.failure = event
            case InvalidMessage():
                raise event
            case _:
                raise ValueError("only workers send it")

    def _keep(self, event: KeptEvent, present: Generation) -> None:
        """Keeps a listener of the generation that serves, if it is one that the settings can mean, and once."""
        listener = _all_listeners(self._told_settings())[event.place]
        kept = (*present.bound, *present.services)[event.index]
        if listener.address not in (kept.listener.address, kept.address):
            raise ValueError(f"{listener.address} is not {kept.address}")
        if event.place in self.listeners or any(one.sockets is kept.sockets for one in self.listeners.values()):
            raise ValueError(f"listener {event.place} twice")
        self.listeners[event.place] = replace(kept, listener=listener)

    def _told_settings(self) -> Settings:
        if self.settings is None:
            raise ValueError("a listener before the settings")
        return self.settings


class Changes:
    """The change that is under way, and the one after it.

    Args:
        state: the master's.
        log_files: where it logs.
    """

    def __init__(self, state: DaemonState, log_files: LogFiles) -> None:
        self._state = state
        self._pool = state.pool
        self._log_files = log_files
        self._tried = -1  # where an image that is tried says which files it is made of
        self.current: Change | None = None
        self._next: Change | None = None

    @property
    def candidate(self) -> Generation | None:
        """The generation that boots beside the one that serves, when there is one."""
        return self.current.candidate if self.current is not None else None

    @property
    def under_way(self) -> str:
        """The verb of the change that is under way; empty when none is."""
        return self.current.verb if self.current is not None else ""

    def candidate_view(self, boot_timeout: float) -> Candidate | None:
        """The candidate as the plan sees it: with no workers wanted while a helper prepares it."""
        change = self.current
        if change is None or change.done_by is not None:
            return None
        if change.candidate is None:
            return Candidate(change.number, 0, boot_timeout)
        settings = change.candidate.settings
        return Candidate(change.number, self._wanted_by(settings), settings.boot_timeout)

    def ask(self, verb: str, client: ControlClient | None = None) -> None:
        """Wants a change; the client gets the outcome."""
        state, clients = self._state.master_state, [] if client is None else [client]
        busy = self.under_way or (state.value if state is MasterState.STARTING else "")
        if state not in (MasterState.STARTING, MasterState.RUNNING):
            log.warning("%s: refused, the daemon is %s", verb, state.value)
            self._end(Change(verb, clients=clients), ErrorReply(f"the daemon is {state.value}"))
        elif not busy:
            self._begin(Change(verb, clients=clients))
        elif verb == DIFF:
            self._end(Change(verb, clients=clients), ErrorReply(f"the daemon is busy: {busy}; ask again"))
        else:
            if self._next is None:
                self._next = Change(verb)
            elif verb == UPGRADE:
                self._next.verb = verb
            self._next.clients += clients
            log.info("%s: waits for what is under way: %s", self._next.verb, busy)

    def resume(self, clients: list[ControlClient]) -> None:
        """In a new image of the master: the second half of the upgrade that brought it."""
        self._begin(Change(RELOAD, clients=clients))

    def advance(self, now: float) -> float | None:
        """Lets the candidate take over when all of it serves; ends the change when the workers before it take no more
        clients; begins what has waited, when nothing is under way.

        Args:
            now: the time.

        Returns:
            When to look again; None for no need.
        """
        change = self.current
        if change is not None and change.candidate is not None:
            wanted = self._wanted_by(change.candidate.settings)
            if self._pool.serves(change.number, wanted):
                self._take_over(change.candidate)
                change.candidate, change.done_by = None, now + DRAINING_SECONDS
        if change is not None and change.done_by is not None:
            if now < change.done_by and self._pool.take_clients(before=change.number):
                return change.done_by
            self._succeed(change)
        if self.current is None and self._next is not None and self._state.master_state is MasterState.RUNNING:
            following, self._next = self._next, None
            self._begin(following)
        return None

    def helper_said(self, helper: Worker, said: ChildEvent | InvalidMessage) -> None:
        """Takes a message of a helper; one of a former change is ignored."""
        change = self.current
        if change is None or helper.generation != change.number:
            return
        try:
            change.take_event(said, helper.channel, self._state.generation)
        except (ForkdError, ValueError, LookupError, TypeError) as error:
            self.fail(f"the helper sent an invalid message: {error}")

    def helper_exited(self, helper: Worker, ended: Exit) -> None:
        """Goes on with what the helper found, or ends; the end of a helper of a former change is ignored."""
        change = self.current
        if change is None or helper.generation != change.number:
            return
        if ended.status != 0:
            reason, details = _why_helper_failed(helper, ended, change.failure)
            self.fail(reason, details)
        elif change.verb == UPGRADE:
            self._upgrade(change)
        elif change.verb == DIFF:
            self._end(change, DifferencesReply(change.differences))
        else:
            self._boot(change)

    def generation_failed(self, number: int, error: BootError) -> None:
        """A worker of this generation could not boot, or has ended; the change ends if that is its candidate."""
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
        self._forget_tried()
        if change is None:
            return
        reason, details = shorten(reason, _MOST_TEXT), shorten(details, _MOST_TEXT)
        if change.verb != DIFF:
            self._state.change_failure = f"{change.verb} failed: {reason}"
            self._state.change_counts["failure"] += 1
            self._state.change_failed_at = time.time()
        below = f"\n{details.rstrip()}" if details and not logged else ""
        log.log(level, "%s: failed, and nothing has changed: %s%s", change.verb, reason, below)
        for bound in change.bound:
            bound.remove()
        if change.candidate is not None:
            self._log_files.discard(change.candidate, self._state.generation)
            self._pool.slots.pop(change.number, None)
        self._end(change, ErrorReply(reason, details))
        self._release_sockets()

    def cancel(self, why: str) -> None:
        """Ends what is under way and what waits: the daemon stops."""
        waiting, self._next = self._next, None
        if self.current is not None and self.current.done_by is not None:
            self._succeed(self.current)
        self.fail(why, level=logging.INFO)
        if waiting is not None:
            self._end(waiting, ErrorReply(why))

    def fit_sockets(self, wanted: int, *, shrink: bool = False) -> None:
        """Binds the datagram sockets that are missing for so many workers, or for those of the candidate if they are
        more; and closes those that are too many, if that is meant. Raises ForkdError; then nothing is bound.
        """
        bound = [*self._state.generation.bound]
        if self.candidate is not None:
            wanted = max(wanted, self._wanted_by(self.candidate.settings))
            bound += self.candidate.bound
        for one in bound:
            one.resize(wanted, shrink=shrink)

    def close_in_child(self, kept: Generation) -> None:
        """In a worker: closes what was bound for a generation that is not its own."""
        for bound in self.current.bound if self.current is not None else ():
            if bound not in kept.bound:
                bound.close()

    def _wanted_by(self, settings: Settings) -> int:
        return wanted_after(self._state.generation.settings, self._state.wanted, settings)

    def _begin(self, change: Change) -> None:
        """Begins a change: forks the helper that does its first step."""
        self.current = change
        change.number = 1 + max(self._state.generation.number, *(w.generation for w in self._pool.workers.values()), 0)
        self._pool.slots.pop(change.number, None)  # a generation that failed may have had the same number
        if change.verb != DIFF:
            log.info("%s: begins", change.verb)
        state, pid = self._state, os.getpid()
        self._forget_tried()
        if change.verb == UPGRADE:
            self._tried = os.memfd_create("forkd-tried", os.MFD_CLOEXEC)

        def main(row: Row, channel: Channel) -> int:
            signal_when_parent_dies(signals.KILL, pid)  # it has copies of the listeners, and may hang
            if change.verb == UPGRADE:
                return try_or_tell(state.snapshot(), channel, self._tried)
            return state.entry_points.prepare(state.generation, change.verb, channel)

        try:
            self._pool.spawn(HELPER, change.number, main)
        except BootError as error:
            self.fail(str(error), error.details, logged=True)

    def _forget_tried(self) -> None:
        if self._tried >= 0:
            os.close(self._tried)
            self._tried = -1

    def _upgrade(self, change: Change) -> None:
        try:
            changed = changed_file(self._tried) if self._tried >= 0 else ""
        except (OSError, ValueError) as error:
            changed = str(error)
        if changed:
            self.fail(f"{changed} has changed since it was tried; ask again when all files are in place")
            return
        log.info("upgrade: the new code can start; replacing the master's image")
        # The watchdog gets no ping for the time that an interpreter takes to start.
        self._state.notifier.send("WATCHDOG=1")
        # The new image begins with a reload, which is what the clients that wait have asked for too.
        clients = change.clients + (self._next.clients if self._next is not None else [])
        waiting = [client.fileno() for client in clients if client.fileno() >= 0]
        idle = {*self._state.control.hand_over(waiting)} - {*waiting}
        try:
            replace_image(self._state.snapshot(waiting, [*idle]))
        except ForkdError as error:
            self.fail(str(error))

    def _boot(self, change: Change) -> None:
        """Makes a candidate of what the helper has sent; the plan has its workers boot."""
        settings, present = change.settings, self._state.generation
        if settings is None or len(change.listeners) < len(_all_listeners(settings)):
            self.fail("the helper has ended without having sent all settings and listeners")
            return
        try:
            found = [change.listeners[place] for place in range(len(_all_listeners(settings)))]
            listeners, services = found[: len(settings.listen)], found[len(settings.listen) :]
            load_extras(settings)
            log_to = self._log_files.open_for(settings, change.identity, present)
            change.candidate = Generation(change.number, settings, listeners, log_to, change.identity, services)
            self.fit_sockets(self._state.wanted)
        except ForkdError as error:
            self.fail(str(error))

    def _take_over(self, candidate: Generation) -> None:
        """Makes the candidate the generation that serves. The one before it retires, by the next plan."""
        state, before = self._state, self._state.generation
        state.wanted = self._wanted_by(candidate.settings)
        state.switch_generation(candidate)
        before.hand_listeners_to(candidate)
        state.share_control_socket()
        self._log_files.switch(before, candidate)
        self._pool.slots.pop(before.number, None)

    def _succeed(self, change: Change) -> None:
        """Ends a change whose generation has taken over."""
        self._state.change_failure, self._state.changed_at = "", time.time()
        self._state.change_counts["success"] += 1
        log.info("%s: done, generation %d serves", change.verb, change.number)
        self._end(change, ChangedReply(change.number, self._state.wanted))
        self._release_sockets()

    def _release_sockets(self) -> None:
        """Closes the datagram sockets that were bound for workers that are not wanted any more."""
        if self._state.master_state.serves:
            self.fit_sockets(self._state.wanted, shrink=True)

    def _end(self, change: Change, outcome: Reply) -> None:
        if change is self.current:
            self.current = None
        for client in change.clients:
            client.reply(outcome)


def _all_listeners(settings: Settings) -> tuple[Listener, ...]:
    """What the messages of a helper number: the listeners, then those of the master's own."""
    return (*settings.listen, *settings.service_listeners)


def _why_helper_failed(helper: Worker, ended: Exit, failure: FailedEvent | None) -> tuple[str, str]:
    """Why a helper failed, as it says itself if it does, and the lines that belong below."""
    if failure is not None:
        return failure.reason, failure.details
    if helper.cause:  # why the master has killed it
        return helper.cause, "\n".join(helper.stderr_lines)
    if not helper.stderr_lines:
        return f"the helper has ended: {ended}", ""
    *details, last = helper.stderr_lines
    return last.removeprefix("forkd: "), "\n".join(details)
