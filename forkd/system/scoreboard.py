"""The scoreboard: memory that the master shares with its workers, in which each worker writes and all read.

Each worker has a row of counters (`Row`, `Field`) and a region of 3.5 MiB (`Regions`). A region has first the accept
times of the worker's connections (`AcceptTimes`); then what belongs to `shared_counters`; then whose those connections
are that proxies have made (`ClientAddresses`); and last what handlers count (`handler_metrics`). `forkd clients` needs
the first and the third, which the kernel does not know.

There is no lock and no file: an aligned 64-bit store is seen whole, and a reader wants a recent figure, not a
transaction. The master hands rows out and clears them after the worker is reaped. A worker can write its own row and
region alone (`Scoreboard.confine`). What it writes is not trusted: the master, which may be root, keeps in mind itself
which rows are in use. Times are CLOCK_MONOTONIC in nanoseconds.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from array import array
from enum import IntEnum, auto
from time import monotonic_ns

from forkd.system.libc import c_function

#: Bytes of a worker's region: its accept times, its shared counters, its clients' addresses, its handlers' metrics.
ACCEPT_TIMES_SIZE = COUNTERS_SIZE = METRICS_SIZE = 1 << 19
ADDRESSES_SIZE = 1 << 21
REGION_SIZE = ACCEPT_TIMES_SIZE + COUNTERS_SIZE + ADDRESSES_SIZE + METRICS_SIZE
#: Where the last part begins.
METRICS_AT = REGION_SIZE - METRICS_SIZE

#: The load of a row whose worker accepts no clients: more than any worker's, so the least load never is its.
NOT_ACCEPTING = 1 << 62

#: Seconds from one heartbeat of a worker to the next, where its `stall_timeout` does not want a shorter time.
HEARTBEAT_SECONDS = 1.0

_CELL_SIZE = 8
_ROW_CELLS = mmap.PAGESIZE // _CELL_SIZE  # from one row to the next: each has a page of its own, which can be protected
_MOST_ACCEPT_TIMES = ACCEPT_TIMES_SIZE // _CELL_SIZE

_ADDRESS = struct.Struct("=Q16sQ")  # the connection's cookie, its client's IPv6 address, and port
_ADDRESSES_AT = ACCEPT_TIMES_SIZE + COUNTERS_SIZE

_READ_ONLY = mmap.PROT_READ
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE

#: No process that has the memory can make it shorter, which would kill the next that looks (memfd_create(2)).
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0

#: Who may open the memory by a descriptor of it (/proc/self/fd): another user than the master's to read it alone.
#: F_SEAL_FUTURE_WRITE would forbid it to the master's user too, but the master maps it once more after an upgrade, and
#: each worker its own part.
_MODE = 0o444

_MAP_FIXED = 0x10  # sys/mman.h; Python has no name for it
_PUNCH_HOLE = 0x02 | 0x01  # linux/falloc.h, FALLOC_FL_PUNCH_HOLE and FALLOC_FL_KEEP_SIZE


# The rows


class Field(IntEnum):
    """A row's 64-bit fields, in order."""

    PID = 0
    GENERATION = auto()
    HEARTBEAT = auto()  # when the worker's loop last ran
    LOAD = auto()  # connections it holds while it accepts, else NOT_ACCEPTING; what balanced accept compares
    ACCEPTED = auto()
    CLOSED = auto()
    ERRORS = auto()  # exceptions out of handlers
    LAG = auto()  # how late the loop's last heartbeat was
    ENDED_FIRST_BYTE = auto()  # connections that forkd ended, by the reasons of `forkd.ended`
    ENDED_IDLE = auto()
    ENDED_WRITE = auto()
    ENDED_LIFETIME = auto()
    ENDED_HEARTBEAT = auto()
    ENDED_WRITE_BUFFER = auto()
    ENDED_HANDSHAKE = auto()
    ENDED_KILLED = auto()
    DATAGRAMS_RECEIVED = auto()
    DATAGRAMS_SENT = auto()
    DATAGRAMS_DROPPED = auto()  # not sent: too many were unsent already, it took too long, the kernel refused
    REFUSED_FULL = auto()  # clients for which the listener had no slot
    REFUSED_PER_IP = auto()  # clients whose address had too many connections
    REFUSED_RATE = auto()  # clients whose address connected too often
    REFUSED_DENIED = auto()  # clients whose address is not allowed
    REFUSED_PROXY_HEADER = auto()  # connections and datagrams of proxies without a header that can be read


#: Upper bounds of what connections are told apart by: seconds that they lasted, bytes in both directions.
DURATION_BOUNDS = (0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0)
SIZE_BOUNDS = (256, 4096, 1 << 16, 1 << 20, 1 << 24, 1 << 30)


