"""One accepted connection as an `asyncio.Transport`, served by the poll loop without asyncio's generic path.

It keeps asyncio's contract: code written for asyncio's own socket transport does not notice the difference, and
`pause_writing`, `resume_writing` and `connection_lost` come when they would from that one. `_data_ready` and `write`
are on the path of every request and written for speed: one look-up, one recv, one call of the handler, one send. All
other methods are rarer.

To that contract it adds what a handler may want to know of what it has written. That `write` returns says only that the
bytes are kept somewhere: in the transport, in this machine's kernel, on the way. What the peer's kernel has not
acknowledged may never arrive; whether its program has read the rest only that program can say.

    with transport.cork():
        transport.write(head)
        transport.write(body)
    await transport.wait_acked(5.0)

Streams handlers have it as `writer.transport`. A handler that uses none of this pays nothing for it.

Of a TCP connection the kernel is asked when data came and went; of a unix socket it does not know, so there the calls
that read and write note it, where there is a deadline that asks. `server` makes the transports, one for each accepted
socket, and is told how each ends.
"""

from __future__ import annotations

import _socket
import asyncio
import errno
import logging
import os
import socket
from asyncio import base_events, constants, transports, trsock
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import cache
from math import inf
from ssl import SSLEOFError
from time import monotonic
from typing import Any, Protocol
from weakref import ref

from forkd.drain import draining
from forkd.ended import Ended, WriteBufferFull
from forkd.errors import system_reason
from forkd.serve.accept.acceptor import ConnectionStats
from forkd.serve.accept.access import format_peer
from forkd.serve.accept.listener_stats import ListenerStats
from forkd.serve.accept.proxy_protocol import Header
from forkd.serve.deadlines import (
    WRITE_CHECKS,
    ActivityStamps,
    Buffer,
    ConnectionActivity,
    Deadlines,
    TimeoutPolicy,
    kernel_activity,
    octets,
    timeout_error,
)
from forkd.serve.lingering import Lingering
from forkd.serve.loop import CONNECTION, EDGE, ERR, FAST, HUP, IN, OUT, RDHUP, PollLoop
from forkd.serve.stream.coroutine import StreamsProtocol
from forkd.serve.stream.tls import AT_END, NOT_YET, TlsSession
from forkd.system.channel import wait_ready
from forkd.system.logs import ACCESS_LOGGER
from forkd.system.socket_stats import cookie_of, read_tcp_info, unacknowledged_bytes, unread_bytes

log = logging.getLogger("forkd.transport")
access_log = logging.getLogger(ACCESS_LOGGER)

#: Bytes of one read at most: asyncio's.
READ_SIZE = 256 * 1024

# glibc has the kernel map a block of 128 KiB or more each time it is asked for one, until one has been freed: from then
# on it keeps what is as large as that (mallopt(3), M_MMAP_THRESHOLD).
bytes(READ_SIZE + 4096)

#: Writes that are sent at once, since the last read or wait for the socket. What is written after them waits for the
#: loop to turn, up to `pause_writing`: a client that reads fast would otherwise let a handler write for ever.
WRITES_AT_ONCE = 64

HIGH_WATER = 64 * 1024  # asyncio's defaults: pause_writing above the one, resume_writing at the other
LOW_WATER = HIGH_WATER // 4

#: Bytes that come after the end and are thrown away, at most.
MOST_DROPPED = 64 << 20

#: Bytes that one sendfile(2) sends at most: others have their turn then.
FILE_PART = 1 << 20

#: In the place of unsent bytes where there are none and `write` must not send at once; never appended to.
_NO_DIRECT_WRITES = bytearray()

_IOV_MAX = 1024  # of sendmsg(2), limits.h

# Seconds between two looks at what is unacknowledged: from the connection's round-trip time, but no less than the one,
# twice as long each time, and no more than the other.
_LEAST_ACK_PAUSE, _MOST_ACK_PAUSE = 0.001, 0.25

# As plain integers: `sock.family` makes an enumeration's member each time.
_family: Callable[[socket.socket], int] = _socket.socket.family.__get__
_UNIX = int(socket.AF_UNIX)

_DISCONNECTED = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)
_VANISHED = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}
_RESET = errno.ECONNRESET, os.strerror(errno.ECONNRESET)


def _descriptor_of(file: Any) -> tuple[int, int]:
    """An open file's descriptor and size. Raises SendfileNotAvailableError for what is none."""
    try:
        fd = file.fileno()
        return fd, os.fstat(fd).st_size
    except (AttributeError, OSError):
        raise asyncio.SendfileNotAvailableError("not a regular file") from None


def is_vanished(error: BaseException) -> bool:
    """Whether the kernel says by it that the peer answers no more (keepalive, TCP_USER_TIMEOUT) or is out of reach."""
    return isinstance(error, OSError) and error.errno in _VANISHED


def log_end(
    sock: socket.socket, peer: Any, listener: str, ending: tuple[float, str], stamps: ActivityStamps | None
) -> None:
    """Writes the access log's record of a connection that ends.

    Args:
        sock: its socket.
        peer: the peer's address as accept(2) gave it.
        listener: where it came from.
        ending: when it began, on the monotonic clock, and why it ends.
        stamps: what came and went, where the kernel does not tell.
    """
    opened, reason = ending
    info = read_tcp_info(sock) if stamps is None else None
    fields: dict[str, Any] = {"client": format_peer(peer), "listener": listener}
    fields |= {"seconds": round(monotonic() - opened, 6), "reason": reason}
    if info is not None:
        fields |= {"bytes_in": info.received, "bytes_out": info.sent, "rtt": info.rtt / 1e6}
    elif stamps is not None:
        fields |= {"bytes_in": stamps.bytes_in, "bytes_out": stamps.bytes_out}
    words = "%(client)s on %(listener)s: %(seconds).3f s, in %(bytes_in)s, out %(bytes_out)s, rtt %(rtt)s, %(reason)s"
    told = {"bytes_in": "-", "bytes_out": "-", "rtt": "-"} | fields
    if info is not None:
        told["rtt"] = f"{info.rtt / 1000:.3f} ms"
    access_log.info(words, told, extra=fields)


