"""What a test needs of the machine. Where the machine lacks it the test is skipped, with the reason; in CI (where the
variable CI is set) it fails, for a test that is always skipped would never fail.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import pytest

from forkd import compiled
from tests.support.paths import HANDLERS
from tests.support.processes import eventually

_GROUPS = Path("/sys/fs/cgroup")


def needs_root() -> None:
    """For what only root may do."""
    if os.geteuid() != 0:
        lacks("root")


def needs_program(name: str) -> None:
    """For a program of the system."""
    if shutil.which(name) is None:
        lacks(f"the program {name}")


def needs_compiled_twin() -> None:
    """For what is to be tested with the compiled twin of the hot path, too."""
    _, reason = compiled.load()
    if reason:
        lacks(f"the compiled twin: {reason}")


def needs_compiler() -> None:
    """For what compiles it."""
    needs_program("cc")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacks("Python's headers")


def needs_package(name: str) -> None:
    """For a package of PyPI that the extra `interop` has."""
    if importlib.util.find_spec(name) is None:
        lacks(f"the Python package {name}")


def needs_module(name: str, package: str) -> None:
    """For a module that Debian has in a package of its own."""
    with suppress(ModuleNotFoundError):  # it is in a package that is not there either
        if importlib.util.find_spec(name) is not None:
            return
    lacks(f"the module {name} ({package})")


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
    """For tests whose workers are another user, which must be able to read the interpreter, forkd and the handlers."""
    needs_root()
    program = "import sys, os, forkd.cli, yaml; os.listdir(sys.argv[1]); os.listdir(os.path.dirname(os.__file__))"
    try:
        result = subprocess.run(
            [sys.executable, "-c", program, str(HANDLERS)],
            user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        why = result.stderr[-200:] if result.returncode else ""
    except PermissionError as error:
        why = str(error)
    if why and sys.base_prefix != "/usr":  # a version manager's, in a home directory; all of it runs with the system's
        pytest.skip(f"needs an interpreter that every user can read: {why}")
    if why:
        lacks(f"an interpreter and a checkout that every user can read: {why}")
