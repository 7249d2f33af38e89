"""The one place that forks, reaps and signals workers.

A forked child never returns up its parent's stack: it ends in os._exit. Between the fork and the moment when the child
has put its own signal handling in place every signal is blocked in both: a child that inherited the master's wakeup
descriptor would otherwise tell the master of signals that were meant for itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

from forkd import signals
from forkd.states import Life
from forkd.system.channel import Channel, channel_pair
from forkd.system.scoreboard import Field, Row, Scoreboard

log = logging.getLogger("forkd.spawn")

_SOFTWARE = os.EX_SOFTWARE  # a worker that raised


@dataclass(slots=True)
class Worker:
    """A worker process as the master knows it. Times are in seconds on the monotonic clock."""

    pid: int
    slot: int
    row: Row
    channel: Channel
    life: Life
    since: float  # when this life began
    born: float
    ready_at: float | None = None
    killed_as: Life | None = None  # what it was about when it was killed
    heard: bool = True  # whether its channel may still say something
    cause: str = ""  # why the master killed it, or what it said when it could not boot
    details: str = ""  # the traceback that came with the latter


@dataclass(frozen=True, slots=True)
class Exit:
    """A child that was reaped: its status as wait(2) has it, and its largest resident size in bytes."""

    pid: int
    status: int
    peak_memory: int

    def __str__(self) -> str:
        code = os.waitstatus_to_exitcode(self.status)
        if code >= 0:
            return f"exit status {code}"
        core = ", core dumped" if os.WCOREDUMP(self.status) else ""
        return f"killed by {signal.Signals(-code).name}{core}" if -code < 32 else f"killed by signal {-code}{core}"


#: What a child runs: its slot, its row and its channel in; its exit status out.
ChildMain = Callable[[int, Row, Channel], int]


class Spawner:
    """Makes workers and ends them.

    Args:
        main: what a child runs.
        board: where each gets a row.
        abandon: closes, in a child, what is the master's alone.
    """

    def __init__(self, main: ChildMain, board: Scoreboard, abandon: Callable[[], None]) -> None:
        self._main = main
        self._board = board
        self._abandon = abandon

    def spawn(self, slot: int, now: float) -> Worker:
        """Forks a worker.

        Raises:
            OSError: fork(2) or socketpair(2) failed, which is an event and no reason to end.
            OverflowError: the scoreboard has no row left.
        """
        row = self._board.claim()
        ours, theirs = channel_pair()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._child(slot, row, ours, theirs, mask)
        except OSError:
            ours.close()
            row.clear()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            theirs.close()
        row[Field.PID] = pid
        return Worker(pid, slot, row, ours, Life.BOOTING, since=now, born=now)

    def _child(self, slot: int, row: Row, ours: Channel, theirs: Channel, mask: set[int]) -> NoReturn:
        status = _SOFTWARE
        try:
            signal.set_wakeup_fd(-1)
            for known in signals.MASTER:
                signal.signal(known.signal, signal.SIG_DFL)
            for signum in signals.WORKER_IGNORES:
                signal.signal(signum, signal.SIG_IGN)
            ours.close()
            self._abandon()
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            status = self._main(slot, row, theirs)
        except SystemExit as error:  # a handler called sys.exit()
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            log.error("a handler ended this worker by sys.exit(%r)", error.code)
        except BaseException:  # (a worker's main: the border between a worker's bug and its certificate)
            log.critical("the worker ends by an exception", exc_info=True)
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status & 0xFF)

    def signal(self, worker: Worker, signum: signal.Signals) -> None:
        """Sends a signal. The pid can't be somebody else's: it is ours until `reap` returns it."""
        os.kill(worker.pid, signum)

    def reap(self) -> Iterator[Exit]:
        """Every child that has ended, strangers too: as PID 1 of a container the master inherits orphans."""
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            yield Exit(pid, status, usage.ru_maxrss * 1024)
