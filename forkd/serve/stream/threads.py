"""Blocking handlers: a function of (sock, address), or a socketserver request handler class, in a thread a client.

A worker has so many threads for a listener (`threads`), which it starts when they are first wanted and keeps. It takes
no more clients of the listener than that (`accept.limits`), so none waits here while another worker has a thread free.
The handler gets a blocking socket with a descriptor of its own, to close, wrap or pass on as it likes; the loop keeps
another (`handed_over`). An eventfd wakes the loop when a thread is done. Each client has its own copy of the context
variables that the worker's boot has set, as it would in a task.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from queue import SimpleQueue
from time import monotonic
from typing import Any, Self

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.ended import HandshakeFailed
from forkd.serve.deadlines import ActivityStamps
from forkd.serve.handlers import Handler
from forkd.serve.loop import IN
from forkd.serve.stream.handed_over import HandedOver, HandOverServer
from forkd.serve.stream.tls import TlsContexts, handshake_bytes, handshake_reason, load_contexts, say_end
from forkd.serve.stream.transport import ServerContext
from forkd.system.process import flush_output

#: Bytes that are sent between two notes that something was.
_PIECE = 65_536

#: Serves one client, by its socket and address, and returns when it is done.
BlockingHandler = Callable[[socket.socket, Any], object]


def blocking_handler(handler: Handler, address: Address) -> BlockingHandler:
    """The function that serves a client by a handler of a blocking form.

    Args:
        handler: what the listener's settings name.
        address: where it really listens.
    """
    target = handler.target
    if handler.form == "function":
        return target  # type: ignore[no-any-return]
    server = ServerFacade(address, target)
    return lambda sock, peer: target(sock, peer, server)


class ServerFacade:
    """What a socketserver request handler finds as its `server`.

    Attributes:
        server_address, server_name, server_port: where it listens.
        RequestHandlerClass: what serves each client.
    """

    def __init__(self, address: Address, handler: Any) -> None:
        self.server_name, self.server_port = address.host, address.port
        self.server_address: Any = address.path if address.is_unix else (address.host, address.port)
        self.RequestHandlerClass = handler
        self.timeout = None

    def shutdown(self) -> None:
        """A handler can't end the daemon. Raises RuntimeError."""
        raise RuntimeError("a handler can't shut forkd down; os.kill(os.getppid(), signal.SIGTERM) stops the daemon")


class ClientSocket(socket.socket):
    """A connection as its handler has it. When that closes it, the client is told, though the loop has a copy."""

    __slots__ = ("_connection",)

    _connection: ThreadConnection | None

    @classmethod
    def of(cls, sock: socket.socket) -> Self:
        """A blocking one, with a descriptor of its own. Raises OSError."""
        made = cls(sock.family, sock.type, sock.proto, os.dup(sock.fileno()))
        made._connection = None
        made.setblocking(True)
        return made

    def belong_to(self, connection: ThreadConnection) -> None:
        """Tells it of what it is the handler's part."""
        self._connection = connection

    def close(self) -> None:
        """As a socket's. It takes effect when the files that were made of it are closed, too."""
        super().close()
        if self._connection is not None and self.fileno() < 0:
            connection, self._connection = self._connection, None
            connection.closed_by_handler()

    def release(self) -> None:
        """Closes it at last, whatever the handler still has of it; the loop tells the client."""
        self._connection = None
        super().close()
        if (descriptor := self.detach()) >= 0:  # a file of it is open
            os.close(descriptor)