@dataclass(frozen=True, slots=True)
class ServerContext:
    """What all connections of a process share.

    Attributes:
        loop: the process's loop.
        stats: the counters of its connections, told when one ends.
        deadlines: the process's.
        handler_tasks: the task of each streams handler that has not returned.
        at_end: called after the loop has stopped.
        access_log: whether the end of each connection is recorded.
    """

    loop: PollLoop
    stats: ConnectionStats | ListenerStats
    deadlines: Deadlines
    handler_tasks: set[asyncio.Task[None]] = field(default_factory=set)
    at_end: list[Callable[[], None]] = field(default_factory=list)
    access_log: bool = False


class ConnectionObserver(Protocol):
    """What made a transport: says what holds for the connection, and is told of its end."""

    @property
    def write_limit(self) -> int:
        """Unsent bytes above which a further write ends the connection; 0: no limit."""

    @property
    def listener(self) -> str:
        """Where the connection came from, for the log."""

    @property
    def sockname(self) -> Any:
        """The address that its client has connected to, as getsockname(2) gives it; None: the socket is to be asked."""

    @property
    def timeouts(self) -> TimeoutPolicy | None:
        """Its deadlines; None where there are none."""

    @property
    def linger(self) -> float:
        """Seconds for which one that is closed still takes what its client sends, at most; 0: none."""

    @property
    def access_log(self) -> bool:
        """Whether the end of each connection is recorded."""

    @property
    def measure(self) -> Callable[[socket.socket, float, ActivityStamps | None], None] | None:
        """Called when a connection ends, as of `ListenerStats`; None: it is not wanted."""

    @property
    def ended_early(self) -> Callable[[Ended], None]:
        """Called when forkd ends a connection of its own accord."""

    @property
    def closed(self) -> Callable[[], None]:
        """Called when a connection is over."""


class _FileSending:
    """A file that is being sent.

    Args:
        fd: its descriptor.
        offset: where the rest of it begins.
        count: bytes that are to be sent of it at most; None: until its end.
        done: has the result, when it has ended.

    Attributes:
        sent: bytes that are sent.
    """

    __slots__ = ("count", "done", "fd", "offset", "sent")

    def __init__(self, fd: int, offset: int, count: int | None, done: asyncio.Future[int]) -> None:
        self.fd = fd
        self.offset = offset
        self.count = count
        self.done = done
        self.sent = 0

    def send_to(self, sock: int) -> bool:
        """Sends a part of it; whether that was the last one. Raises OSError."""
        size = FILE_PART if self.count is None else min(FILE_PART, self.count - self.sent)
        sent = os.sendfile(sock, self.fd, self.offset, size)
        self.offset += sent
        self.sent += sent
        return not sent or self.sent == self.count

    def fail(self, error: BaseException) -> None:
        """It can't be sent to its end, unless it has ended already."""
        if not self.done.done():
            self.done.set_exception(error)


