"""`forkd logs`: a file and its successors, the journal by a program of the test's, and what can't be read."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually


def shown(daemon: Daemon, *options: str) -> str:
    result = daemon.command("logs", *options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_logs_prints_the_last_lines_of_the_file(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    written = daemon.log.read_text()
    assert shown(daemon) == written
    assert shown(daemon, "-n", "1") == written.splitlines(keepends=True)[-1]
    assert shown(daemon, "-n", "0") == ""
    with daemon.log.open("a") as log:
        log.writelines(f"2026-01-01T00:00:00.000Z INFO {number} {'x' * 100}\n" for number in range(2000))
    lines = shown(daemon, "-n", "1500").splitlines()
    assert [line.split()[2] for line in (lines[0], lines[-1])] == ["500", "1999"]
    assert len(lines) == 1500


def test_logs_follows_the_file_over_a_rotation(harness: Harness, tmp_path: Path) -> None:
    daemon = harness.daemon(workers=1).start()
    out = tmp_path / "out"
    command = [sys.executable, "-m", "forkd", "logs", "-f", *map(str, daemon.identity)]
    with out.open("wb") as file, subprocess.Popen(command, stdout=file, cwd=tmp_path) as process:
        try:
            eventually(lambda: "daemon state: running" in out.read_text(), what="the log")
            daemon.log.rename(daemon.log.with_suffix(".1"))
            daemon.signal(signal.SIGUSR1)
            eventually(daemon.log.exists, what="the new log")
            assert daemon.command("scale", "2").returncode == 0
            eventually(lambda: daemon.log.read_text() and out.read_text().endswith(daemon.log.read_text()), what="both")
            assert out.read_text().startswith(daemon.log.with_suffix(".1").read_text())
        finally:
            process.send_signal(signal.SIGINT)
    assert process.returncode == 130


def test_logs_of_a_redirected_standard_error_is_its_file(harness: Harness) -> None:
    daemon = harness.daemon(workers=1, settings=("log.to=stderr",))
    daemon.run()  # to a file
    assert shown(daemon) == daemon.terminal.read_text()
    assert daemon.command("stop").returncode == 0
    assert daemon.process is not None
    assert daemon.process.wait(60) == 0
    daemon.terminal.write_text("")


def test_logs_of_a_pipe_says_so(harness: Harness, tmp_path: Path) -> None:
    daemon = harness.daemon(workers=1, settings=("log.to=stderr",))
    daemon.prefix = ["sh", "-c", '"$@" 2>&1 | cat >log-of-pipe', "sh"]
    daemon.begin()
    eventually(daemon._is_up, what="the daemon")
    result = daemon.command("logs")
    told = f"forkd: tested, pid {daemon.pid}, logs to its standard error, which is a pipe: what has started it has"
    assert (result.returncode, result.stdout, result.stderr.startswith(told)) == (1, "", True), result.stderr
    assert daemon.command("stop").returncode == 0


@pytest.mark.parametrize("there", [True, False])
def test_logs_asks_the_journal_by_the_name(harness: Harness, there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = harness.directory / "bin"
    directory.mkdir()
    if there:
        (directory / "journalctl").write_text('#!/bin/sh\necho "$@"\n')
        (directory / "journalctl").chmod(0o755)
    file = harness.directory / "chat.yaml"
    file.write_text("log: {to: journal}\nlisten: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n")
    monkeypatch.setenv("PATH", f"{directory}:/bin" if there else str(directory))
    command = [sys.executable, "-m", "forkd", "logs", str(file), "--run-directory", str(directory), "-f", "-n", "7"]
    done = subprocess.run(command, env=os.environ, cwd=harness.directory, capture_output=True, text=True, check=False)
    if there:
        assert (done.returncode, done.stdout) == (0, "--no-pager -n 7 -f -t chat\n")
    else:
        assert (done.returncode, "there is no journalctl(1)" in done.stderr) == (1, True)


def test_logs_of_a_file_that_is_not_there_names_it(harness: Harness) -> None:
    file = harness.directory / "chat.yaml"
    os.mkfifo(harness.directory / "pipe")
    command = [sys.executable, "-m", "forkd", "logs", str(file), "--run-directory", str(harness.directory)]
    for name, said in (("none.log", "and there is no such file"), ("pipe", "which is no file: look at what reads it")):
        file.write_text(f"log: {{to: {harness.directory}/{name}}}\nlisten: []\n")
        done = subprocess.run(command, cwd=harness.directory, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (1, f"forkd: chat logs to {harness.directory}/{name}, {said}\n")
