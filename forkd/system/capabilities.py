"""Linux's capabilities (capabilities(7)), prctl(2), and /proc/self/status, by which both are verified.

Where there are none (another system than Linux) the functions do nothing. `privileges` decides what is dropped.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from enum import IntEnum

from forkd.system.libc import c_function, prctl

_LINUX = sys.platform == "linux"

# linux/prctl.h
PR_SET_DUMPABLE = 4
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4

_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h


class Capability(IntEnum):
    """The capabilities that forkd looks at (linux/capability.h)."""

    CHOWN = 0
    KILL = 5
    SETGID = 6
    SETUID = 7
    SETPCAP = 8
    SYS_CHROOT = 18
    SYS_RESOURCE = 24


class ProcStatus:
    """/proc/self/status (proc_pid_status(5)). The file is opened once: in a chroot there may be no /proc.

    Raises:
        OSError: there is no /proc.
    """

    def __init__(self) -> None:
        self._descriptor = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> dict[str, str]:
        """The lines as they are now, by name. Raises OSError."""
        lines = os.pread(self._descriptor, 65536, 0).decode(errors="replace").splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def has_capability(one: Capability) -> bool:
    """Whether this process has a capability in effect; where there is no /proc, whether it is root's."""
    try:
        status = ProcStatus()
    except OSError:
        return os.geteuid() == 0
    try:
        return bool(int(status.read().get("CapEff", "0"), 16) >> one & 1)
    finally:
        status.close()


def drop_bounding_set() -> None:
    """Empties the bounding set, which limits what any program started later can have. Raises OSError: EPERM without
    CAP_SETPCAP.
    """
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
    """Empties the ambient set, which a program started later would have at once. Raises OSError."""
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def drop_capabilities() -> None:
    """Empties the effective, permitted and inheritable sets: capset(2). Raises OSError."""
    if not _LINUX:
        return
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    data = (ctypes.c_uint32 * 6)()
    c_function("capset", ctypes.c_void_p, ctypes.c_void_p)(header, data)
