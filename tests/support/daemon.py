"""The end-to-end harness: real daemons in directories of their own, clients with deadlines, and a check in the end.

`Harness` makes daemons and clients for one test. When the test is over it stops what still runs and checks that nothing
is left: no process, zombie, file or bound address, and nothing in the log or on the terminal that the test has not
said it expects. This process becomes a child subreaper, so that every process of a daemon stays its descendant.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from tests.support.clients import dial, is_free
from tests.support.paths import HANDLERS
from tests.support.processes import DEADLINE, descendants, eventually, has_another_owner, parent_of, wait_end

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_RECORD = re.compile(r'(?:\d{4}-\d\d-\d\dT\S+Z [A-Z]+ |\{"time": ).*(?:\n  \| .*)*')
_BAD = re.compile(r'\A\S+ (?:ERROR|CRITICAL) |"level": "(?:ERROR|CRITICAL)"|Traceback')

#: Of a worker that is told to close at the end of a test, and has not the time for it: killed it would be another one.
_LATE_AT_END = "it did not close when told to; these are its stacks"

#: What a worker has in the log that has had no time for its `stall_timeout`, though it would go on.
STOOD_STILL = "its loop stood still for stall_timeout; these are its stacks"


def forkd(
    *arguments: object, cwd: Path, seconds: float = 60, pass_fds: Collection[int] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs one command to its end. A daemon that kept its output open would hang this, and is not meant to."""
    command = [sys.executable, "-m", "forkd", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=seconds, check=False, pass_fds=pass_fds
    )


def log_records(log: Path) -> list[str]:
    """A log's records, each with its further lines; whatever else stands in it is one too."""
    text = log.read_text() if log.exists() else ""
    between = [stray for stray in _RECORD.sub("", text).split("\n") if stray]
    return [match[0] for match in _RECORD.finditer(text)] + [f"Traceback? stray line: {stray}" for stray in between]