class ListenerField(IntEnum):
    """A row's 64-bit fields about one listener, in order, where metrics are asked for. The last two are the first of as
    many as there are bounds, and one for what is above all of them.
    """

    OPENED = 0
    CLOSED = 1
    BYTES_IN = 2  # of connections that have ended, as these below
    BYTES_OUT = 3
    MICROSECONDS = 4
    FIRST_DURATION = 5
    FIRST_SIZE = 6 + len(DURATION_BOUNDS)


LISTENER_CELLS = ListenerField.FIRST_SIZE + len(SIZE_BOUNDS) + 1

#: Where the first listener's cells are in a row, and for how many listeners there are some.
_FIRST_LISTENER = 64
MOST_LISTENERS = (_ROW_CELLS - _FIRST_LISTENER) // LISTENER_CELLS


#: Fields that only ever grow in a worker's life: the daemon's totals are their sums over its present and past workers.
COUNTERS = (
    Field.ACCEPTED,
    Field.CLOSED,
    Field.ERRORS,
    *(field for field in Field if field.name.startswith(("DATAGRAMS_", "ENDED_", "REFUSED_"))),
)


def beat_seconds(stall_timeout: float) -> float:
    """Seconds from one heartbeat to the next of a worker with this `stall_timeout`."""
    return min(HEARTBEAT_SECONDS, stall_timeout / 3) if stall_timeout else HEARTBEAT_SECONDS


_NO_LISTENERS = memoryview(bytes((_ROW_CELLS - _FIRST_LISTENER) * _CELL_SIZE)).cast("q")


class Row:
    """One worker's row."""

    __slots__ = ("_board", "_cells", "_listeners", "index")

    def __init__(self, index: int, cells: memoryview, board: Scoreboard | None = None) -> None:
        self.index = index
        self._cells = cells[: len(Field)]
        self._listeners = cells[_FIRST_LISTENER:]
        self._board = board

    @classmethod
    def unshared(cls) -> Row:
        """A row on no scoreboard, for a process that alone reads what it counts."""
        return cls(0, memoryview(bytearray(_ROW_CELLS * _CELL_SIZE)).cast("q"))

    def __getitem__(self, field: Field) -> int:
        value: int = self._cells[field]
        return value

    def __setitem__(self, field: Field, value: int) -> None:
        self._cells[field] = value

    @property
    def active(self) -> int:
        """Connections that are open now."""
        return self[Field.ACCEPTED] - self[Field.CLOSED]

    @property
    def cells(self) -> memoryview:
        """The fields as a view of signed 64-bit integers, for code that counts each connection."""
        return self._cells

    def listener(self, place: int) -> memoryview | None:
        """The cells about the listener in this place of the settings; None for one for which there are none."""
        if place >= MOST_LISTENERS:
            return None
        return self._listeners[place * LISTENER_CELLS : (place + 1) * LISTENER_CELLS]

    @property
    def regions(self) -> int:
        """The descriptor of the regions' memory; -1 where there is none."""
        return -1 if self._board is None else self._board.regions.descriptor

    def clear(self) -> None:
        """Makes the row free; for the master alone."""
        for field in Field:
            self[field] = 0
        self._listeners[:] = _NO_LISTENERS
        self[Field.LOAD] = NOT_ACCEPTING
        if self._board is not None:
            self._board.release(self.index)


def listener_counts(row: Row, place: int) -> list[int]:
    """What a row has about a listener, by `ListenerField`; what is below zero reads as zero."""
    cells = row.listener(place)
    return [max(0, value) for value in cells] if cells is not None else [0] * LISTENER_CELLS


def counters_of(row: Row) -> dict[str, int]:
    """The counters of a row, by the field's name in lower case; what is below zero reads as zero."""
    return {field.name.lower(): max(0, row[field]) for field in COUNTERS}


