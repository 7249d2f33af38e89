"""What a test needs of the machine. Where that is not to be had it is skipped, with the reason; not in CI (the variable
CI is set there), whose machine has to have it: a test that nobody runs would pass for ever.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from processes import eventually

_GROUPS = Path("/sys/fs/cgroup")


def needs_root() -> None:
    """For what only root may do."""
    if os.geteuid() != 0:
        _lacks("root")


def needs_program(name: str) -> None:
    """For a program of the system."""
    if shutil.which(name) is None:
        _lacks(f"the program {name}")


@contextmanager
def control_group(controller: str) -> Iterator[Path]:
    """The directory of a control group of this test's own, below the one that this process is in (version 1 of
    cgroups(7)). It is empty again before the end.
    """
    needs_root()
    group = _own_group(controller) / f"forkd-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        _lacks(f"control groups of {controller}: {error}")
    try:
        yield group
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text(), what=f"the end of all in {group}")
        group.rmdir()


def _own_group(controller: str) -> Path:
    rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    found = [path for _, controllers, path in rows if controller in controllers.split(",")]
    if not found:
        _lacks(f"control groups of {controller}, by version 1")
    return _GROUPS / controller / found[0].lstrip("/")


def _lacks(what: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"CI has to have {what}")
    pytest.skip(f"needs {what}")
