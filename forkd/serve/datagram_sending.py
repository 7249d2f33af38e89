"""The sending half of a datagram socket: datagrams that never block, a bounded number that wait, and flow control.

asyncio's contract, so that the handler's pause_writing, resume_writing and error_received come when they would from
asyncio's own transport. The first lines of `sendto` are on the path of every answer.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from asyncio import transports
from collections import Counter, deque
from collections.abc import Callable
from contextvars import Context
from typing import Any, Protocol

from forkd.ended import Ended
from forkd.serve.loop import OUT, PollLoop
from forkd.serve.networks import shown
from forkd.serve.origins import Origins
from forkd.serve.recent import MANY, RecentPeers
from forkd.system.scoreboard import Field

log = logging.getLogger("forkd.datagram")

#: Bytes of unsent datagrams that are kept at most, each with so many for the keeping; what is beyond is dropped.
MOST_UNSENT = 4 << 20
OVERHEAD = 64

#: Datagrams that are kept for one peer of a unix socket, whose queue alone decides whether it takes more; and seconds
#: until it is tried again. The kernel tells nobody when it would (epoll(7) knows of the sender's own buffer alone).
MOST_OF_PEER = 64
RETRY = 0.01

# As plain integers: an enumeration's members cost a look-up each.
_IN, _OUT, _DROPPED = int(Field.DATAGRAMS_RECEIVED), int(Field.DATAGRAMS_SENT), int(Field.DATAGRAMS_DROPPED)

#: Whether datagrams of a peer are taken.
Admit = Callable[[Any], bool]

#: The payload of a datagram that came by a proxy, whom it is from, and to which of the proxy's addresses it was sent;
#: None for one that is of no use.
Unwrap = Callable[[bytes, Any], "tuple[bytes, Any, Any] | None"]


class DatagramKeeper(Protocol):
    """Who is told of a datagram socket's fate."""

    @property
    def cells(self) -> memoryview:
        """The row of the scoreboard that datagrams are counted on."""

    @property
    def write_limit(self) -> int:
        """Bytes of unsent datagrams that are kept at most; 0: MOST_UNSENT, which is the most in any case."""

    @property
    def listener(self) -> str:
        """Where it is bound, for the log."""

    def lost(self, transport: Any) -> None:
        """A transport is closed."""


