"""One exchange as a server has it: a request that arrives, runs, and is answered; and the memory of those over."""

from __future__ import annotations

from random import Random
from typing import Any

from forkd.rdp.packets import ANSWER, DATA_HEADER, FAILED, PART, RECEIVED, Data, Refusal, State, encode
from forkd.rdp.timers import AMPLIFICATION, Timers
from forkd.rdp.transfer import Incoming, Outgoing

#: An address, as the transport gives it and takes it.
Peer = Any


class Exchange:
    """A request and its answer.

    Attributes:
        key: names it among all; also the token that shows that the peer is there, since nobody can guess it.
        incoming: the request; None once it is running.
        outgoing: the answer, when there is one.
        failed: its handler failed.
        proven: the peer has sent the token back.
        allowed: bytes that may still be sent to a peer that has not.
        expiry: when it may be forgotten.
        acknowledge_at: when the client is told that the answer takes longer, or None.
    """

    __slots__ = (
        "acknowledge_at", "allowed", "count", "expiry", "failed", "id", "incoming", "key", "length", "outgoing", "peer",
        "proven",
    )  # fmt: skip

    def __init__(self, key: int, packet: Data, peer: Peer) -> None:
        self.key, self.id, self.peer, self.length = key, packet.id, peer, packet.length
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
        return self.incoming is None and self.outgoing is None and not self.failed

    @property
    def due(self) -> float:
        """When something is to be done for it, if nothing is heard."""
        at = self.expiry
        if self.acknowledge_at is not None:
            at = min(at, self.acknowledge_at)
        if self.outgoing is not None and self.outgoing.deadline is not None:
            at = min(at, self.outgoing.deadline)
        return at

    def heard(self, size: int, token: int) -> None:
        """Notes what came from the peer."""
        if token == self.key:
            self.proven = True
        elif not self.proven:
            self.allowed += AMPLIFICATION * size

    def received(self) -> list[bytes]:
        """Says what of the request is there, and asks for the token unless it is known."""
        first_missing, ahead = (
            (self.count, 0) if self.incoming is None else (self.incoming.first_missing, self.incoming.ahead)
        )
        return self._within(encode(State(RECEIVED, self.id, self.key, first_missing, ahead, not self.proven)))

    def refused(self) -> list[bytes]:
        return self._within(encode(Refusal(self.id, FAILED)))

    def answer(self, payload: bytes, timers: Timers, random: Random) -> Outgoing:
        outgoing = self.outgoing = Outgoing(payload, timers, random)
        self.acknowledge_at = None
        return outgoing

    def send(self, now: float, outgoing: Outgoing) -> list[bytes]:
        """The parts of the answer to send now; where they are too much, the peer is first asked to show itself."""
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
        """A packet, unless it is more than the peer may be sent."""
        if not self.proven:
            if self.allowed < len(packet):
                return []
            self.allowed -= len(packet)
        return [packet]


class Past:
    """The keys of exchanges that are over: each is kept for the lifetime and up to half of it more, without a timer.

    Args:
        lifetime: seconds.
    """

    def __init__(self, lifetime: float) -> None:
        self._quarter = lifetime / 4
        self._sets: list[set[int]] = [set() for _ in range(6)]  # the newest first
        self._turn: float | None = None

    def __len__(self) -> int:
        return sum(map(len, self._sets))

    def add(self, key: int, now: float) -> None:
        self.turn(now)
        if self._turn is None:
            self._turn = now + self._quarter
        self._sets[0].add(key)

    def has(self, key: int, now: float) -> bool:
        """Whether it is over; one that is asked for again is kept for a lifetime from now."""
        self.turn(now)
        if self._turn is None or not any(key in one for one in self._sets):
            return False
        for one in self._sets[1:]:
            one.discard(key)
        self._sets[0].add(key)
        return True

    def turn(self, now: float) -> None:
        """Forgets what is old enough."""
        while self._turn is not None and now >= self._turn:
            self._sets = [set(), *self._sets[:-1]]
            self._turn = self._turn + self._quarter if any(self._sets) else None

    @property
    def deadline(self) -> float | None:
        return self._turn
