"""Handlers that are whole servers: each is started with a listener's sockets, accepts by itself, and is told to stop.

A library that insists on its own accept gets sockets that tell forkd of each client and of its end (`ListeningSocket`).
What a library hides from those, by a copy of the listening socket or by TLS that takes a connection's descriptor over,
is found among this process's own descriptors, at each heartbeat. So connections are counted, listed, bounded by
deadlines and waited for as those of other handlers are; but their client is in before anyone can refuse it.

A server stops by what it was started as: an object's own method, else the cancellation of its coroutine. It is done
when it has ended and its connections have; its owner bounds the time. A worker owns a `WholeServers`, `forkd once` an
`OneClientServer`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import os
import socket
from collections.abc import Callable, Coroutine, Mapping
from threading import get_ident
from time import monotonic
from typing import Any

from forkd import drain
from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.ended import Ended
from forkd.errors import HandlerError
from forkd.serve.handlers import Handler, ServerEntry, end_if_forked, handler_error, server_entry
from forkd.serve.loop import PollLoop
from forkd.serve.stream.handed_over import HandedOver, HandOverServer
from forkd.serve.stream.transport import ServerContext
from forkd.system.listeners import BoundListener
from forkd.system.process import close_in_place
from forkd.system.socket_stats import WILDCARDS, inode_of, own_sockets

#: Seconds that a server has to close its listening sockets, once it is told to stop, before they are taken away; and to
#: accept, where there is but one client.
_ACCEPTING = 0.5

#: Seconds from a server's last accept until it is told to stop: clients that have just come say what they want.
_FIRST_WORDS = 0.2

#: Seconds from one look for a server's first accept to the next, and while a worker drains for the ends of connections.
_LOOK_EVERY = 0.05

#: Seconds for which an accept waits that is to wait without end.
_VERY_LONG = 1e6

#: Of all time, the part that looking for connections may take.
_LOOKING = 0.01

#: Seconds from a server's start until its failure has the worker replaced, at least: one that fails each time is not to
#: have workers forked without end.
_LEAST_LIFE = 1.0

#: How servers are told to stop: the first of these that can be called without arguments. A method that is a coroutine
#: is waited for, and `wait_closed` after `close`.
_STOPS = ("close", "cleanup", "stop", "aclose", "shutdown", "stopListening")


class ListeningSocket(socket.socket):
    """A listening socket as a server gets it: tells of each client that is accepted. What would change it for other
    workers, who have the same one, it does not do.

    Attributes:
        connections: what is told; None: nothing is, as of a copy.
    """

    connections: ServerConnections | None = None

    @classmethod
    def of(cls, sock: socket.socket, connections: ServerConnections) -> ListeningSocket:
        """The same socket, taken over."""
        taken = cls(sock.family, sock.type, sock.proto, sock.detach())
        taken.setblocking(False)
        taken.connections = connections
        return taken

    def accept(self) -> tuple[socket.socket, Any]:
        """As of any socket. In one turn of the loop one client alone: the others of a burst are for the other workers
        that they woke.
        """
        if self.connections is not None and not self.connections.take_turn():
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        descriptor, peer = self._accept()  # type: ignore[attr-defined]
        sock = AcceptedSocket(self.family, self.type, self.proto, descriptor)
        if socket.getdefaulttimeout() is None and self.gettimeout():
            sock.setblocking(True)
        if self.connections is not None:
            sock.connection = self.connections.accepted(sock, peer)
        return sock, peer

    def setblocking(self, flag: bool, /) -> None:
        """As `settimeout`."""
        self.settimeout(None if flag else 0.0)

    def settimeout(self, value: float | None, /) -> None:
        """As of any socket, but that waiting without end is waiting very long: the file description is other workers'
        too, whose loops would stand still in accept(2), were it a blocking one.
        """
        super().settimeout(_VERY_LONG if value is None else value)

    def listen(self, backlog: int = 0, /) -> None:
        """Nothing: it listens, with the backlog of the settings."""

    def shutdown(self, how: int, /) -> None:
        """Nothing."""


class OneClientSocket(ListeningSocket):
    """In the place of a listening socket, where a process serves one client, which it has accepted already."""

    _client: tuple[socket.socket, Any] | None = None

    def bring(self, sock: socket.socket, peer: Any) -> None:
        """Here is the client. Then this is to become readable."""
        self._client = sock, peer

    def take_back(self) -> bool:
        """Closes the client if it was not accepted; whether it was not."""
        if self._client is None:
            return False
        self._client[0].close()
        self._client = None
        self.recv(1)
        return True

    def accept(self) -> tuple[socket.socket, Any]:
        """The client, once; as of any socket."""
        if self._client is None:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.recv(1)
        (client, peer), self._client = self._client, None
        sock = AcceptedSocket(client.family, client.type, client.proto, client.detach())
        if self.connections is not None:
            borrowed = BorrowedSocket(sock.family, sock.type, sock.proto, sock.fileno())
            sock.connection = self.connections.add(borrowed, peer)
        return sock, peer


class AcceptedSocket(socket.socket):
    """A connection that a server has accepted: tells when it is closed.

    Attributes:
        connection: what is told.
    """

    connection: ServerConnection | None = None

    def _real_close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None:
            connection.closing()
        super()._real_close()  # type: ignore[misc]


class BorrowedSocket(socket.socket):
    """A socket whose descriptor something else owns: when closed it only lets go of that."""

    def close(self) -> None:
        """See above."""
        self.detach()


class ServerConnection(HandedOver):
    """A connection that a server has accepted.

    Args:
        sock: its descriptor.
        peer: the peer's address.
        server: the connections of its listener.
        inode: the socket's, by which it is known that the descriptor still is it.
    """

    __slots__ = ("_inode",)
    _server: ServerConnections

    def __init__(self, sock: BorrowedSocket, peer: Any, server: ServerConnections, inode: int) -> None:
        super().__init__(sock, peer, server)
        self._inode = inode

    @property
    def is_there(self) -> bool:
        """Whether it is open."""
        return inode_of(self._sock.fileno()) == self._inode

    def closing(self) -> None:
        """Its socket is about to be closed."""
        if (
            self._server.is_here()
        ):  # else a thread closes it, or a process that the handler has forked: it is looked for
            self.finish()

    def finish(self, error: BaseException | None = None) -> None:
        """It is over."""
        if self._server.forget(self._inode):
            if not self.is_there:  # its descriptor may be another socket's by now
                self._sock.close()
            super().finish(error)

    def check(self, now: float) -> float:
        """As `deadlines.Watched`."""
        if self.is_there:
            return super().check(now)
        self.finish()
        return 0.0

    def end(self, error: Ended) -> None:
        """Ends it, of forkd's own accord."""
        if self.is_there:
            super().end(error)

    def abort(self) -> None:
        """Shuts it down; the server then closes it."""
        if self.is_there:
            super().abort()

    def close_at_exit(self) -> None:
        """At the end of the process: nothing more is to be read."""
        if self.is_there:
            super().close_at_exit()

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the socket; the number stays taken, as the server's object has it."""
        if self.is_there:
            close_in_place(self._sock.fileno())

    @property
    def cookie(self) -> int:
        """What the kernel calls the connection; 0 when it is over."""
        return super().cookie if self.is_there else 0

    def note_descriptor(self, descriptor: int) -> None:
        """It is open by this number, among others maybe."""
        if not self.is_there:
            self._sock.close()
            self._sock = BorrowedSocket(fileno=descriptor)


