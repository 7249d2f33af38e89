"""The life of a daemon as its commands show it: run, start, status, stop, restart and scale.

Each test has a real daemon; exit statuses and sentences are those that a script or a person gets. The commands that
need none, schema and completion, are here too.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from forkd.system.run_directory import default_run_directory
from tests.support.clients import at_end, echoes
from tests.support.daemon import Harness, forkd
from tests.support.processes import DEADLINE, eventually, title, wait_end

_TERM_FIRST = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
for number in (signal.SIGHUP, signal.SIGTERM):
    os.kill(os.getpid(), number)
os.execv(sys.executable, [sys.executable, "-m", "forkd", "run", *sys.argv[1:]])
"""


def test_signals_that_waited_for_the_start_end_it_in_order(harness: Harness) -> None:
    daemon = harness.daemon()
    words = [sys.executable, "-c", _TERM_FIRST, *map(str, (*daemon.identity, *daemon.options))]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_file_with_a_name_of_another_encoding_is_taken(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "caf\udce9.yaml"
    file.write_text("workers: 1\nlisten:\n  - {address: tcp://127.0.0.1:0, handler: forkd.builtin:Echo}\n")
    daemon = harness.daemon(target=file, listen=(), workers=None).start()
    assert echoes(harness.connect(daemon))
    assert title(daemon.pid) == "forkd: tested master"
    assert daemon.status()["source"] == str(file)
    assert daemon.command("reload").returncode == 0


def test_status_tells_stopped_running_and_dead_by_exit_status(harness: Harness) -> None:
    daemon = harness.daemon()
    stopped = daemon.command("status")
    assert (stopped.returncode, stopped.stdout) == (3, "tested is stopped\n")
    assert daemon.command("status", "--json").stdout == '{"name": "tested", "state": "stopped"}\n'
    daemon.start()
    assert daemon.command("status").returncode == 0
    master, workers = daemon.pid, daemon.workers().values()
    daemon.expect("the master is gone")
    os.kill(master, signal.SIGKILL)
    for pid in (master, *workers):
        wait_end(pid)
    dead = daemon.command("status")
    assert (dead.returncode, dead.stdout) == (1, f"tested is dead, but left its pid file (pid {master})\n")
    assert json.loads(daemon.command("status", "--json").stdout)["state"] == "dead"
    daemon.start()
    assert daemon.command("status").returncode == 0
    assert daemon.pid != master


def test_start_and_stop_tell_what_they_did(harness: Harness) -> None:
    daemon = harness.daemon()
    started = daemon.command("start")
    assert started.returncode == 0
    assert started.stdout == (f"tested started, pid {daemon.pid}, 2 workers on {daemon.address}; log: {daemon.log}\n")
    assert started.stderr == ""
    master = daemon.pid
    stopped = daemon.command("stop")
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (0, f"tested stopped, pid {master}\n", "")
    assert list(daemon.run_directory.iterdir()) == []


def test_starting_what_runs_is_a_success_that_says_so(harness: Harness) -> None:
    daemon = harness.daemon().start()
    master = daemon.pid
    again = daemon.command("start")
    assert (again.returncode, again.stdout) == (0, f"tested is already running, pid {master}\n")
    assert daemon.pid == master


def test_stopping_what_does_not_run_is_a_success_that_says_so(harness: Harness) -> None:
    daemon = harness.daemon().start()
    assert daemon.command("stop").returncode == 0
    again = daemon.command("stop")
    assert (again.returncode, again.stdout) == (0, "tested is not running\n")


def test_second_run_fails_and_leaves_the_first_alone(harness: Harness) -> None:
    daemon = harness.daemon().run()
    second = daemon.command("run")
    assert (second.returncode, second.stderr) == (1, f"forkd: tested is already running, pid {daemon.pid}\n")
    assert echoes(harness.connect(daemon))


def test_start_returns_only_when_every_worker_is_ready(harness: Harness, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    daemon = harness.daemon(target="gate:Echo")
    command = [sys.executable, "-m", "forkd", "start", *daemon.target, *daemon.identity, *daemon.options]
    with open(tmp_path / "gate", "r+b", buffering=0) as gate:
        start = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.PIPE)
        with start:
            gate.write(b"1")
            daemon.wait_answer()
            eventually(lambda: len(daemon.workers()) == 1, what="the first worker")
            assert daemon.status()["state"] == "starting"
            assert start.poll() is None
            gate.write(b"2")
            assert start.wait(DEADLINE) == 0
    assert daemon.status()["state"] == "running"
    assert list(daemon.workers()) == [1, 2]


def test_start_detaches_from_the_terminal_and_the_session(harness: Harness) -> None:
    master = harness.daemon().start().pid
    assert os.getsid(master) != os.getsid(0)
    fields = Path(f"/proc/{master}/stat").read_text().rpartition(")")[2].split()
    assert fields[4] == "0"  # tty_nr
    assert fields[3] != str(master)  # no session leader, so it can't take a terminal
    assert os.readlink(f"/proc/{master}/fd/0") == "/dev/null"
    assert re.search(r"Umask:\t0027", Path(f"/proc/{master}/status").read_text())


def test_status_as_json_has_the_whole_state(harness: Harness) -> None:
    daemon = harness.daemon(workers=2).start()
    client = harness.connect(daemon)
    assert echoes(client)
    daemon.wait_clients(1)
    found = json.loads(daemon.command("status", "--json").stdout)
    assert found.keys() == {
        "name", "pid", "version", "state", "started", "wanted", "boot_timeout", "serving", "workers", "listeners",
        "deaths", "totals", "generation", "change", "refusal", "reason", "foreground", "source", "directory",
        "run_directory", "last_failure", "death_counts", "log_lines_lost", "hot_path", "services", "not_ready",
        "drained", "log", "last_success", "change_counts",
    }  # fmt: skip
    assert (found["name"], found["state"], found["wanted"], found["serving"]) == ("tested", "running", 2, 2)
    assert [one["slot"] for one in found["workers"]] == [1, 2]
    assert found["workers"][0].keys() == {
        "slot", "pid", "generation", "state", "age", "clients", "accepted", "closed", "refused", "ended", "errors",
        "lag", "datagrams", "heartbeat_age", "rss", "pss",
    }  # fmt: skip
    assert sum(one["accepted"] for one in found["workers"]) == 1
    assert found["listeners"] == [
        {
            "address": daemon.address, "handler": "forkd.builtin:Echo", "backlog": 4096, "queue": 0,
            "queue_limit": 4096, "drops": 0, "resets": 0, "clients": 1, "limit": None, "certificates": [],
        }
    ]  # fmt: skip
    assert found["deaths"] == []


def test_status_as_text_has_lines_for_workers_listeners_deaths(harness: Harness) -> None:
    daemon = harness.daemon().start()
    victim = daemon.workers()[2]
    daemon.expect(f"worker 2 .pid {victim}. has ended: killed by SIGKILL")
    os.kill(victim, signal.SIGKILL)
    workers = daemon.wait_workers(2, without={victim})
    text = daemon.command("status").stdout
    assert re.search(rf"^tested: running, pid {daemon.pid}, since \d{{4}}-", text)
    for slot, pid in workers.items():
        assert re.search(rf"^{slot} +{pid} +serving ", text, re.MULTILINE)
    assert re.search(rf"^{daemon.address} +forkd\.builtin:Echo +0 +0/4096 +0 +0$", text, re.MULTILINE)
    assert re.search(rf" 2 +{victim} .*killed by SIGKILL", text)


def test_stop_waits_for_the_clients(harness: Harness) -> None:
    daemon = harness.daemon().start()
    client = harness.connect(daemon)
    assert echoes(client)
    command = [sys.executable, "-m", "forkd", "stop", *daemon.identity]
    with subprocess.Popen(list(map(str, command)), cwd=daemon.directory, stdout=subprocess.PIPE) as stop:
        daemon.wait_log("draining")
        assert echoes(client)
        assert stop.poll() is None
        client.close()
        assert stop.wait(DEADLINE) == 0


def test_stop_takes_its_two_answers_when_they_come_as_one(harness: Harness) -> None:
    daemon = harness.daemon()
    daemon.run_directory.mkdir()
    control = daemon.run_directory / "control.sock"
    with socket.socket(socket.AF_UNIX) as master:
        master.bind(str(control))
        master.listen()
        command = [sys.executable, "-m", "forkd", "stop", *daemon.identity]
        with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, cwd=daemon.directory) as stop:
            client, _ = master.accept()
            with client, client.makefile("rb") as requests:
                assert b"stop" in requests.readline()
                client.sendall(b'{"ok": true, "within": 1}\n{"ok": true}\n')
            stop.wait(DEADLINE)
    control.unlink()
    assert stop.returncode == 0


