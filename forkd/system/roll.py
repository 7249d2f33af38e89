"""When each connection of a worker began: what `forkd clients` needs and the kernel does not know.

The first half of the worker's region has a cell of 8 bytes for each descriptor, with the time of accept in nanoseconds
on the monotonic clock; a descriptor beyond has none. It is written at accept and at no other time: the next connection
of that descriptor overwrites it, and whether there still is one the kernel knows. So a connection costs one store.
"""

from __future__ import annotations

import os
from array import array
from time import monotonic_ns

from forkd.system.regions import HALF, SIZE

_BYTES = 8
_CELLS = HALF // _BYTES


class Roll:
    """A process's own.

    Args:
        region: its region; None for one that nobody looks at.
    """

    __slots__ = ("_cells",)

    def __init__(self, region: memoryview | None = None) -> None:
        self._cells = memoryview(bytearray(0)).cast("q") if region is None else region[:HALF].cast("q")

    def began(self, descriptor: int) -> None:
        """A connection with this descriptor begins now."""
        if descriptor < len(self._cells):
            self._cells[descriptor] = monotonic_ns()


def read_roll(regions: int, index: int, descriptors: int) -> array[int]:
    """When each of a worker's descriptors last became a connection, in nanoseconds; 0 for one that never did.

    The memory is read and not mapped: to look at a mapping would make some where nobody has written yet.

    Args:
        regions: a descriptor of the regions' memory.
        index: of the worker's row.
        descriptors: how many are wanted, from 0 on.

    Raises:
        OSError: it can't be read.
    """
    cells = array("q")
    cells.frombytes(os.pread(regions, min(descriptors, _CELLS) * _BYTES, index * SIZE))
    return cells
