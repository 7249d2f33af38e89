"""CPython's own tests of asyncio over forkd's loop and transport: none fails that asyncio's own transport passes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.cpython_suite import MODULES
from tests.support.needs import needs_compiled_twin, needs_module
from tests.support.paths import CHECKOUT
from tests.support.processes import DEADLINE


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("kind", ["forkd", "compiled"])
def test_asyncios_own_tests_pass(kind: str, name: str) -> None:
    needs_module(f"test.test_asyncio.{name}", "libpython3.11-testsuite")
    if kind == "compiled":
        needs_compiled_twin()
    command = [sys.executable, "-m", "tests.support.cpython_suite", kind, name]
    ran = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=6 * DEADLINE, check=True)
    *failed, count = ran.stdout.split()
    assert failed == [], ran.stderr
    assert int(count) > 0
