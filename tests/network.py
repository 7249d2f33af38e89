"""A network of the test's own: what it starts and connects meanwhile is in a namespace with nothing but a loopback."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from needs import lacks, needs_program, needs_root

_CLONE_NEWNET = 0x40000000  # linux/sched.h


@contextmanager
def own_network(*local: str) -> Iterator[None]:
    """Goes there, and back in the end; these networks are the loopback's own, all their addresses this machine's."""
    needs_root()
    needs_program("ip")
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(_CLONE_NEWNET):
            lacks(f"network namespaces: {os.strerror(ctypes.get_errno())}")
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True, timeout=20)
            for network in local:
                subprocess.run(["ip", "route", "add", "local", network, "dev", "lo"], check=True, timeout=20)
            # A local route is enough to be reached, but bind(2) wants an address of an interface, or to be told.
            Path("/proc/sys/net/ipv6/ip_nonlocal_bind").write_text("1")
            yield
        finally:
            assert libc.setns(home, _CLONE_NEWNET) == 0
    finally:
        os.close(home)
