"""A handler that has been taken over: it does what a client tells it, a line of JSON in, one out."""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any


def _channel() -> socket.socket:
    """The worker's channel to the master: the unix socket that is connected and has no name."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            sock = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if sock.family == socket.AF_UNIX and not listens and _peer(sock) == os.getppid():
            return sock
        sock.close()
    raise LookupError("no channel")


def _peer(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def kill_master(number: int) -> None:
    os.kill(os.getppid(), number)


def write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def reopen(number: int) -> None:
    os.close(os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_TRUNC))


def remove(path: str) -> None:
    os.unlink(path)


def put_beside(path: str) -> None:
    os.symlink("/etc/passwd", path + ".new")


def ask(path: str) -> str:
    """What the control socket answers."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(path)
        try:
            sock.sendall(b'{"verb": "stop", "now": true}\n')
            return sock.recv(1000).decode()
        except OSError as error:
            return type(error).__name__


def say(text: str, times: int) -> int:
    """Says this on the channel; how many bytes the master took before it heard no more."""
    channel, said = _channel(), 0
    channel.setblocking(True)
    channel.settimeout(10)
    try:
        for _ in range(times):
            channel.sendall(text.encode())
            said += len(text)
    except OSError:
        pass
    return said


def complain(text: str, times: int) -> None:
    for _ in range(times):
        os.write(2, text.encode())


def scribble(number: int, value: int) -> int:
    """Writes a number into every field from this one on, wherever this process may write on the scoreboard; how many
    pages that are.
    """
    pages = re.findall(r"(\w+)-(\w+) rw-s .*forkd-scoreboard", Path("/proc/self/maps").read_text())
    for first, last in pages:
        cells = (ctypes.c_int64 * ((int(last, 16) - int(first, 16)) // 8)).from_address(int(first, 16))
        for index in range(number, len(cells)):
            cells[index] = value
    return sum(int(last, 16) - int(first, 16) for first, last in pages) // os.sysconf("SC_PAGESIZE")


def load(name: str) -> str:
    return importlib.import_module(name).__name__


def descriptors() -> dict[str, str]:
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            found[entry] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the listing's own
            continue
    return found


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def parent_death_signal() -> int:
    number = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0) == 0  # PR_GET_PDEATHSIG
    return number.value


def become_root() -> None:
    os.setuid(0)


DEEDS = {
    deed.__name__: deed
    for deed in (
        kill_master, write, reopen, remove, put_beside, ask, say, complain, scribble, load, descriptors, run,
        become_root, parent_death_signal,
    )
}  # fmt: skip


class Hostile(asyncio.Protocol):
    """Obeys whoever connects."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.heard = b""

    def data_received(self, data: bytes) -> None:
        self.heard += data
        if data.endswith(b"\n"):
            self.obey(self.heard)
            self.heard = b""

    def obey(self, data: bytes) -> None:
        name, *arguments = json.loads(data)
        try:
            answer = {"value": DEEDS[name](*arguments)}
        except Exception as error:  # noqa: BLE001 (the test judges it)
            answer = {"error": type(error).__name__, "pid": os.getpid()}
        self.transport.write(json.dumps(answer).encode() + b"\n")
