"""What /proc tells of processes (proc(5)): their memory, descriptors and unix sockets, which signals they take; and the
way by it into the network namespace of another process.

Where there is no /proc, or it hides something, a function returns what its docstring says.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from forkd.errors import ForkdError

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_CLONE_NEWNET = 0x40000000  # CLONE_NEWNET of linux/sched.h
_LISTENING = "00010000"  # the flag of a socket in /proc/net/unix


def need_proc() -> None:
    """Raises ForkdError where there is no /proc, as in a bare chroot: forkd sees to its processes by it."""
    if not os.path.exists("/proc/self/fd"):
        raise ForkdError("there is no /proc (proc(5)), which forkd needs; mount it: mount -t proc proc /proc")


def resident_memory() -> int:
    """Bytes of memory that this process has in use (proc_pid_statm(5)); 0 where there is no /proc."""
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_SIZE
    return 0


def memory_of(pid: int) -> tuple[int | None, int | None]:
    """Bytes of memory that a process has in use: all of it (RSS), and with what it shares divided by how many share it
    (PSS; proc_pid_smaps(5), smaps_rollup). None where this process may not look, or the other has gone.
    """
    with contextlib.suppress(OSError, KeyError, ValueError), open(f"/proc/{pid}/smaps_rollup", "rb") as file:
        found = {words[0]: int(words[1]) * 1024 for line in file if len(words := line.split()) == 3}
        return found[b"Rss:"], found[b"Pss:"]
    return None, None


def descriptors_of(pid: int) -> list[tuple[int, str]]:
    """The descriptors of a process, and what each leads to (proc_pid_fd(5)). Raises OSError where the process has gone,
    or is another's.
    """
    found = []
    directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                found.append((int(name), os.readlink(name, dir_fd=directory)))
    finally:
        os.close(directory)
    return found


def unix_sockets(pid: int) -> Iterator[tuple[str, str, bool]]:
    """The unix sockets that have a name, where a process sees the network (proc_net(5)): of each the inode, the name,
    and whether it listens. By a name with a line feed anyone can have sockets told that are none. Raises OSError.
    """
    with open(f"/proc/{pid}/net/unix", errors="surrogateescape", newline="\n") as lines:
        next(lines, None)
        for line in lines:
            fields = line.rstrip("\n").split(maxsplit=7)
            if len(fields) == 8:
                yield fields[6], fields[7], fields[3] == _LISTENING


def dies_of(pid: int, signum: signal.Signals) -> bool:
    """Whether a signal has its default in a process: it is neither caught nor ignored there (proc_pid_status(5))."""
    kept = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith((b"SigIgn:", b"SigCgt:")):
                kept |= int(line.split()[1], 16)
        return not kept >> (signum - 1) & 1
    return False


@contextmanager
def network_namespace_of(pid: int) -> Iterator[None]:
    """A context in which this thread is in the network namespace of another process (setns(2), network_namespaces(7)).

    It does nothing where that is the thread's own namespace, or where the process does not show which one it has.

    Raises:
        ForkdError: this process may not enter it.
    """
    ours, theirs = "/proc/self/ns/net", f"/proc/{pid}/ns/net"
    try:
        same = os.stat(theirs).st_ino == os.stat(ours).st_ino
    except OSError:  # another user's process hides it
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
    import ctypes  # noqa: PLC0415 (rare: most daemons are in the namespace of who asks)

    from forkd.system.libc import c_function  # noqa: PLC0415

    c_function("setns", ctypes.c_int, ctypes.c_int)(descriptor, _CLONE_NEWNET)  # os.setns is there from Python 3.12 on
