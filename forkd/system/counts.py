"""What all workers count together without a lock: how many there are of a key at a time, and how many came lately.

Each worker has tables of its own in its region of shared memory (`regions`), which it alone writes and all others read;
a total is the sum over all of them. To claim one of a limited number a worker first counts it in its own table, then
adds up everybody's, and takes it back where that is too many. So of several that claim at the same time the last one
sees all the others, and there are never more than the limit. That two see each other and both take it back is made rare
by looking again.

A store that another processor does not see yet while its own goes on to load is what every machine may do, x86 too (its
only liberty); `fence` forbids it. An entry never moves while it counts, and lies in one of two small sets that its key
names, so there are no links to follow, and no claim of a hostile worker leads anywhere. When a worker dies the master
clears its region with its row, and so what it held is free again.
"""

from __future__ import annotations

import os
from _thread import allocate_lock
from time import monotonic_ns

from forkd.system.regions import HALF
from forkd.system.scoreboard import Scoreboard

#: How often one that finds too many, but room when it has taken its own back, tries again.
_TRIES = 8

#: A window in parts: it is taken for up to one part longer than it is, never for shorter.
_PARTS = 6
_RING = _PARTS + 1
_COUNT_BITS = 30  # of a ring's cell; the others are the part's number, which lasts for decades of uptime
_COUNT = (1 << _COUNT_BITS) - 1

#: Where each table begins in the second half of a region, in cells of 8 bytes, and its sets.
_PLACES, _ADDRESSES, _RATES, _END = 0, 1024, 33_792, HALF // 8

_own_lock = allocate_lock()
_own_lock.acquire()


def fence() -> None:
    """What this process has stored is seen by all others before it loads anything more.

    A lock that is given back and taken again, which nobody else wants. On x86 each is a locked instruction, which
    empties the store buffer; on ARM a store-release and then a load-acquire, which pass neither each other nor what is
    before the one and after the other.
    """
    _own_lock.release()
    _own_lock.acquire()


class _Table:
    """A table of entries, each of a 64-bit key and some cells, in the regions of all workers.

    Its first cell says whether there is anything in it, so that a row that is nobody's costs one look. A key's entry is
    in one of two sets, the one that was emptier: such a table is about three quarters full before a key finds no place.
    """

    def __init__(self, board: Scoreboard, row: int, first: int, end: int, ways: int, width: int) -> None:
        self._board = board
        self._row = row
        self._first, self._end = first, end
        self._ways, self._width = ways, width
        self._size = ways * width
        self._sets = (end - first - 1) // self._size
        self._at: dict[int, int] = {}  # where this worker's own entries are
        self._views: list[memoryview] = []
        self._own = self._view(row)

    def _view(self, row: int) -> memoryview:
        return self._board.regions.of(row)[HALF:].cast("q")[self._first : self._end]

    def _tables(self) -> list[memoryview]:
        for row in range(len(self._views), self._board.used):
            self._views.append(self._own if row == self._row else self._view(row))
        return self._views

    def _starts(self, key: int) -> tuple[int, int]:
        return 1 + key % self._sets * self._size, 1 + (key >> 32) % self._sets * self._size

    def _entries(self, key: int) -> list[list[int]]:
        """What everybody has of a key: the entry's cells but the first."""
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

    def _is_free(self, at: int) -> bool:
        """Whether this worker's entry there counts nothing."""
        raise NotImplementedError

    def _find_place(self, key: int) -> int:
        """Where this worker's entry of a key is, from now on; 0 where there is no place for it."""
        at = self._at.get(key, 0)
        if not at:
            width = self._width
            sets = [
                [at for at in range(start, start + self._size, width) if self._is_free(at)]
                for start in self._starts(key)
            ]
            free = max(sets, key=len)
            if not free:
                return 0
            at = free[0]
            old = self._own[at]
            if self._at.get(old) == at:
                del self._at[old]
            for cell in range(at + 1, at + width):
                self._own[cell] = 0
            self._own[at] = key
            self._at[key] = at
        return at


