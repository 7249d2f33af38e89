"""What all workers count together without a lock: how many connections a key has now, and how many came lately.

Each worker has tables of its own in its region of shared memory (`scoreboard.Regions`), which it alone writes and all
others read; a total is the sum over all of them. To claim one of a limited number a worker first counts it in its own
table, then adds up all tables, and takes it back where that is too many. So of several that claim at the same time the
last one sees all the others, and there are never more than the limit. That two see each other and both take it back is
made rare by trying again.

A store that another processor does not see yet while its own goes on to load is what every machine may do, x86 too (its
only liberty); `fence` forbids it. An entry never moves while it counts, and is in one of two small sets that its key
names, so there are no links to follow, and no entry of a hostile worker leads anywhere. When a worker dies the master
clears its region with its row, and so what it held is free again.

`serve.accept` limits connections by these; the limits themselves are the settings', not known here.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from collections.abc import Callable
from functools import cache
from time import monotonic_ns
from typing import Any

from forkd.compiled import extension
from forkd.system.scoreboard import ACCEPT_TIMES_SIZE, COUNTERS_SIZE, Scoreboard

FAST = extension("forkd.system._fast")

#: How often a claim tries again that found too many, but room when it had taken its own back.
_TRIES = 8
_OVERFLOW = 256  # keys as whose together those are counted that find no room

#: A rate's time in parts: it is taken for up to one part longer than it is, never for shorter.
_PARTS = 6
_RING = _PARTS + 1
_COUNT_BITS = 30  # of a ring's cell; the others are the part's number, which lasts for decades of uptime
_COUNT = (1 << _COUNT_BITS) - 1

#: Where each table begins in its part of a region, in cells of 8 bytes.
_BY_LISTENER, _BY_ADDRESS, _RATES = 0, 1024, 33_792
_END = COUNTERS_SIZE // 8

_own_lock = allocate_lock()
_own_lock.acquire()


class SharedCounters:
    """All that one worker counts with the others.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.

    Attributes:
        by_listener: connections of each listener.
        by_address: connections of each client's address; some ten thousand addresses of one worker at least.
        rates: new connections of each client's address.
        secret: what to hash keys with; the same for all workers of the daemon, and unknown outside of it.
    """

    def __init__(self, board: Scoreboard, row: int) -> None:
        current, rates = twins(FAST)
        self.by_listener = current(board, row, _BY_LISTENER, _BY_ADDRESS)
        self.by_address = current(board, row, _BY_ADDRESS, _RATES)
        self.rates = rates(board, row, _RATES, _END)
        self.secret = board.secret


class CurrentCounts:
    """How many there are of each key now.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.
        first, end: the table's cells in the region's second half.
    """

    def __init__(self, board: Scoreboard, row: int, first: int, end: int) -> None:
        self._table = table = _KeyTable(board, row, (first, end), ways=8, width=2)
        self._own, self._position = table.own, table.position
        self._held: dict[int, int] = {}  # by its position, how many an entry counts, whatever the memory says

    def total(self, key: int) -> int:
        """How many all workers have of a key."""
        return sum(max(0, count) for (count,) in self._table.entries(key))

    def claim(self, key: int, limit: int) -> bool:
        """Counts one more of a key, unless there are as many as the limit.

        Returns:
            Whether it was counted; it is not where this worker's table is full.
        """
        for _ in range(_TRIES):
            if not (at := self._table.find_or_add(key, self._is_free)):
                return False
            self._own[at + 1] = self._held[at] = self._held.get(at, 0) + 1
            self._own[0] = 1
            fence()
            if self.total(key) <= limit:
                return True
            self.release(key)
            if self.total(key) >= limit:
                return False
            os.sched_yield()  # the others whose claims collided may have been stopped in between
        return False

    def release(self, key: int) -> None:
        """Counts one less of a key, which this worker has claimed."""
        at = self._position[key]
        self._own[at + 1] = self._held[at] = left = self._held[at] - 1
        if not left:
            self._own[at] = 0  # next time it may be in its other set, and must not be found in both
            del self._held[at], self._position[key]
            if not self._position:
                self._own[0] = 0

    def _is_free(self, at: int) -> bool:
        return at not in self._held


class RateCounts:
    """How many came of each key within a time.

    The time is cut into parts, and an entry has a ring of counts for the last ones: as many come in any time of that
    length as are allowed, at most; and of a steady stream 6/7 of that, at least.

    What a worker has counted is forgotten with it when it ends. Keys that find no room in a full table, because more
    than some three thousand keys came within the time, are counted together, and as many of them may come as of
    `_OVERFLOW` keys: others are not shut out at once by a client that can come from so many addresses.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.
        first, end: the table's cells in the region's second half.
        clock: the monotonic clock, in nanoseconds.
    """

    def __init__(
        self, board: Scoreboard, row: int, first: int, end: int, clock: Callable[[], int] = monotonic_ns
    ) -> None:
        self._clock = clock
        self._table = _KeyTable(board, row, (first, end), ways=4, width=1 + _RING)
        self._overflow: dict[tuple[int, int], tuple[int, int]] = {}  # by limit and time: since when, and how many
        self._until: dict[int, int] = {}  # by its position, when an entry has no meaning any more

    def total(self, key: int, part: int) -> int:
        """How many came of a key in a part of its time and in the _PARTS before it."""
        oldest = (part - _PARTS) << _COUNT_BITS
        return sum(cell & _COUNT for ring in self._table.entries(key) for cell in ring if cell >= oldest and cell > 0)

    def claim(self, key: int, limit: int, seconds: int) -> bool:
        """Counts one more of a key, unless as many as the limit have come within so many seconds.

        Returns:
            Whether it may come.
        """
        own, length = self._table.own, seconds * 10**9
        for _ in range(_TRIES):
            now = self._clock()
            part = now * _PARTS // length
            if not (at := self._table.find_or_add(key, self._is_free)):
                return self._claim_without_room(limit, seconds, now)
            self._until[at] = now + 2 * length
            cell = at + 1 + part % _RING
            before = own[cell] if own[cell] >> _COUNT_BITS == part else part << _COUNT_BITS
            if before & _COUNT == _COUNT:
                return False
            own[cell] = before + 1
            own[0] = 1
            fence()
            # Once the part is over others begin to write over the oldest one that is reckoned with here.
            if self.total(key, part) <= limit and self._clock() * _PARTS // length == part:
                return True
            own[cell] = before
            if self.total(key, part) >= limit:
                return False
            os.sched_yield()
        return False

    def _claim_without_room(self, limit: int, seconds: int, now: int) -> bool:
        since, count = self._overflow.get((limit, seconds), (now, 0))
        if now - since >= seconds * 10**9:
            since, count = now, 0
        fits = count < limit * _OVERFLOW
        self._overflow[limit, seconds] = since, count + fits
        return fits

    def _is_free(self, at: int) -> bool:
        return self._until.get(at, 0) <= self._clock()


@cache
def twins(fast: Any) -> tuple[type[CurrentCounts], type[RateCounts]]:
    """The classes that count.

    Args:
        fast: the extension `system._fast`; None: those in Python.
    """
    if fast is None:
        return CurrentCounts, RateCounts

    class CompiledRateCounts(fast.RateCounts, RateCounts):  # type: ignore[misc]  # its module has no types
        def __init__(self, *table: Any) -> None:
            fast.RateCounts.__init__(self, *table)
            self._overflow = {}

    return fast.CurrentCounts, CompiledRateCounts


class _KeyTable:
    """A table of entries, each of a 64-bit key and some cells, in the regions of all workers.

    Its first cell says whether there is anything in it, so that the row of no worker costs one look. A key's entry is
    in one of two sets, the one that was emptier: such a table is about three quarters full before a key finds no room.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.
        bounds: the table's first cell in the region's second half, and the one behind its last.
        ways: entries of a set.
        width: cells of an entry, with its key.

    Attributes:
        own: the cells that this worker writes.
        position: by key, where this worker's own entries are.
    """

    def __init__(self, board: Scoreboard, row: int, bounds: tuple[int, int], *, ways: int, width: int) -> None:
        self._board = board
        self._row = row
        self._bounds = slice(*bounds)
        self._width = width
        self._size = ways * width
        self._sets = (bounds[1] - bounds[0] - 1) // self._size
        self._views: list[memoryview] = []
        self.position: dict[int, int] = {}
        self._keys: dict[int, int] = {}  # the other way round, whatever the memory says
        self.own = self._view(row)

    def entries(self, key: int) -> list[list[int]]:
        """The entries that all workers have of a key: their cells but the first."""
        found, size, width = [], self._size, self._width
        starts = self._starts(key)
        for cells in self._tables():
            if cells[0]:
                for start in starts:
                    entries = cells[start : start + size].tolist()
                    if key in (keys := entries[::width]):
                        at = keys.index(key) * width
                        found.append(entries[at + 1 : at + width])
                        break
        return found

    def find_or_add(self, key: int, is_free: Callable[[int], bool]) -> int:
        """Where this worker's entry of a key is, from now on; 0 where there is no room for it.

        Args:
            key: the key.
            is_free: whether the entry at a position counts nothing, and may become another key's.
        """
        at = self.position.get(key, 0)
        if not at:
            width = self._width
            sets = [
                [at for at in range(start, start + self._size, width) if is_free(at)] for start in self._starts(key)
            ]
            free = max(sets, key=len)
            if not free:
                return 0
            at = free[0]
            if self.position.get(old := self._keys.get(at, 0)) == at:
                del self.position[old]
            for cell in range(at + 1, at + width):
                self.own[cell] = 0
            self.own[at] = self._keys[at] = key
            self.position[key] = at
        return at

    def _view(self, row: int) -> memoryview:
        return self._board.regions.view(row)[ACCEPT_TIMES_SIZE:].cast("q")[self._bounds]

    def _tables(self) -> list[memoryview]:
        for row in range(len(self._views), self._board.used):
            self._views.append(self.own if row == self._row else self._view(row))
        return self._views

    def _starts(self, key: int) -> tuple[int, int]:
        return 1 + key % self._sets * self._size, 1 + (key >> 32) % self._sets * self._size


def fence() -> None:
    """What this process has stored is seen by all others before it loads anything more.

    It gives back a lock and takes it again, which no other thread wants. On x86 each is a locked instruction, which
    empties the store buffer; on ARM a store-release and then a load-acquire, which pass neither each other nor what is
    before the one and after the other.
    """
    _own_lock.release()
    _own_lock.acquire()
