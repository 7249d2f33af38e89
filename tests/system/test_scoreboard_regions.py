"""The regions beside the scoreboard: written by the worker that has one, read by all, empty again for the next."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
from collections.abc import Iterator

import pytest

from forkd.system.scoreboard import REGION_SIZE, Regions
from tests.support.forked import exit_code, start_child


@pytest.fixture
def regions() -> Iterator[Regions]:
    made = Regions(8)
    yield made
    os.close(made.descriptor)


def fill(regions: Regions, index: int) -> None:
    regions.confine(index)
    regions.view(index)[REGION_SIZE - 3 :] = b"end"


def test_region_that_a_worker_writes_is_read_by_all(regions: Regions) -> None:
    assert exit_code(start_child(lambda: fill(regions, 7))) == 0
    assert bytes(regions.view(7)[REGION_SIZE - 3 :]) == b"end"
    assert bytes(regions.view(6)) == bytes(REGION_SIZE)


def test_a_region_that_is_written_to_after_a_first_look_is_seen(regions: Regions) -> None:
    view = regions.view(2)
    assert exit_code(start_child(lambda: fill(regions, 2))) == 0
    assert bytes(view[REGION_SIZE - 3 :]) == b"end"


def test_a_worker_can_write_no_other_region(regions: Regions) -> None:
    def trespass() -> None:
        regions.confine(1)
        with pytest.raises(OSError, match="Bad file"):
            os.pwrite(regions.descriptor, b"x", 0)
        faulthandler.disable()  # of pytest; the end is expected
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        regions.view(0)[0] = 1

    assert exit_code(start_child(trespass)) == -signal.SIGSEGV
    assert regions.view(0)[0] == 0


def test_cleared_region_is_empty_and_takes_no_memory(regions: Regions) -> None:
    assert exit_code(start_child(lambda: fill(regions, 3))) == 0
    assert os.fstat(regions.descriptor).st_blocks
    regions.clear(3)
    assert os.fstat(regions.descriptor).st_blocks == 0
    assert bytes(regions.view(3)) == bytes(REGION_SIZE)


def test_the_memory_can_be_handed_on_by_its_descriptor(regions: Regions) -> None:
    assert exit_code(start_child(lambda: fill(regions, 0))) == 0
    other = Regions(8, os.dup(regions.descriptor))
    assert bytes(other.view(0)[REGION_SIZE - 3 :]) == b"end"
    os.close(other.descriptor)
