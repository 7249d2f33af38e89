"""A worker that has been taken over: it does its worst as nobody, and the master and the other workers go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from harness import Harness
from needs import lacks
from nobody import NOBODY, daemon_of, harnesses, lives, places, tell
from processes import eventually

__all__ = ["harnesses", "places"]  # the fixtures


def test_a_hostile_worker_reaches_nothing_of_the_masters(open_harness: Harness, place: Path) -> None:
    daemon = daemon_of(open_harness).start()
    master, workers = daemon.pid, daemon.workers()
    pid_file = daemon.run_directory / "pid"
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        assert tell(open_harness, daemon, "kill_master", number)["error"] == "PermissionError"
    for path in (pid_file, daemon.log, daemon.run_directory / "control.sock", f"/proc/{master}/mem"):
        assert tell(open_harness, daemon, "write", str(path))["error"] in ("PermissionError", "OSError")
        if "proc" not in str(path):
            assert tell(open_harness, daemon, "remove", str(path))["error"] == "PermissionError"
            assert tell(open_harness, daemon, "put_beside", str(path))["error"] == "PermissionError"
    found = tell(open_harness, daemon, "descriptors")["value"]
    log = next(number for number, link in found.items() if link == str(daemon.log))
    assert tell(open_harness, daemon, "reopen", int(log))["error"] == "PermissionError"
    assert pid_file.read_text() == f"{master}\n"
    lives(daemon, master, workers)


def test_set_user_id_programs_give_a_worker_nothing(open_harness: Harness, place: Path) -> None:
    program = place / "id"
    shutil.copy(shutil.which("id") or lacks("id"), program)
    program.chmod(0o4755)
    if os.statvfs(place).f_flag & os.ST_NOSUID:
        lacks("a temporary directory whose set-user-ID bits count")
    daemon = daemon_of(open_harness).start()
    assert tell(open_harness, daemon, "run", str(program), "-u")["value"].strip() == str(NOBODY)
    other = daemon_of(open_harness, "no_new_privs=false", name="lax").start()
    assert tell(open_harness, other, "run", str(program), "-u")["value"].strip() == "0"


@pytest.mark.parametrize(
    ("text", "times", "said"),
    [
        ("no message\n", 1, "not JSON"),
        ("[]\n", 1, "not a JSON object"),
        ("x" * 65536, 1000, "a message of more than 1048576 bytes"),
        ('{"event": "hello"}\n', 100_000, "an event 'hello'"),
        ('{"event": {"event": []}}\n', 100, "an event ''"),
        ('{"event": "answer", "number": 7, "found": [[]]}\n', 100, "an answer to what it was not asked"),
        ('{"event": "worn", "why": [{}]}\n', 100_000, "it says so"),
        ("[" * 100_000 + "\n", 1, "not JSON"),
    ],
)
def test_a_worker_that_floods_its_channel_is_replaced(open_harness: Harness, text: str, times: int, said: str) -> None:
    daemon = daemon_of(open_harness, "drain_timeout=1s").start()
    master, workers = daemon.pid, daemon.workers()
    assert "value" in tell(open_harness, daemon, "say", text, times)
    daemon.wait_log(re.escape(said))
    if "worn" not in text:  # its channel is closed, which is all that a worker knows of its master
        daemon.expect("the master is gone")
    eventually(lambda: len(set(daemon.workers().values()) & set(workers.values())) == 1, what="a replacement")
    daemon.wait_workers(2)
    assert daemon.command("status").returncode == 0
    assert daemon.pid == master
    assert tell(open_harness, daemon, "load", "json") == {"value": "json"}
    assert len([record for record in daemon.records() if "nobody understands" in record]) <= 10


@pytest.mark.parametrize("text", ['{"event": "ready"}\n', '{"event": "failed", "reason": "\\ud800", "details": 7}\n'])
def test_a_worker_that_repeats_what_is_a_message_harms_nobody(open_harness: Harness, text: str) -> None:
    daemon = daemon_of(open_harness).start()
    master, workers = daemon.pid, daemon.workers()
    assert tell(open_harness, daemon, "say", text, 50_000)["value"] == 50_000 * len(text)
    lives(daemon, master, workers)


def test_a_worker_that_floods_standard_error_leaves_the_master_time_for_others(open_harness: Harness) -> None:
    daemon = daemon_of(open_harness).start()
    master, workers = daemon.pid, daemon.workers()
    client = open_harness.connect(daemon)
    client.sendall(json.dumps(["complain", "\x1b[31m" + "x" * 60_000, 200]).encode() + b"\n")
    for _ in range(10):
        daemon.status()
    lives(daemon, master, workers)
    with client.makefile("rb") as lines:
        assert json.loads(lines.readline()) == {"value": None}
    assert b"\x1b" not in daemon.log.read_bytes()
    daemon.log.write_text("")  # nothing in it for `check`, which would take its time


@pytest.mark.parametrize("value", [-1, -(1 << 63), (1 << 63) - 1, 0])
def test_a_worker_that_scribbles_on_the_scoreboard_harms_itself_alone(open_harness: Harness, value: int) -> None:
    daemon = daemon_of(open_harness, "stall_timeout=1h").start()
    master, workers = daemon.pid, daemon.workers()
    assert tell(open_harness, daemon, "scribble", 0, value) == {"value": 1}
    lives(daemon, master, workers)
    for _ in range(20):
        assert tell(open_harness, daemon, "load", "json") == {"value": "json"}
    daemon.command("scale", 4)
    assert len(daemon.wait_workers(4)) == 4
    assert tell(open_harness, daemon, "load", "json") == {"value": "json"}
    lives(daemon, master, daemon.workers())