class ServerConnections(HandOverServer):
    """The connections of one listener that is served by a whole server.

    Args:
        context: what the process's connections share.
        bound: the listener.
    """

    def __init__(self, context: ServerContext, bound: BoundListener) -> None:
        super().__init__(context, bound.listener, bound.address)
        self.linger = 0.0  # closing is the server's own
        self._count = context.stats.opened
        self._thread = get_ident()
        self._has_accepted = False  # in this turn of the loop
        self._places = [(sock.family, sock.getsockname()) for sock in bound.sockets]
        self._open: dict[int, ServerConnection] = {}  # by inode
        self._others: set[int] = set()  # inodes of sockets that are something else

    @property
    def are_open(self) -> bool:
        """Whether there is one."""
        return bool(self._open)

    def is_here(self) -> bool:
        """Whether this thread is the loop's, and this process too."""
        return get_ident() == self._thread and not self.loop.is_forked

    def take_turn(self) -> bool:
        """Whether a client may be accepted now."""
        if not self.is_here():
            return True
        if self._has_accepted:
            return False
        self._has_accepted = True
        self.loop.call_soon(self._next_turn)
        return True

    def _next_turn(self) -> None:
        self._has_accepted = False

    def accepted(self, sock: socket.socket, peer: Any) -> ServerConnection | None:
        """Counts a connection that was accepted; None where it has to be looked for, as one of another thread."""
        if not self.is_here():
            return None
        self._count()
        return self.add(BorrowedSocket(sock.family, sock.type, sock.proto, sock.fileno()), peer)

    def add(self, sock: BorrowedSocket, peer: Any) -> ServerConnection:
        """Watches over a connection that is counted."""
        inode = inode_of(sock.fileno())
        self.began(sock.fileno())
        self._open[inode] = connection = ServerConnection(sock, peer, self, inode)
        return connection

    def forget(self, inode: int) -> bool:
        """A connection is over; whether it was not before."""
        return self._open.pop(inode, None) is not None

    def look(self, found: Mapping[int, int]) -> None:
        """Compares what is known with what is there.

        Args:
            found: the descriptor of each socket that this process has, by its inode.
        """
        for inode, connection in list(self._open.items()):
            if inode in found:
                connection.note_descriptor(found[inode])
            else:
                connection.finish()
        self._others &= found.keys()
        for inode in found.keys() - self._open.keys() - self._others:
            sock: BorrowedSocket | None = None
            with contextlib.suppress(OSError):  # it is not connected, or was closed by a thread
                sock = BorrowedSocket(fileno=found[inode])
                if self._is_ours(sock):
                    self._count()
                    self.add(sock, sock.getpeername())
                    continue
            self._others.add(inode)
            if sock is not None:
                sock.close()

    def _is_ours(self, sock: socket.socket) -> bool:
        """Whether it was accepted here: its own end has a listener's name. Raises OSError where it has no other end."""
        sock.getpeername()
        name = sock.getsockname()
        if sock.family == socket.AF_UNIX:
            return bool(name) and (socket.AF_UNIX, name) in self._places
        places = [place for family, place in self._places if family == sock.family]
        return any(name[1] == place[1] and place[0] in (name[0], WILDCARDS[sock.family]) for place in places)


