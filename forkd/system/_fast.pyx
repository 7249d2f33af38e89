# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""The compiled twin of `shared_counters`' tables, which each client of a listener with limits is counted in.

The tables in the workers' regions are the same, so that workers of both twins count together. What a worker must know
of its own entries whatever the memory says is in arrays, in the place of dictionaries: the key of each, and what it is
busy with.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport calloc, free, realloc
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from *:
    """
    static void forkd_fence(void) { __sync_synchronize(); }
    """
    const char *FORKD_SOURCE
    void forkd_fence() nogil

cdef extern from "<sched.h>" nogil:
    int sched_yield()

ctypedef long long cell

cdef enum:
    TRIES = 8
    PARTS = 6
    RING = PARTS + 1
    COUNT_BITS = 30

cdef cell COUNT = (1LL << COUNT_BITS) - 1
cdef cell MOST = 1LL << 40  # of one cell that is added up; what another worker has written may be anything

SOURCE = FORKD_SOURCE.decode()


cdef class KeyTable:
    """As `shared_counters._KeyTable`.

    Args:
        board: the scoreboard.
        row: the number of this worker's row.
        first, end: the table's first cell in the region's second half, and the one behind its last.
    """

    cdef object _board, _header
    cdef list _views  # they keep the memory that _tables points to
    cdef const volatile cell **_tables
    cdef Py_ssize_t _row, _first, _end, _ways, _width, _sets, _used
    cdef const volatile cell *_rows  # how many the board has handed out
    cdef Py_ssize_t _capacity
    cdef volatile cell *_own
    cdef cell *_keys  # by entry, of this worker; 0: none
    cdef cell *_busy  # by entry: how many it counts, or until when it has a meaning

    def __init__(self, board, Py_ssize_t row, Py_ssize_t first, Py_ssize_t end):
        self._board, self._row, self._first, self._end, self._views = board, row, first, end, []
        self._sets = (end - first - 1) // (self._ways * self._width)
        free(self._keys)
        free(self._busy)
        self._keys = <cell *>calloc(self._sets * self._ways, sizeof(cell))
        self._busy = <cell *>calloc(self._sets * self._ways, sizeof(cell))
        if self._keys == NULL or self._busy == NULL:
            raise MemoryError
        self._header, self._capacity = board.used_cell, board.capacity
        self._rows = <const volatile cell *>self._address(self._header, PyBUF_SIMPLE)
        self._look_at_rows(row + 1)
        self._own = <volatile cell *>self._address(self._views[row], PyBUF_WRITABLE)

    def __dealloc__(self):
        free(self._keys)
        free(self._busy)
        free(self._tables)

    cdef void *_address(self, view, int how) except NULL:
        cdef Py_buffer buffer
        PyObject_GetBuffer(view, &buffer, how)
        PyBuffer_Release(&buffer)  # the view keeps it
        return buffer.buf

    cdef int _look_at_rows(self, Py_ssize_t count) except -1:
        """Finds the tables of rows that were handed out since."""
        cdef void *tables
        from forkd.system.scoreboard import ACCEPT_TIMES_SIZE

        while len(self._views) < count:
            row = len(self._views)
            view = self._board.regions.view(row)[ACCEPT_TIMES_SIZE:].cast("q")[self._first : self._end]
            tables = realloc(self._tables, (row + 1) * sizeof(void *))
            if tables == NULL:
                raise MemoryError
            self._tables = <const volatile cell **>tables
            self._tables[row] = <const volatile cell *>self._address(view, PyBUF_SIMPLE)
            self._views.append(view)
        return 0

    @cython.cdivision(True)
    cdef inline Py_ssize_t _set(self, cell key, int second) noexcept:
        """The first entry of one of a key's two sets."""
        cdef cell found = (key >> 32 if second else key) % self._sets
        return <Py_ssize_t>(found if found >= 0 else found + self._sets) * self._ways

    cdef inline Py_ssize_t _cell(self, Py_ssize_t entry) noexcept:
        return 1 + entry * self._width

    cdef Py_ssize_t _find(self, cell key) noexcept:
        """This worker's entry of a key; -1: there is none."""
        cdef Py_ssize_t entry, start
        for second in range(2):
            start = self._set(key, second)
            for entry in range(start, start + self._ways):
                if self._keys[entry] == key:
                    return entry
        return -1

    cdef Py_ssize_t _find_or_add(self, cell key, cell now) noexcept:
        """The same, from now on; -1 where there is no room for it.

        An entry may become another key's if it is busy up to `now` at most.
        """
        cdef Py_ssize_t entry = self._find(key), start, i, first, most = 0, count
        if entry >= 0:
            return entry
        for second in range(2):
            start = self._set(key, second)
            count, first = 0, -1
            for i in range(start, start + self._ways):
                if self._busy[i] <= now:
                    count += 1
                    if first < 0:
                        first = i
            if count > most:
                most, entry = count, first
        if entry >= 0:
            for i in range(self._cell(entry) + 1, self._cell(entry) + self._width):
                self._own[i] = 0
            self._own[self._cell(entry)] = self._keys[entry] = key
        return entry

    cdef cell _sum(self, cell key, cell oldest) except -1:
        """What all workers have of a key: the sum of its cells; where these are a ring, of those as young as this."""
        cdef const volatile cell *table
        cdef const volatile cell *entry
        cdef Py_ssize_t row, i, count = min(max(0, self._rows[0]), self._capacity)
        cdef bint is_ring = self._width == 1 + RING
        cdef cell found = 0, value
        if count > len(self._views):
            self._look_at_rows(count)
        for row in range(count):
            table = self._tables[row]
            if not table[0]:
                continue
            entry = self._entry_in(table, key)
            if entry == NULL:
                continue
            for i in range(1, self._width):
                value = entry[i]
                if value > 0 and value >= oldest:
                    found += value & COUNT if is_ring else min(value, MOST)
        return found

    cdef const volatile cell *_entry_in(self, const volatile cell *table, cell key) noexcept:
        cdef Py_ssize_t i, start
        for second in range(2):
            start = self._set(key, second)
            for i in range(start, start + self._ways):
                if table[self._cell(i)] == key:
                    return table + self._cell(i)
        return NULL