def test_stop_now_does_not_wait_for_them(harness: Harness) -> None:
    daemon = harness.daemon().start()
    client = harness.connect(daemon)
    assert echoes(client)
    assert daemon.command("stop", "--now").returncode == 0
    assert at_end(client)


@pytest.mark.parametrize("group", [False, True], ids=["to the master", "to all, as a terminal does"])
def test_interrupt_ends_run_cleanly(harness: Harness, group: bool) -> None:
    daemon = harness.daemon().run()
    client = harness.connect(daemon)
    assert echoes(client)
    assert daemon.process is not None
    (os.killpg if group else os.kill)(daemon.process.pid, signal.SIGINT)
    daemon.wait_log("draining")
    assert echoes(client)
    client.close()
    assert daemon.process.wait(DEADLINE) == 0


def test_restart_starts_a_new_daemon_with_the_new_settings(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    master, address = daemon.pid, daemon.address
    daemon.options += ["--workers=3", f"--listen={address}"]
    daemon.options.remove("--listen=tcp://127.0.0.1:0")
    result = daemon.command("restart")
    assert result.returncode == 0, result.stderr
    assert f"on {address}" in result.stdout
    assert daemon.pid != master
    assert len(daemon.workers()) == 3
    assert echoes(harness.connect(daemon))


def test_restarting_what_does_not_run_starts_it_and_says_so(harness: Harness) -> None:
    daemon = harness.daemon()
    result = daemon.command("restart")
    assert result.returncode == 0
    assert result.stdout.startswith("tested is not running\ntested started, pid ")


def test_scale_returns_when_there_are_so_many_workers(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    more = daemon.command("scale", 3)
    assert (more.returncode, more.stdout) == (0, "tested has 3 workers\n")
    assert list(daemon.workers()) == [1, 2, 3]
    fewer = daemon.command("scale", 1)
    assert (fewer.returncode, fewer.stdout) == (0, "tested has 1 worker\n")
    daemon.wait_workers(1)


@pytest.mark.parametrize(
    ("number", "status", "words"),
    [("0", 1, "from 1 to 512"), ("513", 1, "from 1 to 512"), ("many", 64, "'many' is not a number")],
)
def test_number_of_workers_that_can_not_be_is_refused(harness: Harness, number: str, status: int, words: str) -> None:
    daemon = harness.daemon().start()
    result = daemon.command("scale", number)
    assert result.returncode == status
    assert words in result.stderr
    assert len(daemon.workers()) == 2


def test_scaling_what_does_not_run_fails(harness: Harness) -> None:
    result = harness.daemon().command("scale", 2)
    assert (result.returncode, result.stderr) == (1, "forkd: tested is not running\n")


def test_titles_say_who_is_who_and_how_many_clients_each_has(harness: Harness) -> None:
    daemon = harness.daemon(workers=2).start()
    assert title(daemon.pid) == "forkd: tested master"
    assert {title(pid) for pid in daemon.workers().values()} == {
        f"forkd: tested worker {n} (0 clients)" for n in (1, 2)
    }
    clients = [harness.connect(daemon) for _ in range(75)]
    assert all(echoes(client) for client in clients)
    each = daemon.wait_clients(75)
    for slot, pid in daemon.workers().items():
        wanted = f"forkd: tested worker {slot} ({each[pid]} client{'' if each[pid] == 1 else 's'})"
        eventually(lambda pid=pid, wanted=wanted: title(pid) == wanted, what=wanted)  # type: ignore[misc]


def test_daemons_of_other_names_do_not_meet(harness: Harness) -> None:
    one, two = harness.daemon("one").start(), harness.daemon("two").start()
    assert one.command("stop").returncode == 0
    assert two.command("status").returncode == 0
    assert one.command("status").returncode == 3


def test_run_directory_goes_with_the_daemon_unless_it_is_named(harness: Harness) -> None:
    named = harness.daemon("named", workers=1).start()
    unnamed = harness.daemon(f"unnamed-{os.getpid()}", workers=1)
    unnamed.identity, unnamed.run_directory = ["--name", unnamed.name], default_run_directory(unnamed.name)
    unnamed.start()
    for verb in ("restart", "upgrade"):
        assert unnamed.command(verb).returncode == 0
        assert sorted(file.name for file in unnamed.run_directory.iterdir()) == ["control.sock", "pid"]
    for daemon in (named, unnamed):
        assert daemon.command("stop").returncode == 0
    assert list(named.run_directory.iterdir()) == []
    assert not unnamed.run_directory.exists()
    assert unnamed.command("start", "--listen=tcp://127.0.0.1:0", "--listen=tcp://192.0.2.1:1").returncode == 1
    assert not unnamed.run_directory.exists()


def test_settings_file_names_the_daemon_for_all_commands(harness: Harness, tmp_path: Path) -> None:
    daemon = harness.daemon("chat", target="./chat.yaml", listen=(), workers=None)
    (tmp_path / "chat.yaml").write_text(
        f"run_directory: {daemon.run_directory}\nworkers: 1\n"
        "listen: [{address: 'tcp://127.0.0.1:0', handler: 'forms:AsClass'}]\n"
    )
    daemon.identity = []
    daemon.start()
    assert (daemon.status()["name"], daemon.status()["wanted"]) == ("chat", 1)
    client = harness.connect(daemon)
    assert client.recv(100) == b"class\n"
    client.close()
    assert daemon.command("scale", 2).stdout == "chat has 2 workers\n"
    assert daemon.command("stop").stdout.startswith("chat stopped, pid ")
    assert daemon.command("status").returncode == 3


def test_stop_during_a_start_ends_both(harness: Harness, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    daemon = harness.daemon(target="gate:Echo")
    with open(tmp_path / "gate", "r+b", buffering=0):
        command = [sys.executable, "-m", "forkd", "start", *daemon.target, *daemon.identity, *daemon.options]
        with subprocess.Popen(list(map(str, command)), cwd=tmp_path, stderr=subprocess.PIPE) as start:
            daemon.wait_answer()
            assert daemon.command("stop").returncode == 0
            assert start.stderr is not None
            assert select.select([start.stderr], [], [], DEADLINE)[0]
            assert b"stopped" in start.stderr.read()
            assert start.wait(DEADLINE) == 1


def test_schema_accepts_a_good_file_and_refuses_a_bad_one(tmp_path: Path) -> None:
    schema = json.loads(forkd("schema", cwd=tmp_path).stdout)
    jsonschema.Draft7Validator.check_schema(schema)
    good = {"listen": [{"address": "tcp://127.0.0.1:0", "handler": "a.b:c"}], "workers": 2}
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError, match="wokers"):
        jsonschema.validate({**good, "wokers": 2}, schema)
    assert "| `drain_timeout` | duration | `30s` |" in forkd("schema", "--markdown", cwd=tmp_path).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_the_commands_and_their_options(tmp_path: Path, shell: str) -> None:
    result = forkd("completion", shell, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"restart", result.stdout)
    assert re.search(r"run-directory", result.stdout)
