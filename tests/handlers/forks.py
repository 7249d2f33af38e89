"""A handler that forks: it tells what a child of its has, and which signals its programs ignore."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from forkd.builtin import Echo

pool = ProcessPoolExecutor(1)


def descriptors() -> str:
    """What the process has open, but for what leads to files."""
    links = []
    for entry in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{entry}"))
        except FileNotFoundError:
            continue
    return " ".join(sorted(one for one in links if one.startswith(("socket:", "anon_inode:[eventpoll]"))))


def signals() -> str:
    """The signals that it handles itself."""
    found = [one for one in signal.valid_signals() if callable(signal.getsignal(one))]
    return f"{sorted(map(int, found))} {signal.set_wakeup_fd(-1)}"


def told() -> str:
    """All that, with its title and number."""
    title = Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode()
    return f"{os.getpid()}|{title}|{descriptors()}|{signals()}|{os.getpgrp()}"


def in_child(function: Callable[[], str]) -> str:
    """What a function returns in a forked child."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, function().encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader) as pipe:
        return pipe.read()


class Forks(Echo):
    """Answers `fork`, `pool`, `ignored`, `back`, `program` by a line; echoes anything else."""

    def data_received(self, data: bytes) -> None:
        match data:
            case b"fork":
                self._write(in_child(told).encode() + b"\n")
            case b"pool":
                asyncio.get_running_loop().create_task(self._ask_pool())
            case b"back":
                if os.fork() > 0:
                    os.wait()
                    self._write(b"back\n")
            case b"ignored":
                command = ["grep", "SigIgn", "/proc/self/status"]
                found = subprocess.run(command, stdout=subprocess.PIPE, restore_signals=False, check=True).stdout
                self._write(found)
            case b"program":
                sock = self._transport.get_extra_info("socket")
                subprocess.run(["echo", "by hand"], stdout=sock.fileno(), preexec_fn=os.getpid, check=True)
            case b"sleep":
                self.left = subprocess.Popen(["sleep", "60"])
                self._write(b"%d\n" % self.left.pid)
            case b"stubborn":
                self.left = subprocess.Popen(["sh", "-c", "trap '' TERM; echo; while :; do sleep 60; done"], stdout=-1)
                assert self.left.stdout is not None
                self.left.stdout.readline()
                self._write(b"%d\n" % self.left.pid)
            case _:
                super().data_received(data)

    async def _ask_pool(self) -> None:
        found = await asyncio.get_running_loop().run_in_executor(pool, told)
        self._write(found.encode() + b"\n")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._transport = transport