class Scoreboard:
    """All rows, and the regions beside them.

    Args:
        capacity: rows at most; memory is taken only for those that were ever used.
        descriptor: of the memory, where it was handed through an exec; -1: make some.
        regions: the descriptor of the regions' memory, likewise.

    Attributes:
        capacity: as the argument.
        descriptor: of the memory; -1 where there is none, and in a worker that was confined.
        regions: the regions, one for each row.

    Raises:
        OSError: the system gives no shared memory.
    """

    def __init__(self, capacity: int, descriptor: int = -1, regions: int = -1) -> None:
        size = (capacity + 1) * mmap.PAGESIZE
        self._taken: set[int] = set()  # rows in use, as far as this process has handed them out
        # A memfd has a descriptor that can be handed through an exec; where there are none, memory shared by fork does.
        self._map = mmap.mmap(-1, size)
        self.descriptor = descriptor if descriptor >= 0 else _make_memory("forkd-scoreboard", size)
        if self.descriptor >= 0:
            _map_over(memoryview(self._map), self.descriptor, _READ_WRITE, 0)
        self._memory = memoryview(self._map).cast("q")
        self._header = self._memory[: len(Field)]
        if descriptor < 0:
            self._memory[1:3] = memoryview(os.urandom(2 * _CELL_SIZE)).cast("q")
        self.capacity = capacity
        self.regions = Regions(capacity, regions)

    def confine(self, row: Row) -> None:
        """In a worker: takes away for good the descriptor, and writing to all but its own row and region. Views of the
        memory stay valid; a write to another row through one ends the process (SIGSEGV). Raises OSError.
        """
        self.regions.confine(row.index)
        if self.descriptor < 0:
            return
        reader = open_read_only(self.descriptor)
        page = (row.index + 1) * mmap.PAGESIZE
        try:
            _map_over(memoryview(self._map), reader, _READ_ONLY, 0)
            _map_over(memoryview(self._map)[page : page + mmap.PAGESIZE], self.descriptor, _READ_WRITE, page)
        finally:
            os.close(reader)
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def used_cell(self) -> memoryview:
        """Where the number is that `used` makes sure of, in 8 bytes."""
        return self._header[:1]

    @property
    def used(self) -> int:
        """How many rows, from the first on, have ever been handed out: those that are worth reading."""
        return min(max(0, self._header[0]), self.capacity)

    @property
    def secret(self) -> bytes:
        """16 random bytes, the same for as long as the daemon lives, upgrades too: they are part of the memory."""
        return self._memory[1:3].tobytes()

    def row(self, index: int) -> Row:
        """The row of this number, from 0. Raises IndexError."""
        if not 0 <= index < self.capacity:
            raise IndexError(index)
        start = (index + 1) * _ROW_CELLS
        return Row(index, self._memory[start : start + _ROW_CELLS], self)

    def rows(self) -> list[Row]:
        """The rows that have ever been handed out."""
        return [self.row(index) for index in range(self.used)]

    def claim(self) -> Row:
        """A free row, cleared, which is in use until it is cleared again; for the master alone.

        Raises:
            OverflowError: every row is in use.
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
        """Makes the row of this number free, and its region empty."""
        self._taken.discard(index)
        self.regions.clear(index)

    def adopt(self, index: int) -> Row:
        """The row of this number, which is in use since an earlier image of this process (before an exec)."""
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
        return self._memory[_ROW_CELLS + Field.LOAD : _ROW_CELLS * (self.used + 1) : _ROW_CELLS]


# The regions


class Regions:
    """A region of REGION_SIZE bytes for each row.

    It is mapped by the processes that look into it, takes as much memory as was ever written to, and gives that back
    when the row is cleared.

    Args:
        rows: how many.
        descriptor: of the memory, where it was handed through an exec; -1: make some.

    Raises:
        OSError: the system gives no shared memory.
    """

    def __init__(self, rows: int, descriptor: int = -1) -> None:
        self.descriptor = descriptor if descriptor >= 0 else _make_memory("forkd-regions", rows * REGION_SIZE)
        self._views: dict[int, memoryview] = {}

    def confine(self, index: int) -> None:
        """In a worker: from now on it can write the region of this row, and read all others. Raises OSError."""
        if self.descriptor < 0:
            return
        self._views.clear()
        self.map_writable(index)
        writable, self.descriptor = self.descriptor, open_read_only(self.descriptor)
        os.close(writable)

    def map_writable(self, index: int) -> memoryview:
        """Maps a region for this process to write, as long as it is not confined to another. Raises OSError."""
        self._views[index] = self._map(index, _READ_WRITE)
        return self._views[index]

    def view(self, index: int) -> memoryview:
        """The region of a row; read-only but for the worker that is confined to it. Where the system has no shared
        memory behind descriptors, this process alone sees it.

        Raises:
            OSError: it can't be mapped.
        """
        view = self._views.get(index)
        if view is None:
            view = self._views[index] = self._map(index, _READ_ONLY)
        return view

    def _map(self, index: int, protection: int) -> memoryview:
        mapping = memoryview(mmap.mmap(-1, REGION_SIZE))
        if self.descriptor >= 0:
            _map_over(mapping, self.descriptor, protection, index * REGION_SIZE)
        return mapping

    def clear(self, index: int) -> None:
        """Makes a region empty; for the master alone. Raises OSError."""
        if self.descriptor >= 0:
            _clear_memory(self.descriptor, index * REGION_SIZE, REGION_SIZE)


class AcceptTimes:
    """When each connection of a worker was accepted, written into the first part of its region.

    There is a cell of 8 bytes for each descriptor, with the time of accept in nanoseconds; a descriptor beyond the last
    cell has none. A cell is written at accept and at no other time: the next connection of that descriptor overwrites
    it, and whether there still is one the kernel knows. So a connection costs one store.

    Args:
        region: the worker's region; None for a process whose accept times are not read.
    """

    __slots__ = ("_cells",)

    def __init__(self, region: memoryview | None = None) -> None:
        self._cells = memoryview(bytearray(0)).cast("q") if region is None else region[:ACCEPT_TIMES_SIZE].cast("q")

    def record(self, descriptor: int) -> None:
        """A connection with this descriptor was accepted now."""
        if descriptor < len(self._cells):
            self._cells[descriptor] = monotonic_ns()


def read_accept_times(regions: int, index: int, descriptors: int) -> array[int]:
    """When each of a worker's descriptors was last accepted, in nanoseconds; 0 for one that never was.

    The memory is read and not mapped: to look at a mapping would allocate pages that were never written.

    Args:
        regions: a descriptor of the regions' memory.
        index: of the worker's row.
        descriptors: how many are wanted, from 0 on.

    Raises:
        OSError: it can't be read.
    """
    cells = array("q")
    size = min(descriptors, _MOST_ACCEPT_TIMES) * _CELL_SIZE
    cells.frombytes(os.pread(regions, size, index * REGION_SIZE))
    return cells


class ClientAddresses:
    """Whose a worker's connections are that proxies have made, written into the third part of its region.

    There is an entry for each descriptor, written when the proxy has said who its client is; a descriptor beyond the
    last entry has none. The kernel's cookie in it tells which connection is meant, since that never is another's; so
    nothing is written for connections without a proxy, nor when one ends.

    Args:
        region: the worker's region.
    """

    __slots__ = ("_entries",)

    def __init__(self, region: memoryview) -> None:
        self._entries = region[_ADDRESSES_AT:METRICS_AT]

    def record(self, descriptor: int, cookie: int, address: bytes, port: int) -> None:
        """The connection of this descriptor is that of a client.

        Args:
            descriptor: of the connection.
            cookie: what the kernel calls it (socket(7), SO_COOKIE).
            address: the client's, 16 octets; one of IPv4 as an IPv4-mapped address.
            port: the client's.
        """
        if descriptor < ADDRESSES_SIZE // _ADDRESS.size:
            _ADDRESS.pack_into(self._entries, descriptor * _ADDRESS.size, 0, address, port)
            # The cookie last: an entry without one is no connection's, should it be read just now.
            _ADDRESS.pack_into(self._entries, descriptor * _ADDRESS.size, cookie, address, port)


def read_client_addresses(regions: int, index: int, descriptors: int) -> dict[int, tuple[bytes, int]]:
    """By a connection's cookie, its client's address and port, as far as a worker has recorded them; also those of
    connections that are over.

    Args:
        regions, index, descriptors: as of `read_accept_times`.

    Raises:
        OSError: they can't be read.
    """
    size = min(descriptors * _ADDRESS.size, ADDRESSES_SIZE)
    found = os.pread(regions, size, index * REGION_SIZE + _ADDRESSES_AT)
    return {cookie: (address, port) for cookie, address, port in _ADDRESS.iter_unpack(found) if cookie}


# Memory behind a descriptor (memfd_create(2))


def _make_memory(name: str, size: int) -> int:
    """A descriptor of new memory of so many bytes; -1 where the system has no such thing. Raises OSError."""
    if not hasattr(os, "memfd_create"):
        return -1
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:  # a limit of files' sizes holds for it, too
        os.close(descriptor)
        hint = " (ulimit -f)" if error.errno == errno.EFBIG else ""
        raise OSError(error.errno, f"{error.strerror}{hint}", "memory that workers share") from None
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    os.fchmod(descriptor, _MODE)
    return descriptor


def _map_over(mapping: memoryview, descriptor: int, protection: int, offset: int) -> None:
    """Replaces an anonymous mapping, or a part of it, by memory behind a descriptor (mmap(2), MAP_FIXED). An `mmap` of
    the descriptor would keep a copy of it open.

    Args:
        mapping: what is replaced, in bytes; whole pages.
        descriptor: the memory's.
        protection: _READ_ONLY or _READ_WRITE.
        offset: where in the memory, in bytes.

    Raises:
        OSError: the system refuses.
    """
    types = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    flags = mmap.MAP_SHARED | _MAP_FIXED
    c_function("mmap", *types, result=ctypes.c_ssize_t)(address, len(mapping), protection, flags, descriptor, offset)


def open_read_only(descriptor: int) -> int:
    """Another descriptor of the same memory, by which it can't be written; nor by a mapping that is made of it and
    changed later (mprotect(2)). Raises OSError.
    """
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


def _clear_memory(descriptor: int, offset: int, size: int) -> None:
    """Makes a part of the memory zeros again, and gives it back to the system (fallocate(2)). Raises OSError."""
    types = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
    c_function("fallocate", *types)(descriptor, _PUNCH_HOLE, offset, size)
