"""What a test needs of the machine. Where that is not to be had it is skipped, with the reason; not in CI (the variable
CI is set there), whose machine has to have it: a test that nobody runs would pass for ever.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
        lacks("root")


def needs_program(name: str) -> None:
    """For a program of the system."""
    if shutil.which(name) is None:
        lacks(f"the program {name}")


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
        lacks(f"control groups of {controller}: {error}")
    try:
        yield group
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text(), what=f"the end of all in {group}")
        group.rmdir()


def _own_group(controller: str) -> Path:
    rows = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    found = [path for _, controllers, path in rows if controller in controllers.split(",")]
    if not found:
        lacks(f"control groups of {controller}, by version 1")
    return _GROUPS / controller / found[0].lstrip("/")


def lacks(what: str) -> NoReturn:
    """Skips the test, or fails it in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"CI has to have {what}")
    pytest.skip(f"needs {what}")


def needs_python_for_all() -> None:
    """For tests whose workers are another user: who must be able to read the interpreter, forkd and the handlers."""
    needs_root()
    program = "import sys, os, forkd.cli, yaml; os.listdir(sys.argv[1]); os.listdir(os.path.dirname(os.__file__))"
    try:
        result = subprocess.run(
            [sys.executable, "-c", program, str(Path(__file__).with_name("handlers"))],
            user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        why = result.stderr[-200:] if result.returncode else ""
    except PermissionError as error:
        why = str(error)
    if why and sys.base_prefix != "/usr":  # a version manager's, in somebody's home; with the system's all of it runs
        pytest.skip(f"needs an interpreter that every user can read: {why}")
    if why:
        lacks(f"an interpreter and a checkout that every user can read: {why}")
