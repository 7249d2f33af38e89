"""The scoreboard: shared memory with a row for each worker process, which that process alone writes while it lives.

There is no lock and no file: an aligned 64-bit store is seen whole, and whoever reads wants a recent figure, not a
transaction. The master hands rows out and clears them after the worker is reaped; it may run as root, so it takes a row
for what a stranger claims, and keeps in mind itself which rows are somebody's. Each row has a page of its own, the only
one that its worker can write. Times are CLOCK_MONOTONIC in nanoseconds.
"""

from __future__ import annotations

import ctypes
import fcntl
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

_BYTES = 8
_WIDTH = mmap.PAGESIZE // _BYTES  # cells from one row to the next

#: Nobody who has the memory can make it shorter, which would kill the master when it next looks (memfd_create(2)).
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0

_MAP_FIXED = 0x10  # sys/mman.h; Python has no name for it
_MAP_FAILED = ctypes.c_void_p(-1).value


class Row:
    """One worker's row."""

    __slots__ = ("_cells", "_taken", "index")

    def __init__(self, index: int, cells: memoryview, taken: set[int] | None = None) -> None:
        self.index = index
        self._cells = cells
        self._taken = set() if taken is None else taken  # the rows that are somebody's

    @classmethod
    def of_nobody(cls) -> Row:
        """A row on no scoreboard, for a process that counts for itself alone."""
        return cls(0, memoryview(bytearray(_WIDTH * _BYTES)).cast("q"), set())

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
        self._taken.discard(self.index)


class Scoreboard:
    """All rows.

    Args:
        capacity: rows at most; memory is taken only for those that were ever used.
        descriptor: of the memory, where it was handed through an exec; -1: make some.

    Raises:
        OSError: no shared memory to be had.
    """

    def __init__(self, capacity: int, descriptor: int = -1) -> None:
        self._size = (capacity + 1) * mmap.PAGESIZE
        self._taken: set[int] = set()  # rows that are somebody's, as far as this process has handed them out
        # A memfd has a descriptor that can be handed through an exec; where there are none, memory shared by fork does.
        # An `mmap` of the memfd would keep a copy of its descriptor, so it is an anonymous one, mapped over.
        self.descriptor = descriptor
        self._map = mmap.mmap(-1, self._size)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        if descriptor < 0 and hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("forkd-scoreboard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(self.descriptor, self._size)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        if self.descriptor >= 0:
            self._map_over(self.descriptor, mmap.PROT_READ | mmap.PROT_WRITE)
        self._memory = memoryview(self._map).cast("q")
        self._header = self._memory[: len(Field)]
        self.capacity = capacity

    def _map_over(self, descriptor: int, protection: int, page: int | None = None) -> None:
        """Puts the memory of a descriptor, or one page of it, where this process looks for it (mmap(2), MAP_FIXED)."""
        offset, size = (0, self._size) if page is None else (page * mmap.PAGESIZE, mmap.PAGESIZE)
        function = ctypes.CDLL(None, use_errno=True).mmap
        function.restype = ctypes.c_void_p
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        flags = mmap.MAP_SHARED | _MAP_FIXED
        if function(self._address + offset, size, protection, flags, descriptor, offset) == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def confine(self, row: Row) -> None:
        """In a worker: takes away all but reading, save for its own row, and the descriptor, for good. Views of the
        memory stay what they are; to write to another row through one ends the process. Raises OSError.
        """
        if self.descriptor < 0:
            return
        # What was opened for reading alone can't be made writable again (mprotect(2)).
        reader = os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._map_over(reader, mmap.PROT_READ)
            self._map_over(self.descriptor, mmap.PROT_READ | mmap.PROT_WRITE, row.index + 1)
        finally:
            os.close(reader)
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def used(self) -> int:
        """How many rows, from the first on, have ever been handed out; the ones that are worth looking at."""
        return int(self._header[0])

    def row(self, index: int) -> Row:
        """The row of this number, from 0."""
        if not 0 <= index < self.capacity:
            raise IndexError(index)
        start = (index + 1) * _WIDTH
        return Row(index, self._memory[start : start + len(Field)], self._taken)

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

    def adopt(self, index: int) -> Row:
        """The row of this number, which another image of this process has handed out."""
        row = self.row(index)
        self._taken.add(index)
        return row

    def loads(self) -> memoryview:
        """The loads of the rows in use, as a view: `min` of it is the least load, at the speed of C."""
        return self._memory[_WIDTH + Field.LOAD : _WIDTH * (self.used + 1) : _WIDTH]
