"""A worker's share of the clients: when its listeners wait for some, and when not.

A worker that is ahead of the least loaded one stays out of all wait queues until one of its own connections closes, or
a timer says to look again. Likewise it stays out of the queues of a listener that has no slot for one more client,
while it takes those of others. No lock is ever held and nothing sleeps. The rules of fairness come first, without
clock, socket or memory of their own; `Balance` applies them. The worker starts and stops it, and its acceptors report
to it.
"""

from __future__ import annotations

import errno
import logging
from asyncio import TimerHandle
from collections.abc import Callable, Iterable, Sequence
from enum import Enum, auto
from time import monotonic_ns

from forkd.serve.accept.acceptor import PAUSE, Acceptor, ConnectionStats
from forkd.serve.loop import PollLoop
from forkd.system.scoreboard import HEARTBEAT_SECONDS, Field, Scoreboard

log = logging.getLogger("forkd.accept")

#: Seconds between two heartbeats of a worker.
BEAT = HEARTBEAT_SECONDS

#: A worker whose last heartbeat is this many heartbeats old does not count as one that could take a client.
STALE_BEATS = 2.5

#: Connections by which a worker may be ahead of the least loaded one whatever the numbers, and the fraction, as a
#: shift, by which it may be ahead when they are large. The workers' turns spread clients evenly by themselves; this is
#: for lifetimes that differ, and with less of it clients that come and go would have workers step out all the time.
SLACK = 6
FRACTION = 5

#: Clients that a worker takes at a heartbeat from a listener at which some wait from beat to beat.
MOST_LEFT = 64

#: Heartbeats for which a worker may then be further ahead.
LENIENT_BEATS = 10

#: Seconds in which a worker whose master is dead takes the clients that wait: by a socket that another daemon has, too,
#: more may come all the time.
REST_SECONDS = 0.25

#: Seconds from one line about exhaustion to the next.
_MINUTE = 60


def is_fair(mine: int, least: int) -> bool:
    """Whether a worker with `mine` connections may take one more while the least loaded one has `least`."""
    return mine <= least + max(SLACK, least >> FRACTION)


def least_load(rows: Iterable[tuple[int, int]], now: int, beat: int) -> int:
    """The least load among workers that are alive.

    Args:
        rows: each worker's load and the time of its last heartbeat.
        now: the time, on the heartbeats' clock.
        beat: the time between two heartbeats.

    Returns:
        The least load, and 0 for one that claims less; when no worker is alive, more than any load, so that the caller
        takes the client.
    """
    loads = (load for load, seen in rows if now - seen < STALE_BEATS * beat)
    return max(0, min(loads, default=1 << 62))


def next_try(waited: float, beat: float) -> float:
    """How long a worker that is ahead waits before it looks again, from how long it waited last: from milliseconds,
    twice as long each time, to a heartbeat. All in seconds.
    """
    return min(beat, max(0.005, waited * 2))


