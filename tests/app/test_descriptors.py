"""Standard streams that are closed, and those that a handler has replaced."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clients import dial, echoes, read
from tests.support.daemon import Harness
from tests.support.processes import children

CLOSED = {"stdin": "<&-", "stdout": ">&-", "stderr": "2>&-", "all": "<&- >&- 2>&-"}

TO_LOG = """
import sys
from forkd.builtin import Echo

class ToLog:
    def write(self, text):
        pass

sys.stdout = ToLog()
sys.stderr = {stderr}
"""

PROGRAM = """
import subprocess
from forkd.builtin import Echo

class Runs(Echo):
    def connection_made(self, transport):
        super().connection_made(transport)
        found = subprocess.run(["readlink", "/proc/self/fd/0"], stdout=subprocess.PIPE).stdout
        transport.write(found.ljust(64))
"""


@pytest.mark.parametrize("stderr", ["ToLog()", "None"])
def test_worker_ends_where_a_handler_took_its_output(harness: Harness, tmp_path: Path, stderr: str) -> None:
    (tmp_path / "tolog.py").write_text(TO_LOG.format(stderr=stderr))
    path = tmp_path / "sock"
    daemon = harness.daemon(target="tolog:Echo", workers=1, listen=(f"unix:{path}",)).run()
    pid = daemon.wait_workers(1)[1]
    os.kill(pid, 15)
    daemon.wait_workers(1, without=[pid])
    assert path.exists()
    assert (daemon.run_directory / "control.sock").exists()
    assert len(children(daemon.pid)) == 1
    assert echoes(harness.connect(daemon))


@pytest.mark.parametrize("closed", CLOSED)
def test_start_with_closed_streams_opens_them(harness: Harness, tmp_path: Path, closed: str) -> None:
    (tmp_path / "runs.py").write_text(PROGRAM)
    daemon = harness.daemon(target="runs:Runs", workers=1)
    line = [*daemon.target, *daemon.identity, *daemon.options]
    command = ["sh", "-c", f'exec "$@" {CLOSED[closed]}', "sh", sys.executable, "-m", "forkd", "start", *map(str, line)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    pid = daemon.pid
    opened = {number: os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)}
    assert opened == {0: "/dev/null", 1: str(daemon.log), 2: str(daemon.log)}
    with dial(daemon.address) as sock:
        assert read(sock, 64).strip() == b"/dev/null"


@pytest.mark.parametrize("closed", CLOSED)
def test_run_with_closed_streams_opens_them(harness: Harness, tmp_path: Path, closed: str) -> None:
    (tmp_path / "runs.py").write_text(PROGRAM)
    daemon = harness.daemon(target="runs:Runs", workers=1)
    daemon.prefix = ["sh", "-c", f'exec "$@" {CLOSED[closed]}', "sh"]
    daemon.run()
    numbers = (0, 1, 2) if closed == "all" else ({"stdin": 0, "stdout": 1, "stderr": 2}[closed],)
    assert {os.readlink(f"/proc/{daemon.pid}/fd/{number}") for number in numbers} == {"/dev/null"}
    with dial(daemon.address) as sock:
        assert re.fullmatch(rb"/dev/null *\n? *", read(sock, 64))


@pytest.mark.parametrize("verb", ["check", "status", "stop", "list", "schema", "--version", "call"])
def test_command_with_closed_streams_has_no_traceback(tmp_path: Path, verb: str) -> None:
    more = ["tcp://127.0.0.1:9"] if verb == "call" else []
    words = ["sh", "-c", 'exec "$@" <&- >&-', "sh", sys.executable, "-m", "forkd", verb, *more]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in result.stderr
