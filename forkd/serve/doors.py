"""The doors that one client comes in by: listening sockets, and a connection that was there before.

A third one is in `rendezvous`.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from forkd.serve.accept import PAUSE, Acceptor
from forkd.serve.loop import IN, PollLoop
from forkd.serve.networks import Permission

if TYPE_CHECKING:
    from forkd.config.listener import Listener
    from forkd.config.units import Network
    from forkd.serve.once import Enter
    from forkd.system.bound import BoundListener

log = logging.getLogger("forkd.once")


def welcoming(listener: Listener, networks: Sequence[Network]) -> Callable[[Any], bool]:
    """What tells whether a client may come from where it comes, by its address as accept(2) gives it.

    Args:
        listener: whose networks it must be of.
        networks: of which it must be as well; empty: of any.
    """
    in_general, now = Permission(listener.allow, listener.deny), Permission(networks, ())
    return lambda peer: in_general.allow(peer) and now.allow(peer)


class Listening:
    """Listening sockets, closed when the first welcome client has come in.

    Args:
        bound: the sockets, which this is to close; whoever sits in a backlog is refused by the kernel then.
        networks: where the client may come from; empty: anywhere.
    """

    def __init__(self, bound: BoundListener, networks: Sequence[Network]) -> None:
        self._bound = bound
        self._is_welcome = welcoming(bound.listener, networks)
        self._closed = False
        self._acceptors: list[Acceptor] = []

    def open(self, loop: PollLoop, enter: Enter) -> None:
        """Waits on all sockets."""
        self._loop = loop
        self._enter = enter
        self._acceptors = [Acceptor(loop, sock, partial(self._came, sock), self) for sock in self._bound.sockets]
        self._queue()

    def _queue(self) -> None:
        for acceptor in self._acceptors if not self._closed else ():
            acceptor.queue()

    def _came(self, listener: socket.socket, sock: socket.socket, peer: Any) -> None:
        if not self._is_welcome(peer):
            log.warning("turned away %s", peer)
            sock.close()
            return
        vacant = listener.detach()
        self.close()
        self._enter(sock, peer, vacant)

    def accepted(self, acceptor: Acceptor) -> None:
        """As `accept.Policy`: whether it is the one will be seen."""

    def exhausted(self, error: OSError) -> None:
        """As `accept.Policy`: out for a moment."""
        log.error("can't accept the client: %s; it waits in the backlog meanwhile", error.strerror)
        for acceptor in self._acceptors:
            acceptor.leave()
        self._loop.call_later(PAUSE, self._queue)

    def close(self) -> None:
        """Refuses whoever comes, and whoever waits."""
        if not self._closed:
            self._closed = True
            for acceptor in self._acceptors:
                acceptor.close()
            self._bound.remove()

    def why_nobody(self) -> str:
        """Nothing: who does not come does not say why."""
        return ""


class FirstSender:
    """Datagram sockets; the first welcome sender is the client, to whom its socket is connected. What others have sent
    until then is thrown away by who serves the socket.

    Args:
        bound: the sockets; those that nobody came to, this is to close.
        networks: where the client may come from; empty: anywhere.
    """

    def __init__(self, bound: BoundListener, networks: Sequence[Network]) -> None:
        self._bound = bound
        self._is_welcome = welcoming(bound.listener, networks)
        self._waiting: list[socket.socket] = []

    def open(self, loop: PollLoop, enter: Enter) -> None:
        """Waits on all sockets."""
        self._loop = loop
        self._enter = enter
        for sock in self._bound.sockets:
            self._waiting.append(sock)
            loop.selector.served[sock.fileno()] = partial(self._came, sock)
            loop.selector.epoll.register(sock.fileno(), IN)

    def _came(self, sock: socket.socket, mask: int) -> None:
        if sock not in self._waiting:  # another one's client came in the same round
            return
        try:
            peer = sock.recvfrom(1, socket.MSG_PEEK)[1]
            if peer and self._is_welcome(peer):
                sock.connect(peer)
                self._let_in(sock, peer)
                return
            sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:  # it has gone, or can't be reached
            log.warning("can't serve the sender: %s", error.strerror)
            with contextlib.suppress(OSError):
                sock.recv(1)
            return
        # A unix socket without a name can't be answered.
        log.warning("turned away %s", peer or "a sender without an address")

    def _let_in(self, sock: socket.socket, peer: Any) -> None:
        self._leave()
        self._bound.sockets.remove(sock)
        self.close()
        self._enter(sock, peer, -1)

    def _leave(self) -> None:
        for sock in self._waiting:
            self._loop.selector.epoll.unregister(sock.fileno())
            del self._loop.selector.served[sock.fileno()]
        self._waiting.clear()

    def close(self) -> None:
        """Takes nothing of anybody else."""
        self._leave()
        self._bound.remove()

    def why_nobody(self) -> str:
        """Nothing: who does not come does not say why."""
        return ""


class Connected:
    """A connection that another process has accepted.

    Args:
        sock: the connection, non-blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def open(self, loop: PollLoop, enter: Enter) -> None:
        """Lets it in as soon as the loop runs, as a protocol has the right to expect."""
        loop.call_soon(self._begin, enter)

    def _begin(self, enter: Enter) -> None:
        try:
            peer = self._sock.getpeername()
        except OSError:  # it has gone meanwhile, which the first read will say
            peer = None
        enter(self._sock, peer, -1)

    def close(self) -> None:
        """Nothing: it is in already."""

    def why_nobody(self) -> str:
        """Nothing: it came."""
        return ""
