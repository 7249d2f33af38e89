"""A worker that has been taken over: it does its worst as an unprivileged user, and all others go on."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.admin import ask
from tests.support.daemon import Harness, forkd
from tests.support.needs import lacks
from tests.support.processes import eventually
from tests.support.unprivileged import NOBODY, check_unchanged, order_worker, unprivileged_daemon


def test_hostile_worker_reaches_nothing_of_the_masters(open_harness: Harness, open_directory: Path) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    master, workers = daemon.pid, daemon.workers()
    pid_file = daemon.run_directory / "pid"
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        assert order_worker(open_harness, daemon, "kill_master", number)["error"] == "PermissionError"
    for path in (pid_file, daemon.log, daemon.run_directory / "control.sock", f"/proc/{master}/mem"):
        assert order_worker(open_harness, daemon, "write", str(path))["error"] in ("PermissionError", "OSError")
        if "proc" not in str(path):
            assert order_worker(open_harness, daemon, "remove", str(path))["error"] == "PermissionError"
            assert order_worker(open_harness, daemon, "put_beside", str(path))["error"] == "PermissionError"
    found = order_worker(open_harness, daemon, "descriptors")["value"]
    log = next(number for number, link in found.items() if link == str(daemon.log))
    assert order_worker(open_harness, daemon, "reopen", int(log))["error"] == "PermissionError"
    assert pid_file.read_text() == f"{master}\n"
    check_unchanged(daemon, master, workers)


@pytest.mark.parametrize("reopened", [False, True], ids=["first", "reopened"])
@pytest.mark.parametrize(
    ("added", "removed"), [(0, os.O_APPEND), (os.O_DIRECT, 0), (os.O_NONBLOCK, 0)], ids=["append", "direct", "nonblock"]
)
def test_worker_spoils_its_own_way_to_the_log_alone(
    open_harness: Harness, added: int, removed: int, reopened: bool
) -> None:
    daemon = unprivileged_daemon(open_harness, workers=1).start()
    if reopened:
        daemon.log.rename(f"{daemon.log}.1")
        daemon.signal(signal.SIGUSR1)
        daemon.wait_log("reopened")
    found = order_worker(open_harness, daemon, "descriptors")["value"]
    for number, link in found.items():
        if link == str(daemon.log):
            order_worker(open_harness, daemon, "set_flags", int(number), added, removed)
    before = daemon.log.read_text()
    daemon.command("scale", 2)
    daemon.wait_log(r"worker 2\[\d+\] \S+: ready|worker 2 .*ready")
    assert daemon.log.read_text().startswith(before)


def test_root_opens_no_log_where_workers_could_lead_it(open_harness: Harness, open_directory: Path) -> None:
    theirs, secret = open_directory / "theirs", open_directory / "secret"
    (theirs / "log").mkdir(parents=True)
    secret.mkdir(0o700)
    os.chown(theirs, NOBODY, -1)
    daemon = unprivileged_daemon(open_harness, f"log.to={theirs / 'log/app'}", workers=1)
    for verb in ("check", "start", "run"):
        result = daemon.command(verb)
        assert result.returncode == 78
        assert f"log.to: {theirs} belongs to user nobody, who could put anything there; chown it" in result.stderr

    os.chown(theirs, 0, -1)  # it becomes theirs while the daemon runs
    daemon.start()
    daemon.log = theirs / "log/app"
    os.chown(theirs, NOBODY, -1)
    (theirs / "log").rename(theirs / "moved")
    (theirs / "log").symlink_to(secret)
    daemon.log = theirs / "moved/app"
    daemon.signal(signal.SIGUSR1)
    daemon.wait_log(f"log reopen failed, the open file stays: .*{theirs} belongs to user nobody")
    daemon.expect("log reopen failed")
    assert list(secret.iterdir()) == []


@pytest.mark.parametrize("what", ["log", "pid file"])
def test_named_pipe_in_place_of_a_file_blocks_nothing(open_harness: Harness, what: str) -> None:
    daemon = unprivileged_daemon(open_harness, workers=1)
    if what == "log":
        daemon.start()
        daemon.log.rename(f"{daemon.log}.1")
        os.mkfifo(daemon.log)
        daemon.log, fifo = Path(f"{daemon.log}.1"), daemon.log
        daemon.signal(signal.SIGUSR1)
        daemon.wait_log("log reopen failed, .*it is a named pipe that no program reads")
        daemon.expect("log reopen failed")
        fifo.unlink()
    else:
        daemon.run_directory.mkdir()
        os.mkfifo(daemon.run_directory / "pid")
        result = daemon.command("start")
        assert result.returncode == 1
        assert f"{daemon.run_directory / 'pid'}: it is no file; remove it" in result.stderr
        (daemon.run_directory / "pid").unlink()


def test_settings_that_others_may_write_are_refused(open_directory: Path) -> None:
    file = open_directory / "theirs" / "d.yaml"
    file.parent.mkdir()
    file.write_text("listen: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n")
    assert forkd("check", file, cwd=open_directory).returncode == 0
    for given, owner, mode, said in (
        (file, NOBODY, 0o644, f"{file}: {file} belongs to user nobody"),
        (file, 0, 0o666, f"{file}: {file} is open to all users"),
        (file.parent, NOBODY, 0o755, f"{file}: {file.parent} belongs to user nobody"),
    ):
        before = given.stat().st_mode & 0o777
        os.chown(given, owner, -1)
        given.chmod(mode)
        result = forkd("check", file, cwd=open_directory)
        assert (result.returncode, said in result.stderr) == (78, True), result.stderr
        os.chown(given, 0, -1)
        given.chmod(before)


def test_root_takes_no_settings_from_a_directory_of_others(open_directory: Path) -> None:
    file = open_directory / "etc/forkd/theirs.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("listen: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n")
    os.chown(open_directory, NOBODY, -1)
    result = forkd("run", "theirs", cwd=open_directory)
    assert result.returncode == 78
    assert f"{open_directory} belongs to user nobody, who could put anything there" in result.stderr


def test_set_user_id_programs_give_a_worker_nothing(open_harness: Harness, open_directory: Path) -> None:
    program = open_directory / "id"
    shutil.copy(shutil.which("id") or lacks("id"), program)
    program.chmod(0o4755)
    if os.statvfs(open_directory).f_flag & os.ST_NOSUID:
        lacks("a temporary directory whose set-user-ID bits count")
    daemon = unprivileged_daemon(open_harness).start()
    assert order_worker(open_harness, daemon, "run", str(program), "-u")["value"].strip() == str(NOBODY)
    other = unprivileged_daemon(open_harness, "no_new_privs=false", name="lax").start()
    assert order_worker(open_harness, other, "run", str(program), "-u")["value"].strip() == "0"


@pytest.mark.parametrize(
    ("text", "times", "said"),
    [
        ("no message\n", 1, "not JSON"),
        ("[]\n", 1, "not a JSON object"),
        ("x" * 65536, 1000, "a message of more than 1048576 bytes"),
        ('{"event": "hello"}\n', 100_000, "unknown event 'hello'"),
        ('{"event": {"event": []}}\n', 100, "event: text is wanted"),
        ('{"event": "answer", "number": 7, "found": [[]]}\n', 100, "an answer without a question"),
        ('{"event": "failed", "reason": "\\ud800", "details": 7}\n', 50_000, "details: text is wanted"),
        ('{"event": "worn", "why": "so it \\ud800"}\n', 30_000, r"so it \ud800"),
        ('{"event": "worn", "why": [{}]}\n', 100_000, "why: text is wanted"),
        ("[" * 100_000 + "\n", 1, "not JSON"),
    ],
)
def test_worker_that_floods_its_channel_is_replaced(open_harness: Harness, text: str, times: int, said: str) -> None:
    daemon = unprivileged_daemon(open_harness, "drain_timeout=10s").start()
    master, workers = daemon.pid, daemon.workers()
    assert "value" in order_worker(open_harness, daemon, "say", text, times)
    daemon.wait_log(re.escape(said))
    if "so it" not in text:  # its channel is closed, which is all that a worker knows of its master
        daemon.expect("the master is gone")
    eventually(lambda: len(set(daemon.workers().values()) & set(workers.values())) == 1, what="a replacement")
    daemon.wait_workers(2)
    assert daemon.command("status").returncode == 0
    assert daemon.pid == master
    assert order_worker(open_harness, daemon, "load", "json") == {"value": "json"}
    assert len([record for record in daemon.records() if ": invalid message: " in record]) <= 10


@pytest.mark.parametrize(
    "text", ['{"event": "ready"}\n', '{"event": "failed", "reason": "\\ud800", "details": "\\udfff"}\n']
)
def test_worker_that_repeats_valid_messages_does_no_harm(open_harness: Harness, text: str) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    master, workers = daemon.pid, daemon.workers()
    assert order_worker(open_harness, daemon, "say", text, 50_000)["value"] == 50_000 * len(text)
    check_unchanged(daemon, master, workers)


def test_worker_that_floods_stderr_does_not_block_the_master(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    master, workers = daemon.pid, daemon.workers()
    client = open_harness.connect(daemon)
    client.sendall(json.dumps(["complain", "\x1b[31m" + "x" * 60_000, 200]).encode() + b"\n")
    for _ in range(10):
        daemon.status()
    check_unchanged(daemon, master, workers)
    with client.makefile("rb") as lines:
        assert json.loads(lines.readline()) == {"value": None}
    assert b"\x1b" not in daemon.log.read_bytes()
    daemon.log.write_text("")  # nothing in it for `check`, which would take its time


def test_hostile_worker_opens_no_shared_memory_to_write(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    found = order_worker(open_harness, daemon, "open_shared_memory")["value"]
    assert found == {"/memfd:forkd-regions (deleted)": "PermissionError"}
    assert daemon.command("upgrade").returncode == 0
    assert order_worker(open_harness, daemon, "open_shared_memory")["value"] == found


@pytest.mark.parametrize("value", [-1, -(1 << 63), (1 << 63) - 1, 0])
def test_worker_that_scribbles_on_the_scoreboard_harms_itself(open_harness: Harness, value: int) -> None:
    daemon = unprivileged_daemon(open_harness, "stall_timeout=1h").start()
    master, workers = daemon.pid, daemon.workers()
    assert order_worker(open_harness, daemon, "scribble", 0, value) == {"value": 1}
    check_unchanged(daemon, master, workers)
    for _ in range(20):
        assert order_worker(open_harness, daemon, "load", "json") == {"value": "json"}
    daemon.command("scale", 4)
    assert len(daemon.wait_workers(4)) == 4
    assert order_worker(open_harness, daemon, "load", "json") == {"value": "json"}
    check_unchanged(daemon, master, daemon.workers())


def test_worker_that_lies_about_clients_lies_about_its_own(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness, workers=2).start()
    clients = [open_harness.connect(daemon)]
    while not all(daemon.wait_clients(len(clients)).values()):
        clients.append(open_harness.connect(daemon))
        assert len(clients) < 100, "there is a worker that gets no client"
    names = {"{}:{}".format(*client.getsockname()) for client in clients}
    before = json.loads(daemon.command("clients", "--json").stdout)
    assert {one["client"] for one in before} == names
    liar = order_worker(open_harness, daemon, "claim_clients", [one["id"] for one in before])["value"]
    after = {one["id"]: one for one in json.loads(daemon.command("clients", "--json").stdout)}
    for one in before:
        lied = {"client": f"[{':'.join(['ffff'] * 8)}]:{(1 << 64) - 1}", "proxy": one["client"]}
        told = {name: after[one["id"]][name] for name in lied}
        assert told == (lied if one["pid"] == liar else {"client": one["client"], "proxy": None})


@pytest.mark.parametrize(
    "claim",
    [{"kind": "histogram", "buckets": [10**400]}, {"labels": [["x", "\ud800"]]}, {"doc": "\ud800"}],
    ids=["bucket", "label", "doc"],
)
def test_worker_that_lies_about_metrics_hides_none(open_harness: Harness, claim: dict[str, object]) -> None:
    daemon = unprivileged_daemon(open_harness, "admin.address=tcp://127.0.0.1:0").start()
    master, said = daemon.pid, {"name": "a", "kind": "counter", "labels": [], "buckets": [], "doc": "", "at": 0}
    liar = order_worker(open_harness, daemon, "claim_metric", json.dumps(said | claim))["value"]
    assert ask(daemon, "/metrics").status == 200
    daemon.expect("killed by SIGKILL")
    os.kill(liar, signal.SIGKILL)
    eventually(lambda: liar not in daemon.workers().values(), what="the end of the liar")
    daemon.wait_workers(2)
    assert (daemon.pid, ask(daemon, "/metrics").status) == (master, 200)
