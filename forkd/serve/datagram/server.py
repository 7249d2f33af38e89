"""The datagram sockets of a process: served from its start, and closed when it drains.

A handler is an `asyncio.DatagramProtocol` class or factory; each socket gets a protocol and a `DatagramTransport`.
Datagrams are no connections, so nothing says when a handler is done with one; its tasks do. A process that drains reads
what lies in its queues, calls each protocol's `shutdown()`, and keeps its sockets open while tasks run on its loop, but
for those that ran before the first client.
How long that may take is bounded by the worker or `forkd once`, which own a `DatagramServer`.
"""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from forkd.config.listener import Listener
from forkd.errors import HandlerError
from forkd.serve.accept.access import DENIED, PROXY_HEADER, AccessPolicy, Networks, Refusals
from forkd.serve.accept.proxy_protocol import Malformed, parse_datagram
from forkd.serve.datagram.peers import RecentPeer
from forkd.serve.datagram.transport import Admit, DatagramContext, DatagramTransport, Unwrap
from forkd.serve.handlers import Handler, check_protocol
from forkd.serve.loop import IN_EXCLUSIVE, PollLoop
from forkd.system.listeners import BoundListener
from forkd.system.scoreboard import Row
from forkd.system.shared_counters import SharedCounters


class DatagramServer:
    """All datagram sockets of a process.

    Args:
        loop: the process's loop.
        row: where datagrams are counted.
        on_lost: called with a listener's address when the handler has closed a socket of it by itself.
        on_progress: called whenever `close_if_done` may have a new answer, in a process that drains.
    """

    def __init__(
        self, loop: PollLoop, row: Row, on_lost: Callable[[str], None], on_progress: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._row = row
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._transports: list[DatagramTransport] = []
        self._reading: set[DatagramTransport] = set()  # those whose queue is not read to its end yet, when draining
        self._draining = False
        self._ending = False

    def serve(self, bound: BoundListener, handler: Handler, counters: SharedCounters | None = None) -> None:
        """Serves all sockets of a listener.

        Args:
            bound: the listener.
            handler: what serves it.
            counters: what this worker counts together with the others; None: senders are not checked.

        Raises:
            HandlerError: the protocol's factory or its `connection_made` has raised.
        """
        context = self._context_of(bound.listener, str(bound.address))
        if bound.listener.address.scheme != "udp":  # of a socket that workers share, one alone is woken for a datagram
            context = replace(context, watch=IN_EXCLUSIVE)
        if counters is not None:
            access = DatagramAccess(bound, self._loop, counters, self._row)
            context = replace(context, admit=access.admit, unwrap=access.unwrap)
        try:
            for sock in bound.sockets:
                self._start(sock, handler, context)
        except HandlerError as error:
            raise HandlerError(f"{bound.listener.served_by}: {error}") from None
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            reason = traceback.format_exception_only(error)[-1].strip()
            text = f"{bound.listener.served_by}: could not begin to serve {bound.address}: {reason}"
            raise HandlerError(text, traceback.format_exc()) from None

    def serve_client(self, sock: socket.socket, peer: Any, handler: Handler, listener: Listener) -> DatagramTransport:
        """Serves a socket that is connected to its one client, `peer`. Raises what the handler raises."""
        return self._start(sock, handler, self._context_of(listener, str(listener.address)), peer)

    def beat(self) -> None:
        """At each heartbeat."""
        for transport in self._transports:
            transport.beat()

    def recent(self) -> list[tuple[str, list[RecentPeer]]]:
        """The latest peers of each socket, with the listener's address."""
        return [(transport.about()["listener"], transport.recent()) for transport in self._transports]

    def drain(self) -> None:
        """Reads what lies in the queues, and no more."""
        self._draining = self._ending = True
        self._reading = set(self._transports)
        for transport in self._transports:
            transport.drain()

    def close_if_done(self) -> bool:
        """When the queues are read and no task is left, closes the sockets; whether all are closed, and all is sent."""
        if not self._transports:
            return True
        if any(not transport.is_closing() for transport in self._reading):
            return False
        if tasks := self._loop.client_tasks():
            next(iter(tasks)).add_done_callback(lambda _: self._progress())
            return False
        self.close()
        return False

    def close(self) -> None:
        """Closes the sockets when all is sent."""
        self._ending = True
        for transport in list(self._transports):
            transport.close()

    def abort(self) -> None:
        """Closes the sockets at once, without a word to the owner."""
        self._ending, self._draining = True, False
        for transport in list(self._transports):
            transport.abort()

    def _context_of(self, listener: Listener, address: str) -> DatagramContext:
        return DatagramContext(
            loop=self._loop,
            cells=self._row.cells,
            listener=address,
            on_drained=self._drained,
            on_closed=self._closed,
            write_limit=listener.limits.write_buffer,
        )

    def _start(
        self, sock: socket.socket, handler: Handler, context: DatagramContext, peer: Any = None
    ) -> DatagramTransport:
        sock.setblocking(False)
        protocol = check_protocol(handler.target(), handler.target, "datagram_received")
        transport = DatagramTransport(sock, protocol, context, peer)
        transport.start()
        self._transports.append(transport)
        return transport

    def _drained(self, transport: DatagramTransport) -> None:
        self._reading.discard(transport)
        self._progress()

    def _closed(self, transport: DatagramTransport) -> None:
        if transport not in self._transports:  # its protocol closed it, and then failed to begin
            return
        self._transports.remove(transport)
        self._reading.discard(transport)
        if self._ending:
            self._progress()
        else:
            self._on_lost(transport.about()["listener"])

    def _progress(self) -> None:
        if self._draining:
            self._on_progress()


class DatagramAccess:
    """The datagrams that one listener takes: by its networks, by the rate of one address, and by which proxy.

    Args:
        bound: the listener.
        loop: the worker's loop.
        counters: what the worker counts together with the others.
        row: where refused datagrams are counted.

    Attributes:
        admit: whether a datagram of this sender is taken; None: every sender's is.
        unwrap: takes the header off a datagram that came by a proxy; None: none does.
    """

    def __init__(self, bound: BoundListener, loop: PollLoop, counters: SharedCounters, row: Row) -> None:
        listener = bound.listener
        self._proxies = Networks(listener.proxy_protocol)
        self._refusals = Refusals(loop, str(bound.address), None, row, counters)
        policy = AccessPolicy(listener, str(bound.address), counters)
        self.admit: Admit | None = policy.admission(self._refusals.note)
        self.unwrap: Unwrap | None = self._unwrap if self._proxies else None

    def _unwrap(self, data: bytes, peer: Any) -> tuple[bytes, Any, Any] | None:
        """As `transport.Unwrap`. Where proxies are named, datagrams of other senders are dropped unparsed."""
        if not self._proxies.contains(peer):
            self._refusals.note(peer, DENIED)
            return None
        try:
            header, payload = parse_datagram(data)
        except Malformed as error:  # the proxy is not set up for this, or another program has its address
            self._refusals.note(peer, PROXY_HEADER, str(error))
            return None
        return payload, header.source or peer, header.destination
