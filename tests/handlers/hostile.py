"""A handler that has been taken over: it does what a client tells it, a line of JSON in, one out."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import importlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forkd.system.scoreboard import METRICS_AT, METRICS_SIZE, REGION_SIZE, ClientAddresses, Field


def _channel() -> socket.socket:
    """The worker's channel to the master: the unix socket that is connected and has no name."""
    for sock in _own_sockets():
        if sock.family == socket.AF_UNIX and not _listens(sock) and _peer(sock) == os.getppid():
            return sock
        sock.close()
    raise LookupError("no channel")


def _own_sockets() -> Iterator[socket.socket]:
    """Copies of all that this process has."""
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            yield socket.socket(fileno=os.dup(int(entry)))


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _peer(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], sys.byteorder)


def kill_master(number: int) -> None:
    os.kill(os.getppid(), number)


def write(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY))


def reopen(number: int) -> None:
    os.close(os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_TRUNC))


def open_shared_memory() -> dict[str, str]:
    """What becomes of the try to open each shared memory that this process knows once more, for writing."""
    found = {}
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            if (link := os.readlink(f"/proc/self/fd/{entry}")).startswith("/memfd:"):
                try:
                    os.close(os.open(f"/proc/self/fd/{entry}", os.O_RDWR))
                    found[link] = "open"
                except OSError as error:
                    found[link] = type(error).__name__
    return found


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
    """Sends this on the channel; how many bytes the master took before it read no more."""
    channel, sent = _channel(), 0
    channel.setblocking(True)
    channel.settimeout(10)
    try:
        for _ in range(times):
            channel.sendall(text.encode())
            sent += len(text)
    except OSError:
        pass
    return sent


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


def claim_clients(cookies: list[int]) -> int:
    """Says of these connections, wherever this process may write, that a proxy has made them; this process's pid."""
    regions = re.findall(r"(\w+)-\w+ rw-s .*forkd-regions", Path("/proc/self/maps").read_text())
    for first in regions:
        region = (ctypes.c_ubyte * REGION_SIZE).from_address(int(first, 16))
        addresses = ClientAddresses(memoryview(region).cast("B"))
        for place, cookie in enumerate(cookies):
            addresses.record(place, cookie, bytes([255]) * 16, (1 << 64) - 1)
    return os.getpid()


def claim_metric(line: str) -> int:
    """Says that handlers count this, wherever this process may write; this process's pid."""
    regions = re.findall(r"(\w+)-\w+ rw-s .*forkd-regions", Path("/proc/self/maps").read_text())
    for first in regions:
        part = (ctypes.c_ubyte * METRICS_SIZE).from_address(int(first, 16) + METRICS_AT)
        said = line.encode() + b"\n"
        memoryview(part).cast("B")[: 8 + len(said)] = struct.pack("=q", len(said)) + said
    return os.getpid()


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


def set_flags(number: int, added: int, removed: int) -> int:
    """Changes what all copies of a descriptor share."""
    flags = fcntl.fcntl(number, fcntl.F_GETFL) & ~removed | added
    fcntl.fcntl(number, fcntl.F_SETFL, flags)
    return fcntl.fcntl(number, fcntl.F_GETFL)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def parent_death_signal() -> int:
    number = ctypes.c_int()
    assert ctypes.CDLL(None).prctl(2, ctypes.byref(number), 0, 0, 0) == 0  # PR_GET_PDEATHSIG
    return number.value


def claim_no_load() -> None:
    """Accepts no more, and says that it has no client and takes some."""
    gc.unfreeze()  # the balance was there before the worker froze what it had imported
    balance = next(one for one in gc.get_objects() if type(one).__name__ == "Balance")
    balance.stop()
    balance._stats._cells[Field.LOAD] = 0


def listeners(kind: str) -> list[socket.socket]:
    """Copies of the worker's listening sockets, or of those for datagrams."""
    found = []
    for sock in _own_sockets():
        if _listens(sock) if kind == "tcp" else (sock.type, sock.family) == (socket.SOCK_DGRAM, socket.AF_INET):
            found.append(sock)
        else:
            sock.close()
    return found


def poison(how: str, kind: str = "tcp") -> list[int]:
    """Spoils them for all that have them; their descriptors, which stay open."""
    found = listeners(kind)
    for sock in found:
        if how == "blocking":
            fcntl.fcntl(sock, fcntl.F_SETFL, 0)
        elif how == "shutdown":
            with contextlib.suppress(OSError):  # ENOTCONN, of one for datagrams, which is shut down all the same
                sock.shutdown(socket.SHUT_RDWR)
        elif how == "connect":
            sock.connect(sock.getsockname())
        elif how == "filter":
            drop = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
            sock.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HL", 1, ctypes.addressof(drop)))
        elif how == "backlog":
            sock.listen(0)
        elif how == "linger":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif how == "defer":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 60)
        elif how == "device":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
    return [sock.detach() for sock in found]


_TAKEN: list[socket.socket] = []


def take_port(number: int) -> None:
    """Shuts its listener down, and listens at the port itself; every worker has to have it back to serve."""
    poison("shutdown")
    _TAKEN.append(socket.create_server(("127.0.0.1", number)))


def give_port() -> None:
    for sock in _TAKEN:
        sock.close()


def reach_terminal() -> str:
    """Types into the terminal that root started the daemon on."""
    terminal = os.open("/dev/tty", os.O_RDWR)
    fcntl.ioctl(terminal, termios.TIOCSTI, b"x")
    return os.ttyname(terminal)


def become_root() -> None:
    os.setuid(0)


DEEDS = {
    deed.__name__: deed
    for deed in (
        kill_master, write, reopen, open_shared_memory, remove, put_beside, ask, say, complain, scribble, load,
        descriptors, run, become_root, parent_death_signal, poison, claim_no_load, take_port, give_port,
        set_flags, reach_terminal, claim_clients, claim_metric,
    )
}  # fmt: skip


class Hostile(asyncio.Protocol):
    """Does what any client orders."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        self.received += data
        if data.endswith(b"\n"):
            self.run(self.received)
            self.received = b""

    def run(self, data: bytes) -> None:
        name, *arguments = json.loads(data)
        try:
            answer = {"value": DEEDS[name](*arguments)}
        except Exception as error:  # noqa: BLE001 (the test judges it)
            answer = {"error": type(error).__name__, "pid": os.getpid()}
        self.transport.write(json.dumps(answer).encode() + b"\n")


class Datagrams(asyncio.DatagramProtocol):
    """Echoes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(data, addr)
