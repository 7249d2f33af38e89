"""When connections began, as a worker notes it and somebody else reads it."""

from __future__ import annotations

import os
from time import monotonic_ns

import pytest

from forkd.system.regions import HALF, SIZE, Regions
from forkd.system.roll import Roll, read_roll


@pytest.fixture
def regions() -> Regions:
    made = Regions(3)
    made.confine(1)
    return made


def test_a_descriptor_has_the_time_of_its_latest_connection(regions: Regions) -> None:
    roll = Roll(regions.of(1))
    before = monotonic_ns()
    roll.began(7)
    between = monotonic_ns()
    roll.began(7)
    roll.began(9)
    cells = read_roll(regions.descriptor, 1, 10)
    assert before <= between <= cells[7] <= cells[9] <= monotonic_ns()
    assert [number for number, began in enumerate(cells) if began] == [7, 9]
    assert set(read_roll(regions.descriptor, 0, 10)) == {0}
    os.close(regions.descriptor)


def test_descriptors_beyond_the_last_cell_have_no_time_and_write_nowhere(regions: Regions) -> None:
    roll = Roll(regions.of(1))
    last = HALF // 8 - 1
    for descriptor in (last, last + 1, 1 << 30):
        roll.began(descriptor)
    cells = read_roll(regions.descriptor, 1, 1 << 30)
    assert (len(cells), cells[last] > 0) == (last + 1, True)
    assert os.pread(regions.descriptor, SIZE - HALF, SIZE + HALF) == bytes(SIZE - HALF)
    os.close(regions.descriptor)


def test_a_process_that_nobody_looks_at_notes_nothing() -> None:
    roll = Roll()
    roll.began(3)
    assert len(roll._cells) == 0
