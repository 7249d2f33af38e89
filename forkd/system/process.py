"""What a process says of itself and to its kernel: titles, the parent-death signal, the processors it may use."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Collection

import setproctitle

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

# It looks for the process's argv by way of the environment, so it must find that before anybody edits it.
setproctitle.getproctitle()


def set_title(name: str, role: str) -> None:
    """Sets what ps(1) shows of this process: `forkd: NAME ROLE`."""
    setproctitle.setproctitle(f"forkd: {name} {role}")


def signal_when_parent_dies(signum: signal.Signals, parent: int) -> bool:
    """Asks the kernel for `signum` when the parent dies (prctl(2), PR_SET_PDEATHSIG).

    setuid clears it, so it is for after a privilege drop. Where the kernel has no such thing this does nothing: the
    channel's end of file says the same.

    Returns:
        Whether `parent` is still this process's parent; when not, it died before the kernel was asked.

    Raises:
        OSError: the kernel refused.
    """
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signum, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


def close_all_but(kept: Collection[int]) -> None:
    """Closes every other descriptor of this process: what whoever started it has left open. Where there is no /proc it
    does nothing.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(int(name))


def processors() -> int:
    """How many processors this process may use (sched_getaffinity(2))."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
