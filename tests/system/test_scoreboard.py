"""The scoreboard: what one process writes into its row the others see, and rows are handed out, cleared and counted."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import resource
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.system.scoreboard import NOT_ACCEPTING, Field, Row, Scoreboard
from tests.support.forked import exit_code, start_child


@pytest.fixture
def make() -> Iterator[Callable[[int], Scoreboard]]:
    """Makes scoreboards whose descriptors are closed at the end."""
    made: list[Scoreboard] = []

    def scoreboard(capacity: int) -> Scoreboard:
        made.append(Scoreboard(capacity))
        return made[-1]

    yield scoreboard
    for board in made:
        board.close()


def claimed(board: Scoreboard, pid: int) -> Row:
    row = board.claim()
    row[Field.PID] = pid
    return row


def test_a_child_and_its_parent_see_what_the_other_writes(make: Callable[[int], Scoreboard]) -> None:
    row = claimed(make(4), 1)
    to_child, from_parent = os.pipe()
    from_child, to_parent = os.pipe()

    def write_and_read() -> None:
        row[Field.ACCEPTED] = 41
        os.write(to_parent, b"x")
        os.close(from_parent)
        os.read(to_child, 1)
        assert row[Field.LAG] == -(1 << 40)

    child = start_child(write_and_read)
    try:
        assert select.select([from_child], [], [], 20)[0]
        assert row[Field.ACCEPTED] == 41
        row[Field.LAG] = -(1 << 40)
    finally:
        for descriptor in (from_parent, to_child, from_child, to_parent):
            os.close(descriptor)
        status = exit_code(child)
    assert status == 0


def test_a_row_that_is_handed_out_after_the_fork_is_shared_too(make: Callable[[int], Scoreboard]) -> None:
    board = make(4)

    def count() -> None:
        board.row(3)[Field.ERRORS] = 7

    assert exit_code(start_child(count)) == 0
    assert board.row(3)[Field.ERRORS] == 7


def test_the_memory_is_reached_through_its_descriptor_too(make: Callable[[int], Scoreboard]) -> None:
    board = make(2)
    claimed(board, 1234)
    assert (1234).to_bytes(8, "little") in os.pread(board.descriptor, mmap.PAGESIZE, mmap.PAGESIZE)
    assert not os.get_inheritable(board.descriptor)


def test_the_lowest_free_row_is_handed_out(make: Callable[[int], Scoreboard]) -> None:
    board = make(8)
    rows = [claimed(board, pid) for pid in (11, 12, 13, 14)]
    assert [row.index for row in rows] == [0, 1, 2, 3]
    rows[2].clear()
    rows[1].clear()
    assert [claimed(board, pid).index for pid in (15, 16, 17)] == [1, 2, 4]
    assert [row[Field.PID] for row in board.rows()] == [11, 15, 16, 14, 17]


def test_row_stays_in_use_whatever_its_worker_writes(make: Callable[[int], Scoreboard]) -> None:
    board = make(2)
    row = claimed(board, 1)
    row[Field.PID] = 0
    assert board.claim().index == 1


def test_a_row_that_was_adopted_is_not_handed_out(make: Callable[[int], Scoreboard]) -> None:
    before = make(3)
    claimed(before, 1)
    claimed(before, 2)
    after = Scoreboard(3, before.descriptor, before.regions.descriptor)
    assert after.adopt(1)[Field.PID] == 2
    assert [after.claim().index, after.claim().index] == [0, 2]


def test_confined_worker_writes_its_row_and_reads_all(make: Callable[[int], Scoreboard]) -> None:
    board = make(4)
    first, own, later = (claimed(board, pid) for pid in (1, 2, 3))
    loads = board.loads()

    def write_and_read() -> None:
        board.confine(own)
        own[Field.ERRORS] = 5
        assert first[Field.PID] == 1
        assert list(loads) == [NOT_ACCEPTING] * 3
        assert later[Field.PID] == 3
        assert board.descriptor == -1

    assert exit_code(start_child(write_and_read)) == 0
    assert own[Field.ERRORS] == 5


@pytest.mark.parametrize("reach", ["another's row", "the header", "memory that it makes writable"])
def test_a_worker_that_is_confined_dies_of_writing_elsewhere(make: Callable[[int], Scoreboard], reach: str) -> None:
    board = make(4)
    other, own = claimed(board, 1), claimed(board, 2)
    header = ctypes.addressof(ctypes.c_char.from_buffer(board.row(0).cells)) - mmap.PAGESIZE

    def trespass() -> int:
        faulthandler.disable()  # of pytest; the end is expected
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        board.confine(own)
        if reach == "the header":
            ctypes.c_int64.from_address(header).value = 1 << 60
        elif reach == "another's row":
            other[Field.HEARTBEAT] = -1
        else:
            protection = mmap.PROT_READ | mmap.PROT_WRITE
            return 7 if ctypes.CDLL(None).mprotect(ctypes.c_void_p(header), mmap.PAGESIZE * 2, protection) else 8
        return 0

    assert exit_code(start_child(trespass)) == (7 if reach.startswith("memory") else -signal.SIGSEGV)
    assert (board.used, other[Field.HEARTBEAT]) == (2, 0)


def test_memory_can_not_be_made_shorter_or_longer(make: Callable[[int], Scoreboard]) -> None:
    board = make(4)
    for size in (0, mmap.PAGESIZE * 100):
        with pytest.raises(PermissionError):
            os.ftruncate(board.descriptor, size)


def test_the_memory_costs_no_second_descriptor(make: Callable[[int], Scoreboard]) -> None:
    board = make(4)
    name = os.readlink(f"/proc/self/fd/{board.descriptor}")
    other = make(4)
    links = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert links.count(name) == 2, other


def test_a_row_is_handed_out_clean_and_takes_no_clients(make: Callable[[int], Scoreboard]) -> None:
    board = make(1)
    row = claimed(board, 1)
    for field in Field:
        row[field] = 99
    row.clear()
    for field in Field:
        row[field] = -99  # as by a process that has kept the memory
    row = board.claim()
    assert {field: row[field] for field in Field} == {
        field: NOT_ACCEPTING if field is Field.LOAD else 0 for field in Field
    }


def test_claim_overflows_when_every_row_is_in_use(make: Callable[[int], Scoreboard]) -> None:
    board = make(3)
    rows = [claimed(board, pid) for pid in (1, 2, 3)]
    with pytest.raises(OverflowError, match="all 3 rows"):
        board.claim()
    rows[1].clear()
    assert board.claim().index == 1


@pytest.mark.parametrize("index", [-1, 3, 4, 1000])
def test_row_beyond_the_capacity_is_an_index_error(make: Callable[[int], Scoreboard], index: int) -> None:
    with pytest.raises(IndexError):
        make(3).row(index)


def test_the_last_row_is_whole(make: Callable[[int], Scoreboard]) -> None:
    board = make(3)
    for index in range(3):
        for field in Field:
            board.row(index)[field] = index * 100 + field
    assert [[board.row(index)[field] for field in Field] for index in range(3)] == [
        [index * 100 + field for field in Field] for index in range(3)
    ]
    assert len(board.row(2).cells) == len(Field)


def test_the_loads_are_those_of_the_rows_in_use_and_follow_them(make: Callable[[int], Scoreboard]) -> None:
    board = make(5)
    assert list(board.loads()) == []
    rows = [claimed(board, pid) for pid in (1, 2, 3)]
    loads = board.loads()
    assert list(loads) == [NOT_ACCEPTING] * 3
    rows[0][Field.LOAD], rows[2][Field.LOAD] = 5, 2
    assert list(loads) == [5, NOT_ACCEPTING, 2]
    assert min(loads) == 2
    rows[2].clear()
    assert min(loads) == 5


def test_used_counts_rows_up_to_the_highest_ever_claimed(make: Callable[[int], Scoreboard]) -> None:
    board = make(5)
    assert (board.used, board.rows()) == (0, [])
    rows = [claimed(board, pid) for pid in (1, 2, 3)]
    for row in rows:
        row.clear()
    assert board.used == 3
    claimed(board, 4)
    assert board.used == 3


def test_open_connections_are_those_accepted_and_not_closed(make: Callable[[int], Scoreboard]) -> None:
    row = make(1).claim()
    row.cells[Field.ACCEPTED] += 5
    row.cells[Field.CLOSED] += 2
    assert row.active == 3


@pytest.mark.parametrize("value", [1 << 63, -(1 << 63) - 1])
def test_a_field_takes_no_more_than_64_bits(make: Callable[[int], Scoreboard], value: int) -> None:
    row = make(1).claim()
    with pytest.raises(ValueError, match="invalid value"):
        row[Field.LAG] = value


@given(st.lists(st.one_of(st.none(), st.integers(0, 5)), max_size=40))
def test_claims_and_clears_in_any_order_keep_rows_apart(steps: list[int | None]) -> None:
    """None claims a row, a number clears the one so far down the list of those that are claimed."""
    board = Scoreboard(6)
    try:
        taken: dict[int, int] = {}
        for pid, step in enumerate(steps, start=1):
            if step is None and len(taken) < 6:
                index = claimed(board, pid).index
                assert index == min(set(range(6)) - set(taken))
                taken[index] = pid
            elif step is not None and step < len(taken):
                index = sorted(taken)[step]
                board.row(index).clear()
                del taken[index]
        assert {row.index: row[Field.PID] for row in board.rows() if row[Field.PID]} == taken
    finally:
        board.close()