class WholeServer:
    """The server of one listener.

    Args:
        context: what the process's connections share.
        bound: the listener, whose sockets this takes over.
        handler: what makes the server.
        kind: what it gets in their place.

    Attributes:
        sockets: what the server gets.
        connections: those that it has accepted.
        running: the task of what the settings name.
    """

    def __init__(
        self,
        context: ServerContext,
        bound: BoundListener,
        handler: Handler,
        kind: type[ListeningSocket] = ListeningSocket,
    ) -> None:
        self._loop, self._process = context.loop, os.getpid()
        self._address, self._name, self._target = bound.address, bound.listener.served_by, handler.target
        entry = server_entry(handler.target)
        assert entry is not None  # noqa: S101 (for the type checker: it was recognized)
        self._entry = entry
        self._inodes = {inode_of(sock.fileno()) for sock in bound.sockets}
        self.connections = ServerConnections(context, bound)
        self.sockets = [kind.of(sock, self.connections) for sock in bound.sockets]
        bound.sockets[:] = self.sockets
        self._tasks = context.handler_tasks
        context.at_end.append(self._abort)
        self.running = self._begin_task(self._run())
        self._stopping: asyncio.Task[None] | None = None
        self._stoppable: list[Any] = []
        self._failure: BaseException | None = None
        self._serves_since = 0.0

    def _begin_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is ended with those of other handlers, should it still run in the end."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _abort(self) -> None:
        """After the loop has stopped: its time is up."""
        self.running.cancel()
        if self._stopping is not None:
            self._stopping.cancel()

    # Its beginning

    async def wait_accepting(self, deadline: float) -> None:
        """Returns when the server accepts clients, or was told to stop.

        Args:
            deadline: how long to wait at most, in the loop's time.

        Raises:
            HandlerError: it has failed or ended before, or has not come to it in time.
        """
        running, began = self.running, monotonic()
        while not running.done() and not self._is_accepting():
            if self._loop.time() > deadline:
                raise HandlerError(f"{self._name} does not accept clients at {self._address} in time (boot_timeout)")
            await asyncio.wait({running}, timeout=min(_LOOK_EVERY, max(0.001, monotonic() - began)))
        self._serves_since = monotonic()
        if self._stopping is not None:
            return
        if self._failure is not None:
            raise handler_error(f"{self._name} could not begin to serve {self._address}", self._failure) from None
        if not self._is_accepting() and not (self._stoppable and not self._entry.method):
            raise HandlerError(f"{self._name} has ended before it accepted clients at {self._address}")
        running.add_done_callback(lambda _: self._report_failure())

    async def _run(self) -> None:
        """Runs what the settings name, for as long as it runs."""
        entry, serve = self._entry, self._target
        try:
            if entry.method:
                server = serve() if entry.is_class else serve
                self._note_stoppable(server)
                serve = getattr(server, entry.method)
            sockets = self._sockets_for(entry)
            made = serve(**{entry.keyword: sockets}) if entry.keyword else serve(sockets)
            if inspect.isawaitable(made):
                made = await made
            for one in made if isinstance(made, list | tuple) else [made]:
                self._note_stoppable(one)
        except asyncio.CancelledError:
            if self._stopping is None:
                self._failure = RuntimeError("its task was cancelled")
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            end_if_forked(self._process, error)
            self._failure = error

    def _sockets_for(self, entry: ServerEntry) -> Any:
        if not entry.takes_one:
            return list(self.sockets)
        if len(self.sockets) > 1:
            raise ValueError(f"it takes one socket, and {self._address} stands for {len(self.sockets)}")
        return self.sockets[0]

    def _note_stoppable(self, server: Any) -> None:
        if hasattr(server, "should_exit") or any(_can_call(server, name) for name in _STOPS):
            self._stoppable.append(server)

    def _report_failure(self) -> None:
        if self._failure is not None:
            message = f"The server at {self._address} has failed."
            self._loop.call_exception_handler({"message": message, "exception": self._failure})

    def _is_accepting(self) -> bool:
        """Whether the loop watches one of the listening sockets, or a copy of one."""
        return bool(self._watched())

    def _watched(self) -> list[int]:
        """The descriptors of its listening sockets that the loop watches for it."""
        return [key.fd for key in self._loop.selector.get_map().values() if inode_of(key.fd) in self._inodes]

    # Its end

    def why_lost(self, found: Mapping[int, int]) -> str:
        """Why it serves no more, though it was not told to stop; empty while it does, and for a while from its start.

        Args:
            found: as of `ServerConnections.look`.
        """
        if self._stopping is not None or not self._serves_since or monotonic() - self._serves_since < _LEAST_LIFE:
            return ""
        ended = self.running.done()
        if ended and self._failure is not None:
            return f"its server at {self._address} has failed"
        if self._inodes.isdisjoint(found) or (ended and not self._stoppable and not self._is_accepting()):
            return f"its server at {self._address} has ended"
        return ""

    def stop(self, on_done: Callable[[], None]) -> None:
        """Tells it, once, to take no more clients, and to end when those that are here have gone.

        Args:
            on_done: called when it has ended.
        """
        if self._stopping is not None:
            return
        # Python 3.13 removes the path of a unix socket that it closes; this one is other workers' too.
        unix_sockets = getattr(self._loop, "_unix_server_sockets", {})
        for sock in self.sockets:
            unix_sockets.pop(sock, None)
        self._take_from_loop()
        self._stopping = self._begin_task(self._stop(asks_itself=drain.is_awaited()))
        self._stopping.add_done_callback(lambda _: on_done())

    @property
    def is_stopping(self) -> bool:
        """Whether it was told to stop."""
        return self._stopping is not None

    @property
    def has_stopped(self) -> bool:
        """Whether it was told to stop, and has."""
        return self._stopping is not None and self._stopping.done()

    async def _stop(self, *, asks_itself: bool) -> None:
        if self.connections.are_open:  # a library may close those that have not said anything yet
            await asyncio.sleep(_FIRST_WORDS)
        ending: list[asyncio.Task[None]] = [self._loop.create_task(self._end(one)) for one in self._stoppable]
        if not ending and not asks_itself:
            self.running.cancel()
        until = monotonic() + _ACCEPTING
        while (self._has_listeners() or not all(one.done() for one in ending)) and monotonic() < until:
            await asyncio.sleep(_LOOK_EVERY)
        if not ending and self._has_listeners():
            self.running.cancel()
        self._take_from_loop()
        for fd, inode in own_sockets():
            if inode in self._inodes:
                close_in_place(fd)  # by its number: the server may close it yet
        await asyncio.wait([self.running, *ending])
        for sock in self.sockets:
            sock.detach()  # a server may have closed it by its number, which is something else then

    def _take_from_loop(self) -> None:
        """Has the loop not tell the server of clients any more."""
        for fd in self._watched():
            self._loop.remove_reader(fd)

    def _has_listeners(self) -> bool:
        """Whether a listening socket, or a copy of one, is open."""
        return any(inode_of(sock.fileno()) in self._inodes for sock in self.sockets) or any(
            inode in self._inodes for _, inode in own_sockets()
        )

    async def _end(self, server: Any) -> None:
        """Has one object stop, and waits for that where it can be waited for."""
        try:
            if hasattr(server, "should_exit"):
                server.should_exit = True
                return
            name = next(name for name in _STOPS if _can_call(server, name))
            await _finished(getattr(server, name)())
            if name == "close" and _can_call(server, "wait_closed"):
                await _finished(server.wait_closed())
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            message = f"The server at {self._address} could not be stopped."
            self._loop.call_exception_handler({"message": message, "exception": error})


