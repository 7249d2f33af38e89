"""A daemon that changes while it runs: its settings stand in a file, its handler in a module; tests rewrite both."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from forkd import errors
from tests.support.clients import echoes, read
from tests.support.daemon import Harness, forkd
from tests.support.paths import HANDLERS
from tests.support.processes import DEADLINE, eventually

_HANDLER = """
from forkd.builtin import Echo

class Says(Echo):
    def connection_made(self, transport):
        super().connection_made(transport)
        transport.write({word!r})
"""

_GATE = """
import os
with open({path!r}, "rb", buffering=0) as gate:
    os.read(gate.fileno(), 1)
"""

WORD = 5  # bytes that the handler greets with


class Changing:
    """One daemon, two workers that serve `says:Says` on a free port unless the settings say otherwise.

    Args:
        harness: whose daemon it is.
        name: the daemon's.
        settings: what the file says.
    """

    def __init__(self, harness: Harness, name: str = "tested", **settings: Any) -> None:
        self.harness = harness
        self.directory = harness.directory
        self.file = self.directory / f"{name}.yaml"
        self.module = self.directory / "says.py"
        self.daemon = harness.daemon(name, target=self.file.name, listen=(), workers=None)
        self.daemon.options = []  # the file has them all
        self.settings: dict[str, Any] = {
            "workers": 2,
            "listen": [listener("tcp://127.0.0.1:0")],
            "python_path": [str(HANDLERS), str(self.directory)],
            "log": {"to": str(self.daemon.log)},
        }
        self.write(**settings)
        self.code("first")

    def write(self, **settings: Any) -> None:
        """Writes the settings file; what is not named stays as it was."""
        self.settings |= settings
        self.file.write_text(yaml.safe_dump(self.settings, sort_keys=False))

    def code(self, word: str, before: str = "") -> None:
        """Writes the handler's module: it greets with a word of five letters, then echoes."""
        self.module.write_text(before + _HANDLER.format(word=word.encode()))
        # Python takes a compiled file for up to date when seconds and length agree.
        shutil.rmtree(self.directory / "__pycache__", ignore_errors=True)

    @contextlib.contextmanager
    def gate(self, word: str) -> Iterator[Callable[[int], object]]:
        """Writes a module whose import waits; what this gives lets so many imports through."""
        path = self.directory / "the gate"
        os.mkfifo(path)
        self.code(word, _GATE.format(path=str(path)))
        with path.open("r+b", buffering=0) as gate:
            yield lambda count: gate.write(b"1" * count)
        path.unlink()

    def greet(self, address: str = "") -> tuple[socket.socket, str]:
        """A new client, and the word that it was greeted with."""
        client = self.harness.connect(address or self.daemon)
        return client, read(client, WORD).decode()

    def crowd(self, *addresses: str) -> list[socket.socket]:
        """New clients of each address, as many as it takes for every worker to have one."""
        clients: list[socket.socket] = []
        while not clients or not all(worker["clients"] for worker in self.daemon.status()["workers"]):
            clients += [self.greet(address)[0] for address in addresses or ("",)]
            assert len(clients) < 100, "there is a worker that gets no client"
        return clients

    def begin(self, verb: str) -> subprocess.Popen[str]:
        """Starts a command about this daemon and leaves it running."""
        command = [sys.executable, "-m", "forkd", verb, *self.daemon.target, *self.daemon.identity]
        return subprocess.Popen(
            list(map(str, command)), cwd=self.directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def bring_forkd(self) -> Path:
        """Gives the daemon a copy of forkd of its own, which its Python finds first, in its working directory."""
        copy = self.directory / "forkd"
        shutil.copytree(Path(errors.__file__).parent, copy)
        return copy


class Untouched:
    """A daemon that runs, a client of it, and what must be the same after each change that fails."""

    def __init__(self, site: Changing) -> None:
        self.site, self.daemon, self.good = site, site.daemon.start(), dict(site.settings)
        self.address, self.pid, self.workers = self.daemon.address, self.daemon.pid, self.daemon.workers()
        self.descriptors = len(descriptors(self.pid))
        self.client, _ = site.greet()

    def fail(self, verb: str, why: str, *patterns: str) -> None:
        """Has what the test has broken taken up, which must fail for this reason; then mends it."""
        result = forkd(verb, *self.daemon.identity, cwd=HANDLERS)  # by a forkd that is not broken
        assert (result.returncode, result.stdout) == (1, ""), f"{why}: {result}"
        assert f"forkd: the {verb} failed, and tested goes on as before: " in result.stderr, why
        for pattern in patterns:
            assert re.search(pattern, result.stderr), f"{why}: {result.stderr}"
        self.check(why)
        self.site.settings = dict(self.good)
        self.site.write()
        self.site.code("first")

    def check(self, why: str) -> None:
        """Fails where one has changed something."""
        status = self.daemon.status()
        assert (status["pid"], status["generation"], status["change"], status["state"]) == (self.pid, 1, "", "running")
        assert self.daemon.workers() == self.workers, why
        assert [one["address"] for one in status["listeners"]] == [self.address], why
        assert echoes(self.client), why
        assert self.site.greet()[1] == "first", why

    def end(self, verb: str) -> None:
        """That the failures have cost nothing, and that the next change takes place."""
        eventually(lambda: len(self.daemon.status()["workers"]) == 2, what="the end of the candidates")
        eventually(lambda: len(descriptors(self.pid)) <= self.descriptors, what="as many descriptors as before")
        self.site.code("later")
        result = self.daemon.command(verb)
        assert result.returncode == 0, result.stderr
        assert self.site.greet()[1] == "later"
        assert echoes(self.client)


def wait_at_gate(pids: Callable[[], Iterable[int]], count: int) -> None:
    """Waits until so many of these processes have begun the import that waits, with the code that is there now."""
    eventually(
        lambda: sum(any("the gate" in one for one in descriptors(pid)) for pid in pids()) == count,
        what=f"{count} processes at the gate",
    )


def listener(address: str, **more: Any) -> dict[str, Any]:
    """The settings of one listener."""
    return {"address": address, "handler": "says:Says", **more}


def outcome(command: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit status of a command that was begun, and what it has said."""
    out, err = command.communicate(timeout=DEADLINE)
    return command.returncode, out, err


def descriptors(pid: int) -> set[str]:
    """A process's open descriptors, each with what it leads to."""
    found = set()
    with contextlib.suppress(FileNotFoundError):  # it may just end
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found.add(f"{entry.name} {os.readlink(entry)}")
    return found


def backlog(address: str) -> int:
    """The backlog of a listening TCP socket, as the kernel has it (ss(8))."""
    command = ["ss", "-Hltn", "sport", "=", address.rpartition(":")[2]]
    line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout
    return int(line.split()[2])
