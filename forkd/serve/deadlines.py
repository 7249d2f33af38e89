"""Deadlines: when a worker checks which connection, and whether that has been silent for too long.

`Deadlines` is one heap of times for a process. A connection that is active costs nothing: it is checked when its
earliest deadline could be over, and if it was not silent meanwhile it gets a later one. Most connections are over
before their first check; since those of one listener come due in the order in which they began, they wait for it in a
dictionary, which costs next to nothing, and come into the heap after it. `TimeoutPolicy` has the rules
of one listener: from what is known of a connection (`ConnectionActivity`) it says when that is over, and why. Of a TCP
connection the kernel knows when data last came and went, so nothing has to write it down; for a unix socket, of which
it does not know, `ActivityStamps` note it. Transports use all of this; how they end is theirs.
"""

from __future__ import annotations

import asyncio
from heapq import heapify, heappop, heappush
from itertools import takewhile
from math import inf
from time import monotonic
from typing import Any, NamedTuple, Protocol

from forkd.config.listener import Listener
from forkd.ended import Ended, FirstByteTimeout, HeartbeatLost, IdleTimeout, LifetimeOver, WriteTimeout
from forkd.system.socket_stats import TcpInfo

#: Seconds by which a check may be late, so that many that fall into a short time take one wake-up.
TIMER_SLACK = 0.05

#: Seconds of work at a time, of a worker that has many connections to end at once; then the others have their turn.
WORK_SLICE = 0.01

#: Checks of a connection within its `timeouts.write`, while something is unsent.
WRITE_CHECKS = 4

#: Seconds by which the kernel's times may be off: it reckons in ticks, the longest of which are of a hundredth.
_TICK = 0.02

#: Entries that are of no use, beyond as many as there are others, at which they are thrown away.
_WASTE = 256

Buffer = bytes | bytearray | memoryview


class ByteSource(Protocol):
    """What a connection is read and written by."""

    def recv(self, size: int, /) -> bytes:
        """As a socket's."""

    def send(self, data: Buffer, /) -> int:
        """As a socket's."""


def octets(data: Buffer) -> Buffer:
    """`data`, with `len` for its number of bytes; raises TypeError, as asyncio does, for what has none."""
    if isinstance(data, memoryview):
        try:
            return data.cast("B")
        except (TypeError, ValueError):  # it has gaps, zeros in its shape, or a format as ctypes has them
            return data.tobytes()
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
    return data


class Watched(Protocol):
    """What has deadlines.

    Attributes:
        due: when it is checked next; 0: not at all. `Deadlines` alone sets it.
    """

    due: float

    def check(self, now: float) -> float:
        """Ends it if its time is over. When to check again, on the monotonic clock; 0: never."""

    def __lt__(self, other: Any) -> bool:
        """Which of two that are due at the same moment is first: either may be. The heap asks."""