class Retry:
    """A timer that backs off: from milliseconds, twice as long each time, to a heartbeat.

    Args:
        loop: the worker's loop.
        action: what to do when it is time to look again.
    """

    def __init__(self, loop: PollLoop, action: Callable[[], None]) -> None:
        self._loop = loop
        self._action = action
        self._waited = 0.0
        self._timer: TimerHandle | None = None

    def start(self, seconds: float = 0.0) -> None:
        """Waits from now on: so long, or as short as it ever waits."""
        self.cancel()
        self._wait(seconds or next_try(0.0, BEAT))

    def back_off(self) -> None:
        """Waits once more, longer than the last time, unless it waits already."""
        if self._timer is None:
            self._wait(next_try(self._waited, BEAT))

    def cancel(self) -> None:
        """Waits no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, seconds: float) -> None:
        self._waited = seconds
        self._timer = self._loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._action()


class BalanceState(Enum):
    """Which wait queues a worker is in."""

    TAKING = auto()  # those of all its listeners; the end of a connection changes nothing
    NO_ROOM = auto()  # not those of a listener that has no slot for one more
    AHEAD = auto()  # none: the worker is ahead of the least loaded one, or the system lacks something
    STOPPED = auto()  # none: it has not started, or takes no more clients


class Waiting(Enum):
    """Which of the clients that wait are for a worker that stops."""

    OWN = auto()  # one for each listener, which may have woken no other worker
    ALL = auto()  # the master is dead: when the last worker closes its copy of the listener, the kernel resets the rest
    NONE = auto()  # the same, but a service manager keeps the listener for the next master


class Balance:
    """A worker's share of the clients.

    Args:
        loop: the worker's loop.
        board: the scoreboard, for the others' loads.
        stats: this worker's connections. Their observer passes on to `connection_closed`.

    Attributes:
        state: which wait queues the worker is in.
    """

    def __init__(self, loop: PollLoop, board: Scoreboard, stats: ConnectionStats) -> None:
        self._loop = loop
        self._board = board
        self._loads = board.loads()
        self._stats = stats
        self._acceptors: Sequence[Acceptor] = ()
        self.state = BalanceState.STOPPED
        self._fairness_retry = Retry(loop, self._look_for_fairness)
        self._room_retry = Retry(loop, self._rejoin)
        self._last_complaint = -1e9
        self._left_waiting = False  # clients waited at the last heartbeat
        self._more_slack = 0  # connections by which it may be further ahead than is fair, for a while
        self._lenient_until = -1e9

    def start(self, acceptors: Sequence[Acceptor]) -> None:
        """Begins to take clients by these listeners."""
        self._acceptors = acceptors
        self._rejoin()

    def stop(self, takes: Waiting = Waiting.OWN) -> None:
        """Takes no more clients but some that wait, and closes this process's copies of the listeners. Those are
        counted when this returns.

        Args:
            takes: which.
        """
        self._stats.set_accepting(False)
        self._enter(BalanceState.STOPPED)
        self._fairness_retry.cancel()
        self._room_retry.cancel()
        acceptors, self._acceptors = self._acceptors, ()
        if takes is Waiting.OWN:
            for acceptor in acceptors:
                acceptor.last_call(self._stats.opened)
        until = self._loop.time() + REST_SECONDS
        for acceptor in acceptors:
            if takes is Waiting.ALL:
                acceptor.take_rest(self._stats.opened, until)
            acceptor.close()  # right after no more waited

    def accepted(self, acceptor: Acceptor) -> None:
        """Counts a client that was accepted; lets another worker have the next one."""
        stats = self._stats
        stats.opened()
        mine = stats.accepted - stats.ended
        # From the cheapest question to the dearest, since it is asked for every client: is it fair whatever the others
        # have; by all the loads there are; by those of the workers that are alive.
        if mine <= SLACK or is_fair(mine, min(self._loads)) or is_fair(mine, self._least()):
            acceptor.requeue()
        else:
            self._step_out(0.0)

    def not_served(self) -> None:
        """A client that was counted is gone before it was served."""
        self._stats.closed()

    def full(self) -> None:
        """A listener has left the queue because it has no slot for one more client."""
        # Others should not wait for this worker to catch up with them, which it can't.
        self._stats.set_accepting(False)
        self._enter(BalanceState.NO_ROOM)
        self._room_retry.start()

    def exhausted(self, error: OSError) -> None:
        """The system could not give one more descriptor or buffer: out for a moment, and one line a minute about it."""
        now = self._loop.time()
        # EINVAL: the listener was shut down, of which the master tells when it has set it right.
        if error.errno != errno.EINVAL and now - self._last_complaint > _MINUTE:
            self._last_complaint = now
            log.error("can't accept clients: %s; they wait in the backlog meanwhile", error.strerror)
        self._step_out(PAUSE)
        self._stats.set_accepting(False)  # as when it is full

    def connection_closed(self) -> None:
        """One of this worker's connections has closed."""
        if self.state is BalanceState.AHEAD:
            self._look_for_fairness()
        elif self.state is BalanceState.NO_ROOM:
            self._rejoin()

    def replace(self, old: Sequence[Acceptor], new: Sequence[Acceptor]) -> None:
        """Takes clients by other listeners in the place of some that get no more; those that wait there are taken."""
        self._acceptors = [*(one for one in self._acceptors if one not in old), *new]
        for acceptor in old:
            acceptor.take_rest(self._stats.opened)
            acceptor.close()
        if self.state is not BalanceState.AHEAD:
            self._rejoin()

    def beat(self) -> None:
        """At each heartbeat: takes a client that was left by a worker that was woken for it and stands still.

        A worker that is ahead takes it too, since the one that should may only claim to have few clients. Where some
        wait at two heartbeats in a row, as many as wait are taken, and this worker may be further ahead for a while, by
        twice as many connections each time.
        """
        self._loads = self._board.loads()
        ahead = self.state is BalanceState.AHEAD
        waiting = [one for one in self._acceptors if (one.queued or ahead) and one.has_client()]
        again, self._left_waiting = self._left_waiting and bool(waiting), bool(waiting)
        if again:
            self._lenient_until = self._loop.time() + LENIENT_BEATS * BEAT
            if ahead:
                self._more_slack = max(SLACK, 2 * self._more_slack)
        elif self._loop.time() > self._lenient_until:
            self._more_slack = 0
        if waiting and ahead:
            self._rejoin()
        for acceptor in waiting:
            for _ in range(MOST_LEFT if again else 1):
                if not (acceptor.queued and acceptor.has_client()):
                    break
                acceptor.try_once()

    def _enter(self, state: BalanceState) -> None:
        self.state = state
        self._stats.notify = state is not BalanceState.TAKING

    def _least(self) -> int:
        rows = ((row[Field.LOAD], row[Field.HEARTBEAT]) for row in self._board.rows())
        return least_load(rows, monotonic_ns(), int(BEAT * 1e9)) + self._more_slack

    def _step_out(self, seconds: float) -> None:
        # No last call here: it would be one client more for a worker that is ahead, and each would end in another step
        # out, so that a crowd would be served by this worker to the last. It is hardly needed either: for a client that
        # comes while this worker is at work the kernel wakes the next one, and a worker that is behind is in the queue.
        self._enter(BalanceState.AHEAD)
        for acceptor in self._acceptors:
            acceptor.leave()
        self._room_retry.cancel()
        self._fairness_retry.start(seconds)

    def _look_for_fairness(self) -> None:
        """Comes back if the worker is no longer ahead, or else looks again later."""
        if is_fair(self._stats.active, self._least()):
            self._rejoin()
        else:
            self._fairness_retry.back_off()

    def _rejoin(self) -> None:
        """Waits for clients of all listeners that have a slot for one."""
        self._fairness_retry.cancel()
        full = [acceptor for acceptor in self._acceptors if not (acceptor.queued or acceptor.queue())]
        self._stats.set_accepting(not full)
        if full:
            self._enter(BalanceState.NO_ROOM)
            self._room_retry.back_off()
        else:
            self._enter(BalanceState.TAKING)
            self._room_retry.cancel()
