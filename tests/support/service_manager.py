"""A socket that stands for systemd's (sd_notify(3)): it receives what daemons report, keeps the descriptors that they
send, and starts their successors with these.
"""

from __future__ import annotations

import array
import contextlib
import os
import re
import socket
import sys
from typing import Any

from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE

# Becomes the program that follows, with these descriptors at 3, 4, … under these names (sd_listen_fds(3)).
_START_WITH = """\
import os, sys
numbers, names, program = sys.argv[1].split(), sys.argv[2], sys.argv[3:]
high = [os.dup2(int(number), 500 + place) for place, number in enumerate(numbers)]
os.closerange(3, 500)
for place, one in enumerate(high):
    os.dup2(one, 3 + place)
os.closerange(500, 1000)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(numbers)), LISTEN_FDNAMES=names)
os.execv(program[0], program)
"""


class FakeManager:
    """Receives what daemons report, datagram by datagram, and keeps the descriptors that they send."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.sock.bind(path.replace("@", "\0", 1))
        self.sock.settimeout(DEADLINE)
        self.received: list[dict[str, str]] = []
        self.pids: list[int] = []
        self.store: dict[str, list[int]] = {}  # by name, the descriptors that it keeps

    def receive(self) -> dict[str, str]:
        """The next datagram's assignments."""
        data, ancillary, _, _ = self.sock.recvmsg(65536, 1024)
        self.pids += [
            int.from_bytes(body[:4], "little") for _, kind, body in ancillary if kind == socket.SCM_CREDENTIALS
        ]
        found = dict(line.split("=", 1) for line in data.decode().split("\n"))
        self.received.append(found)
        self._keep(found, [one for _, kind, body in ancillary if kind == socket.SCM_RIGHTS for one in _ints(body)])
        return found

    def _keep(self, found: dict[str, str], descriptors: list[int]) -> None:
        """As systemd does: what it has it does not take again, by whatever name."""
        assert bool(descriptors) is ("FDSTORE" in found)
        if "FDSTOREREMOVE" in found:
            for one in self.store.pop(found["FDNAME"]):
                os.close(one)
        have = {os.fstat(one).st_ino for kept in self.store.values() for one in kept}
        for one in descriptors:
            if os.fstat(one).st_ino in have:
                os.close(one)
            else:
                self.store.setdefault(found["FDNAME"], []).append(one)

    def fill(self) -> None:
        """Fills its queue, which has room again when it receives."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other, contextlib.suppress(BlockingIOError):
            other.setblocking(False)
            while True:
                other.sendto(b"FULL=1", self.path)

    def start_with_store(self, daemon: Daemon) -> None:
        """Starts the next daemon with what is kept, as systemd does."""
        pairs = [(one, name) for name, kept in self.store.items() for one in kept]
        numbers = [one for one, _ in pairs]
        daemon.prefix = [
            sys.executable, "-c", _START_WITH, " ".join(map(str, numbers)), ":".join(name for _, name in pairs),
        ]  # fmt: skip
        daemon.run(numbers)

    def close(self) -> None:
        """Closes it, and all that it keeps."""
        self.sock.close()
        for kept in self.store.values():
            for one in kept:
                os.close(one)

    def wait_for(self, key: str, pattern: str = "") -> dict[str, str]:
        """Receives until a datagram assigns this key, to a value that fits the pattern; that datagram."""
        while not (key in (found := self.receive()) and re.search(pattern, found[key])):
            pass
        return found

    def count(self, key: str) -> int:
        """How often a key was assigned."""
        return sum(key in one for one in self.received)


def managed_daemon(manager: FakeManager, harness: Harness, *, watchdog: float = 0.0, **more: Any) -> Daemon:
    """A daemon that reports to this manager; `watchdog` is its interval in seconds, 0: none."""
    environment = {"NOTIFY_SOCKET": manager.path}
    if watchdog:
        environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
    return harness.daemon(environment=environment, **more)


def _ints(body: bytes) -> array.array[int]:
    found = array.array("i")
    found.frombytes(body)
    return found
