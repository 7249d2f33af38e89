"""One datagram socket as an `asyncio.DatagramTransport`, served by the poll loop without asyncio's generic path.

It keeps asyncio's contract, flow control and `error_received` included, and adds what a daemon wants: a wake-up takes
a bounded batch, what a handler raises is reported and ends nothing, what waits to be sent is bounded, a datagram that
came cut off is dropped, and on a socket bound to every address of the machine a reply leaves from the one that the
request came to. `_ready` and the first lines of `sendto` are on the path of every datagram, and written for speed.
`server` makes the transports and is told when one has drained or closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from asyncio import transports, trsock
from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any

from forkd.compiled import extension
from forkd.drain import draining
from forkd.ended import Ended
from forkd.serve.accept.access import format_peer
from forkd.serve.datagram.peers import (
    COUNT_AFTER,
    MOST_PEERS,
    TALLY_AFTER,
    BlockedPeer,
    RecentPeer,
    RecentPeers,
    UnreadAnswers,
)
from forkd.serve.datagram.pktinfo import MOST_PEERS as MOST_ROUTES
from forkd.serve.datagram.pktinfo import ReplyRoutes, enable_pktinfo, reply
from forkd.serve.deadlines import octets
from forkd.serve.loop import IN, OUT, SLICE, PollLoop, Ready
from forkd.serve.stream.transport import HIGH_WATER, LOW_WATER
from forkd.system.inherited import is_connected
from forkd.system.scoreboard import Field

log = logging.getLogger("forkd.datagram")

#: Datagrams that one wake-up takes at most, and fewer if they take longer than a slice; then it is other sockets' turn.
BATCH = 64

#: No datagram of UDP is longer; of a unix socket, whose limit is its sender's buffer, one that is comes cut off.
_LONGEST = 65_536
_LONGEST_UNIX = 262_144

#: Rounds for which a worker that drains reads a socket that others send to meanwhile, and its successor reads.
_LAST_ROUNDS = 16

#: Bytes of unsent datagrams that are kept at most, each with so many for the keeping; what is beyond is dropped.
MOST_UNSENT = 4 << 20
OVERHEAD = 64

#: Datagrams that are kept for one peer of a unix socket, and seconds until it is tried again, each time twice as long.
#: The kernel never says when it would take more (epoll(7) knows of the sender's own buffer alone).
MOST_OF_PEER = 64
RETRY = 0.01

#: Seconds for which what waits is kept while nothing can be sent: to the peer, or from a socket that many peers have.
KEEP = 2.0

#: Seconds between two lines in the log that tell of datagrams which were dropped.
TELL_AFTER = 60.0

# As plain integers: an enumeration's members cost a look-up each.
_IN, _OUT, _DROPPED = int(Field.DATAGRAMS_RECEIVED), int(Field.DATAGRAMS_SENT), int(Field.DATAGRAMS_DROPPED)

_TURNS = range(BATCH)

#: The compiled twin of what is called for each datagram; None: the methods here are.
fast = extension("forkd.serve.datagram._fast")

#: Whether datagrams of a peer are taken.
Admit = Callable[[Any], bool]

#: The payload of a datagram that came by a proxy, the client that sent it, and the proxy's address that it was sent to;
#: None for a datagram that is of no use.
Unwrap = Callable[[bytes, Any], "tuple[bytes, Any, Any] | None"]


@dataclass(frozen=True, slots=True)
class DatagramContext:
    """What the sockets of one listener have in common.

    Attributes:
        loop: the process's loop.
        cells: the row of the scoreboard that datagrams are counted on.
        listener: where it is bound, for the log.
        on_drained: called with a transport that has read its queue after `drain()`; not with one closed before that.
        on_closed: called with a transport whose socket is closed.
        write_limit: bytes of unsent datagrams that each keeps at most; 0: MOST_UNSENT, which is the most in any case.
        watch: what epoll is asked for so as to read: EPOLLIN, with EPOLLEXCLUSIVE for a socket that workers share.
        admit: asked for each datagram; None: all are taken.
        unwrap: takes a proxy's header off each datagram; None: there is none.
    """

    loop: PollLoop
    cells: memoryview
    listener: str
    on_drained: Callable[[DatagramTransport], None]
    on_closed: Callable[[DatagramTransport], None]
    write_limit: int = 0
    watch: int = IN
    admit: Admit | None = None
    unwrap: Unwrap | None = None


class DatagramTransport(transports._FlowControlMixin, asyncio.DatagramTransport):
    """One socket.

    Args:
        sock: a bound, non-blocking datagram socket; the transport owns it.
        protocol: what serves it.
        context: what it has in common with the listener's other sockets.
        peer: where it is connected to; None: it takes datagrams from any address.
    """

    _loop: PollLoop

    def __init__(
        self, sock: socket.socket, protocol: asyncio.BaseProtocol, context: DatagramContext, peer: Any = None
    ) -> None:
        super().__init__({}, context.loop)
        self._high_water, self._low_water = HIGH_WATER, LOW_WATER
        self._sock = sock
        self._fd = sock.fileno()
        self._peer = peer
        self._cells, self._listener = context.cells, context.listener
        self._on_drained, self._on_closed = context.on_drained, context.on_closed
        self._read_interest = context.watch
        self._interest = 0
        self._closing = False
        self._conn_lost = 0
        self._draining = False
        self._rounds = 0
        self._unsent: deque[tuple[bytes, Any, float]] = deque()  # payload, recipient, when it was kept
        self._unsent_bytes = 0
        self._most_unsent = min(context.write_limit or MOST_UNSENT, MOST_UNSENT)
        self._recent = RecentPeers(context.loop.time)
        self._senders, self._note_recipient = self._recent.senders, self._recent.recipients.append
        self._cut_off = self._dropped = 0  # not told of yet
        self._tell_at = 0.0
        self._admit, self._unwrap = context.admit, context.unwrap
        self._stray = peer is not None  # whether datagrams of others may lie in the queue, from before the connect
        self._check = self._checked if self._admit or self._unwrap or self._stray else None
        self._sendto = sock.sendto
        self._context = copy_context()
        self._reader: Ready = partial(self._context.run, self._ready)  # type: ignore[call-arg]  # mypy misreads ParamSpec
        self._choose_calls()
        self.set_protocol(protocol)

    def _choose_calls(self) -> None:
        """Chooses how datagrams are received and sent: as simply as the socket allows."""
        self._hot: Any = None  # the compiled twin of `_ready` and `sendto`, of a UDP socket that many peers send to
        self._routes: ReplyRoutes | None = None
        self._receive: Callable[[int], tuple[bytes, Any]] = self._sock.recvfrom
        self._size = _LONGEST
        self._unread: UnreadAnswers | None = None  # of a unix socket; then nothing is in `_unsent`
        self._blocked: dict[Any, BlockedPeer] = {}  # those of its peers that take nothing
        self._given_up: dict[Any, None] = {}  # those for which nothing is kept until they take something again
        if self._sock.family == socket.AF_UNIX:
            self._unread = None if self._peer is not None else UnreadAnswers(self._sock)
            self._receive, self._size = self._receive_whole, _LONGEST_UNIX
        elif self._unwrap or self._peer is not None or fast is None:
            if self._unwrap or (self._peer is None and enable_pktinfo(self._sock)):
                self._routes = ReplyRoutes(self._sock, checked=bool(self._unwrap or self._admit))
                self._receive = self._routes.receive
        else:
            bounds = (BATCH, SLICE, COUNT_AFTER, MOST_ROUTES)
            origin = reply if enable_pktinfo(self._sock) else None
            self._hot = fast.UdpSocket(self, self._sock, self._context, self._admit, origin, bounds)
            self._reader, self.sendto = self._hot.ready, self._hot.sendto  # type: ignore[method-assign]
        # Whether `sendto` may call sendto(2) with nothing in between: ever, and at the moment.
        self._plain = self._peer is None and not (self._routes or self._unread or self._hot)
        self._direct = self._plain

    def _send_directly(self, allowed: bool) -> None:
        """Says whether what is to be sent may be sent at once, as nothing waits before it."""
        self._direct = allowed and self._plain
        if self._hot is not None:
            self._hot.direct, self._hot.closing = allowed, self._closing

    def start(self) -> None:
        """Tells the protocol that there is a socket, then begins to read. Raises what the protocol raises."""
        self._context.run(self._protocol.connection_made, self)
        if not self._closing:
            self._watch(self._interest | self._read_interest)

    # Receiving

    def _ready(self, mask: int) -> bool:
        """Receives a batch and hands it to the protocol; whether the queue is empty then."""
        if mask != IN and not self._is_readable(mask):
            return False
        receive, size, check = self._receive, self._size, self._check
        senders, emptied, late = self._senders, False, 0.0
        note_sender = senders.append
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
            note_sender(peer)
            try:
                self._deliver(data, peer)
            except BaseException as error:  # noqa: BLE001 (the handler's border)
                self._complain(error, "protocol.datagram_received() call failed.")
            if self._closing or (now := monotonic()) > late > 0:
                break
            late = late or now + SLICE
        if len(senders) > TALLY_AFTER and self._recent.tally():
            self._count()
        if check is not None and emptied:  # what others had sent is gone, and since the connect the kernel drops it
            self._stray = False
            self._check = self._checked if self._admit or self._unwrap else None
        return emptied

    def _is_readable(self, mask: int) -> bool:
        """Sends what is unsent, if the socket takes it; whether there is something to read, be it an error."""
        if mask & OUT and self._unsent:
            self._flush()
        return bool(mask & ~OUT and self._interest & IN)

    def _receive_whole(self, size: int) -> tuple[bytes, Any]:
        """As recvfrom(2), but drops a datagram that is longer than `size`: cut off, it is of no use."""
        while True:
            data, _, flags, peer = self._sock.recvmsg(size)
            if not flags & socket.MSG_TRUNC:
                return data, peer
            self._cut_off += 1

    def _checked(self, data: bytes, peer: Any) -> tuple[bytes, Any] | None:
        """The payload and the peer that the protocol is given for a datagram; None: it is dropped."""
        if self._stray and peer != self._peer:
            return None
        if self._unwrap is not None:
            found = self._unwrap(data, peer)
            if found is None:
                return None
            data, client, _ = found
        else:
            client = peer
        if self._admit is not None and not self._admit(client):
            return None
        if self._routes is not None:
            self._routes.remember(client, peer)
        return data, client

    # Sending

    def sendto(self, data: Any, addr: Any = None) -> None:
        """Sends a datagram, which may be empty. One that the socket does not take now is kept and sent later, or
        dropped when too many are kept; of one that can't be sent `error_received` is told.
        """
        if data.__class__ is not bytes:
            data = octets(data)
        if self._direct:
            try:
                self._sendto(data, addr)
            except (BlockingIOError, InterruptedError):
                self._keep(data, addr)
            except OSError as error:
                self._refused(error)
            else:
                self._note_recipient(addr)
            return
        self._send_otherwise(data, addr)

    def _send_otherwise(self, data: Any, addr: Any) -> None:
        data = octets(data)
        if self._peer is not None:
            if addr not in (None, self._peer):
                raise ValueError(f"Invalid address: must be None or {self._peer}")
            addr = self._peer
        elif addr is None:
            raise ValueError("an address is needed: the socket is not connected")
        if self._closing:
            return
        if self._unsent or addr in self._blocked:
            self._keep(data, addr)
            return
        try:
            self._transmit(data, addr)
        except (BlockingIOError, InterruptedError):
            self._keep(data, addr)
        except OSError as error:
            self._refused(error)

    def _transmit(self, data: Any, addr: Any) -> None:
        """Sends now and notes it. Raises OSError."""
        if self._peer is not None:
            self._sock.send(data)
        elif self._routes is not None:
            self._routes.send(data, addr)
        elif self._unread is None:
            if self._hot is None or not self._hot.send(data, addr):
                self._sendto(data, addr)
        elif self._unread.may_send(addr, len(data)):
            self._sendto(data, addr)
            if self._given_up:
                self._given_up.pop(addr, None)
        else:
            raise BlockingIOError
        self._note_recipient(addr)
        if len(self._recent.recipients) > TALLY_AFTER and self._recent.tally():
            self._count()

    def _keep(self, data: Any, addr: Any) -> None:
        """Keeps a datagram until the socket takes it, or drops and counts it at the bound."""
        kept = bytes(data)
        if self._unsent_bytes + len(kept) + OVERHEAD > self._most_unsent:
            self._note_dropped(1)
        elif self._unread is not None:
            self._keep_for_peer(kept, addr)
        else:
            if not self._unsent and self._peer is None:
                self._loop.call_later(KEEP, self._expire, context=self._context)
            self._unsent.append((kept, addr, self._loop.time()))
            self._unsent_bytes += len(kept) + OVERHEAD
            self._send_directly(False)
            self._watch(self._interest | OUT)
            self._maybe_pause_protocol()  # type: ignore[attr-defined]

    def _keep_for_peer(self, data: bytes, addr: Any) -> None:
        """Keeps a datagram for a peer of a unix socket. The protocol is not paused: it serves the others too."""
        blocked = self._blocked.get(addr)
        if addr in self._given_up or (blocked is not None and len(blocked.datagrams) >= MOST_OF_PEER):
            self._note_dropped(1)
            return
        if blocked is None:
            blocked = self._blocked[addr] = BlockedPeer(self._loop.time() + KEEP, RETRY)
            self._loop.call_later(RETRY, self._retry, addr, context=self._context)
        blocked.datagrams.append(data)
        self._unsent_bytes += len(data) + OVERHEAD

    def _retry(self, addr: Any) -> None:
        """Sends a peer of a unix socket what is kept for it, as far as it takes it; or gives it up."""
        blocked = self._blocked.get(addr)
        while blocked is not None and blocked.datagrams and not self._conn_lost:
            try:
                self._transmit(blocked.datagrams[0], addr)
            except (BlockingIOError, InterruptedError):
                if self._loop.time() < blocked.expires:
                    blocked.wait *= 2
                    self._loop.call_later(blocked.wait, self._retry, addr, context=self._context)
                    return
                self._give_up(addr, blocked)
                break
            except OSError as error:
                self._refused(error)
                if self._conn_lost:  # it has aborted
                    return
            self._unsent_bytes -= len(blocked.datagrams.popleft()) + OVERHEAD
            blocked.wait, blocked.expires = RETRY, self._loop.time() + KEEP
        self._blocked.pop(addr, None)
        self._end_if_sent()

    def _give_up(self, addr: Any, blocked: BlockedPeer) -> None:
        self._note_dropped(len(blocked.datagrams))
        self._unsent_bytes -= sum(map(len, blocked.datagrams)) + OVERHEAD * len(blocked.datagrams)
        if len(self._given_up) >= MOST_PEERS:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[addr] = None

    def _expire(self) -> None:
        """Drops what waits for too long on a socket that many peers have, by which it would come too late anyway."""
        kept_since = self._loop.time() - KEEP
        count = 0
        while self._unsent and self._unsent[0][2] <= kept_since:
            self._unsent_bytes -= len(self._unsent.popleft()[0]) + OVERHEAD
            count += 1
        self._note_dropped(count)
        if self._unsent:
            self._loop.call_at(self._unsent[0][2] + KEEP, self._expire, context=self._context)
        elif count:
            self._all_sent()

    def _note_dropped(self, count: int) -> None:
        self._cells[_DROPPED] += count
        self._dropped += count

    def _flush(self) -> None:
        """Sends what is unsent, in its order, as far as the socket takes it."""
        while self._unsent:
            data, addr, kept_at = self._unsent.popleft()
            self._unsent_bytes -= len(data) + OVERHEAD
            try:
                self._transmit(data, addr)
            except (BlockingIOError, InterruptedError):
                self._unsent.appendleft((data, addr, kept_at))
                self._unsent_bytes += len(data) + OVERHEAD
                break
            except OSError as error:
                self._refused(error)
                if self._conn_lost:  # it has aborted
                    return
            except (TypeError, ValueError, OverflowError) as error:  # it was kept with no address that there can be
                self._complain(error, "a datagram could not be sent")
        if self._unsent:
            self._maybe_resume_protocol()  # type: ignore[attr-defined]
        else:
            self._all_sent()

    def _all_sent(self) -> None:
        """Nothing waits any more on a socket that says when it takes more."""
        self._watch(self._interest & ~OUT)
        self._send_directly(not self._closing)
        self._maybe_resume_protocol()  # type: ignore[attr-defined]  # it may send in it
        self._end_if_sent()

    def _end_if_sent(self) -> None:
        if self._closing and not self._conn_lost and not self._unsent and not self._blocked:
            self._conn_lost += 1
            self._loop.call_soon(self._connection_lost, None, context=self._context)

    def get_write_buffer_size(self) -> int:
        """Bytes that are unsent, with those that keeping them takes."""
        return self._unsent_bytes

    # Counts, errors and names

    def beat(self) -> None:
        """At each heartbeat: counts what was noted since the last one. Of a socket that workers share it also reads
        what is left in the queue by a worker that was woken for it and is stuck.
        """
        if self._read_interest != IN and self._interest & IN:
            self._reader(IN)
        self._count()
        if (self._cut_off or self._dropped) and self._loop.time() >= self._tell_at:
            self._tell_at = self._loop.time() + TELL_AFTER
            self._tell_dropped()

    def _tell_dropped(self) -> None:
        if self._cut_off:
            text = "%s: dropped %d datagrams of more than %d bytes, which came cut off"
            log.warning(text, self._listener, self._cut_off, self._size)
        if self._dropped:
            text = "%s: dropped %d datagrams that could not be sent in time"
            text += ", as their clients do not read" if self._unread is not None else ""
            log.warning(text, self._listener, self._dropped)
        self._cut_off = self._dropped = 0

    def recent(self) -> list[RecentPeer]:
        """The latest peers, `peers.MOST_PEERS` at most, with how many datagrams were received and sent."""
        self._count()
        return self._recent.list()

    def _count(self) -> None:
        """Counts the datagrams that were noted since the last time, on the scoreboard too."""
        received, sent = self._recent.count(self._hot.take_counts() if self._hot is not None else ())
        self._cells[_IN] += received
        self._cells[_OUT] += sent

    def _refused(self, error: OSError) -> None:
        """The kernel does not send one datagram: for one, a filter of packets forbids it."""
        self._cells[_DROPPED] += 1
        self._failed(error)

    def _failed(self, error: OSError) -> None:
        """Passes an error of the kernel to the protocol: for one, that no process receives where it was sent to."""
        try:
            self._protocol.error_received(error)  # type: ignore[attr-defined]
        except BaseException as raised:  # noqa: BLE001 (the handler's border)
            self._complain(raised, "protocol.error_received() call failed.")

    def _complain(self, error: BaseException, message: str) -> None:
        self._loop.call_exception_handler(
            {"message": message, "exception": error, "transport": self, "protocol": self._protocol}
        )

    def about(self) -> dict[str, str]:
        """The fields that a log record about this socket has."""
        return {"listener": self._listener}

    def __repr__(self) -> str:
        state = "closed" if self._conn_lost else "closing" if self._closing else "open"
        return f"<{type(self).__name__} {state} fd={self._fd} unsent={self._unsent_bytes}>"

    # The end

    def drain(self) -> None:
        """Reads what lies in the queue, then reads no more, calls the protocol's `shutdown()`, if it has one, and
        `on_drained`. What is written is sent on.
        """
        self._draining = True
        self._loop.call_soon(self._drain_round)

    def _drain_round(self) -> None:
        if self._closing or not self._draining:
            return
        self._rounds += 1
        emptied = self._reader(IN)
        if not emptied and (self._rounds < _LAST_ROUNDS or self._gets_no_more()):
            self._loop.call_soon(self._drain_round)
            return
        if self._closing:
            return
        self._watch(self._interest & OUT)
        shutdown = getattr(self._protocol, "shutdown", None)
        if callable(shutdown):
            self._loop.call_hook(
                self._context, shutdown, lambda error: self._complain(error, "protocol.shutdown() call failed.")
            )
        self._draining = False
        self._on_drained(self)

    def _gets_no_more(self) -> bool:
        """Whether nothing more comes, since the master has taken the socket out of its group by connecting it."""
        return self._peer is None and is_connected(self._sock)

    def is_closing(self) -> bool:
        """Whether the socket is closed or about to be."""
        return self._closing

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the socket, which the worker goes on with."""
        self._sock.close()

    def close(self) -> None:
        """Stops reading, sends what is unsent, then closes. `connection_lost(None)` comes later, never from here."""
        if self._closing:
            return
        self._closing = True
        self._send_directly(False)
        self._watch(self._interest & OUT)
        self._end_if_sent()

    def abort(self) -> None:
        """Closes at once; what is unsent is lost."""
        self._abort(None)

    def end(self, error: Ended) -> None:
        """Closes at once because forkd decided so; the log and the protocol are told why."""
        if not self._conn_lost:
            about = {**self.about(), "reason": error.reason}
            log.info("closed client %s (%s): %s", format_peer(self._peer), error.reason, error, extra=about)
            self._abort(error)

    def _abort(self, error: Ended | None) -> None:
        if self._conn_lost:
            return
        self._closing = True
        self._send_directly(False)
        self._unsent.clear()
        self._blocked.clear()
        self._unsent_bytes = 0
        self._watch(0)
        self._conn_lost += 1
        self._loop.call_soon(self._connection_lost, error, context=self._context)

    def _connection_lost(self, error: BaseException | None) -> None:
        self._count()
        try:
            self._protocol.connection_lost(error)  # type: ignore[arg-type]
        except BaseException as raised:  # noqa: BLE001 (the handler's border)
            self._complain(raised, "protocol.connection_lost() call failed.")
        finally:
            if self._sock.fileno() == self._fd:  # as in `_watch`
                self._loop.selector.served.pop(self._fd, None)
            self._sock.close()
            self._on_closed(self)

    def _watch(self, interest: int) -> None:
        before, self._interest = self._interest, interest
        if interest == before or self._sock.fileno() != self._fd:  # closed by its handler: the number may be another's
            return
        selector = self._loop.selector
        selector.served[self._fd] = self._reader
        # Exclusive waiters can't be modified (epoll_ctl(2)), but taken out and put in.
        if before:
            selector.epoll.unregister(self._fd)
        if interest:
            selector.epoll.register(self._fd, interest if interest & IN else interest & OUT)

    # The rest of asyncio's interface

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The protocol in charge."""
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Puts another protocol in charge of the datagrams from now on."""
        self._protocol = protocol
        self._deliver = protocol.datagram_received  # type: ignore[attr-defined]
        if self._hot is not None:
            self._hot.deliver = self._deliver

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the socket: `sockname`, `peername` (where it is connected to), `socket`, and whether the
        worker is `draining`; `default` for every other name.
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
