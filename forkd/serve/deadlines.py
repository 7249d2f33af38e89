"""Deadlines: when a worker looks at which connection, and what it then makes of what it sees.

There is one heap of times. A connection that is active costs nothing: it is looked at when its earliest deadline could
be over, and if it was not silent meanwhile it gets a later one. What is seen is a `Sighting`, whoever owns the socket:
of a TCP connection the kernel knows when data last came and went, so nobody has to write it down.
"""

from __future__ import annotations

import asyncio
from heapq import heapify, heappop, heappush
from math import inf
from time import monotonic
from typing import Any, NamedTuple, Protocol

from forkd.config.listener import Listener
from forkd.ended import Ended, FirstByteTimeout, HeartbeatLost, IdleTimeout, LifetimeOver, WriteTimeout
from forkd.system.tcp_info import TcpInfo

#: Seconds by which a look may be late, so that many that fall into a short time take one wake-up.
GRAIN = 0.05

#: Seconds of work at a time, of a worker that has many connections to end at once; then the others have their turn.
SLICE = 0.01

#: Looks at a connection within its `timeouts.write`, while something waits for it.
LOOKS = 4

#: Seconds by which the kernel's times may be off: it reckons in ticks, the longest of which are of a hundredth.
_TICK = 0.02

#: Entries that are of no use, beyond as many as there are others, at which they are thrown away.
_WASTE = 256


class Watched(Protocol):
    """What has deadlines.

    Attributes:
        due: when it is looked at next; 0: not at all. `Deadlines` alone sets it.
    """

    due: float

    def look(self, now: float) -> float:
        """Ends it if its time is over. When to look again, on the monotonic clock; 0: never."""

    def __lt__(self, other: Any) -> bool:
        """Which of two that are due at the same moment is first: either may be. The heap asks."""


class Deadlines:
    """The heap of one process.

    Args:
        loop: its loop.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, Watched]] = []
        self._live = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = inf
        self._working = False

    def watch(self, one: Watched, when: float) -> None:
        """Looks at it at this time, unless it is looked at earlier anyway."""
        if one.due:
            if when >= one.due:
                return
        else:
            self._live += 1
        one.due = when
        if len(self._heap) > 2 * self._live + _WASTE:
            self._clear_out()
        heappush(self._heap, (when, one))
        if when < self._timer_at and not self._working:
            self._set_timer(when)

    def forget(self, one: Watched) -> None:
        """Looks at it no more."""
        if not one.due:
            return
        one.due = 0.0
        self._live -= 1
        if len(self._heap) > 2 * self._live + _WASTE:
            self._clear_out()

    def _clear_out(self) -> None:
        """Throws away what is of no use; also all but one entry of those that want the same time again and again."""
        self._heap = list({id(entry[1]): entry for entry in self._heap if entry[0] == entry[1].due}.values())
        heapify(self._heap)

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self._loop.call_at(when + GRAIN, self._work)

    def _work(self) -> None:
        """Looks at all that are due, for a slice of time."""
        self._timer, self._timer_at = None, inf
        self._working = True
        now = monotonic()
        until = now + SLICE
        while self._heap and self._heap[0][0] <= now:
            when, one = heappop(self._heap)
            if one.due != when:
                continue
            one.due = 0.0
            self._live -= 1
            if again := one.look(now):
                self.watch(one, again)
            if monotonic() > until:
                break
        self._working = False
        if self._heap:
            # What is left of those that are due has its turn after everybody else had one.
            self._set_timer(max(self._heap[0][0], now - GRAIN))


class Sighting(NamedTuple):
    """What is seen of a connection. Times are on the monotonic clock.

    Attributes:
        opened: when it began.
        spoke: whether the client has ever said something.
        heard: when it last did; `opened` where it never did.
        told: when something was last sent to it; likewise.
        stuck: since when it has taken nothing of what waits for it; 0 where nothing does.
        asked: when its protocol's `heartbeat()` was last called; 0: never.
    """

    opened: float
    spoke: bool
    heard: float
    told: float
    stuck: float = 0.0
    asked: float = 0.0


def sighting_of(info: TcpInfo, opened: float, now: float, stuck: float = 0.0, asked: float = 0.0) -> Sighting:
    """What the kernel tells of a TCP connection, whoever reads and writes it.

    Args:
        info: its words.
        opened: as of the sighting; likewise `stuck` and `asked`.
        now: when the kernel was asked.
    """
    # To the kernel a connection begins before it is accepted.
    heard = max(opened, now - info.last_data_received / 1000)
    told = max(opened, now - info.last_data_sent / 1000)
    return Sighting(opened, info.received > 0, heard, told, stuck, asked)


class Patience:
    """One listener's deadlines: rules, and who sees to them.

    Args:
        listener: its settings.
        deadlines: this process's.

    Attributes:
        deadlines: as the argument.
        first: seconds from a connection's beginning to the first look at it; 0: none is needed.
        write: `timeouts.write`.
        beat: `keepalive.heartbeat`.
    """

    def __init__(self, listener: Listener, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        timeouts = listener.timeouts
        self._first_byte, self._idle, self._lifetime = timeouts.first_byte, timeouts.idle, timeouts.lifetime
        self.beat = listener.keepalive.heartbeat
        self.write = timeouts.write
        spans = (self._first_byte, self._idle, self._lifetime, self.beat)
        self.first = min(filter(None, spans), default=0.0)

    def end(self, seen: Sighting) -> tuple[float, type[Ended]]:
        """When the connection is over unless something happens, and why then."""
        ends: list[tuple[float, type[Ended]]] = [(inf, Ended)]
        if self._lifetime:
            ends.append((seen.opened + self._lifetime, LifetimeOver))
        if seen.stuck and self.write:
            ends.append((seen.stuck + self.write, WriteTimeout))
        if not seen.spoke and self._first_byte:
            # Who is told something meanwhile may well have nothing to say but that it takes it.
            ends.append((seen.told + self._first_byte, FirstByteTimeout))
        elif self._idle:
            ends.append((max(seen.heard, seen.told) + self._idle, IdleTimeout))
        if self.beat and not _answered(seen):  # however late it was asked, it has an interval for its answer
            ends.append((seen.asked + self.beat, HeartbeatLost))
        return min(ends, key=lambda end: end[0])

    def heartbeat(self, seen: Sighting) -> float:
        """When the protocol's `heartbeat()` is to be called unless something comes; inf: not before that."""
        return seen.heard + self.beat if self.beat and _answered(seen) else inf


def _answered(seen: Sighting) -> bool:
    """Whether something has come since the heartbeat; so also where there was none yet."""
    return seen.heard > seen.asked - _TICK


def explained(kind: type[Ended], seen: Sighting, now: float) -> Ended:
    """The error that says of a connection why it is over."""
    if kind is LifetimeOver:
        return kind(f"it is {now - seen.opened:.1f} s old")
    if kind is WriteTimeout:
        return kind(f"it has taken nothing of what waits for it for {now - seen.stuck:.1f} s")
    if kind is FirstByteTimeout:
        return kind(f"it has never said anything, and was told nothing for {now - seen.told:.1f} s")
    if kind is HeartbeatLost:
        return kind(f"it has said nothing for {now - seen.heard:.1f} s, nor to its heartbeat")
    return kind(f"it was idle for {now - max(seen.heard, seen.told):.1f} s")
