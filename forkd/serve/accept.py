"""Accepting: who of the workers takes a client, and what a worker does when it should not or can't.

The listener's wait queue in the kernel decides who is woken (EPOLLEXCLUSIVE: one worker a client). It wakes its first
entry that waits, so a worker that has accepted leaves the queue and joins it again at its end. A worker that is ahead
of the least loaded one stays out until one of its own connections closes, or a timer says to look again. No lock is
ever held, nothing sleeps, and nobody accepts in order to refuse.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any, Protocol

from forkd.ended import Ended
from forkd.serve.admission import SLACK, is_fair, least_load, next_try
from forkd.serve.loop import IN, IN_EXCLUSIVE, PollLoop
from forkd.system.roll import Roll
from forkd.system.scoreboard import NOBODY, Field, Row, Scoreboard

log = logging.getLogger("forkd.accept")

#: Seconds between two heartbeats of a worker.
BEAT = 1.0

#: Seconds for which a worker takes no clients after the system had no means for one more.
PAUSE = 0.1

#: accept(2): this machine lacks something; other errors are the client's, or the network's, and pass.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}

#: Takes an accepted, non-blocking socket and the peer's address, and owns the socket from then on. It does not raise.
Serve = Callable[[socket.socket, Any], None]


class Tally:
    """A worker's connections, counted on its row of the scoreboard.

    Args:
        row: the row.
        roll: where it is noted when each began; None: nobody wants to know.
    """

    __slots__ = ("_accepting", "_cells", "accepted", "began", "ended", "errors", "on_closed")

    def __init__(self, row: Row, roll: Roll | None = None) -> None:
        self._cells = row.cells
        self.began = (roll or Roll()).began
        self._accepting = False
        self.accepted = 0
        self.ended = 0
        self.errors = 0
        self.on_closed: Callable[[], None] | None = None  # told of each end of a connection

    @property
    def active(self) -> int:
        """Connections that are open."""
        return self.accepted - self.ended

    def set_accepting(self, accepting: bool) -> None:
        """Whether others should reckon with this worker when they compare loads."""
        self._accepting = accepting
        self._cells[Field.LOAD] = self.active if accepting else NOBODY

    def opened(self) -> None:
        """A connection was accepted."""
        self.accepted = accepted = self.accepted + 1
        cells = self._cells
        cells[_ACCEPTED] = accepted
        if self._accepting:
            cells[_LOAD] = accepted - self.ended

    def closed(self) -> None:
        """A connection is over."""
        self.ended = ended = self.ended + 1
        cells = self._cells
        cells[_CLOSED] = ended
        if self._accepting:
            cells[_LOAD] = self.accepted - ended
        if self.on_closed is not None:
            self.on_closed()

    def failed(self) -> None:
        """A handler raised."""
        self.errors += 1
        self._cells[Field.ERRORS] = self.errors

    def cut(self, error: Ended) -> None:
        """A connection is ended of forkd's own accord."""
        self._cells[Field[f"ENDED_{error.reason.upper()}"]] += 1


# As plain integers: an enumeration's members cost a look-up each, and these are counted with every connection.
_ACCEPTED, _CLOSED, _LOAD = int(Field.ACCEPTED), int(Field.CLOSED), int(Field.LOAD)


class Policy(Protocol):
    """Who decides when listeners wait for clients."""

    def accepted(self, acceptor: Acceptor) -> None:
        """One has accepted a client, which is served next."""

    def exhausted(self, error: OSError) -> None:
        """The system could not give one more descriptor or buffer."""


