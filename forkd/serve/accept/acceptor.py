"""Accepting: one listening socket of a worker, and the counters of the connections that came by it.

The listener's wait queue in the kernel decides which worker is woken (EPOLLEXCLUSIVE: one worker a client). The kernel
wakes the first entry that waits, so a worker that has accepted leaves the queue and joins it again at its end. When a
worker should not or can't take clients is decided by `balance`, and for a listener with limits also by `limits`; both
are told of what happens here. A client is passed on to `serve`, which owns its socket from then on.
"""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from math import inf
from typing import Any, ClassVar, Protocol

from forkd.ended import Ended
from forkd.serve.loop import FAST, IN, IN_EXCLUSIVE, PollLoop, Ready
from forkd.system.scoreboard import NOT_ACCEPTING, AcceptTimes, Field, Row

#: Seconds for which a worker takes no clients after the system could not give it a descriptor or a buffer.
PAUSE = 0.1

#: accept(2): this machine lacks something, or the listener was shut down, which the master sets right; other errors are
#: the client's, or the network's, and pass.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL}

# As plain integers: an enumeration's members cost a look-up each, and these are counted with every connection.
_ACCEPTED, _CLOSED, _LOAD = int(Field.ACCEPTED), int(Field.CLOSED), int(Field.LOAD)

#: Takes an accepted, non-blocking socket and the peer's address, and owns the socket from then on. It does not raise.
Serve = Callable[[socket.socket, Any], None]

#: Says of a client, by its address, why it is refused, or, where that is empty, what to call when it has gone.
Admit = Callable[[Any], tuple[str, Callable[[], None]]]


class CloseObserver(Protocol):
    """What is told that connections end, while it wants to know (`ConnectionStats.notify`)."""

    def connection_closed(self) -> None:
        """A connection is over, and no longer counted as active."""


class ConnectionStats:
    """The counters of a process's connections, shown on its row of the scoreboard.

    Args:
        row: the row.
        observer: told of each connection that is over, while `notify` is true.
        accept_times: where it is noted when each connection began; None: not at all.

    Attributes:
        accepted, ended, errors: connections accepted, connections over, exceptions out of handlers.
        began: notes by its descriptor that a connection begins.
        measure: what takes down what a connection was when it ends; None: nothing does (`listener_stats`).
        notify: whether the observer is told. A worker that simply takes clients has nothing to do when one ends, and is
            spared the calls.
    """

    __slots__ = ("_accepting", "_cells", "_observer", "accepted", "began", "ended", "errors", "notify")

    measure: ClassVar[None] = None

    def __init__(self, row: Row, observer: CloseObserver, accept_times: AcceptTimes | None = None) -> None:
        self._cells = row.cells
        self._observer = observer
        self.began = (accept_times or AcceptTimes()).record
        self._accepting = False
        self.accepted = 0
        self.ended = 0
        self.errors = 0
        self.notify = True

    @property
    def active(self) -> int:
        """Connections that are open."""
        return self.accepted - self.ended

    def set_accepting(self, accepting: bool) -> None:
        """Whether other workers should reckon with this one when they compare loads."""
        self._accepting = accepting
        self._cells[Field.LOAD] = self.active if accepting else NOT_ACCEPTING

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
        if self.notify:
            self._observer.connection_closed()

    def freed(self) -> None:
        """A connection needs no thread any more, though it is not over."""
        if self.notify:
            self._observer.connection_closed()

    def failed(self) -> None:
        """A handler raised."""
        self.errors += 1
        self._cells[Field.ERRORS] = self.errors

    def ended_early(self, error: Ended) -> None:
        """forkd ends a connection of its own accord."""
        self._cells[Field[f"ENDED_{error.reason.upper()}"]] += 1


class AcceptObserver(Protocol):
    """What decides when listeners wait for clients, and is told of those that come."""

    def accepted(self, acceptor: Acceptor) -> None:
        """A client was accepted, and is served next."""

    def exhausted(self, error: OSError) -> None:
        """The system could not give one more descriptor or buffer."""


