"""A daemon that changes while it runs: its settings stand in a file, its handler in a module, and tests rewrite both."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from clients import read
from harness import HANDLERS, Harness
from processes import PATIENCE

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

    def begin(self, verb: str) -> subprocess.Popen[str]:
        """Starts a command about this daemon and leaves it running."""
        command = [sys.executable, "-m", "forkd", verb, *self.daemon.target, *self.daemon.identity]
        return subprocess.Popen(
            list(map(str, command)), cwd=self.directory, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def bring_forkd(self) -> Path:
        """Gives the daemon a copy of forkd of its own, which its Python finds first, in its working directory."""
        copy = self.directory / "forkd"
        shutil.copytree(Path(sys.modules["forkd"].__file__ or "").parent, copy)
        return copy


def listener(address: str, **more: Any) -> dict[str, Any]:
    """The settings of one listener."""
    return {"address": address, "handler": "says:Says", **more}


def outcome(command: subprocess.Popen[str]) -> tuple[int, str, str]:
    """The exit status of a command that was begun, and what it has said."""
    out, err = command.communicate(timeout=PATIENCE)
    return command.returncode, out, err


def descriptors(pid: int) -> set[str]:
    """A process's open descriptors, each with what it leads to."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        found.add(f"{entry.name} {os.readlink(entry)}")
    return found


def backlog(address: str) -> int:
    """The backlog of a listening TCP socket, as the kernel has it (ss(8))."""
    command = ["ss", "-Hltn", "sport", "=", address.rpartition(":")[2]]
    line = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
    return int(line.split()[2])