class StreamTransport(transports._FlowControlMixin):
    """One accepted connection.

    Args:
        loop: the worker's loop.
        sock: a connected, non-blocking stream socket; the transport owns it.
        protocol: what serves it.
        peer: the peer's address as accept(2) gave it.
        observer: what counts the connection.
        tls: what it is read and written by where it has TLS, with its handshake done; else None.

    Attributes:
        due: as of `deadlines.Watched`.
    """

    __slots__ = (
        "__weakref__",
        "_closing",
        "_conn_lost",
        "_context",
        "_corks",
        "_deliver",
        "_dropped",
        "_eof_answer",
        "_eof_sent",
        "_error",
        "_fd",
        "_file",
        "_heartbeat_at",
        "_interest",
        "_kernel_queue",
        "_linger",
        "_lingering",
        "_observer",
        "_opened",
        "_paused",
        "_peer",
        "_protocol",
        "_reader",
        "_received_before",
        "_recv",
        "_send",
        "_sock",
        "_sockname",
        "_spare_writes",
        "_stalled_since",
        "_stamps",
        "_tls",
        "_unsent",
        "due",
    )

    _protocol: asyncio.BaseProtocol  # the one in charge
    _deliver: Any  # its `data_received`; None of a BufferedProtocol
    _reader: Any  # what reads for it

    # loop.start_tls asks a transport whether it can do that.
    _start_tls_compatible = True

    def __init__(
        self,
        loop: PollLoop,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        peer: Any,
        observer: ConnectionObserver,
        tls: TlsSession | None = None,
    ) -> None:
        # The base's own __init__ would make a dictionary and several calls; the first four are its fields.
        self._loop = loop
        self._protocol_paused = False
        self._high_water = HIGH_WATER
        self._low_water = LOW_WATER
        self._sock = sock
        self._fd = sock.fileno()
        self._tls = tls
        self._received_before = 0  # bytes of its handshake, which to the kernel are data
        if tls is not None and observer.timeouts is not None:
            self._received_before = tls.handshake_bytes(sock)
        source = sock if tls is None else tls
        self._recv: Callable[[int], bytes] = source.recv
        self._send: Callable[[Buffer], int] = source.send
        self._peer = peer
        self._sockname: Any = observer.sockname  # None: asked for at the first need, and at the end
        self._observer = observer
        #: Unsent bytes; None: nothing is unsent and `write` may send at once.
        self._unsent: bytearray | None = None
        self._file: _FileSending | None = None  # what is sent behind what is unsent
        self._spare_writes = WRITES_AT_ONCE  # those that are left
        self._corks = 0  # blocks of the handler that gather what is written
        self._interest = 0  # what epoll watches this descriptor for
        self._paused = False
        #: What the protocol has answered to the end of file; None: it has not been told of any.
        self._eof_answer: bool | None = None
        self._closing = False
        self._eof_sent = False
        self._conn_lost = 0  # from 1 on: the protocol has been or will be told; writes since then
        self._error: OSError | None = None  # what the kernel has said of the connection, to tell when all is read
        # Since when the socket has taken nothing of what is unsent, while something is; when the protocol's heartbeat()
        # was last called, 0: never; what lay in the kernel's queue at the last look.
        self._stalled_since = self._heartbeat_at = self.due = 0.0
        # Seconds for which it is to linger, once it is closed and while the client has not sent its end; what came
        # meanwhile; what sees to it when the protocol has been told of the end.
        self._linger = 0.0
        self._dropped = 0
        self._lingering: Lingering | None = None
        self._kernel_queue = 0
        self._stamps: ActivityStamps | None = None  # notes what comes and goes, where the kernel does not
        self._opened = opened = monotonic()
        # As with asyncio's transport, a context variable that is set while one connection is served is not seen by
        # others.
        self._context = copy_context()
        self._context.run(CONNECTION.set, ref(self))
        self.set_protocol(protocol)
        timeouts = observer.timeouts
        if (timeouts is not None or observer.access_log) and _family(sock) == _UNIX:
            self._stamps = stamps = ActivityStamps(source, opened)
            self._recv, self._send = stamps.recv, stamps.send
        if timeouts is not None and timeouts.first_check:  # last: one that could not be made has no deadline
            self.due = timeouts.firsts[self] = opened + timeouts.first_check
            if self.due < timeouts.deadlines.timer_at:
                timeouts.deadlines.wake_at(self.due)

    def start(self, *, watched: bool = False) -> None:
        """Tells the protocol that it is connected, then begins to read.

        As with asyncio's transport, what `connection_made` has scheduled runs before anything else is told.

        Args:
            watched: whether epoll watches its descriptor for reading already.
        """
        if watched:
            self._interest = IN
            self._loop.selector.served[self._fd] = self._reader
        scheduled = self._loop.scheduled
        before = len(scheduled)
        try:
            self._context.run(self._protocol.connection_made, self)
        except BaseException as error:  # noqa: BLE001 (the handler's border: it may raise anything)
            self.handler_failed(error, "protocol.connection_made() call failed.")
            return
        at_once = len(scheduled) == before
        if not (self._paused or self._closing):
            self._watch(self._interest | IN)
            # A client that spoke at once is heard at once, which saves a round of the loop. Not so for a
            # BufferedProtocol, which would be asked for a buffer in vain when there is nothing yet. Of an end that TLS
            # has and that is read early no later event would tell.
            if at_once and self._deliver is not None:
                self._data_ready(IN)
            elif self._protocol.__class__ is StreamsProtocol and self._tls is None:
                self._read_early()
        if draining():
            if at_once:
                self.notify_drain()
            else:
                self._loop.call_soon(self._notify_late_drain)

    def _read_early(self) -> None:
        """Reads for asyncio's streams, which only keep what they are given: so the handler's task, which is scheduled,
        finds it there. That the client has gone it hears later, as others do.
        """
        try:
            data = self._recv(READ_SIZE)
        except OSError as error:
            if not isinstance(error, (BlockingIOError, InterruptedError)):
                self._error = type(error)(*error.args)  # which the kernel tells but once
            return
        if data:
            self._context.run(self._deliver, data)

    def _notify_late_drain(self) -> None:
        """Of one accepted in the very last moment. Asked before it is heard, its protocol would take it for idle."""
        if self._interest & IN and not self._closing:
            self._reader(IN)
        self.notify_drain()

    def _watch(self, interest: int) -> None:
        before, self._interest = self._interest, interest
        if interest == before or self._sock.fileno() != self._fd:  # as in `_connection_lost`
            return
        selector = self._loop.selector
        # An event of this same round may still be on its way to a connection that should not be read any more.
        selector.served[self._fd] = self._reader if interest & IN else self._mixed_ready
        if not before:
            selector.epoll.register(self._fd, interest)
        elif interest:
            selector.epoll.modify(self._fd, interest)
        else:  # watched for nothing it would still report a hang-up, for ever
            selector.epoll.unregister(self._fd)

    def __repr__(self) -> str:
        state = "closed" if self._conn_lost else "closing" if self._closing else "open"
        return (
            f"<{type(self).__name__} {state} fd={self._fd} peer={self._peer!r} unsent={self.get_write_buffer_size()}>"
        )

    # Reading

    def _data_ready(self, mask: int) -> None:
        if mask != IN:
            self._mixed_ready(mask)
            return
        try:
            data = self._recv(READ_SIZE)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._read_failed(error)
            return
        if not data:
            self._end_of_file()
            return
        self._spare_writes = WRITES_AT_ONCE
        try:
            self._context.run(self._deliver, data)
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self.handler_failed(error, "Fatal error: protocol.data_received() call failed.")

    def _buffer_ready(self, mask: int) -> None:
        if mask != IN:
            self._mixed_ready(mask)
            return
        protocol: Any = self._protocol
        try:
            buffer = self._context.run(protocol.get_buffer, -1)
            if not len(buffer):
                raise RuntimeError("get_buffer() returned an empty buffer")  # noqa: TRY301 (asyncio's own error)
            count = self._sock.recv_into(buffer) if self._tls is None else self._tls.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._read_failed(error)
            return
        except BaseException as error:  # noqa: BLE001 (the handler's border: its buffer may be of no use)
            self.handler_failed(error, "Fatal error: protocol.get_buffer() call failed.")
            return
        if not count:
            self._end_of_file()
            return
        self._spare_writes = WRITES_AT_ONCE
        if self._stamps is not None:
            self._stamps.note_received(count)
        try:
            self._context.run(protocol.buffer_updated, count)
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self.handler_failed(error, "Fatal error: protocol.buffer_updated() call failed.")
        if self._tls is not None and self._tls.pending():
            self._loop.call_soon(self._read_pending)

    def _read_pending(self) -> None:
        """Reads what TLS has read already, of which epoll does not know."""
        if self._interest & IN and not self._closing and self._tls is not None and self._tls.pending():
            self._reader(IN)

    def _mixed_ready(self, mask: int) -> None:
        """Anything but plainly readable: writable, hung up, in error; or not to be read now. What came is first."""
        if self._interest & IN and mask & ~OUT:
            # Asked for its error the kernel forgets it, so that reading gives what came before, then the end of file:
            # a client that resets costs no exception in recv.
            if mask & ERR and (number := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                self._error = (
                    ConnectionResetError(*_RESET) if number == _RESET[0] else OSError(number, os.strerror(number))
                )
            self._reader(IN)
        elif self._interest & EDGE and mask & (RDHUP | HUP | ERR):
            self._hung_up(mask)
        if self._interest & OUT and mask & ~IN:
            self._flush()

    def _drop(self, mask: int) -> None:
        """After `close`, until it is lost: throws away what comes. A client that sends all that it has before it reads
        would otherwise never come to read what is unsent.
        """
        if mask != IN:
            self._mixed_ready(mask)
            return
        count, failed = 0, self._error
        try:
            count = len(self._sock.recv(READ_SIZE))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            failed = failed or error
        self._dropped += count
        if not count:
            self._linger = 0.0
        if not count or self._dropped >= MOST_DROPPED:
            self._watch(self._interest & ~IN)
        if not count and failed is not None:
            self._read_failed(failed)

    def _end_of_file(self) -> None:
        if self._conn_lost:
            return
        if self._error is not None:
            self._read_failed(self._error)
            return
        before = len(self._loop.scheduled)
        if not self._tell_end_of_file():
            return
        if self._eof_answer:
            if not self._closing:
                self._watch(self._interest & ~IN | EDGE)
        elif self._unsent or self._closing or len(self._loop.scheduled) > before or not self._tell_end():
            self.close()
        else:  # called from the loop with nothing unsent, so no code is surprised that it happens at once
            self._closing = True
            self._conn_lost += 1
            self._connection_lost(None)

    def _tell_end_of_file(self) -> bool:
        """Tells the protocol, whose answer is in `_eof_answer` then; False when it has raised instead."""
        self._eof_answer = True  # should it read on in there it has been told already
        try:
            answer = bool(self._context.run(self._protocol.eof_received))  # type: ignore[attr-defined]
            self._eof_answer = answer and self._tls is None  # as with asyncio's, nothing can be sent after it
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self.handler_failed(error, "Fatal error: protocol.eof_received() call failed.")
            return False
        return True

    def _hung_up(self, mask: int) -> None:
        """While nothing is read: the peer has reset the connection, has closed it, or sends no more.

        A reset ends the connection. The end of file is told, unless there is something to be read before it; but the
        transport does not close itself then, as it would otherwise, before the handler reads on: a peer that has only
        shut down its sending side may be owed an answer, and it looks like one that has closed.
        """
        if mask & ERR and (number := self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
            # A reset that comes after the end of file is EPIPE to Linux.
            self._error = (
                ConnectionResetError(*_RESET)
                if number in (errno.ECONNRESET, errno.EPIPE)
                else OSError(number, os.strerror(number))
            )
        if self._error is not None:
            self._fail(self._error)
            return
        if self._eof_answer is None and not (self._nothing_unread() and self._tell_end_of_file()):
            return
        # It reads on already; or the connection is closed in both directions, and no answer can be sent.
        if not self._eof_answer and (mask & HUP or not self._paused):
            self.close()

    def _nothing_unread(self) -> bool:
        """Whether the next read would find the end of file, and the protocol can be told of it."""
        # asyncio's sendfile takes anything but a loss for a mistake while it has the connection.
        if isinstance(self._protocol, base_events._SendfileFallbackProtocol):  # type: ignore[attr-defined]
            return False
        if self._tls is not None and self._tls.pending():  # which a buffer was too small for
            return False
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self._fail(error)
            return False

    def _read_failed(self, error: OSError) -> None:
        if self._conn_lost or isinstance(error, NOT_YET):
            return
        if isinstance(error, AT_END):
            if self._tls is not None and isinstance(error, SSLEOFError):
                self._tls.cut = True
                if self._error is None and wait_ready(self._fd, 0, 0):  # older Pythons say so of a reset, too
                    self._error = ConnectionResetError(*_RESET)
            self._end_of_file()
            return
        self._note_error(error, "Fatal read error on socket transport")
        self._closing = True
        self._conn_lost += 1
        self._connection_lost(error)

    def _fail(self, error: OSError) -> None:
        self._note_error(error, "Fatal read error on socket transport")
        self._force_close(error)

    # Writing

    def write(self, data: Buffer) -> None:
        """Sends what the socket takes now, keeps the rest and sends it later; never blocks."""
        if self._unsent is not None:
            self._write_later(data)
            return
        if data.__class__ is not bytes:
            data = octets(data)
        self._spare_writes = spare = self._spare_writes - 1
        try:
            sent = self._send(data) if spare >= 0 else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._write_failed(error)
            return
        if sent != len(data):
            self._keep(data, sent)

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Sends several pieces as one, by a single sendmsg(2) where nothing waits before them."""
        pieces = [piece if piece.__class__ is bytes else octets(memoryview(piece)) for piece in list_of_data]
        if self._unsent is not None or self._tls is not None or not 1 < len(pieces) <= _IOV_MAX:
            self.write(b"".join(pieces))
            return
        self._spare_writes = spare = self._spare_writes - 1
        try:
            sent = self._sock.sendmsg(pieces) if spare >= 0 else 0
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._write_failed(error)
            return
        if self._stamps is not None:
            self._stamps.note_sent(sent)
        if sent != sum(map(len, pieces)):
            self._keep(b"".join(pieces), sent)

    def _keep(self, data: Buffer, sent: int) -> None:
        """Keeps what the socket did not take, or was not asked to."""
        self._spare_writes = WRITES_AT_ONCE
        self._unsent = bytearray(memoryview(data)[sent:])
        self._send_later()
        self._maybe_pause_protocol()  # type: ignore[attr-defined]

    def _send_later(self) -> None:
        """Has the loop send what is unsent when the socket takes it.

        Where it waits for that already, epoll is asked again: while reading is paused, a socket that took all of the
        last piece is not reported again (epoll(7), EPOLLET).
        """
        if self._interest & OUT:
            if self._interest & EDGE and self._sock.fileno() == self._fd:
                self._loop.selector.epoll.modify(self._fd, self._interest)
            return
        if (timeouts := self._observer.timeouts) is not None and timeouts.write:
            self._stalled_since = now = monotonic()
            timeouts.deadlines.watch(self, now + timeouts.write / WRITE_CHECKS)
        self._watch(self._interest | OUT)

    def _write_later(self, data: Buffer) -> None:
        data = octets(data)
        if self._file is not None:
            raise RuntimeError("unable to write; sendfile is in progress")
        if self._eof_sent:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not data:
            return
        if self._conn_lost:
            if self._conn_lost == constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                log.warning("handler keeps writing to a closed connection: %r", self._protocol, extra=self.about())
            self._conn_lost += 1
            return
        if self._tls is not None and self._tls.is_ending:
            return
        assert self._unsent is not None  # noqa: S101 (for the type checker)
        if 0 < self._observer.write_limit < len(self._unsent) and not self._takes_more():
            self.end(WriteBufferFull(f"it does not read: {len(self._unsent)} bytes are unsent"))
            return
        self._unsent += data
        if self._corks:
            most: int = self._high_water
            if len(self._unsent) > min(most, self._observer.write_limit or most):
                self._send_gathered()
        self._maybe_pause_protocol()  # type: ignore[attr-defined]

    def _takes_more(self) -> bool:
        """Whether the socket, asked now, has taken so much that a write is within the limit: the loop may not have
        turned for long.
        """
        assert self._unsent is not None  # noqa: S101 (for the type checker)
        with suppress(OSError):
            del self._unsent[: self._send(self._unsent)]
        return len(self._unsent) <= self._observer.write_limit

    def _flush(self) -> None:
        if self._file is not None and not (self._unsent or self._closing):
            self._send_file(self._file)
            return
        out = self._unsent
        assert out is not None  # noqa: S101 (for the type checker)
        try:
            sent = self._send(out) if out else 0
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._write_failed(error)
            return
        del out[:sent]
        self._stalled_since = monotonic()
        if not (out or self._closing or self._eof_sent or self._corks or self._file):
            self._unsent = None
        # The handler may write, close or abort in it.
        self._context.run(self._maybe_resume_protocol)  # type: ignore[attr-defined]
        if self._conn_lost:
            return
        if self._unsent or (self._file is not None and not self._closing) or (self._closing and not self._tell_end()):
            self._send_later()
            return
        self._watch(self._interest & ~OUT)
        if self._closing:
            self._conn_lost += 1
            if self._loop.scheduled:  # by what the handler has been told before, perhaps
                self._loop.call_soon(self._connection_lost, None)
            else:
                self._connection_lost(None)
        elif self._eof_sent:
            self._shut_down_sending()

    @property
    def _sendfile_compatible(self) -> constants._SendfileMode:
        """What loop.sendfile is to do: with TLS, read the file and write it."""
        return constants._SendfileMode.TRY_NATIVE if self._tls is None else constants._SendfileMode.FALLBACK

    async def send_file(self, file: Any, offset: int, count: int | None) -> int:
        """Sends a file behind all that was written, by sendfile(2); what `loop.sendfile` calls.

        As with asyncio's transport, nothing is received meanwhile, and nothing can be written.

        Args:
            file: an open file.
            offset: where to begin.
            count: bytes at most; None: until its end.

        Returns:
            Bytes sent. So far the file's position has moved, also after an error.

        Raises:
            SendfileNotAvailableError: it is no file that sendfile(2) takes, and nothing was sent.
            ConnectionError: the connection has ended first.
        """
        fd, size = _descriptor_of(file)
        if not (count or size):
            return 0
        if self._file is not None:
            raise RuntimeError("another file is being sent")
        was_reading = self.is_reading()
        self.pause_reading()
        self._send_gathered()
        self._file = sending = _FileSending(fd, offset, count or None, self._loop.create_future())
        if not self._unsent:
            self._unsent = _NO_DIRECT_WRITES
            self._send_file(sending)
        try:
            return await sending.done
        finally:
            self._file = None
            self._end_file()
            if sending.sent:
                with suppress(OSError):  # the handler has closed it
                    os.lseek(fd, sending.offset, os.SEEK_SET)
            if was_reading:
                self.resume_reading()

    def _send_file(self, sending: _FileSending) -> None:
        """Sends a part of a file, and the next one when the socket takes it."""
        before = sending.sent
        try:
            if sending.done.done() or sending.send_to(self._fd):
                self._watch(self._interest & ~OUT)
                if not sending.done.done():
                    sending.done.set_result(sending.sent)
                return
        except (BlockingIOError, InterruptedError):
            self._send_later()
            return
        except OSError as error:
            self._watch(self._interest & ~OUT)
            if isinstance(error, ConnectionError) or is_vanished(error):
                self._write_failed(error)
            else:  # of the file
                sending.fail(error if before else asyncio.SendfileNotAvailableError(f"os.sendfile: {error.strerror}"))
            return
        if self._stamps is not None:
            self._stamps.note_sent(sending.sent - before)
        self._stalled_since = monotonic()
        self._send_later()

    def _end_file(self) -> None:
        """After a file has been sent, or not to its end: writes are sent at once again."""
        if self._unsent or self._closing:  # the loop is at it
            return
        self._watch(self._interest & ~OUT)
        if self._eof_sent:
            self._shut_down_sending()
        else:
            self._unsent = bytearray() if self._corks else None

    def _write_failed(self, error: OSError) -> None:
        if self._conn_lost:
            return
        self._note_error(error, "Fatal write error on socket transport")
        self._force_close(self._error or error)

    def can_write_eof(self) -> bool:
        """Whether the connection can be closed for one direction: not with TLS, as with asyncio's."""
        return self._tls is None

    def write_eof(self) -> None:
        """Closes the sending side when all is sent; data is received on. Raises NotImplementedError with TLS."""
        if self._tls is not None:
            raise NotImplementedError("a connection with TLS is closed in both directions")
        if self._closing or self._eof_sent:
            return
        self._eof_sent = True
        if self._file is not None:
            return
        if self._unsent:
            self._send_later()
        else:
            self._unsent = _NO_DIRECT_WRITES
            self._shut_down_sending()

    def _shut_down_sending(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:  # the peer has reset the connection, which the next read will say
            log.debug("shutdown(SHUT_WR): %s", error.strerror)

    def get_write_buffer_size(self) -> int:
        """Bytes that are unsent."""
        return len(self._unsent) if self._unsent else 0

    # Flow control: of what is written by asyncio's mixin, with `_maybe_pause_protocol` and `_maybe_resume_protocol`

    def is_reading(self) -> bool:
        """Whether data is being received."""
        return not self._closing and not self._paused

    def pause_reading(self) -> None:
        """Receives nothing until `resume_reading`; the peer feels it when the kernel's buffer is full. That it has gone
        is noticed all the same.
        """
        if self._closing or self._paused:
            return
        self._paused = True
        self._watch(self._interest & ~IN | RDHUP | EDGE)

    def resume_reading(self) -> None:
        """Receives again."""
        if self._closing or not self._paused:
            return
        self._paused = False
        if self._eof_answer is None:
            self._watch(self._interest & ~(RDHUP | EDGE) | IN)
            if self._tls is not None:
                self._loop.call_soon(self._read_pending)
        elif not self._eof_answer:
            self.close()

    # Delivery

    @contextmanager
    def cork(self) -> Iterator[None]:
        """Gathers what is written in a `with` block and sends it as one at the block's end, so that several writes make
        one segment.

        Above the high-water mark what there is is sent meanwhile. Blocks may be nested, and may await. What was written
        before an exception is sent too; `close` and `write_eof` in the block send it first.
        """
        self._corks += 1
        if self._unsent is None:
            self._unsent = bytearray()
        try:
            yield
        finally:
            self._corks -= 1
            if not self._corks:
                self._end_cork()

    def _end_cork(self) -> None:
        self._send_gathered()
        if not (self._unsent or self._closing or self._eof_sent or self._file):
            self._unsent = None
            self._maybe_resume_protocol()  # type: ignore[attr-defined]

    def _send_gathered(self) -> None:
        """Sends what was written in a corked transport, unless the loop is at it already."""
        out = self._unsent
        if not out or self._interest & OUT:
            return
        self._spare_writes = spare = self._spare_writes - 1
        if spare < 0:
            self._spare_writes = WRITES_AT_ONCE
            self._send_later()
            return
        try:
            sent = self._send(out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._write_failed(error)
            return
        del out[:sent]
        if out:
            self._send_later()

    def unacked(self) -> int:
        """Bytes that were written and that the peer's kernel has not acknowledged: those that are unsent, and the
        kernel's (SIOCOUTQ of tcp(7)), where an end of file that was written counts as one.

        Of a unix socket it is what the peer has not read, with what the kernel needs to keep it.

        Raises:
            ConnectionError: the connection is over. In `connection_lost` it still tells what the kernel had unsent.
        """
        if self._sock.fileno() < 0:
            raise self._lost_error()
        return self.get_write_buffer_size() + unacknowledged_bytes(self._sock)

    async def wait_acked(self, timeout: float | None = None) -> None:
        """Returns when the peer's kernel has acknowledged all that was written; what is corked is sent first.

        The kernel tells of no such event, so this looks again and again: after a round-trip time, then less often.

        Args:
            timeout: seconds; None: as long as the connection lasts.

        Raises:
            TimeoutError: there are unacknowledged bytes after that time; it says how many. They are sent on.
            ConnectionError: the connection has ended first.
        """
        if self._corks:
            self._send_gathered()
        until = None if timeout is None else self._loop.time() + timeout
        info = None if self._conn_lost else read_tcp_info(self._sock)
        pause = max(_LEAST_ACK_PAUSE, min(_MOST_ACK_PAUSE, info.rtt / 1e6 if info else 0.0))
        while not self._conn_lost:
            count = self.unacked()
            if not count:
                return
            left = pause if until is None else until - self._loop.time()
            if left <= 0:
                raise TimeoutError(f"{count} bytes are unacknowledged after {timeout:g} s")
            await asyncio.sleep(min(pause, left))
            pause = min(pause * 2, _MOST_ACK_PAUSE)
        raise self._lost_error()

    def _lost_error(self) -> ConnectionError:
        if isinstance(self._error, ConnectionError):
            return type(self._error)(*self._error.args)
        why = f": {self._error.strerror}" if self._error is not None else ""
        return ConnectionAbortedError(f"the connection is over{why}")

    # Deadlines

    def check(self, now: float) -> float:
        """As `deadlines.Watched`."""
        timeouts = self._observer.timeouts
        if self._conn_lost or timeouts is None:
            return 0.0
        activity = self._activity(now)
        if self._closing or self._eof_answer is not None:  # nothing more is to come from the client
            activity, next_heartbeat = activity._replace(has_received=True, heartbeat_at=0.0), inf
        elif now >= (next_heartbeat := timeouts.next_heartbeat(activity)):
            self._call_heartbeat(now)
            activity, next_heartbeat = activity._replace(heartbeat_at=self._heartbeat_at), now + timeouts.heartbeat
            if self._conn_lost:
                return 0.0
        when, kind = timeouts.deadline(activity)
        if now >= when:
            self.end(timeout_error(kind, activity, now))
            return 0.0
        again = min(when, next_heartbeat)
        if activity.stalled_since and timeouts.write:
            again = min(again, now + timeouts.write / WRITE_CHECKS)
        return 0.0 if again == inf else again

    def __lt__(self, other: object) -> bool:
        """As `deadlines.Watched`."""
        return id(self) < id(other)

    def _activity(self, now: float) -> ConnectionActivity:
        stalled, heartbeat_at = self._look_for_stall(now) if self._interest & OUT else 0.0, self._heartbeat_at
        if (stamps := self._stamps) is not None:
            # Of what the handler does not read yet it is not known since when it is there.
            last = now if self._paused and not self._nothing_unread() else stamps.last_received
            return ConnectionActivity(self._opened, stamps.bytes_in > 0, last, stamps.last_sent, stalled, heartbeat_at)
        info = read_tcp_info(self._sock)
        if info is None:  # it has gone in this moment, as the next event will tell
            return ConnectionActivity(self._opened, True, now, now, stalled, heartbeat_at)
        activity = kernel_activity(info, self._opened, now, stalled, heartbeat_at)
        return activity if self._tls is None else activity._replace(has_received=info.received > self._received_before)

    def _look_for_stall(self, now: float) -> float:
        """Since when the client has taken nothing. The socket says that it is writable only when much has been taken,
        so what is looked at is whether the queue has changed since the last look.
        """
        try:
            queue = unacknowledged_bytes(self._sock)
        except OSError:  # as in `_activity`
            return now
        if queue != self._kernel_queue:
            self._kernel_queue, self._stalled_since = queue, now
        return self._stalled_since

    def _call_heartbeat(self, now: float) -> None:
        """Calls the protocol's `heartbeat()`; where it has none, no answer is missed. The next protocol in charge may
        have one.
        """
        if self._call_hook("heartbeat"):
            self._heartbeat_at = now

    def _call_hook(self, name: str) -> bool:
        """Calls a method that the protocol may have for forkd, which may be `async def`; whether it has it."""

        def failed(error: BaseException) -> None:
            self.handler_failed(error, f"protocol.{name}() call failed.")

        try:
            hook = getattr(self._inner_protocol(), name, None)
        except BaseException as error:  # noqa: BLE001 (the handler's border: it may be a property)
            failed(error)
            return False
        if not callable(hook):
            return False
        self._loop.call_hook(self._context, hook, failed)
        return True

    def _inner_protocol(self) -> Any:
        """The handler's protocol, also of a connection that has gone over to TLS (loop.start_tls). Until the handshake
        is done that one is not connected, and asyncio's is in charge.
        """
        protocol: Any = self._protocol
        inner, told = (getattr(protocol, name, None) for name in ("_app_protocol", "_get_extra_info"))
        return protocol if inner is None or told is None or told("ssl_object") is None else inner

    # Ending

    def is_closing(self) -> bool:
        """Whether the connection is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Stops reading, sends what is unsent, then closes. `connection_lost(None)` comes later, never from here.

        When the client has not sent its end, the connection lingers after that (`lingering`).
        """
        if self._closing:
            return
        self._closing = True
        if self._eof_answer is None:
            self._linger = self._observer.linger
        interest = 0
        if self._linger:
            interest, self._reader = IN, self._drop
            if self._interest & IN and self._sock.fileno() == self._fd:  # it is watched for that already
                self._loop.selector.served[self._fd] = self._drop
        if self._unsent or not self._tell_end():
            self._unsent = self._unsent or bytearray()
            self._send_later()
            self._watch(OUT | interest)
            return
        self._unsent = _NO_DIRECT_WRITES
        self._watch(interest)
        self._conn_lost += 1
        self._loop.call_soon(self._connection_lost, None)

    def _tell_end(self) -> bool:
        """With TLS, tells the client that nothing more comes; False where that has to wait for the socket."""
        return self._tls is None or self._tls.close_notify()

    def close_at_exit(self) -> None:
        """As `close`, at the end of the process: it lingers only for what is unread already."""
        if self._closing:
            return
        self.close()
        if self._linger:
            with suppress(OSError):
                self._linger *= unread_bytes(self._sock) > 0

    def abort(self) -> None:
        """Closes at once; what is unsent is lost."""
        self._force_close(None)

    def end(self, error: Ended) -> None:
        """Ends the connection at once, of forkd's own accord: the log says why, and it is counted."""
        if self._conn_lost:
            return
        # Of a handler that wrote too much its author should hear; of the rest an operator who wants to.
        level = logging.WARNING if isinstance(error, WriteBufferFull) else logging.INFO
        about = {**self.about(), "reason": error.reason}
        log.log(level, "closed %s (%s): %s", self._name(), error.reason, error, extra=about)
        self._observer.ended_early(error)
        self._force_close(error)

    def notify_drain(self) -> None:
        """Tells the protocol that the worker drains, by its `shutdown()` if it has one; it ends when it suits it."""
        if self._closing:
            return
        self._call_hook("shutdown")

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the socket, which the worker goes on with."""
        self._sock.close()

    @property
    def is_over(self) -> bool:
        """Whether the protocol has been told, or will be next, that the connection is lost."""
        return self._conn_lost > 0

    def _force_close(self, error: BaseException | None) -> None:
        # By this name loop.start_tls's protocol ends the transport below it.
        self._linger = 0.0
        if self._conn_lost:
            if self._lingering is not None:
                self._lingering.close()
            return
        self._unsent = _NO_DIRECT_WRITES
        self._closing = True
        self._watch(0)
        self._conn_lost += 1
        self._loop.call_soon(self._connection_lost, error)

    def _connection_lost(self, error: BaseException | None) -> None:
        selector = self._loop.selector
        lingers = self._linger > 0 and error is None
        watched = lingers and self._interest == IN
        # Where the handler has closed the socket behind this transport's back, the number may be another's by now.
        is_own = self._sock.fileno() == self._fd
        if self._interest and not watched and is_own:
            selector.epoll.unregister(self._fd)
        self._interest = 0
        self._unsent = _NO_DIRECT_WRITES
        if self._file is not None:
            self._file.fail(error or ConnectionError("the connection is over"))
        if (timeouts := self._observer.timeouts) is not None and timeouts.firsts.pop(self, 0.0) != self.due:
            timeouts.deadlines.forget(self)
        self.due = 0.0
        if self._observer.access_log:
            ending = self._opened, self._end_reason(error)
            log_end(self._sock, self._peer, self._observer.listener, ending, self._stamps)
        if self._observer.measure is not None:
            self._observer.measure(self._sock, self._opened, self._stamps)
        if error is None:
            self._tell_end()
        try:
            self._context.run(self._protocol.connection_lost, error)  # type: ignore[arg-type]
        except BaseException as raised:  # noqa: BLE001 (the handler's border)
            self._report_failure(raised, "protocol.connection_lost() call failed.")
        finally:
            if is_own:
                selector.served.pop(self._fd, None)
            # Transport and protocol know each other; without this they would wait for the garbage collector.
            self._protocol = self._deliver = self._reader = None  # type: ignore[assignment]
            if self._sockname is None:  # a task may yet ask for it
                self._ask_sockname()
            if lingers:
                self._start_lingering(watched=watched)
            else:
                self._sock.close()
                self._observer.closed()

    def _start_lingering(self, *, watched: bool) -> None:
        closed, left = self._observer.closed, max(0, MOST_DROPPED - self._dropped)
        self._lingering = Lingering(self._loop, self._sock, self._linger, left, lambda _: closed(), watched=watched)

    def _end_reason(self, error: BaseException | None) -> str:
        if isinstance(error, Ended):
            return error.reason
        if error is None:
            return "closed" if self._eof_answer is None else "eof"
        if is_vanished(error):
            return "vanished"
        return "reset" if isinstance(error, ConnectionError) else "error"

    def handler_failed(self, error: BaseException, message: str) -> None:
        """Reports what the handler has raised, and ends the connection."""
        self._report_failure(error, message)
        self._force_close(error)

    def _report_failure(self, error: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
        )

    def _note_error(self, error: OSError, message: str) -> None:
        """Keeps why the connection ends. That a client goes away, as its `connection_lost` hears, is nothing to log;
        that one has vanished is worth a line; anything else is a warning.
        """
        if self._error is None:  # without its traceback, which knows this transport
            self._error = type(error)(*error.args)
        if isinstance(error, _DISCONNECTED):
            return
        if is_vanished(error):
            log.info("%s has vanished: %s", self._name(), error.strerror, extra=self.about())
        else:
            log.warning("%s: %s: %s", self._name(), message, system_reason(error), extra=self.about())

    def about(self) -> dict[str, str]:
        """Which connection a log record is about, as fields of it."""
        return {"client": str(self._peer), "listener": self._observer.listener}

    def _name(self) -> str:
        return f"client {self._peer!r}" if self._peer else f"client on descriptor {self._fd}"

    # The rest of asyncio's interface, and the peer

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol in charge."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Puts another protocol in charge, of this connection's data from now on."""
        self._protocol = protocol
        if self._closing:
            return
        if isinstance(protocol, asyncio.BufferedProtocol):
            self._deliver = None
            self._reader = self._buffer_ready
        else:
            self._deliver = protocol.data_received  # type: ignore[attr-defined]
            self._reader = self._data_ready
        if self._interest & IN:
            self._loop.selector.served[self._fd] = self._reader
        elif self._interest & EDGE:  # what the one before it was not told
            self._loop.selector.epoll.modify(self._fd, self._interest)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection: `peername`, `sockname`, `socket`, and whether its worker is `draining`; of
        one that a proxy has made for its client also `proxy_peername`, where the proxy is, and what its header says, as
        in `proxy_authority` (`accept.proxy_protocol.Header.details`). `default` for all else.
        """
        if name == "peername":
            return self._peer
        header: Header | None = getattr(self._sock, "proxy_header", None)
        if name == "sockname":
            if header is not None and header.destination is not None:
                return header.destination
            if self._sockname is None:
                self._ask_sockname()
            return default if self._sockname is None else self._sockname
        if name == "socket":
            return trsock.TransportSocket(self._sock)
        if name == "draining":
            return draining()
        if name == "proxy_peername":
            return getattr(self._sock, name, default)
        if header is not None and name.startswith("proxy_"):
            return header.details.get(name.removeprefix("proxy_"), default)
        return default if self._tls is None else self._tls.info(name, default)

    def _ask_sockname(self) -> None:
        try:
            name = self._sock.getsockname()
        except OSError:  # the handler has closed the socket behind this transport's back
            return
        self._sockname = name

    @property
    def peer(self) -> Any:
        """The peer's address, as accept(2) gave it."""
        return self._peer

    @property
    def cookie(self) -> int:
        """What the kernel calls the connection. Raises OSError."""
        return cookie_of(self._sock)


@cache
def compiled_transport(fast: Any) -> type[StreamTransport]:
    """The compiled twin of `StreamTransport`. Of fields that are seldom asked for it has None until they are.

    Args:
        fast: the extension `serve._fast`.
    """

    class CompiledTransport(StreamTransport):
        __slots__ = ()
        _data_ready = fast.data_ready
        write = fast.write
        _connection_lost = fast.connection_lost
        _recv = _made_late("_recv", lambda self: self._sock.recv)
        _send = _made_late("_send", lambda self: self._sock.send)
        _peer = _made_late("_peer", lambda self: self._sock.peername())
        _reader = _made_late("_reader", lambda self: self._data_ready)

    fast.use_transport(StreamTransport, CompiledTransport, globals())
    return CompiledTransport


def _made_late(name: str, make: Callable[[Any], Any]) -> Any:
    field: Any = vars(StreamTransport)[name]

    def get(self: StreamTransport) -> Any:
        value = field.__get__(self)
        return make(self) if value is None else value

    return property(get, field.__set__)


#: What serves a connection in this process.
Connection = StreamTransport if FAST is None else compiled_transport(FAST)