class WholeServers:
    """The whole servers of a process.

    Args:
        loop: the process's.
        on_lost: called with a sentence when one has ended, or failed, of its own accord.
        on_progress: called whenever `have_stopped` may have a new answer.
    """

    def __init__(self, loop: PollLoop, on_lost: Callable[[str], None], on_progress: Callable[[], None]) -> None:
        self._loop = loop
        self._on_lost = on_lost
        self._on_progress = on_progress
        self._servers: list[WholeServer] = []
        self._next_look = 0.0

    async def serve(self, bound: BoundListener, handler: Handler, context: ServerContext, deadline: float) -> None:
        """Starts a listener's server, and waits for it; as of `WholeServer` and its `wait_accepting`."""
        server = WholeServer(context, bound, handler)
        self._servers.append(server)
        await server.wait_accepting(deadline)

    def beat(self) -> None:
        """At each heartbeat."""
        if self._loop.time() >= self._next_look:
            self._look()

    def _look(self) -> None:
        """Looks for what the servers' sockets do not tell."""
        began = self._loop.time()
        found = {inode: fd for fd, inode in own_sockets()}
        for server in self._servers:
            server.connections.look(found)
            if why := server.why_lost(found):
                self._on_lost(why)
        took = self._loop.time() - began
        self._next_look = began + took / _LOOKING

    def drain(self) -> None:
        """Tells the servers to stop."""
        for server in self._servers:
            server.stop(self._on_progress)
        self._look_while_draining()

    def _look_while_draining(self) -> None:
        self._look()
        self._loop.call_at(max(self._next_look, self._loop.time() + _LOOK_EVERY), self._look_while_draining)

    @property
    def have_stopped(self) -> bool:
        """Whether all were told to stop, and have."""
        return all(server.has_stopped for server in self._servers)


