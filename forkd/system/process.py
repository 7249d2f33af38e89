"""What a process does about itself: its title, the parent-death signal, the stacks of its threads, its descriptors and
terminal, and its end.

Each function is on its own and keeps no state. Where the system lacks something, a function does nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import gc
import io
import logging
import os
import signal
import sys
import termios
import threading
from collections.abc import Collection

import setproctitle

from forkd.system.libc import prctl

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

_FLUSH_SECONDS = 1.0  # for files, after threads and atexit have had their time

log = logging.getLogger("forkd.process")

# It finds the process's argv by way of the environment, so it must look before that is changed.
with contextlib.suppress(UnicodeDecodeError):  # an argument is of another encoding; it has found them
    setproctitle.getproctitle()


def flush_output() -> None:
    """Flushes `sys.stdout` and `sys.stderr`, which a handler may have replaced by anything."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


def finish_interpreter(seconds: float) -> None:
    """Does, in a process that ends by os._exit, what an interpreter does at its end: waits for threads, calls what is
    registered with atexit (of multiprocessing, too), and flushes the files that are open.

    Args:
        seconds: for which threads and atexit may take. The process ends a second later at the latest, with the
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
