"""The counters of one listener's connections, kept where metrics are asked for; `ConnectionStats` has the process's.

They stand on the worker's row of the scoreboard, as `scoreboard.ListenerField` has them. What a connection was is taken
down when it ends, so one that lasts costs nothing meanwhile; and only so many that end are looked at in a second.
"""

from __future__ import annotations

import socket
from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import inf
from time import monotonic
from typing import Protocol

from forkd.serve.accept.acceptor import ConnectionStats
from forkd.system.scoreboard import DURATION_BOUNDS, SIZE_BOUNDS, ListenerField
from forkd.system.socket_stats import IPPROTO_TCP, TCP_BYTES, TCP_INFO, parse_bytes

_OPENED, _CLOSED = int(ListenerField.OPENED), int(ListenerField.CLOSED)
_BYTES_IN, _BYTES_OUT = int(ListenerField.BYTES_IN), int(ListenerField.BYTES_OUT)
_MICROSECONDS = int(ListenerField.MICROSECONDS)
_FIRST_DURATION, _FIRST_SIZE = int(ListenerField.FIRST_DURATION), int(ListenerField.FIRST_SIZE)


#: Connections that are looked at between two heartbeats. Those beyond are taken to be like these, since to ask the
#: kernel about one costs as much as a tenth of serving it.
MOST_LOOKED_AT = 1000


class Stamps(Protocol):
    """What came and went, where the kernel does not tell (`deadlines.ActivityStamps`)."""

    bytes_in: int
    bytes_out: int


class Endings:
    """What one listener's connections were, taken down as they end and reckoned together at each heartbeat.

    Args:
        cells: the listener's, on the worker's row.
    """

    def __init__(self, cells: memoryview) -> None:
        self._cells = cells
        self._pending: list[tuple[float, bytes | Stamps | None]] = []
        self._left = MOST_LOOKED_AT
        self._more = 0  # that were not looked at

    def measure(self, sock: socket.socket, opened: float, stamps: Stamps | None) -> None:
        """Takes down what a connection was, before its socket is closed.

        Args:
            sock: the socket.
            opened: when it began, on the monotonic clock.
            stamps: what came and went, where the kernel does not tell.
        """
        if not self._left:
            self._more += 1
            return
        self._left -= 1
        try:
            told = sock.getsockopt(IPPROTO_TCP, TCP_INFO, TCP_BYTES.size) if stamps is None else stamps
        except OSError:  # it is closed already, or none of TCP's
            told = None
        self._pending.append((monotonic() - opened, told))

    def reckon(self) -> None:
        """Adds what was taken down to the cells; at each heartbeat, and at the worker's end."""
        pending, more, cells = self._pending, self._more, self._cells
        self._pending, self._more, self._left = [], 0, MOST_LOOKED_AT
        if not pending:
            return
        share = 1 + more / len(pending)
        durations = sorted(seconds for seconds, _ in pending)
        traffic = [_traffic(told) for _, told in pending]
        cells[_BYTES_IN] += round(share * sum(came for came, _ in traffic))
        cells[_BYTES_OUT] += round(share * sum(went for _, went in traffic))
        cells[_MICROSECONDS] += int(share * sum(durations) * 1e6)
        _add(cells, _FIRST_DURATION, DURATION_BOUNDS, durations, share)
        _add(cells, _FIRST_SIZE, SIZE_BOUNDS, sorted(came + went for came, went in traffic), share)


class ListenerStats:
    """What counts the connections of one listener. It stands for the process's `ConnectionStats`, which counts too.

    Args:
        stats: the process's.
        cells: the listener's, on the worker's row.
        endings: takes down what the connections were.

    Attributes:
        began, closed, opened, freed, ended_early: as of `ConnectionStats`.
        measure, reckon: as of `Endings`.
    """

    def __init__(self, stats: ConnectionStats, cells: memoryview, endings: Endings | None = None) -> None:
        self._stats, self._cells = stats, cells
        self._endings = endings or Endings(cells)
        self.began: Callable[[int], None] = self._began
        self._note = stats.began
        self.opened, self.freed, self.ended_early = stats.opened, stats.freed, stats.ended_early
        self.measure, self.reckon = self._endings.measure, self._endings.reckon

    def behind(self) -> ListenerStats:
        """The same for what serves connections that have been noted to begin, as those with TLS."""
        made = ListenerStats(self._stats, self._cells, self._endings)
        made.began = self._stats.began
        return made

    def _began(self, descriptor: int) -> None:
        self._note(descriptor)
        self._cells[_OPENED] += 1

    def closed(self) -> None:
        """A connection is over."""
        self._cells[_CLOSED] += 1
        self._stats.closed()


def _traffic(told: bytes | Stamps | None) -> tuple[int, int]:
    """Bytes that came and went."""
    if isinstance(told, bytes):
        return parse_bytes(told)
    return (0, 0) if told is None else (told.bytes_in, told.bytes_out)


def _add(cells: memoryview, first: int, bounds: Sequence[float], values: Sequence[float], share: float) -> None:
    """Counts values between bounds, in cells from the first one on.

    Args:
        cells, first: where.
        bounds: the upper ones but the last, which is infinity.
        values: sorted.
        share: for how many each of them stands.
    """
    before = 0
    for place, bound in enumerate((*bounds, inf)):
        up_to = round(share * bisect_right(values, bound))
        if up_to > before:
            cells[first + place] += up_to - before
            before = up_to
