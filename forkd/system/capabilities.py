"""Linux's capabilities (capabilities(7)), prctl(2), and what the kernel says of this process in /proc/self/status."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from enum import IntEnum

_LINUX = sys.platform == "linux"

# linux/prctl.h
PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h


class Capability(IntEnum):
    """Those that the daemon needs for something (linux/capability.h)."""

    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    SYS_CHROOT = 18
    SYS_RESOURCE = 24


class Status:
    """What the kernel says of this process. The file is opened once: in a chroot there may be no /proc.

    Raises:
        OSError: there is no /proc.
    """

    def __init__(self) -> None:
        self._descriptor = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> dict[str, str]:
        """The lines of proc_pid_status(5) as they are now, by name. Raises OSError."""
        lines = os.pread(self._descriptor, 65536, 0).decode(errors="replace").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def has_capability(one: Capability) -> bool:
    """Whether this process may do what a capability allows; where that can't be told, whether it is root's."""
    try:
        status = Status()
    except OSError:
        return os.geteuid() == 0
    try:
        return bool(int(status.read().get("CapEff", "0"), 16) >> one & 1)
    finally:
        status.close()


def prctl(option: int, argument: int = 0, second: int = 0) -> int:
    """As prctl(2), where there is one; elsewhere 0. Raises OSError."""
    if not _LINUX:
        return 0
    arguments = [ctypes.c_ulong(one) for one in (argument, second, 0, 0)]
    result = int(ctypes.CDLL(None, use_errno=True).prctl(option, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def drop_bounding_set() -> None:
    """Gives up all that a program which is started could ever have. Raises OSError: EPERM without CAP_SETPCAP."""
    number = 0
    while _LINUX:
        try:
            held = prctl(_PR_CAPBSET_READ, number)
        except OSError as error:
            if error.errno == errno.EINVAL:  # there are no more
                return
            raise
        if held:
            prctl(_PR_CAPBSET_DROP, number)
        number += 1


def clear_ambient_set() -> None:
    """Gives up what a program that is started would have at once. Raises OSError."""
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def drop_capabilities() -> None:
    """Gives up the effective, permitted and inheritable sets: capset(2). Raises OSError."""
    if not _LINUX:
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, data):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
