"""A server's exchanges with many peers, as a state machine without input, output or clock.

Methods take the time and return packets with the peers that they are for; `deadline` says when `expire` is to be
called. A request is handed out to be run at most once. Nothing that has run is forgotten while a packet of it may
still arrive: at the bounds of memory it is the new requests that are refused.
"""

from __future__ import annotations

from collections import Counter
from hashlib import blake2b
from random import Random
from typing import NamedTuple

from forkd.rdp.alarms import Alarms
from forkd.rdp.exchange import Exchange, Past, Peer
from forkd.rdp.packets import BUSY, RECEIVED, REQUEST, TAKEN, TOO_LARGE, BadPacket, Data, Refusal, State, decode, encode
from forkd.rdp.timers import Limits, Timers
from forkd.rdp.transfer import Incoming

Packets = list[tuple[bytes, Peer]]


class Request(NamedTuple):
    """A request that has arrived whole and is to be run: now, and never again."""

    key: int
    id: int
    payload: bytes
    peer: Peer


class Responder:
    """The exchanges of one socket.

    Args:
        timers: when to send again and to forget.
        limits: what to keep.
        random: where the jitter comes from.
        secret: bytes that nobody knows, from which the tokens are made.

    Attributes:
        draining: no new request is taken; a client sends it again, to whoever reads the socket next.
    """

    def __init__(self, timers: Timers, limits: Limits, random: Random, secret: bytes) -> None:
        self._timers, self._limits, self._random, self._secret = timers, limits, random, secret
        self._live: dict[int, Exchange] = {}
        self._past = Past(timers.exchange_lifetime)
        self._alarms = Alarms()
        self._kept = 0  # bytes of answers
        self._arriving: Counter[object] = Counter()  # bytes announced by requests that are not whole, for each host
        self._arriving_in_all = 0
        self._unfinished: set[int] = set()
        self.draining = False

    @property
    def deadline(self) -> float | None:
        at, turn = self._alarms.next, self._past.deadline
        return turn if at is None else at if turn is None else min(at, turn)

    @property
    def unfinished(self) -> int:
        """Exchanges whose request arrives or runs, or whose answer of several parts is under way."""
        return len(self._unfinished)

    def __len__(self) -> int:
        """How many exchanges are remembered."""
        return len(self._live) + len(self._past)

    def receive(self, now: float, data: bytes, peer: Peer) -> tuple[list[bytes], Request | None]:
        """Takes a datagram.

        Returns:
            Packets for the same peer, and the request that is to be run if this made one whole.
        """
        try:
            packet = decode(data)
        except BadPacket:
            return [], None
        if not isinstance(packet, Data | State) or packet.kind not in {REQUEST, TAKEN}:
            return [], None
        key = self._key(packet.id, peer)
        exchange = self._live.get(key)
        if isinstance(packet, State):
            return ([] if exchange is None else self._taken(now, exchange, packet, len(data))), None
        if exchange is None:
            if self._past.has(key, now):
                return [], None
            refused = self._refuse(packet, key, peer)
            if refused is not None:
                return refused, None
            exchange = self._begin(key, packet, peer)
        return self._requested(now, exchange, packet, len(data))

    def answer(self, now: float, key: int, payload: bytes) -> Packets:
        """The answer of a request that was run."""
        exchange = self._live[key]
        outgoing = exchange.answer(payload, self._timers, self._random)
        exchange.expiry = now + self._timers.exchange_lifetime
        self._kept += len(payload)
        if outgoing.count == 1:
            self._unfinished.discard(key)
        return self._send(exchange, exchange.send(now, outgoing))

    def fail(self, now: float, key: int) -> Packets:
        """The request was run and has no answer."""
        exchange = self._live[key]
        exchange.failed, exchange.acknowledge_at = True, None
        self._unfinished.discard(key)
        exchange.expiry = now + self._timers.exchange_lifetime
        return self._send(exchange, exchange.refused())

    def expire(self, now: float) -> Packets:
        """Does what is due."""
        self._past.turn(now)
        packets: Packets = []
        for key in self._alarms.due(now):
            exchange = self._live[key]
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
            self._alarms.want(key, exchange.due)
        return packets

    def _key(self, id: int, peer: Peer) -> int:
        """What names an exchange: a keyed hash, so that who has not been sent it can't know it."""
        digest = blake2b(b"%d %b" % (id, repr(peer).encode()), key=self._secret, digest_size=8).digest()
        return int.from_bytes(digest) or 1  # 0 stands for no token

    def _refuse(self, packet: Data, key: int, peer: Peer) -> list[bytes] | None:
        """What to say to a new request that is not taken; None when it is."""
        limits, proven, long = self._limits, packet.token == key, len(packet.payload) < packet.length
        if self.draining:
            return []
        if packet.length > limits.request:
            return [encode(Refusal(packet.id, TOO_LARGE))]
        if not proven and (long or len(self) * 2 >= limits.exchanges):
            return [encode(State(RECEIVED, packet.id, key, 0, 0, prove=True))]
        full = len(self) >= limits.exchanges or self._kept >= limits.answers
        if long:
            full |= self._arriving_in_all + packet.length > limits.arriving
            full |= self._arriving[_host(peer)] + packet.length > limits.arriving_per_host
        return [encode(Refusal(packet.id, BUSY))] if full else None

    def _begin(self, key: int, packet: Data, peer: Peer) -> Exchange:
        exchange = self._live[key] = Exchange(key, packet, peer)
        self._unfinished.add(key)
        if exchange.count > 1:
            self._arriving_in_all += packet.length
            self._arriving[_host(peer)] += packet.length
        return exchange

    def _requested(self, now: float, exchange: Exchange, packet: Data, size: int) -> tuple[list[bytes], Request | None]:
        if packet.length != exchange.length:
            return [], None
        exchange.heard(size, packet.token)
        incoming = exchange.incoming
        exchange.expiry = now + (self._timers.max_transmit_wait if incoming else self._timers.exchange_lifetime)
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
        self._alarms.want(exchange.key, exchange.due)
        return packets, request

    def _run(self, now: float, exchange: Exchange, incoming: Incoming) -> Request:
        self._arrived(exchange)
        exchange.incoming = None
        exchange.expiry = now + self._timers.exchange_lifetime
        exchange.acknowledge_at = now + self._timers.acknowledge_after if exchange.count == 1 else None
        return Request(exchange.key, exchange.id, incoming.payload(), exchange.peer)

    def _taken(self, now: float, exchange: Exchange, packet: State, size: int) -> list[bytes]:
        if packet.token != exchange.key:
            return []
        exchange.heard(size, packet.token)
        outgoing = exchange.outgoing
        if outgoing is None:
            return exchange.refused() if exchange.failed else exchange.received()
        exchange.expiry = now + self._timers.exchange_lifetime
        progress = outgoing.acknowledge(now, packet.first_missing, packet.ahead)
        if outgoing.done:
            self._forget(exchange)
            self._past.add(exchange.key, now)
            return []
        if outgoing.exhausted and not progress:
            outgoing.revive()
        packets = exchange.send(now, outgoing)
        self._alarms.want(exchange.key, exchange.due)
        return packets

    def _send(self, exchange: Exchange, packets: list[bytes]) -> Packets:
        self._alarms.want(exchange.key, exchange.due)
        return [(packet, exchange.peer) for packet in packets]

    def _arrived(self, exchange: Exchange) -> None:
        """Gives back what was set aside for a request that was arriving."""
        if exchange.incoming is not None and exchange.count > 1:
            host = _host(exchange.peer)
            self._arriving_in_all -= exchange.length
            self._arriving[host] -= exchange.length
            if not self._arriving[host]:
                del self._arriving[host]

    def _forget(self, exchange: Exchange) -> None:
        self._arrived(exchange)
        if exchange.outgoing is not None:
            self._kept -= len(exchange.outgoing.payload)
        del self._live[exchange.key]
        self._unfinished.discard(exchange.key)
        self._alarms.forget(exchange.key)


def _host(peer: Peer) -> object:
    return peer[0] if isinstance(peer, tuple) else peer
