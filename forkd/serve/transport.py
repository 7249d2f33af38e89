"""A connection as an `asyncio.Transport`, served by the poll loop without asyncio's generic path.

It keeps asyncio's contract: code written for asyncio's own socket transport does not notice the difference. What is on
the path of every request (`_data_ready` in `receiving` and `write` in `sending`) is written for speed: one look-up, one
recv, one call of the handler, one send. Everything rarer is elsewhere.
"""

from __future__ import annotations

import asyncio
import socket
import sys
from asyncio import constants, trsock
from contextvars import copy_context
from time import monotonic
from typing import Any

from forkd.drain import draining
from forkd.serve.delivery import Delivery
from forkd.serve.loop import EDGE, IN, OUT, PollLoop
from forkd.serve.sending import HIGH_WATER, LOW_WATER, SHUT, Keeper
from forkd.serve.stamps import Stamps
from forkd.serve.upkeep import Upkeep

_SO_COOKIE = 57  # asm-generic/socket.h; Python has no name for it


class Transport(Upkeep, Delivery):
    """One accepted connection.

    Args:
        loop: the worker's loop.
        sock: a connected, non-blocking stream socket; the transport owns it.
        protocol: what serves it.
        peer: the peer's address as accept(2) gave it.
        keeper: who counts it.
    """

    __slots__ = ("__weakref__", "_sockname")

    # For loop.start_tls and loop.sendfile, which ask a transport what it can do.
    _start_tls_compatible = True
    _sendfile_compatible = constants._SendfileMode.FALLBACK

    def __init__(
        self, loop: PollLoop, sock: socket.socket, protocol: asyncio.BaseProtocol, peer: Any, keeper: Keeper
    ) -> None:
        # The base's own __init__ would make a dictionary and several calls; the first four are its fields.
        self._loop = loop
        self._protocol_paused = False
        self._high_water = HIGH_WATER
        self._low_water = LOW_WATER
        self._sock = sock
        self._fd = sock.fileno()
        self._recv = sock.recv
        self._send = sock.send
        self._peer = peer
        self._sockname: Any = None  # asked for at the first need
        self._keeper = keeper
        self._out = None
        self._corks = 0
        self._interest = 0
        self._paused = False
        self._kept_open = None
        self._closing = False
        self._eof_sent = False
        self._conn_lost = 0
        self._error = None
        self._stuck = self._asked = self.due = 0.0
        self._queue = 0
        self._stamps = None
        self._opened = opened = monotonic()
        if (patience := keeper.patience) is not None and patience.first:
            patience.deadlines.watch(self, opened + patience.first)
        # As with asyncio's transport, a context variable that is set while one connection is served is not seen by
        # others.
        self._context = copy_context()
        self.set_protocol(protocol)
        if sock.family == socket.AF_UNIX and (patience is not None or keeper.access):
            self._stamps = stamps = Stamps(sock, opened)
            self._recv, self._send = stamps.recv, stamps.send

    def start(self) -> None:
        """Tells the protocol that it is connected, then begins to read."""
        try:
            self._context.run(self._protocol.connection_made, self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border: it may raise anything)
            self._handler_failed(error, "protocol.connection_made() call failed.")
            return
        if not (self._paused or self._closing):
            self._watch(self._interest | IN)
            # A client that spoke at once is heard at once, which saves a round of the loop. Not so for a
            # BufferedProtocol, which would be asked for a buffer in vain when there is nothing yet.
            if self._deliver is not None:
                self._data_ready(IN)
        # Accepted in the very last moment. Asked before it is heard, a protocol would take its client for an idle one.
        if draining():
            self.ask_to_end()

    # The end

    def is_closing(self) -> bool:
        """Whether the connection is closed or about to be."""
        return self._closing

    def close(self) -> None:
        """Stops reading, sends what is unsent, then closes. `connection_lost(None)` comes later, never from here."""
        if self._closing:
            return
        self._closing = True
        if self._out:
            self._send_later()
            self._watch(OUT)
            return
        self._out = SHUT
        self._watch(0)
        self._conn_lost += 1
        self._loop.call_soon(self._connection_lost, None)

    def abort(self) -> None:
        """Closes at once; what is unsent is lost."""
        self._force_close(None)

    @property
    def is_over(self) -> bool:
        """Whether the protocol has been told, or will be next, that the connection is lost."""
        return self._conn_lost > 0

    @property
    def peer(self) -> Any:
        """The peer's address, as accept(2) gave it."""
        return self._peer

    @property
    def cookie(self) -> int:
        """What the kernel calls the connection, as `sock_diag` tells it (socket(7), SO_COOKIE). Raises OSError."""
        return int.from_bytes(self._sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)

    def _force_close(self, error: BaseException | None) -> None:
        # By this name loop.start_tls's protocol ends the transport below it.
        if self._conn_lost:
            return
        self._out = SHUT
        self._closing = True
        self._watch(0)
        self._conn_lost += 1
        self._loop.call_soon(self._connection_lost, error)

    def ask_to_end(self) -> None:
        """Tells the protocol that the worker drains, by its `shutdown()` if it has one; it ends when it suits it."""
        if self._closing:
            return
        try:
            shutdown = getattr(self._inner_protocol(), "shutdown", None)
            if callable(shutdown):
                self._context.run(shutdown)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            self._handler_failed(error, "protocol.shutdown() call failed.")

    def _connection_lost(self, error: BaseException | None) -> None:
        selector = self._loop.selector
        if self._interest:
            selector.epoll.unregister(self._fd)
            self._interest = 0
        self._out = SHUT
        if self.due and (patience := self._keeper.patience) is not None:
            patience.deadlines.forget(self)
        if self._keeper.access:
            self._record(error)
        try:
            self._context.run(self._protocol.connection_lost, error)  # type: ignore[arg-type]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as raised:  # noqa: BLE001 (the handler's border)
            self._complain(raised, "protocol.connection_lost() call failed.")
        finally:
            selector.served.pop(self._fd, None)
            self._sock.close()
            # Transport and protocol know each other; without this they would wait for the garbage collector.
            self._protocol = self._deliver = self._reader = None  # type: ignore[assignment]
            self._keeper.closed()

    def _watch(self, interest: int) -> None:
        before, self._interest = self._interest, interest
        if interest == before:
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

    # What went wrong

    def _handler_failed(self, error: BaseException, message: str) -> None:
        self._complain(error, message)
        self._force_close(error)

    def _complain(self, error: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
        )

    def __repr__(self) -> str:
        state = "closed" if self._conn_lost else "closing" if self._closing else "open"
        return (
            f"<{type(self).__name__} {state} fd={self._fd} peer={self._peer!r} unsent={self.get_write_buffer_size()}>"
        )

    # The rest of asyncio's interface

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol in charge."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Puts another protocol in charge, of this connection's data from now on."""
        self._protocol = protocol
        if self._conn_lost:
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
        """What is known of the connection: `peername`, `sockname`, `socket`, and whether its worker is `draining`;
        `default` for all else.
        """
        if name == "peername":
            return self._peer
        if name == "sockname":
            if self._sockname is None:
                try:
                    self._sockname = self._sock.getsockname()
                except OSError:
                    return default
            return self._sockname
        if name == "socket":
            return trsock.TransportSocket(self._sock)
        if name == "draining":
            return draining()
        return default
