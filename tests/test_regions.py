"""The regions beside the scoreboard: written by the worker that has one, read by all, empty again for the next."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import resource
import signal
from collections.abc import Callable, Iterator

import pytest

from forkd.system.regions import SIZE, Regions


@pytest.fixture
def regions() -> Iterator[Regions]:
    made = Regions(8)
    yield made
    os.close(made.descriptor)


def in_child(work: Callable[[], None]) -> int:
    """The exit status of a child that does this work: 9 where that raises."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(9)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fill(regions: Regions, index: int) -> None:
    regions.confine(index)
    regions.of(index)[SIZE - 3 :] = b"end"


def test_what_a_worker_writes_in_its_region_everybody_reads(regions: Regions) -> None:
    assert in_child(lambda: fill(regions, 7)) == 0
    assert regions.of(7)[SIZE - 3 :] == b"end"
    assert bytes(regions.of(6)) == bytes(SIZE)


def test_a_region_that_is_written_to_after_a_first_look_is_seen(regions: Regions) -> None:
    view = regions.of(2)
    assert in_child(lambda: fill(regions, 2)) == 0
    assert view[SIZE - 3 :] == b"end"


def test_a_worker_can_write_no_other_region(regions: Regions) -> None:
    def trespass() -> None:
        regions.confine(1)
        with pytest.raises(OSError, match="Bad file"):
            os.pwrite(regions.descriptor, b"x", 0)
        faulthandler.disable()  # of pytest; the end is expected
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        regions.of(0)[0] = 1

    assert in_child(trespass) == -signal.SIGSEGV
    assert regions.of(0)[0] == 0


def test_what_is_cleared_is_empty_and_takes_no_memory(regions: Regions) -> None:
    assert in_child(lambda: fill(regions, 3)) == 0
    assert os.fstat(regions.descriptor).st_blocks
    regions.clear(3)
    assert os.fstat(regions.descriptor).st_blocks == 0
    assert bytes(regions.of(3)) == bytes(SIZE)


def test_the_memory_can_be_handed_on_by_its_descriptor(regions: Regions) -> None:
    assert in_child(lambda: fill(regions, 0)) == 0
    other = Regions(8, os.dup(regions.descriptor))
    assert other.of(0)[SIZE - 3 :] == b"end"
    os.close(other.descriptor)