class OneClientServer:
    """The whole server of a process that serves one client. Called with that client, which is counted, it passes it on.

    Args:
        context: what the process's connections share.
        listener: its settings.
        address: where it really listens.
        handler: what makes the server.
        on_progress: called when the server has ended, told to or not.
    """

    def __init__(
        self,
        context: ServerContext,
        listener: Listener,
        address: Address,
        handler: Handler,
        on_progress: Callable[[], None],
    ) -> None:
        self._loop, self._closed = context.loop, context.stats.closed
        self._name = listener.served_by
        self._on_progress = on_progress
        self._bell, sock = socket.socketpair()
        self._server = WholeServer(context, BoundListener(listener, address, [sock]), handler, OneClientSocket)
        self._socket: OneClientSocket = self._server.sockets[0]  # type: ignore[assignment]
        self._came = False

    async def start(self, deadline: float) -> None:
        """As `WholeServer.wait_accepting`."""
        await self._server.wait_accepting(deadline)
        if not self._server.running.done():
            self._server.running.add_done_callback(lambda _: self._has_ended())

    def __call__(self, sock: socket.socket, peer: Any) -> None:
        """Serves the client and owns its socket."""
        self._came = True
        self._socket.bring(sock, peer)
        self._bell.send(b"!")
        self._loop.call_later(_ACCEPTING, self._check_accepted)

    def stop(self) -> None:
        """As of `WholeServer`."""
        self._server.stop(self._on_progress)

    def _has_ended(self) -> None:
        if not self._came and not self._server.is_stopping:
            self._report("has ended before its client came")
        self._on_progress()

    def _check_accepted(self) -> None:
        if self._socket.take_back():
            self._report("has not accepted its client, maybe since it accepts from a copy of its socket; run a daemon")
            self._closed()
            return
        self._look()

    def _look(self) -> None:
        """From time to time: whether the connection has ended in a way of which its socket does not tell."""
        self._server.connections.look({inode: fd for fd, inode in own_sockets()})
        self._loop.call_later(_ACCEPTING, self._look)

    def _report(self, what: str) -> None:
        self._loop.call_exception_handler({"exception": HandlerError(f"{self._name} {what}")})


def _can_call(server: Any, name: str) -> bool:
    """Whether an object has such a method that wants no arguments."""
    method = getattr(server, name, None)
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind()
    except TypeError:
        return False
    except ValueError:  # one in C, which does not tell its signature
        return True
    return True


async def _finished(result: Any) -> None:
    """Waits for what a method has returned, where that can be waited for."""
    if hasattr(result, "asFuture"):  # Twisted's Deferred, which asyncio can't await as it is
        result = result.asFuture(asyncio.get_running_loop())
    if inspect.isawaitable(result):
        await result
