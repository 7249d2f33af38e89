"""What a process tells the kernel and learns from it: its title, the parent-death signal, stacks, memory, processors
and the share of them that its control groups leave it (cgroups(7)), out-of-memory kills, and another process's network
namespace. `c_function` looks up what Python has no name for.

Each function is on its own and keeps no state. Where the system lacks something, a function does nothing, or returns
what its docstring says.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import fcntl
import gc
import io
import logging
import os
import re
import signal
import sys
import termios
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any

import setproctitle

from forkd.errors import ForkdError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CLONE_NEWNET = 0x40000000  # CLONE_NEWNET of linux/sched.h
_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")

_FLUSH_SECONDS = 0.5  # for files, after threads and atexit have had their time

log = logging.getLogger("forkd.process")

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")  # which groups this process is in

#: By the version's type of file system: the files of a group that hold quota and period, in microseconds.
_QUOTA_FILES = {"cgroup": ("cpu.cfs_quota_us", "cpu.cfs_period_us"), "cgroup2": ("cpu.max",)}

_PROC = Path("/proc/self")

_ESCAPED = re.compile(r"\\([0-7]{3})")

# It finds the process's argv by way of the environment, so it must look before that is changed.
setproctitle.getproctitle()


def need_proc() -> None:
    """Raises ForkdError where there is no /proc, as in a bare chroot: forkd sees to its processes by it."""
    if not os.path.exists(_PROC / "fd"):
        raise ForkdError("there is no /proc (proc(5)), which forkd needs; mount it: mount -t proc proc /proc")


def flush_output() -> None:
    """Flushes `sys.stdout` and `sys.stderr`, which a handler may have replaced by anything."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def finish_interpreter(seconds: float) -> None:
    """Does, in a process that ends by os._exit, what an interpreter does at its end: waits for threads, calls what is
    registered with atexit (of multiprocessing, too), and flushes the files that are open.

    Args:
        seconds: for which threads and atexit may take. The process ends half a second later at the latest, with the
            stacks of its threads on standard error.
    """
    with contextlib.suppress(RuntimeError):  # no thread can be had for it
        faulthandler.dump_traceback_later(seconds + _FLUSH_SECONDS, exit=True, file=2)
    late = list[bool]()

    def interrupt(*_: object) -> None:
        late.append(True)
        raise _TimeUp

    report = sys.unraisablehook  # threading (from Python 3.13 on) and atexit do not raise, but report and go on
    sys.unraisablehook = lambda found: None if found.exc_type is _TimeUp else report(found)
    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    for step in (threading._shutdown, atexit._run_exitfuncs, flush_output, _flush_files):  # type: ignore[attr-defined]
        try:
            step()
        except _TimeUp:
            pass
        except BaseException:  # (the handler's border: what it registered may raise anything)
            log.exception("the end of the handler's modules failed")
        if late:
            late.clear()
            names = ", ".join(one.name for one in threading.enumerate() if one is not threading.main_thread())
            what = f"threads of the handler still run: {names}" if names else "its atexit functions still run"
            log.warning("ending, though %s", what)
    signal.setitimer(signal.ITIMER_REAL, 0)
    faulthandler.cancel_dump_traceback_later()


class _TimeUp(BaseException):
    """What `finish_interpreter` waits for takes too long."""


def _flush_files() -> None:
    """Flushes what is buffered for files, and closes files that write something at their end, as compressed ones do."""
    gc.unfreeze()  # what was imported
    wrappers, texts, binaries = list[io.IOBase](), list[io.IOBase](), list[io.IOBase]()
    for found in gc.get_objects():
        kind = type(found)  # isinstance would ask the object
        if issubclass(kind, io.TextIOWrapper):
            texts.append(found)
        elif issubclass(kind, io.BufferedWriter | io.BufferedRandom | io.BufferedRWPair):
            binaries.append(found)
        elif issubclass(kind, io.BufferedIOBase) and not issubclass(kind, io.BufferedReader | io.BytesIO):
            wrappers.append(found)
    for one in wrappers:
        with contextlib.suppress(Exception):
            one.close()
    for one in (*texts, *binaries):
        with contextlib.suppress(Exception):  # it is closed or for reading, the disk is full
            one.flush()


def set_title(name: str, role: str) -> None:
    """Sets what ps(1) shows of this process: `forkd: NAME ROLE`."""
    setproctitle.setproctitle(f"forkd: {name} {role}")


def signal_when_parent_dies(signum: signal.Signals, parent: int) -> bool:
    """Asks the kernel for `signum` when the parent dies (prctl(2), PR_SET_PDEATHSIG).

    A change of the user clears it, so it is to be called after privileges are dropped. Where the kernel has no such
    thing this does nothing: the channel's end of file says the same.

    Returns:
        Whether `parent` is still this process's parent; when not, it died before the kernel was asked.

    Raises:
        OSError: the kernel refused.
    """
    prctl(_PR_SET_PDEATHSIG, signum)
    return os.getppid() == parent


def dump_stacks_on(signum: signal.Signals) -> None:
    """Writes the stacks of all threads to stderr at `signum`, and when the process crashes in C (faulthandler).

    It is done in C, at once, also while Python is stuck. stderr is what it is now: a handler may close or redirect it
    later.

    Raises:
        OSError: there is no stderr.
    """
    descriptor = os.dup(2)
    faulthandler.register(signum, file=descriptor, all_threads=True, chain=False)
    faulthandler.enable(file=descriptor, all_threads=True)