class Counts(_Table):
    """How many there are of each key at a time.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.
        first, end: the table's cells in the region's second half.
    """

    def __init__(self, board: Scoreboard, row: int, first: int, end: int) -> None:
        super().__init__(board, row, first, end, ways=8, width=2)

    def _is_free(self, at: int) -> bool:
        return not self._own[at + 1]

    def total(self, key: int) -> int:
        """How many all workers have of a key."""
        return sum(max(0, count) for (count,) in self._entries(key))

    def claim(self, key: int, limit: int) -> bool:
        """Takes one more of a key, unless there are as many as the limit; whether it did. A full table has none."""
        for _ in range(_TRIES):
            if not (at := self._find_place(key)):
                return False
            self._own[at + 1] += 1
            self._own[0] = 1
            fence()
            if self.total(key) <= limit:
                return True
            self.release(key)
            if self.total(key) >= limit:
                return False
            os.sched_yield()  # the others who collided may have been stopped in between
        return False

    def release(self, key: int) -> None:
        """Gives one back that this worker has."""
        at = self._at[key]
        left = self._own[at + 1] - 1
        self._own[at + 1] = left
        if not left:
            self._own[at] = 0  # next time it may be in its other set, and must not be found in both
            del self._at[key]
            if not self._at:
                self._own[0] = 0


class Windows(_Table):
    """How many came of each key within a time.

    The time is cut into parts, and an entry has a ring of counts for the last ones: as many come in any time of the
    window's length as are allowed, at most; and of a steady stream 6/7 of that, at least.

    What a worker has counted is forgotten with it when it ends. Who finds no place in a full table, because more than
    some three thousand keys came within the window, is not counted: whoever can come from so many addresses is not held
    up by a limit on each, and others must not be shut out by that.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.
        first, end: the table's cells in the region's second half.
    """

    def __init__(self, board: Scoreboard, row: int, first: int, end: int) -> None:
        super().__init__(board, row, first, end, ways=4, width=1 + _RING)
        self._until: dict[int, int] = {}  # when the entry there is of no meaning any more

    def _is_free(self, at: int) -> bool:
        return self._until.get(at, 0) <= monotonic_ns()

    def total(self, key: int, part: int) -> int:
        """How many came of a key in a part of its time and as many before it as a window has."""
        oldest = (part - _PARTS) << _COUNT_BITS
        return sum(cell & _COUNT for ring in self._entries(key) for cell in ring if cell >= oldest and cell > 0)

    def claim(self, key: int, limit: int, seconds: int) -> bool:
        """Counts one more of a key, unless as many as the limit have come within so many seconds; whether it did."""
        length = seconds * 10**9
        for _ in range(_TRIES):
            now = monotonic_ns()
            part = now * _PARTS // length
            if not (at := self._find_place(key)):
                return True
            self._until[at] = now + 2 * length
            cell = at + 1 + part % _RING
            self._own[cell] = before = max(self._own[cell], part << _COUNT_BITS)
            self._own[cell] = before + 1
            self._own[0] = 1
            fence()
            # Once the part is over others begin to write over the oldest one that is reckoned with here.
            if self.total(key, part) <= limit and monotonic_ns() * _PARTS // length == part:
                return True
            self._own[cell] = before
            if self.total(key, part) >= limit:
                return False
            os.sched_yield()
        return False


class Ledger:
    """All that one worker counts with the others.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.

    Attributes:
        places: connections of each listener.
        addresses: connections of each client's address; some ten thousand addresses of one worker at least.
        rates: new connections of each client's address.
        secret: what to hash keys with; the same for all workers of the daemon, and unknown outside of it.
    """

    def __init__(self, board: Scoreboard, row: int) -> None:
        self.places = Counts(board, row, _PLACES, _ADDRESSES)
        self.addresses = Counts(board, row, _ADDRESSES, _RATES)
        self.rates = Windows(board, row, _RATES, _END)
        self.secret = board.secret
