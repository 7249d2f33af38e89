"""`forkd top`: the picture and the keys alone, and the program on a terminal (pty(7)) with a running daemon."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from forkd.cli.top import CLIENTS, WORKERS, Line, Snapshot, View, picture, press, rows_of, take_snapshot
from forkd.errors import ForkdError
from forkd.system.run_directory import RunDirectory
from tests.support.clients import at_end, echoes
from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually


def sample(workers: int = 2, clients: int = 0, **more: Any) -> Snapshot:
    """What a daemon with so many workers and clients tells."""
    counts = {"refused": {"full": 1}, "ended": {"idle": 2}, "accepted": 9, "errors": 0}
    status = {
        "name": "chat", "state": "running", "pid": 7, "started": 0.0, "generation": 1, "version": "1",
        "serving": workers, "wanted": workers,
        "totals": counts, "reason": "", "last_failure": None, "change": "", "deaths": [],
        "boot_timeout": 1.0,
        "workers": [
            {"slot": n, "pid": 100 + n, "state": "serving", "age": 9.0, "clients": n, "pss": n << 20, **counts}
            for n in range(1, workers + 1)
        ],
        "listeners": [
            {"address": f"tcp://127.0.0.1:{n}", "clients": 5, "limit": 10, "queue": 0, "queue_limit": 9, "drops": 0}
            for n in range(9)
        ],
        **more,
    }  # fmt: skip
    found = [
        {
            "id": n, "worker": 1, "client": f"10.0.0.{n}:1", "age": 99.0 - n, "idle": None, "in": n, "out": n << 30,
            "sendq": 0, "state": "established", "listener": "tcp://127.0.0.1:1",
        }
        for n in range(1, clients + 1)
    ]  # fmt: skip
    return Snapshot(60.0, status, {0: 1.0}, found)


@pytest.mark.parametrize("page", [WORKERS, CLIENTS])
@pytest.mark.parametrize("size", [(80, 24), (200, 60), (20, 5), (1, 1)])
def test_picture_has_the_size_of_the_terminal(page: str, size: tuple[int, int]) -> None:
    width, height = size
    for told in (sample(100, 100), sample(1), Snapshot(0.0, error="chat is not running")):
        lines = picture(told, View(page), width, height)
        assert len(lines) == height
        assert max(len(line.text) for line in lines) <= width


def test_picture_shows_trouble_by_word_and_look() -> None:
    failure = {"time": 0.0, "text": "reload failed: no"}
    death = {"slot": 3, "pid": 9, "time": 0.0, "exit": "killed by SIGKILL", "cause": "signal", "expected": False}
    told = sample(state="degraded", reason="worker 2 has ended", last_failure=failure, deaths=[death])
    bad = [line.text for line in picture(told, View(), 80, 24) if line.look == "bad"]
    assert bad[0].startswith("chat: degraded, pid 7, up 1.0m")
    assert bad[1:3] == ["worker 2 has ended", "the last reload failed: no"]
    assert bad[3].endswith("killed by SIGKILL, signal")
    assert "[#####.....]" in "\n".join(line.text for line in picture(told, View(), 80, None))


def test_chosen_row_stays_in_the_picture_and_follows_its_client() -> None:
    told, view = sample(clients=300), View(CLIENTS)
    for _ in range(250):
        press("down", told, view)
    assert view.chosen == 251
    press("r", told, view)
    (chosen,) = [line.text for line in picture(told, view, 80, 24) if line.look == "chosen"]
    assert chosen.startswith("251 ")


def test_keys_sort_by_each_column_those_unknown_last() -> None:
    told, view = sample(clients=3), View(CLIENTS)
    for _ in range(3):
        press("s", told, view)
    assert [one["id"] for one in rows_of(told, view)] == [3, 2, 1]  # by age
    press("r", told, view)
    assert [one["id"] for one in rows_of(told, view)] == [1, 2, 3]
    press("s", told, view)
    assert [one["id"] for one in rows_of(told, view)] == [1, 2, 3]  # by what is not known
    assert "AGE" in picture(told, view, 80, None)[-4].text


def test_kill_is_asked_about_before_it_is_an_order() -> None:
    told, view = sample(clients=3), View(CLIENTS)
    assert press("down", told, view) is None
    assert press("k", told, view) is None
    assert picture(told, view, 80, 24)[-1].text == "close the client 2? y or n"
    assert press("n", told, view) is None
    assert press("y", told, view) is None
    press("k", told, view)
    assert press("y", told, view) == ("kill", 2)
    assert press("k", told, View(WORKERS)) is None


def test_scale_keys_stay_within_what_is_possible() -> None:
    assert press("+", sample(2), View()) == ("scale", 3)
    assert press("-", sample(2), View()) == ("scale", 1)
    assert press("-", sample(1), View()) is None
    assert press("+", Snapshot(0.0), View()) is None
    assert press("q", Snapshot(0.0), View()) == ("quit", 0)


class Terminal:
    """`forkd top` of a daemon, on a terminal of 80 by 24."""

    def __init__(self, daemon: Daemon, *, ignored: signal.Signals | None = None, **environment: str) -> None:
        self._master, slave = pty.openpty()
        os.set_blocking(self._master, False)
        self.resize(24, 80)
        command = [sys.executable, "-m", "forkd", "top", *map(str, daemon.identity)]
        if ignored is not None:
            command = ["sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh", *command]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=daemon.directory,
            env={**os.environ, "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        os.close(slave)
        self.all = self._new = ""

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _read(self) -> str:
        with contextlib.suppress(OSError):  # nothing is there, or it has ended
            self._new += os.read(self._master, 1 << 16).decode(errors="replace")
        return self._new

    def type(self, keys: str) -> None:
        self.all, self._new = self.all + self._read(), ""
        os.write(self._master, keys.encode())

    def wait(self, pattern: str) -> None:
        """Waits until what was drawn since the last key fits a pattern."""
        found = ""

        def shown() -> bool:
            nonlocal found
            found = self._read()
            return bool(re.search(pattern, found))

        try:
            eventually(shown, what=pattern)
        except AssertionError as error:
            raise AssertionError(f"{error}: {found[-2000:]!r}") from None

    def hang_up(self) -> None:
        """What a lost connection to the terminal does."""
        os.close(self._master)
        self._master = os.open(os.devnull, os.O_RDONLY)

    def end(self) -> int:
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()
            self.all += self._read()
            os.close(self._master)


def test_top_shows_a_daemon_and_obeys_its_keys(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    client = harness.connect(daemon)
    assert echoes(client)
    terminal = Terminal(daemon, NO_COLOR="1")
    terminal.wait("tested: running, pid")
    terminal.wait("q quit")
    terminal.type("+")
    daemon.wait_workers(2)
    terminal.type("c")
    host, port = client.getsockname()[:2]
    terminal.wait(f"{host}:{port}")
    terminal.type("k")
    terminal.wait("close the client")
    terminal.type("y")
    assert at_end(client)
    terminal.wait("closed the client")
    terminal.type("c")
    terminal.wait("c clients")
    terminal.resize(12, 40)
    terminal.process.send_signal(signal.SIGWINCH)
    terminal.wait("SLOT")
    assert daemon.command("stop").returncode == 0
    terminal.wait("not running|closed the connection|can't be asked")
    terminal.type("q")
    assert terminal.end() == 0
    assert not re.search(r"\x1b\[(?:\d+;)*3[12](?:;\d+)*m", terminal.all)  # no colour
    assert "Traceback" not in terminal.all


def test_top_obeys_keys_at_once_while_the_master_stands_still(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    pid = daemon.pid
    terminal = Terminal(daemon, NO_COLOR="1")
    terminal.wait("tested: running, pid")
    os.kill(pid, signal.SIGSTOP)
    try:
        terminal.wait("no answer for [0-9.]+s, and what is shown is older: tested does not answer")
        began = time.monotonic()
        for head in (r"ID\^", r"SLOT\^") * 5:
            terminal.type("c")
            terminal.wait(head)
        assert time.monotonic() - began < 10 * 0.9  # ten samples, each of which is waited for a second
        terminal.type("")
        terminal.wait(r"\x1b\[3;15H.*\d")  # the time is drawn again, since the master is asked again
        terminal.type("q")
        assert terminal.end() == 0
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "Traceback" not in terminal.all


def test_top_shows_what_was_before_until_the_master_answers() -> None:
    before = Snapshot(time.time() - 70, sample().status)
    missing = RunDirectory("chat", Path("/nonexistent/run"))
    assert take_snapshot(missing, View(), before).error == "chat is not running"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forkd.cli.top.MasterConnection", no_answer)
        silent = take_snapshot(missing, View(), before)
        assert take_snapshot(missing, View(), silent).error == silent.error
        assert take_snapshot(missing, View(), None).status == {}
    lines = picture(silent, View(), 120, 24)
    assert lines[0].text.startswith("chat: running")
    assert lines[2] == Line("no answer for 1.2m, and what is shown is older: chat hangs", "bad")


def no_answer(run: RunDirectory) -> None:
    raise ForkdError(f"{run.name} hangs")


def test_top_ends_with_its_terminal(harness: Harness) -> None:
    terminal = Terminal(harness.daemon(workers=1).start(), ignored=signal.SIGHUP)
    terminal.wait("tested: running, pid")
    terminal.hang_up()
    assert terminal.end() != -signal.SIGKILL


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_top_leaves_the_terminal_as_it_was_when_it_is_ended(harness: Harness, signum: signal.Signals) -> None:
    daemon = harness.daemon(workers=1).start()
    terminal = Terminal(daemon)
    terminal.wait("tested: running")
    terminal.wait(r"\x1b\[[0-9;]*32")  # with colours
    terminal.process.send_signal(signum)
    assert terminal.end() == 130
    assert "\x1b[?1049l" in terminal.all  # the other screen is back
    assert "Traceback" not in terminal.all


def test_top_once_prints_one_picture_as_text(harness: Harness) -> None:
    daemon = harness.daemon().start()
    client = harness.connect(daemon)
    assert echoes(client)
    for options in (("--once",), ()):  # what is no terminal gets text, too
        result = daemon.command("top", *options)
        lines = result.stdout.splitlines()
        assert (result.returncode, result.stderr) == (0, "")
        assert lines[0].startswith(f"tested: running, pid {daemon.pid}, up ")
        assert lines[1].startswith("2 of 2 workers, 1 clients, ")
        assert [line.split()[1] for line in lines[-2:]] == [str(pid) for _, pid in sorted(daemon.workers().items())]
        assert max(map(len, lines)) <= 80
    client.close()
    assert daemon.command("stop").returncode == 0
    assert daemon.command("top", "--once").returncode == 1


def test_top_on_a_terminal_that_can_not_show_it_says_so(harness: Harness) -> None:
    terminal = Terminal(harness.daemon(workers=1).start(), TERM="nonsense")
    terminal.wait("this terminal can't show it .*; try --once")
    assert terminal.end() == 1
