"""A daemon in the foreground whose log is not read: it serves and stops, and says what was lost."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from time import monotonic

import pytest

from tests.support.clients import read
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, eventually


def start(harness: Harness, log: int) -> Daemon:
    """A daemon that logs to this descriptor, as standard error."""
    daemon = harness.daemon(target="verbose:fill", workers=1, settings=("log.to=stderr", "stall_timeout=5s"))
    daemon.terminal.touch()
    command = [sys.executable, "-m", "forkd", "run", *daemon.target, *daemon.identity, *daemon.options]
    daemon.process = subprocess.Popen(
        [str(word) for word in command],
        cwd=daemon.directory,
        stdin=subprocess.DEVNULL,
        stderr=log,
        process_group=0,
    )
    eventually(daemon._is_up, what="its start")
    return daemon


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    """What the log is read from, and what it goes to."""
    if request.param == "socket":
        found = tuple(sock.detach() for sock in socket.socketpair())
    else:
        found = os.pipe() if request.param == "pipe" else os.openpty()
    yield found[0], found[1]
    for one in found:
        os.close(one)


def tell(client: socket.socket, words: str) -> None:
    client.sendall(f"{words}\n".encode())
    assert read(client, 5) == b"done\n"


def read_until(descriptor: int, *patterns: str) -> str:
    """Reads the log until it has all of these; what it has."""
    text, deadline = "", monotonic() + DEADLINE
    while not all(re.search(pattern, text) for pattern in patterns):
        assert monotonic() < deadline, text[-2000:]
        text += os.read(descriptor, 1 << 16).decode()
    return text


@pytest.mark.parametrize(
    ("ends", "signum"),
    [("pipe", signal.SIGTERM), ("terminal", signal.SIGQUIT), ("socket", signal.SIGTERM)],
    indirect=["ends"],
)
def test_daemon_whose_log_is_not_read_serves_and_stops(
    harness: Harness, ends: tuple[int, int], signum: signal.Signals
) -> None:
    daemon = start(harness, ends[1])
    workers = daemon.workers()
    with harness.connect(daemon) as client:
        tell(client, "log 3000")  # 3 MB, of which the worker keeps one
        tell(client, "print 3000")  # these the master logs
        eventually(lambda: daemon.status()["log_lines_lost"] > 0, what="lost lines")
        assert re.search(r"^\d+ log lines lost: the log could not be written$", daemon.command("status").stdout, re.M)
        assert daemon.workers() == workers
        if signum == signal.SIGTERM:
            read_until(ends[0], r"master\[\d+\] \S+: \d+ log lines lost", r"worker 1\[\d+\] \S+: \d+ log lines lost")
            tell(client, "print 3000")
    began = monotonic()
    daemon.signal(signum)
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0
    assert monotonic() - began < 20


@pytest.mark.parametrize("ends", ["pipe"], indirect=True)
def test_upgrade_loses_no_line_that_waits_for_the_reader(harness: Harness, ends: tuple[int, int]) -> None:
    daemon = start(harness, ends[1])
    with harness.connect(daemon) as client:
        tell(client, "print 3000")  # the master keeps one MB of these
        lost = eventually(lambda: daemon.status()["log_lines_lost"], what="lost lines")
        client.close()
        result = daemon.command("upgrade")
        assert result.returncode == 0, result.stderr
        lost = daemon.status()["log_lines_lost"]
        text = read_until(ends[0], r"master\[\d+\] \S+: \d+ log lines lost")
        assert daemon.status()["log_lines_lost"] == lost
    assert text.count("x" * 1000) >= 900
    (told,) = re.findall(r"(\d+) log lines lost", text)
    assert int(told) == lost
    daemon.signal(signal.SIGTERM)
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0


def test_start_that_fails_with_an_unread_log_ends(harness: Harness) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    command = [sys.executable, "-m", "forkd", "run", "json:missing", "--listen", "tcp://127.0.0.1:0"]
    command += ["--set", f"run_directory={harness.directory}/run", "--workers", "1"]
    process = subprocess.Popen(command, stderr=writer, cwd=harness.directory)
    assert process.wait(DEADLINE) == 1
    os.close(reader)
    os.close(writer)
