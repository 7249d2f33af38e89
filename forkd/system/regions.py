"""Shared memory beside the scoreboard: a large region for each of its rows, which is mapped by those alone who look.

As with a row, the worker that has it writes it and everybody may read it; what stands there is a stranger's claim. It
takes as much memory as was ever written to, and gives it back when the row is cleared.
"""

from __future__ import annotations

import mmap
import os

from forkd.system.memory import READ, WRITE, clear_memory, make_memory, map_over, read_only

#: Bytes of a region. The first half is `roll`'s, the second half `counts`'.
SIZE = 1 << 20
HALF = SIZE // 2


class Regions:
    """All of them.

    Args:
        rows: how many.
        descriptor: of the memory, where it was handed through an exec; -1: make some.

    Raises:
        OSError: no shared memory to be had.
    """

    def __init__(self, rows: int, descriptor: int = -1) -> None:
        self.descriptor = descriptor if descriptor >= 0 else make_memory("forkd-regions", rows * SIZE)
        self._own = -1
        self._views: dict[int, memoryview] = {}

    def confine(self, index: int) -> None:
        """In a worker: from now on it can write the region of this row, and read all others. Raises OSError."""
        if self.descriptor < 0:
            return
        self._own = index
        self._views = {index: self._map(index, WRITE)}
        writable, self.descriptor = self.descriptor, read_only(self.descriptor)
        os.close(writable)

    def of(self, index: int) -> memoryview:
        """The region of a row, SIZE bytes; to be written by the worker that is confined to it. Where the system has no
        such memory it is this process's own.

        Raises:
            OSError: it can't be mapped.
        """
        view = self._views.get(index)
        if view is None:
            view = self._views[index] = self._map(index, READ)
        return view

    def _map(self, index: int, protection: int) -> memoryview:
        place = mmap.mmap(-1, SIZE)
        if self.descriptor >= 0:
            map_over(place, 0, self.descriptor, protection, index * SIZE, SIZE)
        return memoryview(place)

    def clear(self, index: int) -> None:
        """Makes a region nobody's; for the master alone. Raises OSError."""
        if self.descriptor >= 0:
            clear_memory(self.descriptor, index * SIZE, SIZE)
