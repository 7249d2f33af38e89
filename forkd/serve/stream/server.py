"""From a handler of whatever form to what serves accepted connections by it.

`stream_server` makes that from a listener's settings: a `ProtocolServer`, which gives each connection a protocol and a
transport. A handler that is `async def handle(reader, writer)` becomes a protocol factory first: asyncio's own streams,
over forkd's transport. One that blocks has a `ThreadServer`.

At the end of a process `close_connections` and `end_tasks` end what is still there, within bounded time. Workers and
`forkd once` use all of this; neither accepts here.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.ended import Ended, HandshakeFailed
from forkd.serve.accept.acceptor import Serve
from forkd.serve.accept.access import format_peer
from forkd.serve.accept.listener_stats import ListenerStats
from forkd.serve.accept.proxy_protocol import ProxyHeaderReader
from forkd.serve.deadlines import TimeoutPolicy
from forkd.serve.handlers import BLOCKING, Handler, check_protocol
from forkd.serve.lingering import Lingering
from forkd.serve.loop import FAST, PollLoop
from forkd.serve.stream.coroutine import streams_factory
from forkd.serve.stream.handed_over import HandedOver
from forkd.serve.stream.program import ProgramServer
from forkd.serve.stream.threads import ThreadServer, blocking_handler
from forkd.serve.stream.tls import (
    BufferedTlsSession,
    TlsContexts,
    TlsHandshake,
    TlsHandshakes,
    TlsSession,
    load_contexts,
)
from forkd.serve.stream.transport import Connection, ServerContext, StreamTransport
from forkd.system.socket_options import connection_tuner

log = logging.getLogger("forkd.tls")

ProtocolFactory = Callable[[], asyncio.BaseProtocol]

#: The options of listeners that take connections to whatever address (IP_TRANSPARENT of ip(7); linux/in6.h).
_TRANSPARENT = {socket.AF_INET: (socket.IPPROTO_IP, 19), socket.AF_INET6: (socket.IPPROTO_IPV6, 75)}

#: Bytes that a client may still send after a handshake that failed.
_MOST_READ = 65_536

#: Seconds that closed connections have to send what is unsent, and tasks to see to their cancellation, at the very end.
CLOSE_TIMEOUT = 0.5


def stream_server(
    handler: Handler,
    listener: Listener,
    address: Address,
    context: ServerContext,
    sockets: Iterable[socket.socket] = (),
) -> Serve:
    """What serves each connection of a listener.

    Args:
        handler: what the listener's settings name.
        listener: its settings.
        address: where it really listens, for the log.
        context: what the process's connections share.
        sockets: those that listen; none: the connection is there already.
    """
    contexts, outer = load_contexts(listener), context
    if contexts is not None and isinstance(context.stats, ListenerStats):
        context = replace(context, stats=context.stats.behind())
    if handler.form == "program":
        program = ProgramServer(context, listener, address)
        return program if contexts is None else TlsServer(outer, program, contexts, listener.tls.handshake)
    if handler.form in BLOCKING:
        return ThreadServer(context, blocking_handler(handler, address), listener, address)
    server = _protocol_server(handler, listener, address, context)
    server.sockname = common_name(sockets)
    serve = server if contexts is None else TlsServer(outer, server, contexts, listener.tls.handshake)
    if (tune := connection_tuner(listener)) is None:
        return serve
    return lambda sock, peer: serve(tune(sock), peer)


def _protocol_server(handler: Handler, listener: Listener, address: Address, context: ServerContext) -> ProtocolServer:
    """What serves each connection by a protocol, as of `stream_server`."""
    factory = handler.target
    if handler.form == "streams":
        factory = streams_factory(handler.target, context.loop, context.handler_tasks)
    timeouts = TimeoutPolicy(listener, context.deadlines)
    return Server(
        context,
        factory,
        str(address),
        write_limit=listener.limits.write_buffer,
        timeouts=timeouts if timeouts.first_check or timeouts.write else None,
        linger=listener.socket.linger,
    )


def common_name(sockets: Iterable[socket.socket]) -> Any:
    """What getsockname(2) says of every connection that comes by these listeners; None where that depends on it."""
    names = set()
    for sock in sockets:
        name = sock.getsockname()
        if isinstance(name, tuple):
            option = _TRANSPARENT.get(sock.family)
            if option is None or name[0] in ("0.0.0.0", "::") or sock.getsockopt(*option):  # noqa: S104 (compared)
                return None
        names.add(name)
    return names.pop() if len(names) == 1 else None


class ProtocolServer:
    """Serves accepted connections, each by a new protocol. An acceptor calls it; its transports observe it.

    Args:
        context: what the process's connections share.
        factory: makes a protocol, an `asyncio.Protocol` or `asyncio.BufferedProtocol`.
        listener: what the log calls where the connections come from.
        write_limit: unsent bytes above which a connection whose handler writes again is closed; 0: none.
        timeouts: their deadlines; None where there are none.
        linger: `socket.linger`.

    Attributes:
        sockname: as of `transport.ConnectionObserver`; what makes this may know it.
        listener, write_limit, timeouts, linger, access_log, measure, closed, ended_early: as of
            `transport.ConnectionObserver`.
    """

    def __init__(
        self,
        context: ServerContext,
        factory: ProtocolFactory,
        listener: str = "",
        *,
        write_limit: int = 0,
        timeouts: TimeoutPolicy | None = None,
        linger: float = 0.0,
    ) -> None:
        self._loop = context.loop
        self._factory = factory
        self._began = context.stats.began
        self.listener = listener
        self.sockname: Any = None
        self.write_limit = write_limit
        self.timeouts = timeouts
        self.linger = linger
        self.access_log = context.access_log
        self.measure = context.stats.measure
        self.closed, self.ended_early = context.stats.closed, context.stats.ended_early

    def __call__(self, sock: socket.socket, peer: Any, tls: TlsSession | None = None, watched: bool = False) -> None:
        """Serves one connection and owns its socket; one with TLS when its handshake is done.

        Args:
            sock, peer: as of `Serve`.
            tls: its TLS.
            watched: whether epoll watches it for reading already.
        """
        if tls is None:  # else it has begun with its handshake
            self._began(sock.fileno())
        try:
            transport = self.transport(self._factory(), sock, peer, tls)
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            if watched:
                self._loop.selector.epoll.unregister(sock.fileno())
            self.failed(sock, error)
        else:
            transport.start(watched=watched)

    def transport(
        self, protocol: Any, sock: socket.socket, peer: Any, tls: TlsSession | None = None
    ) -> StreamTransport:
        """A new connection. Raises HandlerError where what the factory has made is no protocol."""
        if not isinstance(protocol, asyncio.BaseProtocol):
            check_protocol(protocol, self._factory)
        return Connection(self._loop, sock, protocol, peer, self, tls)

    def failed(self, sock: socket.socket, error: BaseException) -> None:
        """Ends a connection that nothing could be made to serve."""
        sock.close()
        self.closed()
        self._loop.call_exception_handler({"message": "The protocol factory failed.", "exception": error})


@cache
def compiled_server(fast: Any) -> type[ProtocolServer]:
    """The compiled twin of `ProtocolServer`.

    Args:
        fast: the extension `serve._fast`.
    """

    class CompiledServer(fast.Server, ProtocolServer):  # type: ignore[misc]  # its module has no types
        pass

    return CompiledServer


#: What serves the connections of a listener in this process.
Server = ProtocolServer if FAST is None else compiled_server(FAST)


class TlsServer:
    """Serves accepted connections with TLS, each when its handshake is done.

    Args:
        context: what the process's connections share.
        server: what serves them then.
        contexts: the listener's certificates.
        seconds: that a handshake may take.
    """

    def __init__(
        self, context: ServerContext, server: ProtocolServer | ProgramServer, contexts: TlsContexts, seconds: float
    ) -> None:
        self._loop = context.loop
        self._began = context.stats.began
        self._server = server
        self._session = BufferedTlsSession if isinstance(server, ProgramServer) else TlsSession
        self._handshakes = TlsHandshakes(context.loop, context.deadlines, contexts, seconds)

    def __call__(self, sock: socket.socket, peer: Any) -> None:
        """Serves one connection and owns its socket."""
        self._began(sock.fileno())
        session = self._session(self._handshakes.contexts, sock)
        TlsHandshake(self._handshakes, session, sock, peer, partial(self._serve, session, sock, peer))

    def _serve(self, session: TlsSession, sock: socket.socket, peer: Any, watched: bool, failure: Ended | None) -> None:
        server = self._server
        if failure is None:
            if isinstance(server, ProtocolServer):
                server(sock, peer, session, watched)
                return
            if watched:
                self._loop.selector.epoll.unregister(sock.fileno())
            assert isinstance(session, BufferedTlsSession)  # noqa: S101 (for the type checker)
            server(sock, peer, session)
            return
        about = {"client": format_peer(peer), "listener": server.listener, "reason": failure.reason}
        log.info("closed client %r (%s): %s", peer, failure.reason, failure, extra=about)
        server.ended_early(failure)
        if server.linger and isinstance(failure, HandshakeFailed):
            # Else what it has sent beyond its hello resets the connection, and it never sees why.
            Lingering(self._loop, sock, server.linger, _MOST_READ, lambda _: server.closed(), watched=watched)
            return
        if watched:
            self._loop.selector.epoll.unregister(sock.fileno())
        sock.close()
        server.closed()


def transports_of(loop: PollLoop) -> list[StreamTransport | HandedOver]:
    """The connections that are open on a loop."""
    return [owner for owner in _owners(loop) if isinstance(owner, StreamTransport)] + list(loop.outside)


def beginnings_of(loop: PollLoop) -> list[ProxyHeaderReader | TlsHandshake]:
    """The connections of a loop that no handler has yet: their proxy's header, or their handshake, is waited for."""
    return [owner for owner in _owners(loop) if isinstance(owner, ProxyHeaderReader | TlsHandshake)]


def _owners(loop: PollLoop) -> list[object]:
    return [getattr(ready, "__self__", None) for ready in loop.selector.served.values()]


def close_connections(context: ServerContext) -> None:
    """After the loop has stopped: aborts its connections, and ends their threads and the tasks of streams handlers.

    Args:
        context: what the process's connections share.
    """
    for close in context.at_end:
        close()
    for transport in transports_of(context.loop):
        transport.abort()
    if tasks := list(context.handler_tasks):
        context.loop.run_until_complete(asyncio.wait(tasks, timeout=CLOSE_TIMEOUT))
    _cancel(context.loop, context.handler_tasks)


def end_tasks(loop: PollLoop) -> None:
    """At the very end: ends all tasks that still run, and asynchronous generators."""
    _cancel(loop, asyncio.all_tasks(loop))
    loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), CLOSE_TIMEOUT))


def _cancel(loop: PollLoop, tasks: Collection[asyncio.Task[Any]]) -> None:
    for task in (tasks := list(tasks)):
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=CLOSE_TIMEOUT))