class StampedSocket(ClientSocket):
    """One of which the kernel tells nothing: what its handler does is noted."""

    __slots__ = ("stamps",)

    stamps: ActivityStamps

    def recv(self, *args: Any) -> bytes:
        """As a socket's; likewise all others."""
        data = super().recv(*args)
        self.stamps.note_received(len(data))
        return data

    def recv_into(self, *args: Any) -> int:
        count = super().recv_into(*args)
        self.stamps.note_received(count)
        return count

    def recvfrom(self, *args: Any) -> Any:
        found = super().recvfrom(*args)
        self.stamps.note_received(len(found[0]))
        return found

    def recvfrom_into(self, *args: Any) -> Any:
        found = super().recvfrom_into(*args)
        self.stamps.note_received(found[0])
        return found

    def recvmsg(self, *args: Any) -> Any:
        found = super().recvmsg(*args)
        self.stamps.note_received(len(found[0]))
        return found

    def recvmsg_into(self, *args: Any) -> Any:
        found = super().recvmsg_into(*args)
        self.stamps.note_received(found[0])
        return found

    def send(self, data: Any, *args: Any) -> int:
        if self.gettimeout() is None and (size := memoryview(data).nbytes) > _PIECE:  # then it waits for all
            self.sendall(data, *args)
            return size
        count = super().send(data, *args)
        self.stamps.note_sent(count)
        return count

    def sendall(self, data: Any, *args: Any) -> None:
        limit, began = self.gettimeout(), monotonic()
        with memoryview(data) as view, view.cast("B") as rest:
            for at in range(0, len(rest), _PIECE):
                if at and limit and monotonic() - began > limit:  # which is the limit of the whole
                    raise TimeoutError("timed out")
                piece = rest[at : at + _PIECE]
                super().sendall(piece, *args)
                self.stamps.note_sent(len(piece))

    def sendto(self, *args: Any) -> int:
        count = super().sendto(*args)
        self.stamps.note_sent(count)
        return count

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        mine: Any = self
        sent = 0
        while count is None or sent < count:
            rest = None if count is None else count - sent
            try:
                now: int = mine._sendfile_use_sendfile(file, offset + sent, min(rest or _PIECE, _PIECE))
            except socket._GiveupOnSendfile:  # type: ignore[attr-defined]  # then by `send`
                return sent + int(mine._sendfile_use_send(file, offset + sent, rest))
            self.stamps.note_sent(now)
            sent += now
            if not now:
                break
        return sent


class ClientTlsSocket(ssl.SSLSocket):
    """A connection with TLS as its handler has it. When that closes it, the client is told, as of a `ClientSocket`."""

    connection: ThreadConnection | None = None

    def _real_close(self) -> None:
        connection, self.connection = self.connection, None
        if connection is not None and connection.is_here:
            say_end(self)
        super()._real_close()  # type: ignore[misc]
        if connection is not None:
            connection.closed_by_handler()


class ThreadConnection(HandedOver):
    """A connection whose handler runs in a thread.

    Attributes:
        handlers_socket: the handler's.
        thread: which thread that is; 0 before it runs.
    """

    __slots__ = ("_context", "handlers_socket", "thread")

    def __init__(self, sock: socket.socket, peer: Any, server: ThreadServer) -> None:
        stamped = sock.family == socket.AF_UNIX and (server.check_every > 0 or server.access_log) and not server.has_tls
        self._context = copy_context()
        self.handlers_socket = found = (StampedSocket if stamped else ClientSocket).of(sock)
        super().__init__(sock, peer, server)
        found.belong_to(self)
        if isinstance(found, StampedSocket):
            self.stamps = found.stamps = ActivityStamps(sock, self._opened)
        self.thread = 0

    def run(self, handle: BlockingHandler, sock: socket.socket) -> object:
        """In its thread: what the handler returns."""
        return self._context.run(handle, sock, self.peer)

    def begin_after_handshake(self) -> None:
        """In its thread: what came before this is no data of the client's."""
        self.received_before = handshake_bytes(self._sock)

    @property
    def is_here(self) -> bool:
        """Whether this is no process that a handler has forked."""
        return self._sock.fileno() >= 0

    def closed_by_handler(self) -> None:
        """In its thread: the handler has closed its socket, and may go on with something else."""
        if not self._is_over:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)

    def close_in_child(self) -> None:
        """In a forked process: as of any connection; one that its handler has forked keeps the handler's own."""
        super().close_in_child()
        if self.thread != threading.get_ident():
            self.handlers_socket.release()