class Deadlines:
    """The heap of one process.

    Args:
        loop: its loop.

    Attributes:
        timer_at: when the next of those are checked that it knows of; inf: none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._heap: list[tuple[float, Watched]] = []
        self._firsts: list[dict[Watched, float]] = []
        self._useless = 0  # entries of what was forgotten, or is checked earlier
        self._timer: asyncio.TimerHandle | None = None
        self.timer_at = inf
        self._working = False

    @property
    def size(self) -> int:
        """Entries of the heap, also those that are of no use any more."""
        return len(self._heap)

    def add_firsts(self, firsts: dict[Watched, float]) -> None:
        """Also checks those that are in there, at their times, of which each is no earlier than the one before it. What
        adds one sets its `due` as well, and calls `wake_at` where that is before `timer_at`.
        """
        self._firsts.append(firsts)

    def watch(self, one: Watched, when: float) -> None:
        """Checks it at this time, unless it is checked earlier anyway."""
        if one.due:
            if when >= one.due:
                return
            self._note_useless()
        one.due = when
        heappush(self._heap, (when, one))
        if when < self.timer_at:
            self.wake_at(when)

    def forget(self, one: Watched) -> None:
        """Checks it no more."""
        if not one.due:
            return
        one.due = 0.0
        self._note_useless()

    def wake_at(self, when: float) -> None:
        """Has those checked at this time that are due then."""
        if self._working:
            return
        if self._timer is not None:
            self._timer.cancel()
        self.timer_at = when
        self._timer = self._loop.call_at(when + TIMER_SLACK, self._work)

    def _note_useless(self) -> None:
        """Throws away what is of no use where that is much; also all but one entry of what has several for one time."""
        self._useless += 1
        if self._useless > len(self._heap) // 2 + _WASTE:
            self._heap = list({id(entry[1]): entry for entry in self._heap if entry[0] == entry[1].due}.values())
            heapify(self._heap)
            self._useless = 0

    def _work(self) -> None:
        """Checks all that are due, for a slice of time."""
        self._timer, self.timer_at = None, inf
        self._working = True
        now = monotonic()
        until = now + WORK_SLICE
        for firsts in self._firsts:
            self._move_firsts(firsts, now)
        while self._heap and self._heap[0][0] <= now:
            when, one = heappop(self._heap)
            if one.due != when:
                self._useless -= 1
                continue
            one.due = 0.0
            if again := one.check(now):
                self.watch(one, again)
            if monotonic() > until:
                break
        self._working = False
        heads = [next(iter(firsts.values())) for firsts in self._firsts if firsts]
        if self._heap:
            heads.append(self._heap[0][0])
        if heads:
            # What is left of those that are due has its turn after everything else on the loop had one.
            self.wake_at(max(min(heads), now - TIMER_SLACK))

    def _move_firsts(self, firsts: dict[Watched, float], now: float) -> None:
        """Moves those that are due into the heap."""
        moved = list(takewhile(lambda first: first[1] <= now, firsts.items()))
        for one, when in moved:
            del firsts[one]
            heappush(self._heap, (when, one))


class ConnectionActivity(NamedTuple):
    """What is known of a connection. Times are on the monotonic clock.

    Attributes:
        opened: when it began.
        has_received: whether anything has ever come from the client.
        last_received: when something last came; `opened` where nothing ever did.
        last_sent: when something was last sent to the client; likewise.
        stalled_since: since when the client has taken nothing of what is unsent; 0 where nothing is.
        heartbeat_at: when its protocol's `heartbeat()` was last called; 0: never.
    """

    opened: float
    has_received: bool
    last_received: float
    last_sent: float
    stalled_since: float = 0.0
    heartbeat_at: float = 0.0


def kernel_activity(
    info: TcpInfo, opened: float, now: float, stalled_since: float = 0.0, heartbeat_at: float = 0.0
) -> ConnectionActivity:
    """What the kernel knows of a TCP connection, whatever program reads and writes it.

    Args:
        info: what it says (TCP_INFO of tcp(7)).
        opened: as of `ConnectionActivity`; likewise `stalled_since` and `heartbeat_at`.
        now: when the kernel was asked.
    """
    # To the kernel a connection begins before it is accepted.
    last_received = max(opened, now - info.last_data_received / 1000)
    last_sent = max(opened, now - info.last_data_sent / 1000)
    return ConnectionActivity(opened, info.received > 0, last_received, last_sent, stalled_since, heartbeat_at)


class TimeoutPolicy:
    """One listener's rules, and the heap that its connections are watched by.

    Args:
        listener: its settings.
        deadlines: this process's.

    Attributes:
        deadlines: as the argument.
        first_check: seconds from a connection's beginning to its first check; 0: none is needed.
        firsts: connections that were not checked yet, and when they are.
        write: `timeouts.write`.
        heartbeat: `keepalive.heartbeat`.
    """

    def __init__(self, listener: Listener, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        timeouts = listener.timeouts
        self._first_byte, self._idle, self._lifetime = timeouts.first_byte, timeouts.idle, timeouts.lifetime
        self.heartbeat = listener.keepalive.heartbeat
        self.write = timeouts.write
        spans = (self._first_byte, self._idle, self._lifetime, self.heartbeat)
        self.first_check = min(filter(None, spans), default=0.0)
        self.firsts: dict[Watched, float] = {}
        deadlines.add_firsts(self.firsts)

    def deadline(self, activity: ConnectionActivity) -> tuple[float, type[Ended]]:
        """When the connection is over unless something happens, and why then."""
        ends: list[tuple[float, type[Ended]]] = [(inf, Ended)]
        if self._lifetime:
            ends.append((activity.opened + self._lifetime, LifetimeOver))
        if activity.stalled_since and self.write:
            ends.append((activity.stalled_since + self.write, WriteTimeout))
        if not activity.has_received and self._first_byte:
            # A client that is sent something meanwhile may well have nothing to say but that it takes it.
            ends.append((activity.last_sent + self._first_byte, FirstByteTimeout))
        elif self._idle:
            ends.append((max(activity.last_received, activity.last_sent) + self._idle, IdleTimeout))
        if self.heartbeat and not _is_answered(activity):  # however late the call was, an interval is for the answer
            ends.append((activity.heartbeat_at + self.heartbeat, HeartbeatLost))
        return min(ends, key=lambda end: end[0])

    def next_heartbeat(self, activity: ConnectionActivity) -> float:
        """When the protocol's `heartbeat()` is to be called unless something comes; inf: not before that."""
        return activity.last_received + self.heartbeat if self.heartbeat and _is_answered(activity) else inf


