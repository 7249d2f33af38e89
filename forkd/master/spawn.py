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
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, NoReturn

from forkd import signals
from forkd.errors import BootError
from forkd.master.plan import WorkerView
from forkd.states import Life
from forkd.system.channel import Channel, channel_pair
from forkd.system.logs import same_file
from forkd.system.scoreboard import Field, Row, Scoreboard

log = logging.getLogger("forkd.spawn")

_SOFTWARE = os.EX_SOFTWARE  # a worker that raised


#: The slot of a helper: a child that does something for the master and serves nobody.
HELPER = 0

#: Lines of a child's standard error that are kept for its certificate.
LAST_WORDS = 40


@dataclass(slots=True)
class Worker:
    """A child process as the master knows it. Times are in seconds on the monotonic clock."""

    pid: int
    slot: int
    generation: int
    row: Row
    channel: Channel
    stderr: int  # what it writes to standard error is read here; -1 after its end
    life: Life
    since: float  # when this life began
    born: float
    ready_at: float | None = None
    killed_as: Life | None = None  # what it was about when it was killed
    heard: bool = True  # whether its channel may still say something
    dumped: float = -inf  # when it was last told to write its stacks
    strange: int = 0  # messages of it that nobody understands
    worn: str = ""  # why it says that it should be replaced
    drain_timeout: float | None = None  # of its own settings, where others serve by now
    stall_timeout: float | None = None  # likewise
    forsaken: list[dict[str, Any]] = field(default_factory=list)  # where listeners were that have been closed since
    cause: str = ""  # why it was told to end or was killed, or what it said when it could not boot
    failure: BootError | None = None  # the latter, with its traceback
    unfinished: str = ""  # the beginning of a line that it has not ended yet
    owes: set[int] = field(default_factory=set)  # the numbers of questions that it has not answered yet
    words: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_WORDS))

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"worker {self.slot}" if self.slot != HELPER else "helper"

    def view(self, now: float) -> WorkerView:
        """It as the plan sees it. A heartbeat from the future is of now."""
        beat = min(now, self.row[Field.HEARTBEAT] / 1e9)
        return WorkerView(
            self.pid,
            self.slot,
            self.life,
            self.since,
            self.generation,
            beat,
            self.dumped,
            self.worn,
            self.drain_timeout,
            self.stall_timeout,
        )


@dataclass(frozen=True, slots=True)
class Exit:
    """A child that was reaped: its status as wait(2) has it, and its largest resident size in bytes."""

    pid: int
    status: int
    peak_memory: int

    @property
    def code(self) -> int:
        """The exit status, or the negative number of the signal."""
        return os.waitstatus_to_exitcode(self.status)

    def __str__(self) -> str:
        code = self.code
        if code >= 0:
            return f"exit status {code}"
        core = ", core dumped" if os.WCOREDUMP(self.status) else ""
        return f"killed by {signal.Signals(-code).name}{core}" if -code < 32 else f"killed by signal {-code}{core}"


#: What a child runs: its row and its channel in; its exit status out.
ChildMain = Callable[[Row, Channel], int]


class Spawner:
    """Makes workers and ends them.

    Args:
        board: where each gets a row.
        abandon: closes, in a child, what is the master's alone.
    """

    def __init__(self, board: Scoreboard, abandon: Callable[[], None]) -> None:
        self._board = board
        self._abandon = abandon

    def spawn(self, slot: int, generation: int, main: ChildMain, now: float) -> Worker:
        """Forks a worker, or a helper.

        Raises:
            OSError: fork(2) or socketpair(2) failed, which is an event and no reason to end.
            OverflowError: the scoreboard has no row left.
        """
        row = self._board.claim()
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as after:
            undo.callback(row.clear)
            reader, writer = os.pipe()
            undo.callback(os.close, reader)
            after.callback(os.close, writer)
            ours, theirs = channel_pair()
            undo.callback(ours.close)
            after.callback(theirs.close)
            os.set_blocking(reader, False)
            ours.takes_descriptors = slot == HELPER
            pid = self._fork(main, row, ours, theirs, reader, writer)
            undo.pop_all()
        row[Field.PID], row[Field.GENERATION] = pid, generation
        return Worker(pid, slot, generation, row, ours, reader, Life.BOOTING, since=now, born=now)

    def _fork(self, main: ChildMain, row: Row, ours: Channel, theirs: Channel, reader: int, writer: int) -> int:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                ours.close()
                os.close(reader)
                self._child(main, row, theirs, writer, mask)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _child(self, main: ChildMain, row: Row, channel: Channel, stderr: int, mask: set[int]) -> NoReturn:
        status = _SOFTWARE
        try:
            signal.set_wakeup_fd(-1)
            for known in signals.MASTER:
                signal.signal(known.signal, signal.SIG_DFL)
            for signum in signals.WORKER_IGNORES:
                signal.signal(signum, signal.SIG_IGN)
            self._abandon()
            if same_file(1, 2):  # a detached daemon's, or a terminal: what is printed goes the way of errors
                os.dup2(stderr, 1)
            os.dup2(stderr, 2)
            os.close(stderr)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            status = main(row, channel)
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
        try:
            os.kill(worker.pid, signum)
        except PermissionError:  # it has become somebody else, by a program that may
            log.error("may not send %s to %s (pid %d), which is another user's", signum.name, worker.name, worker.pid)

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