class DatagramSending(transports._FlowControlMixin, asyncio.DatagramTransport):
    """What a datagram transport needs for sending. Its subclass fills these fields, all in one go."""

    _loop: PollLoop
    _sock: socket.socket
    _protocol: asyncio.BaseProtocol
    _keeper: DatagramKeeper
    _context: Context
    _peer: Any
    _interest: int
    _closing: bool
    _conn_lost: int
    _plain: bool  # whether nothing stands between `sendto` and sendto(2),
    _direct: bool  # and nothing does at the moment
    _sendto: Callable[..., int]
    _origins: Origins | None
    _recent: RecentPeers
    _note_told: Callable[[Any], None]
    _unsent: deque[tuple[bytes, Any]]
    _unsent_bytes: int
    _most_unsent: int
    _waiting: Counter[Any] | None  # of a unix socket: how many are unsent, by peer

    def _watch(self, interest: int) -> None:
        """Has epoll watch for this and nothing else."""
        raise NotImplementedError

    def _connection_lost(self, error: BaseException | None) -> None:
        """Tells the protocol, and closes the socket."""
        raise NotImplementedError

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Sends a datagram, also an empty one. One that the socket does not take now is kept and sent later, and
        dropped when too many are kept; one that can't be sent is told to `error_received`.
        """
        if self._direct:
            try:
                self._sendto(data, addr)
            except (BlockingIOError, InterruptedError):
                self._keep(data, addr)
            except OSError as error:
                self._failed(error)
            else:
                self._note_told(addr)
            return
        self._send_otherwise(data, addr)

    def _send_otherwise(self, data: Any, addr: Any) -> None:
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._peer is not None:
            if addr not in (None, self._peer):
                raise ValueError(f"Invalid address: must be None or {self._peer}")
            addr = self._peer
        elif addr is None:
            raise ValueError("an address is needed: the socket is connected to nobody")
        if self._closing:
            return
        if self._unsent if self._waiting is None else self._waiting[addr]:
            self._keep(data, addr)
            return
        try:
            self._transmit(data, addr)
        except (BlockingIOError, InterruptedError):
            self._keep(data, addr)
        except OSError as error:
            self._failed(error)

    def _transmit(self, data: Any, addr: Any) -> None:
        if self._peer is not None:
            self._sock.send(data)
        elif self._origins is not None:
            self._origins.send(data, addr)
        else:
            self._sendto(data, addr)
        self._note_told(addr)
        if len(self._recent.told) > MANY:
            self._count()

    def _keep(self, data: Any, addr: Any) -> None:
        size, waiting = len(data) + OVERHEAD, self._waiting
        if self._unsent_bytes + size > self._most_unsent or (waiting is not None and waiting[addr] >= MOST_OF_PEER):
            self._keeper.cells[_DROPPED] += 1
            return
        if waiting is None:
            self._watch(self._interest | OUT)
        else:
            waiting[addr] += 1
            if not self._unsent:
                self._loop.call_later(RETRY, self._flush, context=self._context)
        self._unsent.append((bytes(data), addr))
        self._unsent_bytes += size
        self._direct = False
        self._maybe_pause_protocol()  # type: ignore[attr-defined]

    def _flush(self) -> None:
        blocked = set()
        for _ in range(len(self._unsent)):
            data, addr = self._unsent.popleft()
            try:
                if addr in blocked:
                    raise BlockingIOError  # noqa: TRY301 (as the kernel would)
                self._transmit(data, addr)
            except (BlockingIOError, InterruptedError):
                if self._waiting is None:
                    self._unsent.appendleft((data, addr))
                    break
                blocked.add(addr)  # those behind it, to the same peer, stay behind it
                self._unsent.append((data, addr))
                continue
            except OSError as error:
                self._failed(error)
                if self._conn_lost:  # it has aborted
                    return
            self._unsent_bytes -= len(data) + OVERHEAD
            if self._waiting is not None:
                self._waiting -= Counter((addr,))
        self._maybe_resume_protocol()  # type: ignore[attr-defined]  # it may send in it
        if self._unsent:
            if self._waiting is not None:
                self._loop.call_later(RETRY, self._flush, context=self._context)
            return
        self._watch(self._interest & ~OUT)
        self._direct = self._plain and not self._closing
        if self._closing and not self._conn_lost:
            self._conn_lost += 1
            self._loop.call_soon(self._connection_lost, None, context=self._context)

    def get_write_buffer_size(self) -> int:
        """Bytes that are unsent, with those that keeping them takes."""
        return self._unsent_bytes

    def is_closing(self) -> bool:
        """Whether the socket is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Stops reading, sends what is unsent, then closes. `connection_lost(None)` comes later, never from here."""
        if self._closing:
            return
        self._closing, self._direct = True, False
        self._watch(self._interest & OUT)
        if not self._unsent:
            self._conn_lost += 1
            self._loop.call_soon(self._connection_lost, None, context=self._context)

    def abort(self) -> None:
        """Closes at once; what is unsent is lost."""
        self._abort(None)

    def end(self, error: Ended) -> None:
        """Closes at once, of forkd's own accord: the log and the protocol are told why."""
        if not self._conn_lost:
            log.info("closed client %s (%s): %s", shown(self._peer), error.reason, error, extra=self.about())
            self._abort(error)

    def _abort(self, error: Ended | None) -> None:
        if self._conn_lost:
            return
        self._closing, self._direct = True, False
        self._unsent.clear()
        self._unsent_bytes = 0
        self._watch(0)
        self._conn_lost += 1
        self._loop.call_soon(self._connection_lost, error, context=self._context)

    def _count(self) -> None:
        """Counts the datagrams that were noted since the last time, on the scoreboard too."""
        received, sent = self._recent.count()
        cells = self._keeper.cells
        cells[_IN] += received
        cells[_OUT] += sent

    def _failed(self, error: OSError) -> None:
        """Tells the protocol of what the kernel has said: for one, that nobody takes what was sent."""
        try:
            self._protocol.error_received(error)  # type: ignore[attr-defined]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as raised:  # noqa: BLE001 (the handler's border)
            self._complain(raised, "protocol.error_received() call failed.")

    def _complain(self, error: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
        )

    def about(self) -> dict[str, str]:
        """Which socket a log record is about, as fields of it."""
        return {"listener": self._keeper.listener}