def close_all_but(kept: Collection[int]) -> None:
    """Closes all other descriptors of this process, which its parent may have left open. Where there is no /proc it
    does nothing.
    """
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                with contextlib.suppress(OSError):  # the listing's own
                    os.close(int(name))


def close_in_place(descriptor: int) -> None:
    """Closes a descriptor that something else owns and may close yet: the number stays taken, and leads nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


def dies_of(pid: int, signum: signal.Signals) -> bool:
    """Whether a signal has its default in a process: it is neither caught nor ignored there (proc_pid_status(5))."""
    kept = 0
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith((b"SigIgn:", b"SigCgt:")):
                kept |= int(line.split()[1], 16)
        return not kept >> (signum - 1) & 1
    return False


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


def processors() -> int:
    """How many processors this process may use: those that it may run on (sched_getaffinity(2)), or as many as its
    control groups leave it the time of, rounded up, where that is less.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else min(count, ceil(quota))


def oom_kills() -> int | None:
    """How many processes of this control group the kernel's out-of-memory killer has killed (cgroups(7)); None where
    that is not counted. It kills by SIGKILL without a sender; this count is how such a death is recognized.
    """
    for path in _oom_count_files():
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
            return int(fields["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None


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


def _oom_count_files() -> Iterator[Path]:
    """Files that may have the count, by version 2 or 1 of control groups; a container sees its own one as the root."""
    try:
        lines = PROC_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        for inside in (group.lstrip("/"), ""):
            if not controllers:
                yield CGROUP_ROOT / inside / "memory.events"
            elif "memory" in controllers.split(","):
                yield CGROUP_ROOT / "memory" / inside / "memory.oom_control"


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
    c_function("setns", ctypes.c_int, ctypes.c_int)(descriptor, _CLONE_NEWNET)  # os.setns is there from Python 3.12 on


# The quota of its control groups, by either version of them


def cpu_quota() -> Fraction | None:
    """Processors whose time this process's groups may use; None where there is no quota.

    A quota holds for a group and for all below it, so each group is looked at, from the process's own up to the one
    that is mounted (a container sees no more than that), and the least counts.
    """
    found = []
    try:
        groups = [*group_directories((_PROC / "cgroup").read_text(), (_PROC / "mountinfo").read_text())]
    except OSError:
        return None
    for kind, directory in groups:
        try:
            text = " ".join((directory / name).read_text() for name in _QUOTA_FILES[kind])
        except OSError:  # the topmost group has no quota, nor has one without this controller
            continue
        if (quota := parse_quota(text)) is not None:
            found.append(quota)
    return min(found, default=None)


def parse_quota(text: str) -> Fraction | None:
    """The quota in processors; None where there is none.

    Args:
        text: quota and period, as `cpu.max` has them, or the two files of version 1 in this order.
    """
    match text.split():
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            return Fraction(int(quota), int(period))
    return None  # "max", or -1 in version 1


def group_directories(groups: str, mounts: str) -> Iterator[tuple[str, Path]]:
    """The directories of the groups that a process is in, each followed by those above it, with the type of their file
    system.

    Args:
        groups: /proc/PID/cgroup.
        mounts: /proc/PID/mountinfo (proc(5)).
    """
    paths = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    for line in mounts.splitlines():
        mount, _, (kind, _, options, *_) = (part.split() for part in line.partition(" - "))
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        root, where = (_ESCAPED.sub(lambda match: chr(int(match[1], 8)), field) for field in mount[3:5])
        inside = Path(paths[kind])
        # A container may see its own group as the topmost one, or have only that one mounted.
        below = inside.relative_to(root) if inside.is_relative_to(root) and ".." not in inside.parts else Path()
        for directory in (below, *below.parents):
            yield kind, Path(where) / directory


# The C library


def prctl(option: int, argument: int = 0, second: int = 0) -> int:
    """As prctl(2), where there is one; elsewhere 0. Raises OSError."""
    if sys.platform != "linux":
        return 0
    return c_function("prctl", ctypes.c_int, *[ctypes.c_ulong] * 4)(option, argument, second, 0, 0)


@cache
def c_function(name: str, *arguments: type[Any], result: type[Any] = ctypes.c_int) -> Callable[..., int]:
    """A function of the C library that says by a negative number that it has failed.

    Each is looked up once. What `ctypes` makes for a look-up is a class, which holds itself and goes with a full
    collection alone: those of the master, which are rare, would let it grow with each worker that it starts.

    Args:
        name: its name.
        arguments: the types of its arguments.
        result: a signed type that its result fits into.

    Returns:
        A function that raises OSError where it fails.

    Raises:
        AttributeError: the system has no such function.
    """
    function = _library()[name]  # by its name: as an attribute it would be shared with who wants other types
    function.argtypes, function.restype, function.errcheck = arguments, result, _check  # type: ignore[assignment]
    called: Callable[..., int] = function
    return called


def leave_terminal() -> None:
    """Gives up this process's controlling terminal, if it has one: by that it could type into it (TIOCSTI). It stays in
    its session and process group. A leader of a session keeps it, as all in the session would lose it.
    """
    if os.getsid(0) == os.getpid():
        return
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.ioctl(terminal, termios.TIOCNOTTY)
        finally:
            os.close(terminal)


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, _: object, arguments: object) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
