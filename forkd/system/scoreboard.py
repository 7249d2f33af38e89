"""The scoreboard: shared memory with a row for each worker process, which that process alone writes while it lives.

There is no lock and no file: an aligned 64-bit store is seen whole, and whoever reads wants a recent figure, not a
transaction. The master hands rows out and clears them after the worker is reaped; it may run as root, so it takes a row
for what a stranger claims, and keeps in mind itself which rows are somebody's. Each row has a page of its own, the only
one that its worker can write. Times are CLOCK_MONOTONIC in nanoseconds.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum, auto

from forkd.system.memory import READ, WRITE, make_memory, map_over, read_only
from forkd.system.regions import Regions


class Field(IntEnum):
    """A row's 64-bit fields, in order."""

    PID = 0
    GENERATION = auto()
    HEARTBEAT = auto()  # when the worker's loop last came by
    LOAD = auto()  # connections it holds while it accepts, else NOBODY; what balanced accept compares
    ACCEPTED = auto()
    CLOSED = auto()
    ERRORS = auto()  # exceptions out of handlers
    LAG = auto()  # how late the loop's last heartbeat was
    ENDED_FIRST_BYTE = auto()  # connections that were ended for one of the reasons of `forkd.ended`, each by its name
    ENDED_IDLE = auto()
    ENDED_WRITE = auto()
    ENDED_LIFETIME = auto()
    ENDED_HEARTBEAT = auto()
    ENDED_WRITE_BUFFER = auto()
    ENDED_KILLED = auto()
    DATAGRAMS_RECEIVED = auto()
    DATAGRAMS_SENT = auto()
    DATAGRAMS_DROPPED = auto()  # that were to be sent, when too many were unsent already
    REFUSED_FULL = auto()  # clients for whom there was no place
    REFUSED_PER_IP = auto()  # those of whose address there were too many
    REFUSED_RATE = auto()  # those of whose address too many came
    REFUSED_DENIED = auto()  # those who may not come from where they come


#: Fields that only ever grow in a worker's life: the daemon's totals are their sums, over the living and the dead.
COUNTERS = (
    Field.ACCEPTED,
    Field.CLOSED,
    Field.ERRORS,
    *(field for field in Field if field.name.startswith(("DATAGRAMS_", "ENDED_", "REFUSED_"))),
)

#: The load of a row whose worker takes no clients: more than any worker's, so the least load never is its.
NOBODY = 1 << 62

_BYTES = 8
_WIDTH = mmap.PAGESIZE // _BYTES  # cells from one row to the next


class Row:
    """One worker's row."""

    __slots__ = ("_board", "_cells", "index")

    def __init__(self, index: int, cells: memoryview, board: Scoreboard | None = None) -> None:
        self.index = index
        self._cells = cells
        self._board = board

    @classmethod
    def of_nobody(cls) -> Row:
        """A row on no scoreboard, for a process that counts for itself alone."""
        return cls(0, memoryview(bytearray(_WIDTH * _BYTES)).cast("q"))

    def __getitem__(self, field: Field) -> int:
        value: int = self._cells[field]
        return value

    def __setitem__(self, field: Field, value: int) -> None:
        self._cells[field] = value

    @property
    def active(self) -> int:
        """Connections that are open."""
        return self[Field.ACCEPTED] - self[Field.CLOSED]

    @property
    def cells(self) -> memoryview:
        """The fields as a view of signed 64-bit integers, for code that counts each connection."""
        return self._cells

    def clear(self) -> None:
        """Makes the row nobody's; for the master alone."""
        for field in Field:
            self[field] = 0
        self[Field.LOAD] = NOBODY
        if self._board is not None:
            self._board.release(self.index)


def counts_of(row: Row) -> dict[str, int]:
    """What its worker has counted, by the field's name."""
    return {field.name.lower(): max(0, row[field]) for field in COUNTERS}


class Scoreboard:
    """All rows.

    Args:
        capacity: rows at most; memory is taken only for those that were ever used.
        descriptor: of the memory, where it was handed through an exec; -1: make some.
        regions: of the regions' memory, likewise.

    Attributes:
        regions: more memory for each row.

    Raises:
        OSError: no shared memory to be had.
    """

    def __init__(self, capacity: int, descriptor: int = -1, regions: int = -1) -> None:
        size = (capacity + 1) * mmap.PAGESIZE
        self._taken: set[int] = set()  # rows that are somebody's, as far as this process has handed them out
        # A memfd has a descriptor that can be handed through an exec; where there are none, memory shared by fork does.
        self._map = mmap.mmap(-1, size)
        self.descriptor = descriptor if descriptor >= 0 else make_memory("forkd-scoreboard", size)
        if self.descriptor >= 0:
            map_over(self._map, 0, self.descriptor, WRITE, 0, size)
        self._size = size
        self._memory = memoryview(self._map).cast("q")
        self._header = self._memory[: len(Field)]
        if descriptor < 0:
            self._memory[1:3] = memoryview(os.urandom(2 * _BYTES)).cast("q")
        self.capacity = capacity
        self.regions = Regions(capacity, regions)

    def confine(self, row: Row) -> None:
        """In a worker: takes away all but reading, save for its own row and region, and the descriptor, for good. Views
        of the memory stay what they are; to write to another row through one ends the process. Raises OSError.
        """
        self.regions.confine(row.index)
        if self.descriptor < 0:
            return
        reader = read_only(self.descriptor)
        page = (row.index + 1) * mmap.PAGESIZE
        try:
            map_over(self._map, 0, reader, READ, 0, self._size)
            map_over(self._map, page, self.descriptor, WRITE, page, mmap.PAGESIZE)
        finally:
            os.close(reader)
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def used(self) -> int:
        """How many rows, from the first on, have ever been handed out; the ones that are worth looking at."""
        return int(self._header[0])

    @property
    def secret(self) -> bytes:
        """Chosen by chance when the daemon started, and the same for as long as it lives, also through upgrades: it is
        part of the memory.
        """
        return self._memory[1:3].tobytes()

    def row(self, index: int) -> Row:
        """The row of this number, from 0."""
        if not 0 <= index < self.capacity:
            raise IndexError(index)
        start = (index + 1) * _WIDTH
        return Row(index, self._memory[start : start + len(Field)], self)

    def rows(self) -> list[Row]:
        """The rows that have ever been handed out."""
        return [self.row(index) for index in range(self.used)]

    def claim(self) -> Row:
        """A cleared row that is nobody's, until it is cleared again; for the master alone.

        Raises:
            OverflowError: every row is somebody's.
        """
        index = next((index for index in range(self.capacity) if index not in self._taken), None)
        if index is None:
            raise OverflowError(f"all {self.capacity} rows of the scoreboard are taken")
        row = self.row(index)
        row.clear()
        self._taken.add(index)
        self._header[0] = max(self.used, index + 1)
        return row

    def release(self, index: int) -> None:
        """The row of this number is nobody's any more."""
        self._taken.discard(index)
        self.regions.clear(index)

    def adopt(self, index: int) -> Row:
        """The row of this number, which another image of this process has handed out."""
        row = self.row(index)
        self._taken.add(index)
        return row

    def close(self) -> None:
        """Closes the descriptors of the memory, which stays mapped."""
        for descriptor in (self.descriptor, self.regions.descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self.descriptor = self.regions.descriptor = -1

    def loads(self) -> memoryview:
        """The loads of the rows in use, as a view: `min` of it is the least load, at the speed of C."""
        return self._memory[_WIDTH + Field.LOAD : _WIDTH * (self.used + 1) : _WIDTH]
