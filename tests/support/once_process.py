"""`forkd once` under test: started in the background or the foreground, its line read, its exit status had.

The test process is a child subreaper while `Harness.watch` lasts, so a detached process ends as its child and leaves it
its status.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.clients import is_free
from tests.support.daemon import Harness, forkd
from tests.support.paths import HANDLERS
from tests.support.processes import DEADLINE, alive, eventually, wait_end

_LINE = re.compile(r"(listening|connecting) (\S+) pid (\d+)\n")


class OnceProcess:
    """One process for one client.

    Args:
        harness: of the test.
        target: a file or a handler; None for the echo.
        options: of the command line.
        listen: its address; none where the file has it.
        verb: what starts it.
    """

    def __init__(
        self,
        harness: Harness,
        target: object = None,
        *options: object,
        listen: str | None = "tcp://127.0.0.1:0",
        verb: str = "once",
    ) -> None:
        self.harness = harness
        self.log = harness.directory / "once.log"
        self.arguments: list[object] = [verb, *([] if target is None else [target])]
        self.arguments += [] if listen is None else ["--listen", listen]
        self.arguments += ["--set", f"python_path=[{HANDLERS}, {harness.directory}]", *options]
        self.expected: list[str] = []
        self.address = ""
        self.pid = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.terminal = harness.directory / "once.stderr"

    def expect(self, *patterns: str) -> OnceProcess:
        """Says which tracebacks and errors there are to be, as regular expressions."""
        self.expected += patterns
        return self

    def command(self, *more: object, **how: Any) -> subprocess.CompletedProcess[str]:
        """Runs it in the background; what the starter said."""
        return forkd(*self.arguments, "--set", f"log.to={self.log}", *more, cwd=self.harness.directory, **how)

    def start(self) -> OnceProcess:
        """Starts it in the background."""
        result = self.command()
        assert (result.returncode, result.stderr) == (0, "")
        return self.read_line(result.stdout)

    def foreground(self, **how: Any) -> OnceProcess:
        """Starts it in the foreground, where `once` wants an option for that, and reads its line."""
        self.open(**how)
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert line, self.terminal.read_text()
        return self.read_line(line)

    def open(self, **how: Any) -> OnceProcess:
        """Starts it in the foreground and reads nothing."""
        more = ["--foreground"] if self.arguments[0] == "once" else []
        command = [sys.executable, "-m", "forkd", *map(str, self.arguments), *more]
        with self.terminal.open("wb") as stderr:
            given = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": stderr, **how}
            self.process = subprocess.Popen(command, cwd=self.harness.directory, **given)
        return self

    def read_line(self, line: str) -> OnceProcess:
        """Takes the address and the pid from what was printed when the client could come."""
        match = _LINE.fullmatch(line)
        assert match is not None, line
        self.address, self.pid = match[2], int(match[3])
        return self

    def status(self) -> int:
        """Waits for its end; the exit status, as the shell's for a signal."""
        if self.process is not None:
            self.process.wait(DEADLINE)
            if self.process.stdout is not None:
                self.process.stdout.close()
            return self.process.returncode
        wait_end(self.pid)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def wait_log(self, pattern: str) -> None:
        """Waits until it has logged something that fits."""
        eventually(lambda: re.search(pattern, self.text()), what=f"{pattern!r} in the log")

    def text(self) -> str:
        """What it has logged, and what it has said on standard error."""
        return "".join(path.read_text() for path in (self.log, self.terminal) if path.exists())

    def stop(self) -> None:
        """Ends it if it still runs."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait(DEADLINE)
            if self.process.stdout is not None:
                self.process.stdout.close()
        elif self.pid and alive(self.pid):
            os.kill(self.pid, signal.SIGKILL)

    def check(self) -> None:
        """That it left nothing behind and logged nothing unexpected."""
        text = self.text()
        for pattern in self.expected:
            assert re.search(pattern, text), f"{pattern!r} is not in the log:\n{text}"
        if not self.expected:
            assert not re.search(r" (ERROR|CRITICAL) |Traceback|forkd: ", text), text
        if self.address.startswith(("tcp:", "unix:")):
            assert is_free(self.address)


def path_of(address: str) -> Path:
    """The file that stands for a unix address."""
    return Path(address.removeprefix("unix:"))
