"""A worker's share of the clients: when its listeners wait for some, and when not.

A worker that is ahead of the least loaded one stays out of all wait queues until one of its own connections closes, or
a timer says to look again; and out of those of a listener that has no place for one more likewise, while it takes
others' clients. No lock is ever held and nothing sleeps.
"""

from __future__ import annotations

import logging
from asyncio import TimerHandle
from collections.abc import Callable, Sequence
from time import monotonic_ns

from forkd.serve.accept import PAUSE, Acceptor, Tally
from forkd.serve.admission import SLACK, is_fair, least_load, next_try
from forkd.serve.loop import PollLoop
from forkd.system.scoreboard import Field, Scoreboard

log = logging.getLogger("forkd.accept")

#: Seconds between two heartbeats of a worker.
BEAT = 1.0


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

    def begin(self, seconds: float = 0.0) -> None:
        """Waits anew: so long, or as short as it ever waits."""
        self.end()
        self._wait(seconds or next_try(0.0, BEAT))

    def go_on(self) -> None:
        """Waits once more, longer than the last time, unless it waits already."""
        if self._timer is None:
            self._wait(next_try(self._waited, BEAT))

    def end(self) -> None:
        """Waits no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wait(self, seconds: float) -> None:
        self._waited = seconds
        self._timer = self._loop.call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        self._timer = None
        self._action()


class Balance:
    """A worker's share of the clients.

    Args:
        loop: the worker's loop.
        board: the scoreboard, for the others' loads.
        tally: this worker's connections.
    """

    def __init__(self, loop: PollLoop, board: Scoreboard, tally: Tally) -> None:
        self._loop = loop
        self._board = board
        self._loads = board.loads()
        self._tally = tally
        self._acceptors: Sequence[Acceptor] = ()
        self._is_out = False  # of all queues: it is ahead, or the system lacks something
        self._until_fair = Retry(loop, self._look_again)
        self._until_room = Retry(loop, self._look_for_room)
        self._complained = -1e9

    def start(self, acceptors: Sequence[Acceptor]) -> None:
        """Begins to take clients by these listeners."""
        self._acceptors = acceptors
        self._come_back()

    def stop(self) -> None:
        """Takes no more clients but one that this worker alone may know of, and closes this process's copies of the
        listeners. That one is counted when this returns.
        """
        self._tally.set_accepting(False)
        self._tally.on_closed = None
        self._until_fair.end()
        self._until_room.end()
        acceptors, self._acceptors = self._acceptors, ()
        for acceptor in acceptors:
            acceptor.last_call(self._tally.opened)
        for acceptor in acceptors:
            acceptor.close()

    def accepted(self, acceptor: Acceptor) -> None:
        """Counts a client that was accepted; lets another worker have the next one."""
        tally = self._tally
        tally.opened()
        mine = tally.accepted - tally.ended
        # From the cheapest question to the dearest, since it is asked for every client: is it fair whatever the others
        # have; by all the loads there are; by those of the workers that are alive.
        if mine <= SLACK or is_fair(mine, min(self._loads)) or is_fair(mine, self._least()):
            acceptor.requeue()
        else:
            self._step_out(0.0)

    def full(self) -> None:
        """A listener has left the queue because it has no place for one more."""
        # Others should not wait for this worker to catch up with them, which it can't.
        self._tally.set_accepting(False)
        self._tally.on_closed = self._look_for_room
        self._until_room.begin()

    def exhausted(self, error: OSError) -> None:
        """The system could not give one more descriptor or buffer: out for a moment, and one line a minute about it."""
        now = self._loop.time()
        if now - self._complained > 60:
            self._complained = now
            log.error("can't accept clients: %s; they wait in the backlog meanwhile", error.strerror)
        self._step_out(PAUSE)
        self._tally.set_accepting(False)  # as when it is full

    def beat(self) -> None:
        """At each heartbeat: takes a client that was left lying by a worker that was woken for it and stands still."""
        self._loads = self._board.loads()
        for acceptor in self._acceptors:
            if acceptor.queued:
                acceptor.try_once()

    def _least(self) -> int:
        rows = ((row[Field.LOAD], row[Field.HEARTBEAT]) for row in self._board.rows())
        return least_load(rows, monotonic_ns(), int(BEAT * 1e9))

    def _step_out(self, seconds: float) -> None:
        # No last call here: it would be one client more for a worker that is ahead, and each would end in another step
        # out, so that a crowd would be served by this worker to the last. It is hardly needed either: for a client that
        # comes while this worker is at work the kernel wakes the next one, and who is behind is in the queue.
        self._is_out = True
        for acceptor in self._acceptors:
            acceptor.leave()
        self._tally.on_closed = self._look_again
        self._until_room.end()
        self._until_fair.begin(seconds)

    def _look_again(self) -> None:
        """One of this worker's connections has closed, or it is time to look."""
        if is_fair(self._tally.active, self._least()):
            self._come_back()
        else:
            self._until_fair.go_on()

    def _look_for_room(self) -> None:
        if not self._is_out:
            self._come_back()

    def _come_back(self) -> None:
        """Waits for clients where there are places for them."""
        self._is_out = False
        self._until_fair.end()
        lacking = [acceptor for acceptor in self._acceptors if not (acceptor.queued or acceptor.queue())]
        self._tally.set_accepting(not lacking)
        if lacking:
            self._tally.on_closed = self._look_for_room
            self._until_room.go_on()
        else:
            self._tally.on_closed = None
            self._until_room.end()
