"""Networks of a test's own (network_namespaces(7)), for root.

`leave_network` puts a process of a run of tests into a namespace with nothing but a loopback, `private_network` one
test. `wired_hosts` makes two hosts with a wire between them (veth(4)), one of which can vanish without a word: programs
run in one by `prefix`; sockets are made in one by `make_socket` and belong to it in every process.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tests.support.needs import lacks, needs_program, needs_root
from tests.support.processes import DEADLINE

_CLONE_NEWNET = 0x40000000  # linux/sched.h
_SIOCSIFFLAGS, _IFF_UP = 0x8914, 0x1  # netdevice(7)
_NUMBERS = itertools.count()

T = TypeVar("T")


def leave_network() -> None:
    """Puts this thread and what it starts into a namespace with nothing but a loopback.

    Raises:
        OSError: the system does not allow it; the thread is where it was.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


@contextlib.contextmanager
def private_network(*local: str) -> Iterator[None]:
    """Puts this thread and what it starts into a namespace with nothing but a loopback, and takes it back in the end.

    Args:
        local: networks all of whose addresses are the loopback's own.
    """
    needs_root()
    needs_program("ip")
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            leave_network()
        except OSError as error:
            lacks(f"network namespaces: {error.strerror}")
        try:
            for network in local:
                _run("ip", "route", "add", "local", network, "dev", "lo")
            # A local route is enough to be reached, but bind(2) wants an address of an interface, or to be told.
            Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("1")
            yield
        finally:
            assert ctypes.CDLL(None).setns(before, _CLONE_NEWNET) == 0
    finally:
        os.close(before)


class Host:
    """One of two hosts, a network namespace.

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

    def make_socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket there, whose operations fail after a while."""
        sock = self.inside(lambda: socket.socket(family, kind))
        sock.settimeout(DEADLINE)
        return sock

    def inside(self, call: Callable[[], T]) -> T:
        """What a function returns there."""

        def do() -> T:
            with Path(f"/run/netns/{self.name}").open("rb") as namespace:
                if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            return call()

        with ThreadPoolExecutor(1) as pool:  # its thread alone goes there, and ends there
            return pool.submit(do).result()

    def connect(self, host: str, port: int) -> socket.socket:
        """A client there."""
        sock = self.make_socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
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
def wired_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that are removed at the end. The test is skipped where there can be none."""
    needs_root()
    needs_program("ip")
    needs_program("nft")
    names = [f"forkd-{os.getpid()}-{next(_NUMBERS)}" for _ in range(2)]
    here, there = Host(names[0], "10.7.7.1"), Host(names[1], "10.7.7.2")
    with contextlib.ExitStack() as undo:
        for host in (here, there):
            try:
                _run("ip", "netns", "add", host.name)
            except subprocess.CalledProcessError as error:
                lacks(f"network namespaces: {error.stderr}")
            undo.callback(_run, "ip", "netns", "delete", host.name)
        _run("ip", "link", "add", "wire", "netns", here.name, "type", "veth", "peer", "wire", "netns", there.name)
        for number, host in enumerate((here, there), 1):
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "wire")
            host.run("ip", "address", "add", f"fd07::{number}/64", "dev", "wire", "nodad")
            for link in ("wire", "lo"):
                host.run("ip", "link", "set", link, "up")
        yield here, there


def _run(*command: str, text: str = "") -> str:
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True, timeout=DEADLINE).stdout
