"""What a process says of itself and to its kernel: titles, the parent-death signal, its stacks, its memory, the
processors that it may use.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Collection

import setproctitle

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PAGE = os.sysconf("SC_PAGE_SIZE")

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


def dump_stacks_on(signum: signal.Signals) -> None:
    """Has the stacks of all threads written to stderr at `signum`, and when the process crashes in C (faulthandler).

    It is done in C, at once, whatever Python is held up by. stderr is what it is now: a handler may close or redirect
    it later.

    Raises:
        OSError: there is no stderr.
    """
    descriptor = os.dup(2)
    faulthandler.register(signum, file=descriptor, all_threads=True, chain=False)
    faulthandler.enable(file=descriptor, all_threads=True)


def resident_memory() -> int:
    """Bytes of memory that this process has in use (proc_pid_statm(5)); 0 where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE
    return 0


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
