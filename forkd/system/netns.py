"""The network namespace of another process (network_namespaces(7)): what netlink tells is of the caller's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from forkd.errors import ForkdError

_NEWNET = 0x40000000  # CLONE_NEWNET of linux/sched.h


@contextmanager
def network_of(pid: int) -> Iterator[None]:
    """Within it this thread is in the network namespace of another process (setns(2)), if that is not its own.

    Raises:
        ForkdError: it is another one, and this process may not enter it.
    """
    ours, theirs = "/proc/self/ns/net", f"/proc/{pid}/ns/net"
    try:
        same = os.stat(theirs).st_ino == os.stat(ours).st_ino
    except OSError:  # another user's process does not show it
        same = True
    if same:
        yield
        return
    back = os.open(ours, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(theirs, pid)
        try:
            yield
        finally:
            _set_namespace(back)
    finally:
        os.close(back)


def _enter(path: str, pid: int) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _set_namespace(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ForkdError(
            f"process {pid} is in another network namespace, which only root can enter: {error.strerror}"
        ) from None


def _set_namespace(descriptor: int) -> None:
    function = ctypes.CDLL(None, use_errno=True).setns  # os.setns is there from Python 3.12 on
    function.argtypes = [ctypes.c_int, ctypes.c_int]
    if function(descriptor, _NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
