"""The scoreboard: shared memory with a row for each worker process, which that process alone writes while it lives.

There is no lock and no file: an aligned 64-bit store is seen whole, and whoever reads wants a recent figure, not a
transaction. The master hands rows out and clears them after the worker is reaped; it may run as root, so it takes a row
for what a stranger claims. Times are CLOCK_MONOTONIC in nanoseconds.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum, auto


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


#: The load of a row whose worker takes no clients: more than any worker's, so the least load never is its.
NOBODY = 1 << 62

_WIDTH = len(Field)
_BYTES = 8


class Row:
    """One worker's row."""

    __slots__ = ("_cells", "index")

    def __init__(self, index: int, cells: memoryview) -> None:
        self.index = index
        self._cells = cells

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
        """Makes the row nobody's."""
        for field in Field:
            self[field] = 0
        self[Field.LOAD] = NOBODY


class Scoreboard:
    """All rows.

    Args:
        capacity: rows at most; memory is taken only for those that were ever used.
        descriptor: of the memory, where it was handed through an exec; -1: make some.

    Raises:
        OSError: no shared memory to be had.
    """

    def __init__(self, capacity: int, descriptor: int = -1) -> None:
        size = (capacity + 1) * _WIDTH * _BYTES
        # A memfd has a descriptor that can be handed through an exec; where there are none, memory shared by fork does.
        if descriptor >= 0:
            self.descriptor = descriptor
        elif hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("forkd-scoreboard", os.MFD_CLOEXEC)
            os.ftruncate(self.descriptor, size)
        else:
            self.descriptor = -1
        self._memory = memoryview(mmap.mmap(self.descriptor, size)).cast("q")
        self._header = self._memory[:_WIDTH]
        self.capacity = capacity

    @property
    def used(self) -> int:
        """How many rows, from the first on, have ever been handed out; the ones that are worth looking at."""
        return int(self._header[0])

    def row(self, index: int) -> Row:
        """The row of this number, from 0."""
        if not 0 <= index < self.capacity:
            raise IndexError(index)
        start = (index + 1) * _WIDTH
        return Row(index, self._memory[start : start + _WIDTH])

    def rows(self) -> list[Row]:
        """The rows that have ever been handed out."""
        return [self.row(index) for index in range(self.used)]

    def claim(self) -> Row:
        """A cleared row that is nobody's; for the master alone.

        Raises:
            OverflowError: every row is somebody's.
        """
        for index in range(self.capacity):
            row = self.row(index)
            if row[Field.PID] == 0:
                row.clear()
                self._header[0] = max(self.used, index + 1)
                return row
        raise OverflowError(f"all {self.capacity} rows of the scoreboard are taken")

    def loads(self) -> memoryview:
        """The loads of the rows in use, as a view: `min` of it is the least load, at the speed of C."""
        return self._memory[_WIDTH + Field.LOAD : _WIDTH * (self.used + 1) : _WIDTH]
