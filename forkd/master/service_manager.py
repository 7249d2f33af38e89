"""Tells the service manager the state of the daemon: ready, reloading, stopping, a status line, watchdog pings; and
gives it copies of the listeners, for the master that comes after one that was killed (sd_notify(3)).

`ServiceManager.notify` is called at each turn of the master's loop, so what it sends comes from the loop that does the
work: the watchdog is about that loop alone. That no worker serves is in the status line. What finds the manager's queue
full is told a moment later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Set

from forkd.master.generation import Generation
from forkd.master.plan import GRACE, STACKS
from forkd.master.reload import RELOAD, UPGRADE
from forkd.master.state import DaemonState
from forkd.master.status import status_line
from forkd.states import MasterState
from forkd.system.fdstore import store_names, stored_names
from forkd.system.listeners import BoundListener
from forkd.system.notify import monotonic_usec, usec

#: Seconds after which the manager is told what its queue had no room for.
_RETRY = 0.1

#: Changes that are kept for a manager that does not read.
_MOST_UNTOLD = 100


class ServiceManager:
    """What the service manager has been told.

    Args:
        state: the master's.
        resumed: whether another image of this master has told it that the daemon is ready, and that an upgrade began.
    """

    def __init__(self, state: DaemonState, *, resumed: bool) -> None:
        self._state = state
        self._notifier = state.notifier
        self._under_way = UPGRADE if resumed else ""  # the change that it was told of
        self._master_state = MasterState.RUNNING if resumed else None  # likewise
        self._untold = deque[list[str]](maxlen=_MOST_UNTOLD)  # of both, what its queue had no room for
        self._status = ""
        self._next_ping = 0.0
        self._stored = {*stored_names()}  # the listeners that it keeps
        self._replaced: set[str] = set()  # of these, those of which it keeps sockets that are not theirs any more
        self._stored_for: tuple[Generation, int] | None = None

    def notify(self, now: float, change: str) -> float | None:
        """Tells the manager what has changed.

        Args:
            now: the time, on the monotonic clock.
            change: the change that is under way.

        Returns:
            When it is to be called again at the latest; None: no need.
        """
        if not self._notifier.has_manager:
            return None
        if news := self._new_state() + self._new_change(change):
            self._untold.append(news)
        if not self._store():
            return now + _RETRY
        told = self._status, self._next_ping
        while len(self._untold) > 1:  # a reload began and is done: it wants to hear of both
            if not self._notifier.send(*self._untold[0]):
                return now + _RETRY
            self._untold.popleft()
        lines = [*self._untold[0]] if self._untold else []
        if (status := status_line(self._state, change)) != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        deadline = self._ping(now, lines)
        if lines and not self._notifier.send(*lines):
            self._status, self._next_ping = told
            return now + _RETRY
        self._untold.clear()
        return deadline

    def listener_changed(self, bound: BoundListener) -> None:
        """A listener has other sockets than before: the manager is to keep those instead."""
        self._stored_for = None
        names = {name for name, one in store_names(self._state.generation.bound).items() if one is bound}
        self._replaced |= names & self._stored
        self._forget(self._replaced)

    def _forget(self, names: Set[str]) -> bool:
        """Has the manager close what it keeps by these names; whether all of it was told."""
        for name in sorted(names):
            if not self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={name}"):
                return False
            self._stored.discard(name)
            self._replaced.discard(name)
        return True

    def _store(self) -> bool:
        """Has the manager keep the listeners of the generation that serves. It is done before READY=1: from then on
        nothing is to be lost. Another image sends them once more, which changes nothing.

        Returns:
            Whether it has them.
        """
        generation = self._state.generation
        present = generation, sum(len(bound.sockets) for bound in generation.bound)
        if self._state.master_state is not MasterState.RUNNING or present == self._stored_for:
            return True
        wanted = store_names(generation.bound)
        # In this order: it does not take a socket that it has by another name.
        if not self._forget(self._replaced | (self._stored - wanted.keys())):
            return False
        for name in sorted(wanted.keys() - self._stored):
            sockets = [sock.fileno() for sock in wanted[name].sockets]
            if not self._notifier.send("FDSTORE=1", f"FDNAME={name}", descriptors=sockets):
                return False
            self._stored.add(name)
        self._stored_for = present
        return True

    def _new_state(self) -> list[str]:
        state = self._state.master_state
        if state is self._master_state:
            return []
        self._master_state = state
        if state is MasterState.STARTING:
            return [_extend(self._state.generation.settings.boot_timeout + GRACE + STACKS)]
        if state is MasterState.RUNNING:
            return ["READY=1"]
        if state in (MasterState.LEAVING, MasterState.DRAINING):
            return ["STOPPING=1", _extend(self._state.stop_timeout)]
        return ["STOPPING=1"] if state is MasterState.CLOSING else []

    def _new_change(self, change: str) -> list[str]:
        """For the manager an upgrade, which goes on as a reload, is a reload."""
        under_way, before = change if change in (RELOAD, UPGRADE) else "", self._under_way
        self._under_way = under_way
        if self._state.master_state is not MasterState.RUNNING or bool(under_way) is bool(before):
            return []
        if not under_way:
            return ["READY=1"]  # also where it failed: the status line says so
        boot_timeout = self._state.generation.settings.boot_timeout
        return ["RELOADING=1", f"MONOTONIC_USEC={monotonic_usec()}", _extend(2 * (boot_timeout + GRACE + STACKS))]

    def _ping(self, now: float, lines: list[str]) -> float | None:
        interval = self._notifier.watchdog
        if interval is None:
            return None
        if now >= self._next_ping:
            self._next_ping = now + interval / 2
            lines.append("WATCHDOG=1")
        return self._next_ping


def _extend(seconds: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={usec(seconds)}"
