"""`forkd list`: all daemons of the machine, also one that can't be asked."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from forkd.cli.control_client import RunningMaster
from forkd.cli.daemons import described
from forkd.cli.locate import SeenDaemon
from forkd.system.proc import unix_sockets
from tests.support.clients import echoes
from tests.support.daemon import Harness, forkd
from tests.support.needs import needs_python_for_all, needs_root
from tests.support.unprivileged import NOBODY


def listed(directory: Path) -> dict[int, dict[str, Any]]:
    """The list's daemons by pid; there may be some of other tests."""
    result = forkd("list", "--json", cwd=directory)
    assert result.returncode == 0, result.stderr
    return {one["pid"]: one for one in json.loads(result.stdout)}


def test_list_has_every_daemon_with_its_state(harness: Harness, tmp_path: Path) -> None:
    first = harness.daemon(name="list-a", workers=2).start()
    second = harness.daemon(name="list-b", workers=1).start()
    client = harness.connect(first)
    assert echoes(client)
    found = listed(tmp_path)
    one, two = found[first.pid], found[second.pid]
    assert [one[key] for key in ("name", "state", "serving", "wanted", "clients", "error")] == [
        "list-a", "running", 2, 2, 1, "",
    ]  # fmt: skip
    assert one["addresses"] == [first.address]
    assert one["run_directory"] == str(first.run_directory)
    assert 0 <= one["uptime"] < 600
    assert [two[key] for key in ("name", "wanted", "clients")] == ["list-b", 1, 0]
    rows = [line.split() for line in forkd("list", cwd=tmp_path).stdout.splitlines()]
    assert rows[0] == ["NAME", "PID", "USER", "STATE", "WORKERS", "CLIENTS", "UPTIME", "ADDRESSES"]
    (row,) = [row for row in rows if row[1:2] == [str(first.pid)]]
    assert (row[0], row[3:6], row[7]) == ("list-a", ["running", "2/2", "1"], first.address)


@pytest.mark.parametrize("root", ["", "/"])
def test_no_other_user_tells_where_a_daemon_is(harness: Harness, monkeypatch: pytest.MonkeyPatch, root: str) -> None:
    """By a name with a line feed, which the kernel's table of sockets has as it is."""
    needs_root()
    daemon = harness.daemon(name="list-f", workers=1).start()
    forged = harness.directory / "f"
    forged.mkdir()
    os.chown(forged, NOBODY, NOBODY)
    control = str(daemon.run_directory / "control.sock")
    (inode,) = (inode for inode, name, listens in unix_sockets(daemon.pid) if listens and name == control)
    monkeypatch.chdir(forged)
    with contextlib.ExitStack() as stack:
        for number in range(300):  # over all of the table, so that one comes before the daemon's own
            path = f"{number}\n0: 2 0 00010000 1 1 {inode} {root}{forged}/control.sock"
            os.makedirs(os.path.dirname(path))
            stack.enter_context(socket.socket(socket.AF_UNIX)).bind(path)
        assert listed(harness.directory)[daemon.pid]["run_directory"] == str(daemon.run_directory)


def test_list_goes_on_where_a_master_does_not_answer(harness: Harness, tmp_path: Path) -> None:
    stopped, other = harness.daemon(name="list-c", workers=1).start(), harness.daemon(name="list-d", workers=1).start()
    pid = stopped.pid
    (tmp_path / "none.yaml").touch()
    os.kill(pid, signal.SIGSTOP)
    try:
        found = listed(tmp_path)
        # An answer is waited for ten seconds; not so that of a daemon that is another one.
        assert forkd("status", "none.yaml", cwd=tmp_path, seconds=9).returncode == 3
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (found[pid]["state"], found[pid]["error"]) == (None, "list-c does not answer")
    assert found[other.pid]["state"] == "running"


def test_command_ends_where_too_many_wait_for_the_master(harness: Harness, tmp_path: Path) -> None:
    daemon = harness.daemon(workers=1).start()
    pid, waiting = daemon.pid, []
    os.kill(pid, signal.SIGSTOP)
    try:
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(str(daemon.run_directory / "control.sock"))
        result = daemon.command("status", seconds=15)
    finally:
        os.kill(pid, signal.SIGCONT)
        for one in waiting:
            one.close()
    assert result.returncode == 1
    assert f"tested runs, pid {pid}, but does not answer: too many wait at " in result.stderr
    assert daemon.command("status").returncode == 0


def test_list_shows_daemons_of_others_by_their_processes(harness: Harness, open_directory: Path) -> None:
    needs_root()
    needs_python_for_all()
    daemon = harness.daemon(name="list-e", workers=1).start()
    result = subprocess.run(
        [sys.executable, "-m", "forkd", "list"],
        user=NOBODY, group=NOBODY, extra_groups=[], cwd=open_directory, capture_output=True, text=True, check=True,
        timeout=60,
    )  # fmt: skip
    (line,) = [line for line in result.stdout.splitlines() if f" {daemon.pid} " in line]
    assert line.split() == ["list-e", str(daemon.pid), "root", "another", "user's", "-", "-", "-", "-"]


def test_daemon_of_another_version_is_described() -> None:
    seen = SeenDaemon(RunningMaster(7, os.geteuid(), "x"), status={"state": "running"})
    found = described(seen, 0.0)
    assert (found["state"], found["clients"], found["uptime"], found["addresses"]) == ("running", None, None, [])


def test_list_says_that_no_daemon_runs(tmp_path: Path) -> None:
    program = (
        "import forkd.cli.daemons as daemons; daemons.every_daemon = lambda: []\n"
        "import forkd.cli, sys; sys.exit(forkd.cli.main(['list']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert result.stdout == "no daemon runs\n"