class Daemon:
    """One daemon with a run directory and a log of its own.

    Args:
        directory: where those are, and what is its working directory.
        name: its name.
        target: a file or a handler; None for the echo.
        workers: how many.
        listen: its addresses; none where the file has them.
        settings: further ones, `KEY=VALUE`.
        environment: variables that `run` has beside this process's.
    """

    def __init__(
        self,
        directory: Path,
        name: str = "tested",
        *,
        target: object = None,
        workers: int | None = 2,
        listen: tuple[str, ...] = ("tcp://127.0.0.1:0",),
        settings: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.name = name
        self.run_directory = directory / f"run-{name}"
        self.log = directory / f"{name}.log"
        self.target = [] if target is None else [target]
        self.identity: list[object] = ["--name", name, "--run-directory", self.run_directory]
        self.options: list[object] = [f"--listen={address}" for address in listen]
        self.options += [] if workers is None else [f"--workers={workers}"]
        for setting in (f"log.to={self.log}", f"python_path=[{HANDLERS}, {directory}]", *settings):
            self.options += ["--set", setting]
        self.prefix: list[str] = []  # of the command, for `run`: what it is run by
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None  # of `run`
        self.terminal = directory / f"{name}.stderr"
        self.expected: list[str] = []
        self.allowed: list[str] = []
        self.held: set[str] = set()
        self.is_free: Callable[[str], bool] = is_free  # asked of its addresses in the end, there where it ran

    def expect(self, *patterns: str) -> None:
        """Says which errors the log is to have, as regular expressions; each must be there in the end."""
        self.expected += patterns

    def allow(self, *patterns: str) -> None:
        """Says which errors the log may have: those that a machine which is late brings about."""
        self.allowed += patterns

    def command(self, verb: str, *more: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command about this daemon."""
        options = self.options if verb in ("run", "start", "restart", "check") else []
        return forkd(verb, *self.target, *self.identity, *options, *more, cwd=self.directory, seconds=seconds)

    def start(self) -> Daemon:
        """Starts it in the background."""
        result = self.command("start")
        assert result.returncode == 0, result.stderr
        return self

    def begin(self, pass_fds: Collection[int] = ()) -> Daemon:
        """Starts it in the foreground, in a process group of its own, with these descriptors too."""
        command = [sys.executable, "-m", "forkd", "run", *self.target, *self.identity, *self.options]
        with self.terminal.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*self.prefix, *map(str, command)],
                cwd=self.directory,
                env=self.environment,
                stderr=stderr,
                stdin=subprocess.DEVNULL,
                process_group=0,
                pass_fds=pass_fds,
            )
        return self

    def run(self, pass_fds: Collection[int] = ()) -> Daemon:
        """Starts it in the foreground, and waits until it is up."""
        self.begin(pass_fds)
        eventually(lambda: self._is_up() or self._gone(), what="the daemon's start")
        assert not self._gone(), self.terminal.read_text()
        return self

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError, AssertionError):
            return bool(self.status()["state"] == "running")
        return False

    def wait_answer(self) -> None:
        """Waits until its master can be asked, which may be some time before it is up."""

        def answers() -> bool:
            with contextlib.suppress(OSError):  # the file of its socket is there a moment before it listens
                return bool(self.status())
            return False

        eventually(answers, what="the master's answer")

    def _gone(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def status(self) -> dict[str, Any]:
        """What the master tells of itself, asked on its control socket without a process for it."""
        with dial(f"unix:{self.run_directory / 'control.sock'}") as sock:
            sock.sendall(b'{"verb": "status"}\n')
            with sock.makefile("rb") as lines:
                line = lines.readline()
        if not line:
            raise ConnectionResetError("the master ended before it answered")
        reply = json.loads(line)
        assert reply.get("ok"), reply
        self.held.update(one["address"] for one in reply["status"]["listeners"])
        return dict(reply["status"])

    @property
    def address(self) -> str:
        """Where its first listener listens."""
        return str(self.status()["listeners"][0]["address"])

    @property
    def pid(self) -> int:
        """The master's."""
        return int(self.status()["pid"])

    def descriptors(self) -> int:
        """How many the master has when its control socket has none but the listening one, as it has no client."""
        pid, path = self.pid, str(self.run_directory / "control.sock")  # a restart's ends in ".new" there
        eventually(lambda: Path("/proc/net/unix").read_text().count(path) == 1, what="the end of all control clients")
        return len(os.listdir(f"/proc/{pid}/fd"))

    def workers(self, state: str = "serving") -> dict[int, int]:
        """The pids of the workers in this state, by slot."""
        return {one["slot"]: one["pid"] for one in self.status()["workers"] if one["state"] == state}

    def wait_workers(self, count: int, without: Collection[int] = ()) -> dict[int, int]:
        """Waits until so many workers serve, and none of those that are not wanted."""

        def settled() -> dict[int, int]:
            serving = self.workers()
            return serving if len(serving) == count and not {*without} & {*serving.values()} else {}

        return eventually(settled, what=f"{count} workers serving")

    def wait_clients(self, count: int) -> dict[int, int]:
        """Waits until there are so many clients in all; how many each worker has, by its pid."""

        def there() -> dict[int, int]:
            clients = {one["pid"]: one["clients"] for one in self.status()["workers"]}
            return clients if sum(clients.values()) == count else {}

        return eventually(there, what=f"{count} clients")

    def signal(self, signum: int) -> None:
        """Sends the master a signal."""
        os.kill(self.pid, signum)

    def wait_log(self, pattern: str) -> str:
        """Waits until the log has a record that the pattern fits; that record."""
        return eventually(
            lambda: next((record for record in self.records() if re.search(pattern, record)), ""),
            what=f"{pattern!r} in {self.log}",
        )

    def records(self) -> list[str]:
        """The log's records, as `log_records` has them."""
        return log_records(self.log)

    def stop(self) -> None:
        """Stops it at once if it runs, and waits until its control socket is closed, which is the last that it does."""
        with contextlib.suppress(
            FileNotFoundError, NotADirectoryError, ConnectionError
        ):  # it does not run, or just ends
            self.status()  # for its addresses
            with dial(f"unix:{self.run_directory / 'control.sock'}") as sock:
                sock.sendall(b'{"verb": "stop", "now": true}\n')
                while sock.recv(4096):
                    pass
        if self.process is not None:
            self.process.wait(DEADLINE)

    def check(self) -> None:
        """That it left nothing behind and logged nothing unexpected."""
        left = list(self.run_directory.iterdir()) if self.run_directory.exists() else []
        assert left == [], f"left in the run directory: {left}"
        held = [address for address in self.held if not (self.is_free(address) or has_another_owner(address))]
        assert held == []
        bad = [record for record in self.records() if _BAD.search(record)]
        known = [*self.expected, *self.allowed, _LATE_AT_END]
        unexpected = [record for record in bad if not any(re.search(one, record) for one in known)]
        assert unexpected == [], "\n".join(unexpected)
        missing = [one for one in self.expected if not any(re.search(one, record) for record in bad)]
        assert missing == [], f"expected in the log, but not there: {missing}"
        if self.process is not None and self.log != self.terminal:
            assert self.terminal.read_text() == ""


class Harness:
    """The daemons and clients of one test."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemons: list[Daemon] = []
        self._before: set[int] = set()
        self._sockets: list[socket.socket] = []

    def daemon(self, name: str = "tested", **more: Any) -> Daemon:
        """One that is yet to be started."""
        self.daemons.append(Daemon(self.directory, name, **more))
        return self.daemons[-1]

    def connect(self, where: Daemon | str, seconds: float = DEADLINE) -> socket.socket:
        """A client that is closed at the end."""
        return self.closing(dial(where if isinstance(where, str) else where.address, seconds))

    def connect_to_each(self, daemon: Daemon, count: int) -> list[socket.socket]:
        """So many clients that workers have taken, and more until each worker has one: any may take the next."""
        clients: list[socket.socket] = []
        deadline = monotonic() + DEADLINE
        while len(clients) < count or not all(daemon.wait_clients(len(clients)).values()):
            assert monotonic() < deadline, "a worker that takes no client"
            clients.append(self.connect(daemon))
        return clients

    def closing(self, sock: socket.socket) -> socket.socket:
        """The same socket, which is closed at the end."""
        self._sockets.append(sock)
        return sock

    @contextlib.contextmanager
    def watch(self) -> Iterator[Harness]:
        """Ends and checks everything when the test is over."""
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
        self._before = set(descendants(os.getpid()))
        try:
            try:
                yield self
            finally:
                for sock in self._sockets:
                    sock.close()
            eventually(lambda: not self._unreaped(), what="the reaping of all dead workers")
            for daemon in self.daemons:
                daemon.stop()
            eventually(lambda: not self._left(), what="the end of all processes")
            for daemon in self.daemons:
                daemon.check()
        finally:
            self._kill()
            libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def _unreaped(self) -> list[int]:
        """Zombies whose parent is a daemon's process; those of this process are orphans, for it is the subreaper."""
        return [pid for pid, state in self._mine().items() if state == "Z" and parent_of(pid) not in (os.getpid(), 0)]

    def _left(self) -> dict[int, str]:
        """Processes that this test has made and that have not ended; orphans that have are reaped."""
        for pid, state in self._mine().items():
            if state == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
        return self._mine()

    def _mine(self) -> dict[int, str]:
        found = descendants(os.getpid())
        known = self._before | {daemon.process.pid for daemon in self.daemons if daemon.process and daemon._gone()}
        return {pid: state for pid, state in found.items() if pid not in known}

    def _kill(self) -> None:
        for _ in range(10):  # a process that is killed may have made another meanwhile
            for pid in self._mine():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                wait_end(pid)
            for daemon in self.daemons:
                if daemon.process is not None:
                    daemon.process.wait(DEADLINE)
            if not self._left():
                return