class Acceptor:
    """One listening socket of a process.

    Args:
        loop: the process's loop.
        sock: a listening, non-blocking socket.
        serve: what serves each connection.
        policy: what this reports to.
    """

    def __init__(self, loop: PollLoop, sock: socket.socket, serve: Serve, policy: Policy) -> None:
        self._selector = loop.selector
        self._sock = sock
        self._fd = sock.fileno()
        self._serve = serve
        self._policy = policy
        # socket.accept() asks the listener for family and type each time, as enumerations; they never change. `_accept`
        # is what it calls itself: accept4(2), the descriptor not inheritable.
        self._accept = sock._accept  # type: ignore[attr-defined]
        self._family, self._type, self._proto = int(sock.family), int(sock.type), sock.proto
        self.queued = False

    def queue(self) -> None:
        """Joins the listener's wait queue, at its end."""
        self._selector.listeners[self._fd] = self.ready
        self._selector.epoll.register(self._fd, IN_EXCLUSIVE)
        self.queued = True

    def leave(self) -> None:
        """Leaves the wait queue."""
        if self.queued:
            self._selector.epoll.unregister(self._fd)
            self.queued = False

    def requeue(self) -> None:
        """Goes to the end of the wait queue, so that the next client wakes somebody else."""
        epoll = self._selector.epoll
        epoll.unregister(self._fd)
        epoll.register(self._fd, IN_EXCLUSIVE)

    def close(self) -> None:
        """Leaves for good and closes this process's copy of the listener."""
        self.leave()
        self._selector.listeners.pop(self._fd, None)
        self._sock.close()

    def ready(self, mask: int) -> None:
        """Accepts one client. One alone: the others of a burst are for the workers that they woke."""
        if not self.queued:  # a listener before this one in the same round took the worker's last place
            return
        try:
            descriptor, peer = self._accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._policy.exhausted(error)
            return
        self._policy.accepted(self)
        self._begin(descriptor, peer)

    def _begin(self, descriptor: int, peer: Any) -> None:
        sock = socket.socket(self._family, self._type, self._proto, descriptor)
        sock.setblocking(False)
        self._serve(sock, peer)

    def try_once(self) -> None:
        """Accepts a client that somebody else was woken for and has not come to take."""
        self.ready(IN)

    def last_call(self, count: Callable[[], None]) -> None:
        """Leaves the wait queue, then accepts a client that may have woken this worker and nobody else, and would wait
        for another's heartbeat. One that comes after the leaving wakes another worker.
        """
        if not self.queued:
            return
        self.leave()
        try:
            descriptor, peer = self._accept()
        except OSError:  # there is nobody, or no means to take one more: then it is for the others
            return
        count()
        self._begin(descriptor, peer)


class Balance:
    """A worker's share of the clients: when its listeners wait for some, and when not.

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
        self._waited = 0.0
        self._retry: Any = None
        self._complained = -1e9

    def start(self, acceptors: Sequence[Acceptor]) -> None:
        """Begins to take clients by these listeners."""
        self._acceptors = acceptors
        self._tally.set_accepting(True)
        self._come_back()

    def stop(self) -> None:
        """Takes no more clients but one that this worker alone may know of, and closes this process's copies of the
        listeners. That one is counted when this returns.
        """
        self._tally.set_accepting(False)
        self._tally.on_closed = None
        self._cancel()
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
            self._step_out(next_try(0.0, BEAT))

    def exhausted(self, error: OSError) -> None:
        """The system could not give one more descriptor or buffer: out for a moment, and one line a minute about it."""
        now = self._loop.time()
        if now - self._complained > 60:
            self._complained = now
            log.error("can't accept clients: %s; they wait in the backlog meanwhile", error.strerror)
        self._step_out(PAUSE)

    def beat(self) -> None:
        """At each heartbeat: takes a client that was left lying by a worker that was woken for it and stands still."""
        self._loads = self._board.loads()
        for acceptor in self._acceptors:
            if acceptor.queued:
                acceptor.try_once()

    def _least(self) -> int:
        rows = ((row[Field.LOAD], row[Field.HEARTBEAT]) for row in self._board.rows())
        return least_load(rows, monotonic_ns(), int(BEAT * 1e9))

    def _fair(self) -> bool:
        return is_fair(self._tally.active, self._least())

    def _step_out(self, seconds: float) -> None:
        # No last call here: it would be one client more for a worker that is ahead, and each would end in another step
        # out, so that a crowd would be served by this worker to the last. It is hardly needed either: for a client that
        # comes while this worker is at work the kernel wakes the next one, and who is behind is in the queue.
        for acceptor in self._acceptors:
            acceptor.leave()
        self._tally.on_closed = self._look_again
        self._wait(seconds)

    def _look_again(self) -> None:
        """One of this worker's connections has closed."""
        if self._fair():
            self._come_back()

    def _time_is_up(self) -> None:
        self._retry = None
        if self._fair():
            self._come_back()
        else:
            self._wait(next_try(self._waited, BEAT))

    def _come_back(self) -> None:
        self._cancel()
        self._tally.on_closed = None
        for acceptor in self._acceptors:
            if not acceptor.queued:
                acceptor.queue()

    def _wait(self, seconds: float) -> None:
        self._cancel()
        self._waited = seconds
        self._retry = self._loop.call_later(seconds, self._time_is_up)

    def _cancel(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
