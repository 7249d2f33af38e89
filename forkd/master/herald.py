"""Tells the service manager what the daemon is about: ready, reloading, stopping, a status line, and that it lives; and
gives it copies of the listeners, for the master that comes after one that was killed.

Called at each turn of the master's loop, so what it says is of the loop that does the work; the watchdog hears of it
only while workers serve.
"""

from __future__ import annotations

from collections.abc import Set

from forkd.master.change import RELOAD, UPGRADE
from forkd.master.generation import Generation
from forkd.master.plan import GRACE, STACKS
from forkd.master.report import status_line
from forkd.master.state import State
from forkd.states import Life, Mode
from forkd.system.notify import monotonic_usec, usec
from forkd.system.store import names_of, stored_names


class Herald:
    """The state of what the manager knows.

    Args:
        state: the master's.
        resumed: whether another image of this master has told it already that the daemon is ready, and is upgraded.
    """

    def __init__(self, state: State, *, resumed: bool) -> None:
        self._state = state
        self._notifier = state.notifier
        self._under_way = UPGRADE if resumed else ""  # as far as it was told
        self._mode = Mode.RUNNING if resumed else None
        self._status = ""
        self._next_ping = 0.0
        self._stored: Set[str] = stored_names()  # the listeners that it keeps
        self._stored_for: tuple[Generation, int] | None = None

    def tell(self, now: float, change: str) -> float | None:
        """Tells what is new.

        Args:
            now: the time, on the monotonic clock.
            change: the change that is under way.

        Returns:
            When it wants to be called again at the latest; None: no need.
        """
        if not self._notifier.listened_to:
            return None
        self._store()
        lines = self._new_mode() + self._new_change(change)
        if (status := status_line(self._state, change)) != self._status:
            self._status = status
            lines.append(f"STATUS={status}")
        deadline = self._ping(now, lines)
        if lines:
            self._notifier.send(*lines)
        return deadline

    def _store(self) -> None:
        """Has it keep the listeners of the generation that serves. It is done before it hears that all is ready: from
        then on nothing is to be lost. Another image sends them once more, which changes nothing.
        """
        generation = self._state.generation
        present = generation, sum(len(bound.sockets) for bound in generation.bound)
        if self._state.mode is not Mode.RUNNING or present == self._stored_for:
            return
        self._stored_for = present
        wanted = names_of(generation.bound)
        # In this order: it does not take a socket that it has by another name.
        for name in sorted(self._stored - wanted.keys()):
            self._notifier.send("FDSTOREREMOVE=1", f"FDNAME={name}")
        for name in sorted(wanted.keys() - self._stored):
            sockets = [sock.fileno() for sock in wanted[name].sockets]
            self._notifier.send("FDSTORE=1", f"FDNAME={name}", descriptors=sockets)
        self._stored = wanted.keys()

    def _new_mode(self) -> list[str]:
        mode, settings = self._state.mode, self._state.generation.settings
        if mode is self._mode:
            return []
        self._mode = mode
        if mode is Mode.STARTING:
            return [_extend(settings.boot_timeout + GRACE + STACKS)]
        if mode is Mode.RUNNING:
            return ["READY=1"]
        if mode is Mode.DRAINING:
            return ["STOPPING=1", _extend(settings.drain_timeout + 2 * (GRACE + STACKS))]
        return ["STOPPING=1"] if mode is Mode.CLOSING else []

    def _new_change(self, change: str) -> list[str]:
        """An upgrade goes on as a reload; for the manager it is one."""
        under_way, before = change if change in (RELOAD, UPGRADE) else "", self._under_way
        self._under_way = under_way
        if self._state.mode is not Mode.RUNNING or bool(under_way) is bool(before):
            return []
        if not under_way:
            return ["READY=1"]  # also where it failed: the status says so, and what served serves
        boot_timeout = self._state.generation.settings.boot_timeout
        return ["RELOADING=1", f"MONOTONIC_USEC={monotonic_usec()}", _extend(2 * (boot_timeout + GRACE + STACKS))]

    def _ping(self, now: float, lines: list[str]) -> float | None:
        interval, state = self._notifier.watchdog, self._state
        if interval is None:
            return None
        if now >= self._next_ping:
            self._next_ping = now + interval / 2
            if any(worker.life is Life.SERVING for worker in state.workers.values()) or state.mode is not Mode.RUNNING:
                lines.append("WATCHDOG=1")
        return self._next_ping


def _extend(seconds: float) -> str:
    return f"EXTEND_TIMEOUT_USEC={usec(seconds)}"
