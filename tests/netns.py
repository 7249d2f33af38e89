"""Two machines of a test's own, as network namespaces with a wire between them (network_namespaces(7), veth(4)), where
one of the two can vanish without a word.

Programs run in one by `prefix`; sockets are made in one by `socket` and stay there whoever uses them.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from needs import lacks, needs_program, needs_root
from processes import PATIENCE

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_NUMBERS = itertools.count()

T = TypeVar("T")


class Machine:
    """One of them.

    Args:
        name: of its namespace (ip-netns(8)).
        address: its own on the wire.
    """

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address

    @property
    def prefix(self) -> list[str]:
        """What a command is run by there; it has the same pid then."""
        return ["ip", "netns", "exec", self.name]

    def run(self, *command: str, text: str = "") -> str:
        """What a command there prints; fails if it does."""
        return _run(*self.prefix, *command, text=text)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket there, whose operations fail after a while."""
        sock = self.inside(socket.socket, family, kind)
        sock.settimeout(PATIENCE)
        return sock

    def inside(self, call: Callable[..., T], *arguments: Any) -> T:
        """What a call returns there."""

        def do() -> T:
            with Path(f"/run/netns/{self.name}").open("rb") as place:
                if ctypes.CDLL(None, use_errno=True).setns(place.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            return call(*arguments)

        with ThreadPoolExecutor(1) as pool:  # its thread goes there alone, and comes to its end there
            return pool.submit(do).result()

    def connect(self, host: str, port: int) -> socket.socket:
        """A client there."""
        sock = self.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.connect((host, port))
        except OSError:
            sock.close()
            raise
        return sock

    def cut(self) -> None:
        """Has all packets of the wire dropped that come here or go out, until `mend`."""
        hooks = "".join(
            f"chain {hook} {{\ntype filter hook {hook} priority 0\n{side} wire drop\n}}\n"
            for hook, side in (("input", "iifname"), ("output", "oifname"))
        )
        self.run("nft", "-f", "-", text=f"table inet wire {{\n{hooks}}}\n")

    def mend(self) -> None:
        """Lets all packets through again."""
        self.run("nft", "delete", "table", "inet", "wire")


@contextlib.contextmanager
def wired() -> Iterator[tuple[Machine, Machine]]:
    """Two machines, gone at the end. Skips where there can be none."""
    needs_root()
    needs_program("ip")
    needs_program("nft")
    names = [f"forkd-{os.getpid()}-{next(_NUMBERS)}" for _ in range(2)]
    here, there = Machine(names[0], "10.7.7.1"), Machine(names[1], "10.7.7.2")
    with contextlib.ExitStack() as undo:
        for machine in (here, there):
            try:
                _run("ip", "netns", "add", machine.name)
            except subprocess.CalledProcessError as error:
                lacks(f"network namespaces: {error.stderr}")
            undo.callback(_run, "ip", "netns", "delete", machine.name)
        _run("ip", "link", "add", "wire", "netns", here.name, "type", "veth", "peer", "wire", "netns", there.name)
        for number, machine in enumerate((here, there), 1):
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "wire")
            machine.run("ip", "address", "add", f"fd07::{number}/64", "dev", "wire", "nodad")
            for link in ("wire", "lo"):
                machine.run("ip", "link", "set", link, "up")
        yield here, there


def _run(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