class Acceptor:
    """One listening socket of a process.

    Args:
        loop: the process's loop.
        sock: a listening, non-blocking socket.
        serve: what serves each connection.
        observer: what this reports to.
        admit: the limits of a class that has some; None: every client is taken.

    Attributes:
        queued: whether it is in the listener's wait queue.
    """

    #: The class of what is accepted.
    connection_class: ClassVar[type[socket.socket]] = socket.socket

    def __init__(
        self, loop: PollLoop, sock: socket.socket, serve: Serve, observer: AcceptObserver, admit: Admit | None = None
    ) -> None:
        self._admit = admit
        self._loop = loop
        self._selector = loop.selector
        self._sock = sock
        self._fd = sock.fileno()
        self._serve = serve
        self._observer = observer
        # socket.accept() asks the listener for family and type each time, as enumerations; they never change. `_accept`
        # is what it calls itself: accept4(2), the descriptor not inheritable.
        self._accept = sock._accept  # type: ignore[attr-defined]
        self._accepted = observer.accepted
        self._family, self._type, self._proto = int(sock.family), int(sock.type), sock.proto
        self.queued = False
        self._ready: Ready = self.ready
        if FAST is not None and self._is_plain():
            self._ready = FAST.Accept(
                self, self._fd, self._proto, serve, observer.accepted, self.connection_class, self._admit
            )
        self._poll = select.poll()
        self._poll.register(self._fd, select.POLLIN)

    def _is_plain(self) -> bool:
        """Whether the compiled twin knows how clients are accepted and served here."""
        return (
            isinstance(self._serve, FAST.Server)
            and isinstance(self._selector, FAST.Rounds)
            and self._family in (socket.AF_INET, socket.AF_INET6)
            and self._type == socket.SOCK_STREAM
            and (type(self)._take is Acceptor._take or self._admit is not None)
            and getattr(self._accept, "__func__", None) is None
        )

    def successor(self, sock: socket.socket) -> Acceptor:
        """One that serves the clients of another socket as this one does."""
        return Acceptor(self._loop, sock, self._serve, self._observer)

    def queue(self) -> bool:
        """Joins the listener's wait queue, at its end; whether it did."""
        self._selector.listeners[self._fd] = self._ready
        self._selector.epoll.register(self._fd, IN_EXCLUSIVE)
        self.queued = True
        return True

    def requeue(self) -> None:
        """Goes to the end of the wait queue, so that the next client wakes another worker."""
        self._selector.requeue(self._fd)

    def leave(self) -> None:
        """Leaves the wait queue."""
        self._unwatch()

    def ready(self, mask: int) -> None:
        """Accepts one client. One alone: the others of a burst are for the workers that they woke."""
        if not self.queued:  # a listener before this one in the same round has used the worker's last slot
            return
        try:
            descriptor, peer = self._accept()
        except BlockingIOError:
            return
        except OSError as error:
            self.accept_failed(error)
            return
        self._take(descriptor, peer, self._accepted)

    def accept_failed(self, error: OSError) -> None:
        """Tells of it, if it is this machine that has too little."""
        if error.errno in _EXHAUSTED:
            self._observer.exhausted(error)

    def has_client(self) -> bool:
        """Whether a client waits. Asked before an accept that no event has announced: a process that has a copy of the
        listener may have cleared its O_NONBLOCK, and then accept(2) would wait for one.
        """
        return bool(self._poll.poll(0))

    def try_once(self) -> None:
        """Accepts a client for which another worker was woken that has not come to take it."""
        self.ready(IN)

    def last_call(self, count: Callable[[], None]) -> None:
        """Leaves the wait queue, then accepts a client that may have woken this worker and no other, and would wait for
        another's heartbeat. One that comes after the leaving wakes another worker.

        Args:
            count: called when there is such a client, before it is served.
        """
        if self.queued:
            self._unwatch()
            self._take_waiting(count)

    def take_rest(self, count: Callable[[], None], until: float = inf) -> None:
        """Leaves the wait queue, then accepts all clients that wait and for which this worker has room.

        Args:
            count: as of `last_call`.
            until: by the loop's time, when to leave the others, where more may come all the time.
        """
        self._unwatch()
        while self._has_room() and self._loop.time() < until and self._take_waiting(count):
            pass
        self.leave()

    def close(self) -> None:
        """Leaves for good and closes this process's copy of the listener."""
        self.leave()
        self._selector.listeners.pop(self._fd, None)
        self._sock.close()

    def _has_room(self) -> bool:
        """Whether a client may come now; where not, it waits for another worker."""
        return True

    def _take(self, descriptor: int, peer: Any, accepted: Callable[[Acceptor], None]) -> None:
        """Takes in a client that was accepted, and tells so before it is served."""
        accepted(self)
        sock = socket.socket(self._family, self._type, self._proto, descriptor)
        sock.setblocking(False)
        self._serve(sock, peer)

    def _take_waiting(self, count: Callable[[], None]) -> bool:
        """Accepts a client if one waits; whether one did."""
        os.set_blocking(self._fd, False)
        try:
            if not self.has_client():
                return False
            descriptor, peer = self._accept()
        except OSError:  # another worker has taken it, or the system can't take one more
            return False
        self._take(descriptor, peer, lambda _: count())
        return True

    def _unwatch(self) -> None:
        if self.queued:
            self._selector.epoll.unregister(self._fd)
            self.queued = False