def _is_answered(activity: ConnectionActivity) -> bool:
    """Whether something has come since the heartbeat; so also where there was none yet."""
    return activity.last_received > activity.heartbeat_at - _TICK


def timeout_error(kind: type[Ended], activity: ConnectionActivity, now: float) -> Ended:
    """The error that says of a connection why it is over."""
    if kind is LifetimeOver:
        return kind(f"it is {now - activity.opened:.1f} s old")
    if kind is WriteTimeout:
        return kind(f"it has taken nothing of what is unsent for {now - activity.stalled_since:.1f} s")
    if kind is FirstByteTimeout:
        return kind(f"it has never sent anything, and was sent nothing for {now - activity.last_sent:.1f} s")
    if kind is HeartbeatLost:
        return kind(f"it has sent nothing for {now - activity.last_received:.1f} s, also not after its heartbeat")
    return kind(f"it was idle for {now - max(activity.last_received, activity.last_sent):.1f} s")


class ActivityStamps:
    """Calls that read and write, and note what they did, for a socket of which the kernel tells nothing, or too much.

    Args:
        source: what reads and writes: a socket, or TLS over one.
        opened: as of `ConnectionActivity`.

    Attributes:
        last_received, last_sent: as of `ConnectionActivity`.
        bytes_in, bytes_out: bytes that have come and gone.
    """

    __slots__ = ("_recv", "_send", "bytes_in", "bytes_out", "last_received", "last_sent")

    def __init__(self, source: ByteSource, opened: float) -> None:
        self._recv, self._send = source.recv, source.send
        self.last_received = self.last_sent = opened
        self.bytes_in = self.bytes_out = 0

    def recv(self, size: int) -> bytes:
        """As the socket's."""
        data = self._recv(size)
        self.note_received(len(data))
        return data

    def send(self, data: Buffer) -> int:
        """As the socket's."""
        sent = self._send(data)
        self.note_sent(sent)
        return sent

    def note_received(self, count: int) -> None:
        """So many bytes have come."""
        if count:
            self.bytes_in += count
            self.last_received = monotonic()

    def note_sent(self, count: int) -> None:
        """So many bytes have gone."""
        if count:
            self.bytes_out += count
            self.last_sent = monotonic()
