"""A socket of datagrams as an `asyncio.DatagramTransport`, served by the poll loop without asyncio's generic path.

It keeps asyncio's contract, and adds to it what a daemon wants: a wake-up takes a bounded batch, what a handler raises
is reported and ends nothing, what waits to be sent is bounded, a datagram that came cut off is dropped, and on a socket
that is bound to every address of the machine a reply leaves from the one that the request came to. What is on the path
of every datagram, `_ready` here and `sendto` in `datagram_sending`, is written for speed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from asyncio import trsock
from collections import Counter, deque
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

from forkd.drain import draining
from forkd.serve.datagram_sending import MOST_UNSENT, Admit, DatagramKeeper, DatagramSending, Unwrap
from forkd.serve.loop import IN, OUT, PollLoop, Ready
from forkd.serve.origins import Origins, receives_origin
from forkd.serve.recent import MANY, Recent, RecentPeers
from forkd.serve.sending import HIGH_WATER, LOW_WATER
from forkd.system.inherited import is_connected

log = logging.getLogger("forkd.datagram")

#: Datagrams that one wake-up takes at most; then it is other sockets' turn.
BATCH = 64

#: No datagram of UDP is longer; of a unix socket, whose limit is its sender's buffer, one that is comes cut off.
_LONGEST = 65_536
_LONGEST_UNIX = 262_144

#: Rounds for which a worker that drains reads a socket that others send to meanwhile, and its successor reads.
_LAST_ROUNDS = 16

_TURNS = range(BATCH)


class DatagramTransport(DatagramSending):
    """One socket.

    Args:
        loop: the process's loop.
        sock: a bound, non-blocking datagram socket; the transport owns it.
        protocol: what serves it.
        keeper: who counts for it.
        peer: where it is connected to; None: it takes datagrams of everybody.
        watch: what epoll is asked for so as to read: EPOLLIN, with EPOLLEXCLUSIVE for a socket that workers share.
        admit: asked for each datagram; None: everybody's are taken.
        unwrap: takes a proxy's header off each datagram; None: there is none.
    """

    def __init__(
        self,
        loop: PollLoop,
        sock: socket.socket,
        protocol: asyncio.BaseProtocol,
        keeper: DatagramKeeper,
        *,
        peer: Any = None,
        watch: int = IN,
        admit: Admit | None = None,
        unwrap: Unwrap | None = None,
    ) -> None:
        super().__init__({}, loop)
        self._high_water, self._low_water = HIGH_WATER, LOW_WATER
        self._sock = sock
        self._fd = sock.fileno()
        self._keeper = keeper
        self._peer = peer
        self._read_interest = watch
        self._interest = 0
        self._closing = False
        self._conn_lost = 0
        self._finish: Callable[[], None] | None = None
        self._rounds = 0
        self._unsent: deque[tuple[bytes, Any]] = deque()
        self._unsent_bytes = 0
        self._most_unsent = min(keeper.write_limit or MOST_UNSENT, MOST_UNSENT)
        self._recent = RecentPeers(loop.time)
        self._heard, self._note_told = self._recent.heard, self._recent.told.append
        self._cut_off = 0
        self._admit, self._unwrap = admit, unwrap
        self._stray = peer is not None  # whether datagrams of others may lie in the queue, from before the connect
        self._check = self._checked if admit or unwrap or self._stray else None
        self._choose_ways()
        self._sendto = sock.sendto
        self._context = copy_context()
        self._reader: Ready = partial(self._context.run, self._ready)  # type: ignore[call-arg]  # mypy misreads ParamSpec
        self.set_protocol(protocol)

    def _choose_ways(self) -> None:
        """How datagrams are received and sent: as simply as the socket allows."""
        self._origins: Origins | None = None
        self._receive: Callable[[int], tuple[bytes, Any]] = self._sock.recvfrom
        self._size = _LONGEST
        self._waiting = None
        if self._sock.family == socket.AF_UNIX:
            self._waiting = None if self._peer is not None else Counter()
            self._receive, self._size = self._receive_whole, _LONGEST_UNIX
        elif self._unwrap or (self._peer is None and receives_origin(self._sock)):
            self._origins = Origins(self._sock)
            self._receive = self._origins.receive
        self._plain = self._origins is None and self._peer is None
        self._direct = self._plain

    def start(self) -> None:
        """Tells the protocol that there is a socket, then begins to read. Raises what the protocol raises."""
        self._context.run(self._protocol.connection_made, self)
        if not self._closing:
            self._watch(self._read_interest)

    # Receiving

    def _ready(self, mask: int) -> bool:
        """Takes a batch; whether nothing is left."""
        if mask != IN and not self._is_readable(mask):
            return False
        receive, size, check = self._receive, self._size, self._check
        noted, emptied = self._heard, False
        heard = noted.append
        for _ in _TURNS:
            try:
                data, peer = receive(size)
            except (BlockingIOError, InterruptedError):
                emptied = True
                break
            except OSError as error:
                self._failed(error)
                continue
            if check is not None:
                found = check(data, peer)
                if found is None:
                    continue
                data, peer = found
            heard(peer)
            try:
                self._deliver(data, peer)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 (the handler's border)
                self._complain(error, "protocol.datagram_received() call failed.")
            if self._closing:
                break
        if len(noted) > MANY:
            self._count()
        if check is not None and emptied:  # what others had sent is gone, and since the connect the kernel sifts
            self._stray = False
            self._check = self._checked if self._admit or self._unwrap else None
        return emptied

    def _is_readable(self, mask: int) -> bool:
        """Sends what waits, if it is time for that; whether there is something to read, be it an error."""
        if mask & OUT and self._unsent:
            self._flush()
        return bool(mask & ~OUT and self._interest & IN)

    def beat(self) -> None:
        """At each heartbeat: counts what has been noted since; takes what was left lying, of a socket that workers
        share, by one that was woken for it and stands still.
        """
        if self._read_interest != IN and self._interest & IN:
            self._reader(IN)
        self._count()
        if self._cut_off:
            words = "%s: dropped %d datagrams of more than %d bytes, which came cut off"
            log.warning(words, self._keeper.listener, self._cut_off, self._size)
            self._cut_off = 0

    def recent(self) -> list[Recent]:
        """The peers of late, at most `recent.MOST_PEERS`, with how many datagrams came and went."""
        self._count()
        return self._recent.list()

    def _receive_whole(self, size: int) -> tuple[bytes, Any]:
        """As recvfrom(2), but for one that is longer than `size`: nothing of it is of use."""
        while True:
            data, _, flags, peer = self._sock.recvmsg(size)
            if not flags & socket.MSG_TRUNC:
                return data, peer
            self._cut_off += 1

    def _checked(self, data: bytes, peer: Any) -> tuple[bytes, Any] | None:
        """What is delivered of a datagram, and as whose; None: nothing."""
        if self._stray and peer != self._peer:
            return None
        if self._unwrap is not None:
            found = self._unwrap(data, peer)
            if found is None:
                return None
            data, client, _ = found
            if self._origins is not None and client != peer:
                self._origins.lead(client, peer)
            peer = client
        if self._admit is not None and not self._admit(peer):
            return None
        return data, peer

    def finish(self, done: Callable[[], None]) -> None:
        """Reads what lies in the queue, then reads no more, and calls the protocol's `shutdown()`, if it has one. What
        is written is sent on.

        Args:
            done: called after that, by the loop; not when the transport is closed before.
        """
        self._finish = done
        self._loop.call_soon(self._finish_round)

    def _finish_round(self) -> None:
        if self._closing or self._finish is None:
            return
        self._rounds += 1
        emptied = self._context.run(self._ready, IN)
        if not emptied and (self._rounds < _LAST_ROUNDS or self._is_deaf()):
            self._loop.call_soon(self._finish_round)
            return
        if self._closing:
            return
        self._watch(self._interest & OUT)
        shutdown = getattr(self._protocol, "shutdown", None)
        if callable(shutdown):
            try:
                self._context.run(shutdown)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException as error:  # noqa: BLE001 (the handler's border)
                self._complain(error, "protocol.shutdown() call failed.")
        done, self._finish = self._finish, None
        done()

    def _is_deaf(self) -> bool:
        """Whether nothing more comes, since the master has taken the socket out of its group by connecting it."""
        return self._peer is None and is_connected(self._sock)

    # The end

    def _connection_lost(self, error: BaseException | None) -> None:
        self._count()
        try:
            self._protocol.connection_lost(error)  # type: ignore[arg-type]
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as raised:  # noqa: BLE001 (the handler's border)
            self._complain(raised, "protocol.connection_lost() call failed.")
        finally:
            self._loop.selector.served.pop(self._fd, None)
            self._sock.close()
            self._keeper.lost(self)

    def _watch(self, interest: int) -> None:
        before, self._interest = self._interest, interest
        if interest == before:
            return
        selector = self._loop.selector
        selector.served[self._fd] = self._reader
        # Exclusive waiters can't be modified (epoll_ctl(2)), but taken out and put in.
        if before:
            selector.epoll.unregister(self._fd)
        if interest:
            selector.epoll.register(self._fd, interest if interest & IN else interest & OUT)

    def __repr__(self) -> str:
        state = "closed" if self._conn_lost else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} fd={self._fd} unsent={self._unsent_bytes}>"

    # The rest of asyncio's interface

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol in charge."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Puts another protocol in charge, of datagrams from now on."""
        self._protocol = protocol
        self._deliver = protocol.datagram_received  # type: ignore[attr-defined]

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the socket: `sockname`, `peername` (where it is connected), `socket`, and whether its worker
        is `draining`; `default` for all else.
        """
        if name == "sockname":
            try:
                return self._sock.getsockname()
            except OSError:
                return default
        if name == "peername":
            return default if self._peer is None else self._peer
        if name == "socket":
            return trsock.TransportSocket(self._sock)
        if name == "draining":
            return draining()
        return default
