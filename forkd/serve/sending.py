"""The sending half of a connection: writes that never block, what the socket did not take, and flow control.

asyncio's contract again, so that the handler's pause_writing and resume_writing come when they would from asyncio's own
transport. `write` is on the path of every request.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from asyncio import constants, transports
from collections.abc import Callable, Iterable
from contextvars import Context
from time import monotonic
from typing import Any, Protocol

from forkd.ended import Ended, WriteBufferFull
from forkd.serve.deadlines import LOOKS, Patience
from forkd.serve.loop import OUT, PollLoop
from forkd.serve.stamps import Buffer, Stamps

log = logging.getLogger("forkd.transport")

_IOV_MAX = 1024  # of sendmsg(2), limits.h
HIGH_WATER = 64 * 1024  # asyncio's defaults: pause_writing above the one, resume_writing at the other
LOW_WATER = HIGH_WATER // 4

#: Stands for "no fast writes" where there is nothing unsent; never appended to.
SHUT = bytearray()

_GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)
_VANISHED = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}


def _octets(data: Buffer) -> Buffer:
    """`data`, with `len` for its number of bytes; raises TypeError, as asyncio does, for what has none."""
    if isinstance(data, memoryview):
        return data.cast("B") if data.c_contiguous else data.tobytes()
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
    return data


def is_vanished(error: BaseException) -> bool:
    """Whether the kernel says by it that the peer answers no more (keepalive, TCP_USER_TIMEOUT) or is out of reach."""
    return isinstance(error, OSError) and error.errno in _VANISHED


class Keeper(Protocol):
    """Who is told of a connection's fate, to count it."""

    @property
    def write_limit(self) -> int:
        """Unsent bytes above which a further write ends the connection; 0: no limit."""

    @property
    def listener(self) -> str:
        """Where it came from, for the log."""

    @property
    def patience(self) -> Patience | None:
        """Its deadlines; None where there are none."""

    @property
    def access(self) -> bool:
        """Whether the end of each connection is recorded."""

    @property
    def cut(self) -> Callable[[Ended], None]:
        """Called when forkd ends a connection of its own accord."""

    @property
    def closed(self) -> Callable[[], None]:
        """Called when a connection is over."""


