"""What a test needs of the machine. Where it is not there the test is skipped with the reason, but in CI it fails."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def lacks(reason: str) -> None:
    """Skips the test, or fails it in CI."""
    if os.environ.get("CI"):
        pytest.fail(f"CI is to have this: {reason}")
    pytest.skip(reason)


def needs_root() -> None:
    """For tests that become somebody else."""
    if os.geteuid() != 0:
        lacks("needs root")


def needs_program(name: str) -> None:
    """For tests that run a program."""
    if shutil.which(name) is None:
        lacks(f"needs {name}")


def needs_python_for_all() -> None:
    """For tests whose workers are another user: who must be able to read the interpreter, forkd and the handlers."""
    needs_root()
    program = "import sys, os, forkd.cli, yaml; os.listdir(sys.argv[1]); os.listdir(os.path.dirname(os.__file__))"
    result = subprocess.run(
        [sys.executable, "-c", program, str(Path(__file__).with_name("handlers"))],
        user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    if result.returncode:
        lacks(f"needs an interpreter and a checkout that every user can read: {result.stderr[-200:]}")
