"""Handlers that the master imports before the fork: what the workers share by it, and what can't be shared."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually

ORIGIN = """
import asyncio, os
PID = os.getpid()

class Origin(asyncio.Protocol):
    def connection_made(self, transport):
        transport.write(b"%d\\n" % PID)
        transport.close()
"""

RESTLESS = """
import threading
from origin import Origin
threading.Thread(target=threading.Event().wait, daemon=True, name="ticker").start()
"""


@pytest.fixture
def daemon(harness: Harness, tmp_path: Path) -> Daemon:
    (tmp_path / "origin.py").write_text(ORIGIN)
    (tmp_path / "restless.py").write_text(RESTLESS)
    return harness.daemon(target="origin:Origin", settings=("preload=true",))


def importer(harness: Harness, daemon: Daemon) -> int:
    """The process that has imported the handler of the worker that serves."""
    with harness.connect(daemon).makefile("rb") as lines:
        return int(lines.readline())


def test_preload_imports_handlers_once_in_the_master(harness: Harness, daemon: Daemon) -> None:
    daemon.start()
    assert {importer(harness, daemon) for _ in range(6)} == {daemon.pid}
    assert daemon.command("reload").returncode == 0
    assert {importer(harness, daemon) for _ in range(6)} == {daemon.pid}


def test_preload_off_has_each_worker_import_handlers(harness: Harness, daemon: Daemon) -> None:
    daemon.options[daemon.options.index("preload=true")] = "preload=false"
    daemon.start()
    workers, importers = {*daemon.workers().values()}, set()

    def has_served() -> bool:
        importers.add(importer(harness, daemon))
        return importers >= workers

    eventually(has_served, what="clients of each worker")
    assert importers == workers


@pytest.mark.parametrize("verb", ["start", "run"])
def test_preload_refuses_threads_that_an_import_has_left(daemon: Daemon, verb: str) -> None:
    daemon.target = ["restless:Origin"]
    refused = daemon.command(verb)
    assert refused.returncode == 1
    assert "have left threads running (ticker)" in refused.stderr
    assert "preload: false" in refused.stderr
    assert daemon.command("status").returncode == 3