class SendingHalf(transports._FlowControlMixin):
    """What a transport needs for sending. Its subclass fills these fields, all in one go, and ends the connection."""

    __slots__ = (
        "_closing",
        "_conn_lost",
        "_context",
        "_corks",
        "_eof_sent",
        "_error",
        "_fd",
        "_interest",
        "_keeper",
        "_out",
        "_peer",
        "_protocol",
        "_send",
        "_sock",
        "_stamps",
        "_stuck",
        "due",
    )

    _loop: PollLoop
    _sock: socket.socket
    _fd: int
    _send: Callable[[Buffer], int]
    _protocol: asyncio.BaseProtocol
    _context: Context
    _peer: Any
    _keeper: Keeper
    _out: bytearray | None  # unsent bytes; None: nothing is unsent and `write` may send at once
    _corks: int  # blocks of the handler that gather what is written
    _interest: int  # what epoll watches this descriptor for
    _closing: bool
    _eof_sent: bool
    _stuck: float  # since when the socket has taken nothing of `_out`, while there is some
    _stamps: Stamps | None  # notes what comes and goes, where the kernel does not
    due: float  # as of `deadlines.Watched`
    _error: OSError | None  # what the kernel has said of the connection, to tell when all is read
    _conn_lost: int  # from 1 on: the protocol has been or will be told; writes since then

    def end(self, error: Ended) -> None:
        """Ends the connection at once, of forkd's own accord."""
        raise NotImplementedError

    def look(self, now: float) -> float:
        """As `deadlines.Watched`."""
        raise NotImplementedError

    def __lt__(self, other: object) -> bool:
        """As `deadlines.Watched`."""
        raise NotImplementedError

    def _force_close(self, error: BaseException | None) -> None:
        """Ends the connection at once; the protocol is told later."""
        raise NotImplementedError

    def _connection_lost(self, error: BaseException | None) -> None:
        """Tells the protocol, and closes the socket."""
        raise NotImplementedError

    def _send_gathered(self) -> None:
        """Sends what a block of the handler has gathered."""
        raise NotImplementedError

    def write(self, data: Buffer) -> None:
        """Sends what the socket takes now, keeps the rest and sends it later; never blocks."""
        if self._out is not None:
            self._write_later(data)
            return
        if data.__class__ is not bytes:
            data = _octets(data)
        try:
            sent = self._send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._write_failed(error)
            return
        if sent != len(data):
            self._keep(data, sent)

    def writelines(self, list_of_data: Iterable[Buffer]) -> None:
        """Sends several pieces as one, by a single sendmsg(2) where nothing waits before them."""
        pieces = [_octets(piece) for piece in list_of_data]
        if self._out is not None or not 1 < len(pieces) <= _IOV_MAX:
            self.write(b"".join(pieces))
            return
        try:
            sent = self._sock.sendmsg(pieces)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._write_failed(error)
            return
        if self._stamps is not None:
            self._stamps.note_out(sent)
        if sent != sum(map(len, pieces)):
            self._keep(b"".join(pieces), sent)

    def _keep(self, data: Buffer, sent: int) -> None:
        """Keeps what the socket did not take."""
        self._out = bytearray(memoryview(data)[sent:])
        self._send_later()
        self._maybe_pause_protocol()  # type: ignore[attr-defined]

    def _send_later(self) -> None:
        """Has the loop send what is unsent when the socket takes it, if it does not wait for that already."""
        if self._interest & OUT:
            return
        if (patience := self._keeper.patience) is not None and patience.write:
            self._stuck = now = monotonic()
            patience.deadlines.watch(self, now + patience.write / LOOKS)
        self._watch(self._interest | OUT)

    def _write_later(self, data: Buffer) -> None:
        data = _octets(data)
        if self._eof_sent:
            raise RuntimeError("Cannot call write() after write_eof()")
        if not data:
            return
        if self._conn_lost:
            if self._conn_lost == constants.LOG_THRESHOLD_FOR_CONNLOST_WRITES:
                log.warning("a handler goes on writing to a closed connection: %r", self._protocol, extra=self.about())
            self._conn_lost += 1
            return
        assert self._out is not None  # noqa: S101 (for the type checker)
        if 0 < self._keeper.write_limit < len(self._out):
            self.end(WriteBufferFull(f"it does not read: {len(self._out)} bytes are unsent"))
            return
        self._out += data
        if self._corks:
            most: int = self._high_water  # type: ignore[attr-defined]
            if len(self._out) > min(most, self._keeper.write_limit or most):
                self._send_gathered()
        self._maybe_pause_protocol()  # type: ignore[attr-defined]

    def _flush(self) -> None:
        out = self._out
        assert out is not None  # noqa: S101 (for the type checker)
        try:
            sent = self._send(out)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._write_failed(error)
            return
        del out[:sent]
        self._stuck = monotonic()
        if not (out or self._closing or self._eof_sent or self._corks):
            self._out = None
        # The handler may write, close or abort in it.
        self._context.run(self._maybe_resume_protocol)  # type: ignore[attr-defined]
        if self._out or self._conn_lost:
            return
        self._watch(self._interest & ~OUT)
        if self._closing:
            self._conn_lost += 1
            self._connection_lost(None)
        elif self._eof_sent:
            self._shut_down()

    def _write_failed(self, error: OSError) -> None:
        if self._conn_lost:
            return
        self._report(error, "Fatal write error on socket transport")
        self._force_close(self._error or error)

    def can_write_eof(self) -> bool:
        """True: a stream socket can be closed for one direction."""
        return True

    def write_eof(self) -> None:
        """Closes the sending side when all is sent; data is received on."""
        if self._closing or self._eof_sent:
            return
        self._eof_sent = True
        if self._out:
            self._send_later()
        else:
            self._out = SHUT
            self._shut_down()

    def _shut_down(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError as error:  # the peer has reset the connection, which the next read will say
            log.debug("shutdown(SHUT_WR): %s", error)

    def get_write_buffer_size(self) -> int:
        """Bytes that are unsent."""
        return len(self._out) if self._out else 0

    def _watch(self, interest: int) -> None:
        """Has epoll watch for this and nothing else."""
        raise NotImplementedError

    def _report(self, error: OSError, message: str) -> None:
        """Keeps why the connection ends. That a client goes away, as its `connection_lost` hears, is nothing to log;
        that one has vanished is worth a line; anything else is a warning.
        """
        if self._error is None:  # without its traceback, which knows this transport
            self._error = type(error)(*error.args)
        if is_vanished(error):
            log.info("%s has vanished: %s", self._name(), error.strerror, extra=self.about())
        elif not isinstance(error, _GONE):
            log.warning("%s: %s: %s", self._name(), message, error, extra=self.about())

    def about(self) -> dict[str, str]:
        """Which connection a log record is about, as fields of it."""
        return {"client": str(self._peer), "listener": self._keeper.listener}

    def _name(self) -> str:
        return f"client {self._peer!r}" if self._peer else f"client on descriptor {self._fd}"
