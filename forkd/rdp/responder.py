"""A server's exchanges with many peers, as a state machine without input, output or clock.

Methods take the time and return packets with the peers that they are for; `deadline` says when `expire` is to be
called. A request is handed out to be run at most once. Nothing that has run is forgotten while a packet of it may
still arrive: at the bounds of memory it is the new requests that are refused, first those of hosts that have taken most
of it. Few exchanges are kept of peers that have not proven their address: others are asked for the token, for which
nothing is kept. `Responder` holds all exchanges of a socket, `Exchange` one that is under way, `FinishedExchanges` the
names of those that are over. `server` calls it.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from hashlib import blake2b
from random import Random
from typing import Any, NamedTuple

from forkd.rdp.packets import (
    ANSWER,
    BUSY,
    DATA_HEADER,
    FAILED,
    PART,
    RECEIVED,
    REQUEST,
    TAKEN,
    TOO_LARGE,
    BadPacket,
    Data,
    ExchangeState,
    Refusal,
    decode,
    encode,
)
from forkd.rdp.timers import AMPLIFICATION, DeadlineHeap, Limits, Timers
from forkd.rdp.transfer import Incoming, Outgoing

#: An address, as the transport gives it and takes it.
Peer = Any


Packets = list[tuple[bytes, Peer]]

#: Bytes that an exchange under way takes, and that sending its answer takes, beside the payloads.
OVERHEAD, ANSWER_OVERHEAD = 512, 1536

#: How many times of what is left a host may have.
_SHARE = 4

#: What one call of `expire` does at most: exchanges that are due, and names that are forgotten.
_DUE_AT_ONCE, _FORGOTTEN_AT_ONCE = 100, 1000

_V4_MAPPED = bytes(10) + b"\xff\xff"


class Request(NamedTuple):
    """A request that has arrived whole and is to be run: now, and never again."""

    key: int
    id: int
    payload: bytes
    peer: Peer


class HostShare:
    """What one host has of a server's memory: an IPv4 address, an IPv6 network of 64 bits, or a unix socket.

    Attributes:
        name: of the host.
        exchanges: that are remembered of it.
        held: bytes of those that are under way.
        arriving: bytes announced by its requests that are not whole.
    """

    __slots__ = ("arriving", "exchanges", "held", "name")

    def __init__(self, name: object) -> None:
        self.name = name
        self.exchanges = self.held = self.arriving = 0


class Responder:
    """The exchanges of one socket.

    Args:
        timers: when to send again and to forget.
        limits: what to keep.
        random: where the jitter comes from.
        secret: bytes that no peer knows, from which the tokens are made.

    Attributes:
        draining: no new request is taken; a client sends it again, to the process that reads the socket next.
    """

    def __init__(self, timers: Timers, limits: Limits, random: Random, secret: bytes) -> None:
        self._timers, self._limits, self._random, self._secret = timers, limits, random, secret
        self._exchanges: dict[int, Exchange] = {}
        self._hosts: dict[object, HostShare] = {}  # those of which an exchange is remembered
        self._finished = FinishedExchanges(timers.exchange_lifetime, self._release)
        self._deadlines = DeadlineHeap()
        self._held = 0  # bytes of all exchanges under way
        self._arriving = 0  # bytes announced by requests that are not whole
        self._unproven = 0  # exchanges of peers that have not sent the token back
        self._unfinished: set[int] = set()
        self.draining = False

    @property
    def deadline(self) -> float | None:
        """When `expire` is to be called; None: not before a datagram has come."""
        at, rotation = self._deadlines.next, self._finished.deadline
        return rotation if at is None else at if rotation is None else min(at, rotation)

    @property
    def unfinished(self) -> int:
        """Exchanges whose request arrives or runs, or whose answer of several parts is under way."""
        return len(self._unfinished)

    def __len__(self) -> int:
        """How many exchanges are remembered."""
        return len(self._exchanges) + len(self._finished)

    def receive(self, now: float, data: bytes, peer: Peer) -> tuple[list[bytes], Request | None]:
        """Takes a datagram.

        Returns:
            Packets for the same peer, and the request that is to be run if this made one whole.
        """
        try:
            packet = decode(data)
        except BadPacket:
            return [], None
        if not isinstance(packet, Data | ExchangeState) or packet.kind not in {REQUEST, TAKEN}:
            return [], None
        key = self._key(packet.id, peer)
        exchange = self._exchanges.get(key)
        if isinstance(packet, ExchangeState):
            return ([] if exchange is None else self._taken(now, exchange, packet, len(data))), None
        if exchange is None:
            if self._finished.has(key, now):
                return [], None
            refused = self._refuse(packet, key, peer)
            if refused is not None:
                return refused, None
            exchange = self._begin(now, key, packet, peer)
        return self._requested(now, exchange, packet, len(data))

    def answer(self, now: float, key: int, payload: bytes) -> Packets:
        """The answer of a request that was run."""
        exchange = self._exchanges[key]
        outgoing = exchange.answer(payload, self._timers, self._random)
        exchange.expiry = now + self._timers.exchange_lifetime
        self._hold(exchange, ANSWER_OVERHEAD + len(payload))
        if outgoing.count == 1:
            self._unfinished.discard(key)
        return self._send(exchange, exchange.send(now, outgoing))

    def fail(self, now: float, key: int) -> Packets:
        """The request was run and has no answer."""
        exchange = self._exchanges[key]
        exchange.failed, exchange.acknowledge_at = True, None
        self._unfinished.discard(key)
        exchange.expiry = now + self._timers.exchange_lifetime
        return self._send(exchange, exchange.refused())

    def expire(self, now: float) -> Packets:
        """Forgets, announces and repeats what is due, up to a bound; the packets to send. Where more is due, `deadline`
        has passed already.
        """
        self._finished.expire(now)
        packets: Packets = []
        for key in self._deadlines.due(now, _DUE_AT_ONCE):
            exchange = self._exchanges[key]
            outgoing = exchange.outgoing
            if now >= exchange.expiry and not exchange.running:
                self._forget(exchange)
                continue
            if exchange.acknowledge_at is not None and now >= exchange.acknowledge_at:
                exchange.acknowledge_at = None
                packets += [(packet, exchange.peer) for packet in exchange.received()]
            if outgoing is not None and outgoing.deadline is not None and now >= outgoing.deadline:
                outgoing.expire(now)
                if outgoing.exhausted:
                    self._unfinished.discard(key)
                else:
                    packets += [(packet, exchange.peer) for packet in exchange.send(now, outgoing)]
            if exchange.running and now >= exchange.expiry:
                exchange.expiry = now + self._timers.exchange_lifetime
            self._deadlines.set(key, exchange.due)
        return packets

    def _key(self, id: int, peer: Peer) -> int:
        """What names an exchange: a keyed hash, which a peer knows only if it was sent to its address."""
        digest = blake2b(b"%d %b" % (id, repr(peer).encode()), key=self._secret, digest_size=8).digest()
        return int.from_bytes(digest) or 1  # 0 stands for no token

    def _refuse(self, packet: Data, key: int, peer: Peer) -> list[bytes] | None:
        """What to say to a new request that is not taken; None when it is."""
        limits, proven, long = self._limits, packet.token == key, len(packet.payload) < packet.length
        if self.draining:
            return []
        if packet.length > limits.request:
            return [encode(Refusal(packet.id, TOO_LARGE))]
        if not proven and (long or len(self) * 2 >= limits.exchanges or self._unproven >= limits.unproven):
            return [encode(ExchangeState(RECEIVED, packet.id, key, 0, 0, prove=True))]
        host = self._hosts.get(_host(peer)) or HostShare(None)
        full = host.exchanges >= _SHARE * (limits.exchanges - len(self))
        full |= host.held >= _SHARE * (limits.answers - self._held)
        if long:
            free = min(limits.arriving - self._arriving, limits.arriving_per_host)
            full |= host.arriving + packet.length > free
        return [encode(Refusal(packet.id, BUSY))] if full else None

    def _begin(self, now: float, key: int, packet: Data, peer: Peer) -> Exchange:
        name = _host(peer)
        host = self._hosts.get(name)
        if host is None:
            host = self._hosts[name] = HostShare(name)
        exchange = self._exchanges[key] = Exchange(key, packet, peer, host)
        exchange.latest = now + self._timers.exchange_lifetime
        host.exchanges += 1
        self._unproven += 1
        self._hold(exchange, OVERHEAD)
        self._unfinished.add(key)
        if exchange.count > 1:
            self._arriving += packet.length
            host.arriving += packet.length
        return exchange

    def _hold(self, exchange: Exchange, size: int) -> None:
        exchange.held += size
        exchange.host.held += size
        self._held += size

    def _release(self, host: HostShare) -> None:
        """One exchange of a host is remembered no more."""
        host.exchanges -= 1
        if not host.exchanges:
            del self._hosts[host.name]

    def _note_received(self, exchange: Exchange, size: int, token: int) -> None:
        if not exchange.proven and exchange.note_received(size, token):
            self._unproven -= 1

    def _requested(self, now: float, exchange: Exchange, packet: Data, size: int) -> tuple[list[bytes], Request | None]:
        if packet.length != exchange.length:
            return [], None
        self._note_received(exchange, size, packet.token)
        incoming = exchange.incoming
        if incoming is None:
            exchange.expiry = now + self._timers.exchange_lifetime
        else:  # no client takes longer in all
            exchange.expiry = min(now + self._timers.max_transmit_wait, exchange.latest)
        request = None
        if incoming is not None:
            incoming.add(packet.part, packet.payload)
            if incoming.whole:
                request = self._run(now, exchange, incoming)
            packets = exchange.received() if exchange.count > 1 else []
        elif exchange.failed:
            packets = exchange.refused()
        elif (outgoing := exchange.outgoing) is None:
            packets = exchange.received()
        else:
            if outgoing.exhausted or outgoing.count == 1:
                outgoing.revive()
            packets = exchange.send(now, outgoing)
        self._deadlines.set(exchange.key, exchange.due)
        return packets, request

    def _run(self, now: float, exchange: Exchange, incoming: Incoming) -> Request:
        self._arrived(exchange)
        exchange.incoming = None
        exchange.expiry = now + self._timers.exchange_lifetime
        exchange.acknowledge_at = now + self._timers.acknowledge_after if exchange.count == 1 else None
        return Request(exchange.key, exchange.id, incoming.payload(), exchange.peer)

    def _taken(self, now: float, exchange: Exchange, packet: ExchangeState, size: int) -> list[bytes]:
        if packet.token != exchange.key:
            return []
        self._note_received(exchange, size, packet.token)
        outgoing = exchange.outgoing
        if outgoing is None:
            return exchange.refused() if exchange.failed else exchange.received()
        exchange.expiry = now + self._timers.exchange_lifetime
        progress = outgoing.acknowledge(now, packet.first_missing, packet.ahead)
        if outgoing.done:
            self._end(exchange)
            self._finished.add(exchange.key, exchange.host, now)
            return []
        if outgoing.exhausted and not progress:
            outgoing.revive()
        packets = exchange.send(now, outgoing)
        self._deadlines.set(exchange.key, exchange.due)
        return packets

    def _send(self, exchange: Exchange, packets: list[bytes]) -> Packets:
        self._deadlines.set(exchange.key, exchange.due)
        return [(packet, exchange.peer) for packet in packets]

    def _arrived(self, exchange: Exchange) -> None:
        """Gives back what was set aside for a request that was arriving."""
        if exchange.incoming is not None and exchange.count > 1:
            self._arriving -= exchange.length
            exchange.host.arriving -= exchange.length

    def _end(self, exchange: Exchange) -> None:
        """An exchange is not under way any more."""
        self._arrived(exchange)
        self._hold(exchange, -exchange.held)
        self._unproven -= not exchange.proven
        del self._exchanges[exchange.key]
        self._unfinished.discard(exchange.key)
        self._deadlines.forget(exchange.key)

    def _forget(self, exchange: Exchange) -> None:
        self._end(exchange)
        self._release(exchange.host)


class Exchange:
    """A request and its answer.

    Attributes:
        key: names it among all; also the token that proves the peer's address, since it cannot be guessed.
        host: what the peer's host has.
        held: bytes that are counted for it.
        latest: until when the whole request has to be there.
        incoming: the request; None once it is running.
        outgoing: the answer, when there is one.
        failed: its handler failed.
        proven: the peer has sent the token back.
        allowed: bytes that may still be sent to a peer that has not.
        expiry: when it may be forgotten.
        acknowledge_at: when the client is told that the answer takes longer, or None.
    """

    __slots__ = (
        "acknowledge_at", "allowed", "count", "expiry", "failed", "held", "host", "id", "incoming", "key", "latest",
        "length", "outgoing", "peer", "proven",
    )  # fmt: skip

    def __init__(self, key: int, packet: Data, peer: Peer, host: HostShare) -> None:
        self.key, self.id, self.peer, self.length = key, packet.id, peer, packet.length
        self.host, self.held, self.latest = host, 0, 0.0
        self.incoming: Incoming | None = Incoming(packet.length)
        self.count = self.incoming.count
        self.outgoing: Outgoing | None = None
        self.failed = False
        self.proven = False
        self.allowed = 0
        self.expiry = 0.0
        self.acknowledge_at: float | None = None

    @property
    def running(self) -> bool:
        """Whether the handler runs for it."""
        return self.incoming is None and self.outgoing is None and not self.failed

    @property
    def due(self) -> float:
        """When something is to be done for it, unless a packet comes earlier."""
        at = self.expiry
        if self.acknowledge_at is not None:
            at = min(at, self.acknowledge_at)
        if self.outgoing is not None and self.outgoing.deadline is not None:
            at = min(at, self.outgoing.deadline)
        return at

    def note_received(self, size: int, token: int) -> bool:
        """Notes a packet of a peer that is not proven: whether it proves the peer's address; else it allows more bytes
        to be sent to it.
        """
        self.proven = token == self.key
        self.allowed += AMPLIFICATION * size
        return self.proven

    def received(self) -> list[bytes]:
        """The packet that says what of the request is there, and asks for the token unless it was sent back."""
        first_missing, ahead = (
            (self.count, 0) if self.incoming is None else (self.incoming.first_missing, self.incoming.ahead)
        )
        return self._within(encode(ExchangeState(RECEIVED, self.id, self.key, first_missing, ahead, not self.proven)))

    def refused(self) -> list[bytes]:
        """The packet that says that the handler failed."""
        return self._within(encode(Refusal(self.id, FAILED)))

    def answer(self, payload: bytes, timers: Timers, random: Random) -> Outgoing:
        """Takes the answer, which is to be sent from now on."""
        outgoing = self.outgoing = Outgoing(payload, timers, random)
        self.acknowledge_at = None
        return outgoing

    def send(self, now: float, outgoing: Outgoing) -> list[bytes]:
        """The parts of the answer to send now; where they are too much, the peer is first asked for the token."""
        payload, length = outgoing.payload, len(outgoing.payload)
        if not self.proven and (outgoing.count > 1 or self.allowed < DATA_HEADER + length):
            outgoing.deadline = None
            return self.received()
        packets = [
            encode(Data(ANSWER, self.id, self.key, length, part, payload[part * PART : (part + 1) * PART]))
            for part in outgoing.send(now)
        ]
        return packets if self.proven else [packet for one in packets for packet in self._within(one)]

    def _within(self, packet: bytes) -> list[bytes]:
        """The packet, unless it is more than an unproven peer may be sent."""
        if not self.proven:
            if self.allowed < len(packet):
                return []
            self.allowed -= len(packet)
        return [packet]


class FinishedExchanges:
    """The keys of finished exchanges: each is kept for the lifetime and up to half of it more, without a timer each.

    Args:
        lifetime: seconds.
        on_forgotten: called with the host of each key that is kept no more.
    """

    def __init__(self, lifetime: float, on_forgotten: Callable[[HostShare], None]) -> None:
        self._quarter = lifetime / 4
        self._on_forgotten = on_forgotten
        self._ages: list[dict[int, HostShare]] = [{} for _ in range(6)]  # the newest first
        self._outdated: deque[dict[int, HostShare]] = deque()  # to be forgotten, some at a time
        self._rotation: float | None = None

    def __len__(self) -> int:
        return sum(map(len, self._ages)) + sum(map(len, self._outdated))

    def add(self, key: int, host: HostShare, now: float) -> None:
        """Remembers a finished exchange."""
        self.expire(now)
        if self._rotation is None:
            self._rotation = now + self._quarter
        self._ages[0][key] = host

    def has(self, key: int, now: float) -> bool:
        """Whether an exchange is finished; its key is then kept for a lifetime from now."""
        self.expire(now)
        for one in self._ages:
            host = one.pop(key, None)
            if host is not None:
                self._ages[0][key] = host
                return True
        return False

    def expire(self, now: float) -> None:
        """Forgets what is old enough: the keys wander through six tables, a quarter of the lifetime in each."""
        while self._rotation is not None and now >= self._rotation:
            if self._ages[-1]:
                self._outdated.append(self._ages[-1])
            self._ages = [{}, *self._ages[:-1]]
            self._rotation = self._rotation + self._quarter if any(self._ages) else None
        if self._outdated:
            oldest = self._outdated[0]
            for _ in range(min(len(oldest), _FORGOTTEN_AT_ONCE)):
                self._on_forgotten(oldest.popitem()[1])
            if not oldest:
                self._outdated.popleft()

    @property
    def deadline(self) -> float | None:
        """When `expire` is to be called: at once while something is outdated; None while nothing is kept."""
        return 0.0 if self._outdated else self._rotation


def _host(peer: Peer) -> object:
    if not isinstance(peer, tuple):
        return peer
    host = str(peer[0])
    if ":" not in host:
        return host
    packed = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return socket.inet_ntop(socket.AF_INET, packed[12:]) if packed.startswith(_V4_MAPPED) else packed[:8]
