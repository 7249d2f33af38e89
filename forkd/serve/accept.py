"""Accepting: a listening socket of a worker, and the count of those who came by it.

The listener's wait queue in the kernel decides who is woken (EPOLLEXCLUSIVE: one worker a client). It wakes its first
entry that waits, so a worker that has accepted leaves the queue and joins it again at its end. When a worker should not
or can't take clients is up to `balance`, and for a listener with limits also to `guard`.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any, Protocol

from forkd.ended import Ended
from forkd.serve.loop import IN, IN_EXCLUSIVE, PollLoop
from forkd.system.roll import Roll
from forkd.system.scoreboard import NOBODY, Field, Row

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
        self._accepted = policy.accepted
        self._family, self._type, self._proto = int(sock.family), int(sock.type), sock.proto
        self.queued = False

    def queue(self) -> bool:
        """Joins the listener's wait queue, at its end; whether it did."""
        self._selector.listeners[self._fd] = self.ready
        self._selector.epoll.register(self._fd, IN_EXCLUSIVE)
        self.queued = True
        return True

    def leave(self) -> None:
        """Leaves the wait queue."""
        self._unwatch()

    def _unwatch(self) -> None:
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
        self._came(descriptor, peer, self._accepted)

    def _came(self, descriptor: int, peer: Any, accepted: Callable[[Acceptor], None]) -> None:
        """Takes in a client that was accepted, and tells so before it is served."""
        accepted(self)
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
        self._unwatch()
        try:
            descriptor, peer = self._accept()
        except OSError:  # there is nobody, or no means to take one more: then it is for the others
            return
        self._came(descriptor, peer, lambda _: count())