cdef class CurrentCounts(KeyTable):
    """As `shared_counters.CurrentCounts`."""

    def __cinit__(self, *_):
        self._ways, self._width = 8, 2

    def total(self, cell key):
        """How many all workers have of a key."""
        return self._sum(key, 0)

    def claim(self, cell key, cell limit):
        """Counts one more of a key, unless there are as many as the limit; whether it was counted."""
        cdef Py_ssize_t entry
        for _ in range(TRIES):
            entry = self._find_or_add(key, 0)
            if entry < 0:
                return False
            self._used += not self._busy[entry]
            self._busy[entry] += 1
            self._own[self._cell(entry) + 1] = self._busy[entry]
            self._own[0] = 1
            forkd_fence()
            if self._sum(key, 0) <= limit:
                return True
            self._release(entry)
            if self._sum(key, 0) >= limit:
                return False
            sched_yield()
        return False

    def release(self, cell key):
        """Counts one less of a key, which this worker has claimed."""
        cdef Py_ssize_t entry = self._find(key)
        if entry < 0:
            raise KeyError(key)
        self._release(entry)

    cdef void _release(self, Py_ssize_t entry) noexcept:
        self._busy[entry] -= 1
        self._own[self._cell(entry) + 1] = self._busy[entry]
        if not self._busy[entry]:
            self._own[self._cell(entry)] = self._keys[entry] = 0
            self._used -= 1
            if not self._used:
                self._own[0] = 0


cdef class RateCounts(KeyTable):
    """The base of `shared_counters.RateCounts`' twin, which has `_claim_without_room`.

    Args:
        board, row, first, end: as of `KeyTable`.
        clock: the monotonic clock, in nanoseconds; None: the system's.
    """

    cdef object _clock

    def __cinit__(self, *_, **__):
        self._ways, self._width = 4, 1 + RING

    def __init__(self, board, Py_ssize_t row, Py_ssize_t first, Py_ssize_t end, clock=None):
        KeyTable.__init__(self, board, row, first, end)
        self._clock = clock

    cdef inline cell _now(self) except -1:
        cdef timespec time
        if self._clock is not None:
            return self._clock()
        clock_gettime(CLOCK_MONOTONIC, &time)
        return time.tv_sec * 1000000000LL + time.tv_nsec

    def claim(self, cell key, cell limit, cell seconds):
        """As there."""
        return self._claim(key, limit, seconds)

    @cython.cdivision(True)
    cdef bint _claim(self, cell key, cell limit, cell seconds) except -1:
        cdef Py_ssize_t entry, at
        cdef cell now, part, before, length = seconds * 1000000000LL
        for _ in range(TRIES):
            now = self._now()
            part = now * PARTS // length
            entry = self._find_or_add(key, now)
            if entry < 0:
                return self._claim_without_room(limit, seconds, now)
            self._busy[entry] = now + 2 * length
            at = self._cell(entry) + 1 + part % RING
            before = self._own[at]
            if before >> COUNT_BITS != part:
                before = part << COUNT_BITS
            if before & COUNT == COUNT:
                return False
            self._own[at] = before + 1
            self._own[0] = 1
            forkd_fence()
            # Once the part is over others begin to write over the oldest one that is reckoned with here.
            if self._sum(key, (part - PARTS) << COUNT_BITS) <= limit:
                now = self._now()
                if now * PARTS // length == part:
                    return True
            self._own[at] = before
            if self._sum(key, (part - PARTS) << COUNT_BITS) >= limit:
                return False
            sched_yield()
        return False


cdef class PeerRate:
    """Whether each client of a listener is within its rate: a callable that gets its address, and counts it.

    Args:
        rates: where it is counted.
        key_of: gives its key.
        known: keys by host, of some.
        limit, seconds: how many may come within which time.
        refused: called with the address of one that is not.
    """

    cdef RateCounts _rates
    cdef object _key_of, _refused
    cdef dict _known
    cdef cell _limit, _seconds

    def __init__(self, RateCounts rates not None, key_of, dict known, cell limit, cell seconds, refused):
        self._rates, self._key_of, self._known, self._refused = rates, key_of, known, refused
        self._limit, self._seconds = limit, seconds

    def __call__(self, peer):
        cdef cell key
        found = self._known.get(peer[0]) if type(peer) is tuple else None
        key = self._key_of(peer) if found is None else found
        if not key:
            return True
        key ^= self._seconds
        if self._rates._claim(key if key else 1, self._limit, self._seconds):
            return True
        self._refused(peer)
        return False
