"""Where the one client of `forkd once` comes from: a listening socket, a datagram socket, or an accepted connection.

Each source hands one client to `on_connection` and closes whatever could let in a second one. A fourth source, which
connects by itself, is `rendezvous`. `app.once` makes the source, and `server` opens it.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from forkd.serve.accept.acceptor import PAUSE, Acceptor
from forkd.serve.accept.access import PROXY_HEADER, Networks, Permission, format_peer
from forkd.serve.accept.proxy_protocol import Header, ProxiedSocket, ProxyHeaderReader, header_seconds
from forkd.serve.loop import IN, PollLoop

if TYPE_CHECKING:
    from forkd.config.listener import Listener
    from forkd.config.values import Network
    from forkd.system.listeners import BoundListener

log = logging.getLogger("forkd.once")

#: Takes the client's non-blocking socket, its address, and `listener_fd`: the descriptor of the listener, which the
#: connection may take over and which is closed otherwise; -1 where there is none.
OnConnection = Callable[[socket.socket, Any, int], None]


class ConnectionSource(Protocol):
    """Where the client comes from."""

    def open(self, loop: PollLoop, on_connection: OnConnection) -> None:
        """Takes a client from now on; `on_connection` is called once, by the loop, when the source is closed again."""

    def close(self) -> None:
        """Takes no client any more."""

    def last_error(self) -> str:
        """What may have kept the client from coming, for the log; empty where nothing is known."""


def client_check(listener: Listener, networks: Sequence[Network]) -> Callable[[Any], bool]:
    """Makes what tells whether a client may come, by its address as accept(2) gives it.

    Args:
        listener: the client must be in its networks.
        networks: `once.from`, which the client must be in as well; empty: any.
    """
    of_listener, of_once = Permission(listener.allow, listener.deny), Permission(networks, ())
    return lambda peer: of_listener.allow(peer) and of_once.allow(peer)


def _about(bound: BoundListener) -> dict[str, str]:
    """The fields of a record about one of its clients, of which a flood is told in short."""
    return {"listener": str(bound.address)}


class ListeningSource:
    """Listening sockets, closed when the first client that may come has been accepted.

    Args:
        bound: the sockets, which this closes; the kernel then refuses every client that is still in a backlog.
        networks: where the client may come from; empty: anywhere.
    """

    def __init__(self, bound: BoundListener, networks: Sequence[Network]) -> None:
        self._bound = bound
        self._may_come = client_check(bound.listener, networks)
        self._proxies = Networks(bound.listener.proxy_protocol)
        self._readers: list[ProxyHeaderReader] = []  # of connections whose client is not known yet
        self._closed = False
        self._acceptors: list[Acceptor] = []

    def open(self, loop: PollLoop, on_connection: OnConnection) -> None:
        """Waits on all sockets."""
        self._loop = loop
        self._on_connection = on_connection
        self._acceptors = [Acceptor(loop, sock, partial(self._serve, sock), self) for sock in self._bound.sockets]
        self._queue()

    def _queue(self) -> None:
        for acceptor in self._acceptors if not self._closed else ():
            acceptor.queue()

    def _serve(self, listener: socket.socket, sock: socket.socket, peer: Any) -> None:
        if not self._proxies:
            self._serve_client(listener, sock, peer)
        elif self._proxies.contains(peer):
            proxied = ProxiedSocket(sock.family, sock.type, sock.proto, sock.detach())
            proxied.setblocking(False)
            failed = partial(self._header_failed, proxied, peer)
            found = partial(self._take_client, listener, proxied, peer)
            seconds = header_seconds(self._bound.listener.timeouts)
            self._readers.append(ProxyHeaderReader(self._loop, proxied, seconds, found, failed))
        else:
            log.warning("refused client %s (denied)", format_peer(peer), extra=_about(self._bound))
            sock.close()

    def _take_client(self, listener: socket.socket, sock: ProxiedSocket, proxy: Any, header: Header) -> None:
        if self._closed:  # another client was first
            sock.close()
            return
        sock.proxy_header, sock.proxy_peername = header, proxy
        self._serve_client(listener, sock, header.source or proxy)

    def _header_failed(self, sock: socket.socket, proxy: Any, why: str) -> None:
        sock.close()
        if why:
            log.warning("refused proxy %s (%s: %s)", format_peer(proxy), PROXY_HEADER, why, extra=_about(self._bound))

    def _serve_client(self, listener: socket.socket, sock: socket.socket, peer: Any) -> None:
        if not self._may_come(peer):
            log.warning("refused client %s (denied)", format_peer(peer), extra=_about(self._bound))
            sock.close()
            return
        listener_fd = listener.detach()
        self.close()
        self._on_connection(sock, peer, listener_fd)

    def accepted(self, acceptor: Acceptor) -> None:
        """As `acceptor.Policy`: nothing, as the client may still be refused."""

    def exhausted(self, error: OSError) -> None:
        """As `acceptor.Policy`: waits until the system may have means again."""
        log.error("can't accept the client: %s; it waits in the backlog meanwhile", error.strerror)
        for acceptor in self._acceptors:
            acceptor.leave()
        self._loop.call_later(PAUSE, self._queue)

    def close(self) -> None:
        """Refuses every further client, and those in a backlog."""
        if not self._closed:
            self._closed = True
            for acceptor in self._acceptors:
                acceptor.close()
            for reader in self._readers:
                reader.cancel()
            self._bound.remove()

    def last_error(self) -> str:
        """Nothing is known of a client that did not connect."""
        return ""


class FirstSenderSource:
    """Datagram sockets; the first sender that may come is the client, and its socket is connected to it.

    What others have sent to that socket until then is thrown away by the transport that serves it.

    Args:
        bound: the sockets; this closes all but the client's.
        networks: where the client may come from; empty: anywhere.
    """

    def __init__(self, bound: BoundListener, networks: Sequence[Network]) -> None:
        self._bound = bound
        self._may_come = client_check(bound.listener, networks)
        self._waiting: list[socket.socket] = []

    def open(self, loop: PollLoop, on_connection: OnConnection) -> None:
        """Waits on all sockets."""
        self._loop = loop
        self._on_connection = on_connection
        for sock in self._bound.sockets:
            self._waiting.append(sock)
            loop.selector.served[sock.fileno()] = partial(self._ready, sock)
            loop.selector.epoll.register(sock.fileno(), IN)

    def _ready(self, sock: socket.socket, mask: int) -> None:
        if sock not in self._waiting:  # the client came to another socket in the same round
            return
        try:
            peer = sock.recvfrom(1, socket.MSG_PEEK)[1]
            if peer and self._may_come(peer):
                sock.connect(peer)
                self._serve(sock, peer)
                return
            sock.recv(1)
        except BlockingIOError:
            return
        except OSError as error:  # the sender is gone, or can't be reached
            log.warning("can't serve the sender: %s", error.strerror, extra=_about(self._bound))
            with contextlib.suppress(OSError):
                sock.recv(1)
            return
        # A unix socket without a name can't be answered.
        who = format_peer(peer) if peer else "without an address"
        log.warning("refused client %s (denied)", who, extra=_about(self._bound))

    def _serve(self, sock: socket.socket, peer: Any) -> None:
        self._leave()
        self._bound.sockets.remove(sock)
        self.close()
        self._on_connection(sock, peer, -1)

    def _leave(self) -> None:
        for sock in self._waiting:
            self._loop.selector.epoll.unregister(sock.fileno())
            del self._loop.selector.served[sock.fileno()]
        self._waiting.clear()

    def close(self) -> None:
        """Takes no datagram of another sender."""
        self._leave()
        self._bound.remove()

    def last_error(self) -> str:
        """Nothing is known of a client that did not send."""
        return ""


class AcceptedSource:
    """A connection that another process has accepted, such as inetd or systemd.

    Args:
        sock: the connection, non-blocking.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def open(self, loop: PollLoop, on_connection: OnConnection) -> None:
        """Hands it over as soon as the loop runs, as a protocol has the right to expect."""
        loop.call_soon(self._serve, on_connection)

    def _serve(self, on_connection: OnConnection) -> None:
        try:
            peer = self._sock.getpeername()
        except OSError:  # the client is gone, which the first read will tell
            peer = None
        on_connection(self._sock, peer, -1)

    def close(self) -> None:
        """Nothing: the connection is all there is."""

    def last_error(self) -> str:
        """Nothing: the client is there."""
        return ""
