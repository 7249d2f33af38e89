"""Resource limits: set where they can be, raised where that is allowed, told where it is not."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest

from forkd.config.settings import Rlimits
from forkd.config.values import FILES_LIMIT, SIZE_LIMIT, UNLIMITED
from forkd.system.rlimits import raise_limits, set_limits
from tests.support.forked import run_in_child
from tests.support.needs import lacks

FILES = resource.RLIMIT_NOFILE


def after(rlimits: Rlimits, number: int, before: tuple[int, int] | None = None) -> tuple[Any, list[str]]:
    """The limit of a worker with these settings, and what its master tells, where both may raise nothing."""

    def look() -> Any:
        if before is not None:
            resource.setrlimit(number, before)
        if os.geteuid() == 0:
            os.setresuid(54321, 54321, 54321)
        told = raise_limits(rlimits)
        set_limits(rlimits)
        return [resource.getrlimit(number), told]

    found, told = run_in_child(look)
    return tuple(found), told


def test_the_soft_limit_of_descriptors_is_raised_to_the_hard_one() -> None:
    assert after(Rlimits(), FILES, (100, 300)) == ((300, 300), [])


def test_descriptors_may_be_fewer_than_the_hard_limit() -> None:
    assert after(Rlimits(nofile=200), FILES, (100, 300)) == ((200, 200), [])


@pytest.mark.parametrize(("wanted", "shown"), [(5000, "5000"), (UNLIMITED, Path("/proc/sys/fs/nr_open").read_text())])
def test_descriptors_above_the_hard_limit_are_told(wanted: int, shown: str) -> None:
    found, told = after(Rlimits(nofile=wanted), FILES, (100, 300))
    assert found == (300, 300)
    assert told == [
        f"rlimits.nofile: wanted {shown.strip()}, there is 300: the hard limit that forkd was started with, which root "
        "alone (CAP_SYS_RESOURCE) may raise"
    ]


@pytest.mark.parametrize(
    ("name", "number"),
    [("core", resource.RLIMIT_CORE), ("memlock", resource.RLIMIT_MEMLOCK), ("address_space", resource.RLIMIT_AS)],
)
def test_each_limit_is_the_kernels_of_that_name(name: str, number: int) -> None:
    size = 8 << 30 if name == "address_space" else 4096
    assert after(Rlimits(**{name: size}), number, (size, 2 * size)) == ((size, size), [])
    found, told = after(Rlimits(**{name: UNLIMITED}), number, (size, 2 * size))
    assert found == (2 * size, 2 * size)
    assert len(told) == 1
    assert told[0].startswith(f"rlimits.{name}: wanted unlimited, there is ")


def test_an_unlimited_limit_stays_so() -> None:
    if resource.getrlimit(resource.RLIMIT_AS)[1] != UNLIMITED:
        lacks("needs no limit of virtual memory")
    assert after(Rlimits(address_space=UNLIMITED), resource.RLIMIT_AS) == ((UNLIMITED, UNLIMITED), [])


def test_a_limit_that_was_not_set_is_left_alone() -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    assert after(Rlimits(nofile=100), resource.RLIMIT_CORE) == (before, [])


def test_limits_are_written_as_numbers_sizes_or_unlimited() -> None:
    assert (FILES_LIMIT.parse("unlimited"), FILES_LIMIT.show(UNLIMITED)) == (UNLIMITED, "unlimited")
    assert (SIZE_LIMIT.parse("64MiB"), SIZE_LIMIT.parse("0")) == (64 << 20, 0)
    for text in ("63", "-1", "many"):
        with pytest.raises(ValueError, match="is not"):
            FILES_LIMIT.parse(text)