class ThreadServer(HandOverServer):
    """Serves accepted connections, each in a thread.

    Args:
        context: what the process's connections share.
        handle: what serves each client.
        listener: its settings.
        address: where it really listens.

    Attributes:
        threads: how many there are, at most.
    """

    def __init__(self, context: ServerContext, handle: BlockingHandler, listener: Listener, address: Address) -> None:
        super().__init__(context, listener, address)
        self._handle = handle
        self.threads = listener.threads
        self._contexts = load_contexts(listener)
        self._handshake_seconds = listener.tls.handshake
        self._process = os.getpid()
        self._waiting: SimpleQueue[ThreadConnection | None] = SimpleQueue()
        self._done: deque[tuple[ThreadConnection, BaseException | None]] = deque()
        self._woken = False
        self._threads = 0
        self._busy = 0
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.loop.selector.served[self._event] = self._collect
        self.loop.selector.epoll.register(self._event, IN)
        context.at_end.append(self.close)

    def __call__(self, sock: socket.socket, peer: Any) -> None:
        """Serves one connection and owns its socket."""
        self.began(sock.fileno())
        try:
            connection = ThreadConnection(sock, peer, self)
        except OSError as error:
            sock.close()
            self._refused(error)
            self.closed()
            return
        try:
            if self._threads <= self._busy and self._threads < self.threads:
                self._start_thread()
        except RuntimeError as error:
            if not self._threads:
                self._refused(error)
                connection.handlers_socket.release()
                connection.finish(ConnectionAbortedError())
                return
        self._busy += 1
        self._waiting.put(connection)

    def _refused(self, error: Exception) -> None:
        """The system lacks a descriptor, or a thread."""
        self.loop.call_exception_handler({"message": "A client can't be served by a thread.", "exception": error})

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self.listener} {self._threads + 1}")
        thread.start()
        self._threads += 1

    @property
    def has_tls(self) -> bool:
        """Whether connections begin with TLS."""
        return self._contexts is not None

    def _work(self) -> None:
        """A thread: serves one client after another."""
        number = threading.get_ident()
        while (connection := self._waiting.get()) is not None:
            error: BaseException | None = None
            connection.thread = number
            try:
                if self._contexts is None:
                    _check_result(connection.run(self._handle, connection.handlers_socket))
                else:
                    _check_result(self._serve_with_tls(connection, self._contexts))
            except BaseException as raised:  # noqa: BLE001 (the handler's border: it may call sys.exit)
                error = raised
            if os.getpid() != self._process:
                self._leave_child(error)
            connection.handlers_socket.release()
            self._done.append((connection, error))
            del connection, error  # while this waits for the next client
            if not self._woken:
                self._woken = True
                os.eventfd_write(self._event, 1)

    def _serve_with_tls(self, connection: ThreadConnection, contexts: TlsContexts) -> object:
        """In its thread: the handshake, the handler, and the end that TLS has. Returns what the handler does; raises
        what they raise.
        """
        plain = connection.handlers_socket
        plain.settimeout(self._handshake_seconds)
        contexts.default.sslsocket_class = ClientTlsSocket
        with contexts.default.wrap_socket(plain, server_side=True, do_handshake_on_connect=False) as sock:
            try:
                sock.do_handshake()
            except (OSError, ValueError) as error:
                late = f"it took longer than {self._handshake_seconds:g} s"
                raise HandshakeFailed(late if isinstance(error, TimeoutError) else handshake_reason(error)) from None
            sock.settimeout(None)
            connection.begin_after_handshake()
            sock.connection = connection  # type: ignore[attr-defined]  # it is a ClientTlsSocket
            try:
                return connection.run(self._handle, sock)
            finally:
                say_end(sock)

    def _leave_child(self, error: BaseException | None) -> None:
        """In a process that the handler has forked, when it comes back: ends it."""
        status = 0
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        elif error is not None:
            threading.excepthook(threading.ExceptHookArgs((type(error), error, error.__traceback__, None)))
            status = 1
        flush_output()
        os._exit(status & 0xFF)

    def _collect(self, mask: int) -> None:
        """On the loop: ends the connections whose threads are done."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._event)
        self._woken = False
        while self._done:
            connection, error = self._done.popleft()
            self._busy -= 1
            connection.finish(error)

    def close(self) -> None:
        """Ends the threads, those that are busy when they are done."""
        for _ in range(self._threads):
            self._waiting.put(None)

    def close_in_child(self) -> None:
        """In a forked process: closes what it shares with its parent."""
        os.close(self._event)


def _check_result(made: object) -> None:
    """Raises TypeError where a handler has done nothing, but returned what would have to be run."""
    if inspect.iscoroutine(made):
        made.close()
        raise TypeError(
            "the handler returned a coroutine, which nothing awaits; is it async def handle(reader, writer)?"
        )
    if inspect.isgenerator(made):
        raise TypeError("the handler has a yield, and so does nothing when it is called")
