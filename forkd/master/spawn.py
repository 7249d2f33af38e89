"""The one place that forks, reaps and signals children: workers, and helpers in slot 0.

`Spawner` is the mechanism of `workers.WorkerPool`; what a child runs is handed in. A forked child never returns up its
parent's stack: it ends in os._exit. Between the fork and the moment when the child has put its own signal handling in
place every signal is blocked in both: a child that inherited the master's wakeup descriptor would otherwise tell the
master of signals that were meant for itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, NoReturn

from forkd import signals
from forkd.errors import BootError, escaped
from forkd.master.plan import WorkerView
from forkd.states import WorkerState
from forkd.system.channel import Channel, channel_pair
from forkd.system.logs import same_file
from forkd.system.process import flush_output, leave_terminal
from forkd.system.scoreboard import Field, Row, Scoreboard

log = logging.getLogger("forkd.spawn")

#: The slot of a helper: a child that does something for the master and serves no clients.
HELPER = 0

#: Lines of a child's standard error that are kept for its exit record.
STDERR_LINES = 40

#: Seconds that processes which a handler has left behind have to end, before they are killed; and after which the
#: master looks whether they have.
ORPHAN_SECONDS = 2.0
_LOOK_SECONDS = 0.1

#: What a child runs: its row and its channel in; its exit status out.
ChildMain = Callable[[Row, Channel], int]

_SOFTWARE = os.EX_SOFTWARE  # a worker that raised


@dataclass(slots=True)
class Worker:
    """A child process as the master knows it. Times are in seconds on the monotonic clock."""

    pid: int
    slot: int
    generation: int
    row: Row
    channel: Channel
    stderr: int  # what it writes to standard error is read here; -1 after its end
    state: WorkerState
    since: float  # when it got into this state
    forked_at: float
    ready_at: float | None = None
    takes_clients: bool = False  # from when it is ready until it has said that it drains
    killed_in: WorkerState | None = None  # its state when it was killed
    readable: bool = True  # whether its channel is read
    dumped_at: float = -inf  # when it was last told to write its stacks
    invalid_messages: int = 0
    recycle_reason: str = ""  # why it should be replaced
    drain_timeout: float | None = None  # of its own settings, where others serve by now
    stall_timeout: float | None = None  # likewise
    closed_listeners: list[dict[str, Any]] = field(
        default_factory=list
    )  # those closed while it may have clients of them
    cause: str = ""  # why it was told to end or was killed, or what it reported when it could not boot
    failure: BootError | None = None  # the latter, with its traceback
    listeners: list[str] = field(default_factory=list)  # the addresses of its generation's listeners
    partial_line: str = ""  # the beginning of a line on standard error that has no end yet
    unanswered: set[int] = field(default_factory=set)  # the numbers of queries that it has not answered yet
    stderr_lines: deque[str] = field(default_factory=lambda: deque(maxlen=STDERR_LINES))  # the last ones

    @property
    def name(self) -> str:
        """What the log calls it."""
        return f"worker {self.slot}" if self.slot != HELPER else "helper"

    def view(self, now: float) -> WorkerView:
        """The worker as the plan sees it. A heartbeat from the future counts as one of now."""
        return WorkerView(
            pid=self.pid,
            slot=self.slot,
            state=self.state,
            since=self.since,
            generation=self.generation,
            heartbeat=min(now, self.row[Field.HEARTBEAT] / 1e9),
            dumped_at=self.dumped_at,
            recycle_reason=self.recycle_reason,
            drain_timeout=self.drain_timeout,
            stall_timeout=self.stall_timeout,
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


class Orphans:
    """What handlers have left behind in the process groups of their workers: told to end when the worker has ended, and
    killed a little later. They are no children of the master, so it looks for their end.
    """

    def __init__(self) -> None:
        self._deadlines: dict[int, float] = {}  # by group

    def __bool__(self) -> bool:
        return bool(self._deadlines)

    def look(self, worker: Worker, *, end: bool, now: float) -> None:
        """Looks what a worker that was reaped has left.

        Args:
            worker: the worker.
            end: whether that is to end.
            now: the time.
        """
        if not (_group_exists(worker.pid) and (left := _members(worker.pid))):
            return
        names, about = ", ".join(left), {"worker": worker.slot}
        if not end:
            log.info("%s (pid %d) has left processes running: %s", worker.name, worker.pid, names, extra=about)
            return
        log.warning("%s (pid %d) has left processes, which are ended: %s", worker.name, worker.pid, names, extra=about)
        _signal_group(worker.pid, signal.SIGTERM)
        self._deadlines[worker.pid] = now + ORPHAN_SECONDS

    def advance(self, now: float) -> float | None:
        """Kills those whose time is over; when to look again, None for no need."""
        if not self._deadlines:
            return None
        for group, deadline in list(self._deadlines.items()):
            if not _group_exists(group) or not _members(group):
                del self._deadlines[group]
            elif now >= deadline:
                log.warning("killing processes that did not end: %s", ", ".join(_members(group)))
                _signal_group(group, signal.SIGKILL)
                del self._deadlines[group]
        return now + _LOOK_SECONDS if self._deadlines else now  # what waited for the last of them can go on


def _group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _members(group: int) -> list[str]:
    """`NAME (pid N)` of each process that a worker's group has, but for zombies (proc_pid_stat(5)). A group of another
    session is another program's, which got the number since.
    """
    found, own = [], os.getsid(0)
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                name, _, rest = file.read().partition(b"(")[2].rpartition(b") ")
                state, _, pgrp, session = rest.split(b" ", 4)[:4]
                if int(pgrp) == group and int(session) == own and state != b"Z":
                    found.append(f"{escaped(name.decode(errors='replace'))} (pid {entry})")
    return found


def _signal_group(group: int, signum: signal.Signals) -> None:
    try:
        os.killpg(group, signum)
    except ProcessLookupError:
        return
    except PermissionError:
        log.error("may not send %s to what is left of process group %d", signum.name, group)


class Spawner:
    """Forks, signals and reaps children.

    Args:
        board: where each gets a row.
        close_in_child: closes, in a child, what is the master's alone.
    """

    def __init__(self, board: Scoreboard, close_in_child: Callable[[], None]) -> None:
        self._board = board
        self._close_in_child = close_in_child

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
        return Worker(pid, slot, generation, row, ours, reader, WorkerState.BOOTING, since=now, forked_at=now)

    def _fork(self, main: ChildMain, row: Row, ours: Channel, theirs: Channel, reader: int, writer: int) -> int:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._child(main, row, (ours, theirs), (reader, writer), mask)
            return pid
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _child(
        self, main: ChildMain, row: Row, channels: tuple[Channel, Channel], pipe: tuple[int, int], mask: set[int]
    ) -> NoReturn:
        status = _SOFTWARE
        try:
            status = self._run(main, row, channels, pipe, mask)
        finally:  # with nothing beside it: whatever is raised, this process must not go on as a second master
            os._exit(status & 0xFF)

    def _run(
        self, main: ChildMain, row: Row, channels: tuple[Channel, Channel], pipe: tuple[int, int], mask: set[int]
    ) -> int:
        """What a child does, to its exit status."""
        (ours, channel), (reader, stderr) = channels, pipe
        status, process = _SOFTWARE, os.getpid()
        try:
            ours.close()
            os.close(reader)
            # Not a session: the kernel's scheduler takes each one for a group of its own (sched(7), autogroup), which
            # costs every request a tenth more CPU. By its group what is left is found when it has ended.
            os.setpgid(0, 0)
            leave_terminal()
            if os.isatty(0):  # of another group, a program that reads it would be stopped
                _read_nothing()
            signal.set_wakeup_fd(-1)
            for known in signals.MASTER:
                signal.signal(known.signal, signal.SIG_DFL)
            for signum in signals.WORKER_REALLY_IGNORES:
                signal.signal(signum, signal.SIG_IGN)
            for signum in signals.WORKER_IGNORES:
                signal.signal(signum, signals.ignore)
                signal.siginterrupt(signum, False)
            self._close_in_child()
            # What is printed goes the way of errors; a terminal is not the worker's.
            if same_file(1, 2) or os.isatty(1):
                os.dup2(stderr, 1)
            os.dup2(stderr, 2)
            os.close(stderr)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            status = main(row, channel)
        except SystemExit as error:  # in a process that a handler has forked
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
            log.debug("process of a handler ended by sys.exit(%r)", error.code)
        except BaseException:  # noqa: BLE001 (a worker's main: the border between its bug and its exit record)
            _log_raised(came_back=os.getpid() != process)
        flush_output()
        return status

    def signal(self, worker: Worker, signum: signal.Signals) -> None:
        """Sends a signal. The pid can't be another process's: it is the child's until `reap` returns it."""
        try:
            os.kill(worker.pid, signum)
        except PermissionError:  # it has become another user, by a program that may
            log.error(
                "may not send %s to %s (pid %d), which has become another user's", signum.name, worker.name, worker.pid
            )

    def reap(self) -> Iterator[Exit]:
        """Every child that has ended, also those that were not forked here: as PID 1 of a container the master inherits
        orphans.
        """
        while True:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            yield Exit(pid, status, usage.ru_maxrss * 1024)


def _log_raised(*, came_back: bool) -> None:
    """Logs the exception that ends a child, or a process that its handler has forked and that came back from it."""
    if came_back:
        log.error("a process that the handler has forked came back from it, and ends; it should call os._exit")
    else:
        log.critical("worker ended by an exception", exc_info=True)


def _read_nothing() -> None:
    """Opens standard input on /dev/null."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
