"""A client's requests over one socket, as a state machine without input, output or clock.

Methods take the time and return the packets to send and the requests that have ended; `deadline` says when `expire` is
to be called. A request is sent until the server says what of it has arrived; once the server has it whole it is not
sent again (a successor of the server would run it again), and the client asks where the answer is instead. Both clients
call it.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from forkd.rdp.packets import (
    ANSWER,
    RECEIVED,
    REQUEST,
    TAKEN,
    TOO_LARGE,
    BadPacket,
    Data,
    ExchangeState,
    decode,
    encode,
)
from forkd.rdp.packets import PART as PART_SIZE
from forkd.rdp.timers import FIRST_WINDOW, DeadlineHeap, Timers
from forkd.rdp.transfer import Incoming, Outgoing

#: Answered requests that are remembered, so that a repeated answer is acknowledged again.
_REMEMBERED = 1024


class RequestEnded(NamedTuple):
    """A request that has its answer, or has none: refused for a reason (see `packets`), or given up (reason None)."""

    id: int
    answer: bytes | None
    reason: int | None
    tries: int
    seconds: float


#: The packets to send, and the requests that have ended.
Step = tuple[list[bytes], list[RequestEnded]]


class Requester:
    """Requests under way to one server.

    Args:
        timers: when to send again.
        limit: bytes of the largest answer that is taken.
        random: where the jitter comes from.
    """

    def __init__(self, timers: Timers, limit: int, random: Random) -> None:
        self._timers, self._limit, self._random = timers, limit, random
        self._pending: dict[int, _PendingRequest] = {}
        self._answered: dict[int, bytes] = {}  # the last acknowledgement of each
        self._deadlines = DeadlineHeap()

    @property
    def deadline(self) -> float | None:
        """When `expire` is to be called; None without a request."""
        return self._deadlines.next

    def start(self, now: float, id: int, payload: bytes) -> list[bytes]:
        """Begins a request; its number has to be one that cannot be guessed."""
        request = self._pending[id] = _PendingRequest(id, payload, now, self._timers, self._random)
        packets = request.send(now)
        self._set_deadline(request)
        return packets

    def forget(self, id: int) -> None:
        """Drops a request whose caller does not wait any more."""
        self._pending.pop(id, None)
        self._deadlines.forget(id)

    def receive(self, now: float, data: bytes) -> Step:
        """Takes a datagram; one that is no packet, or belongs to no request, is ignored."""
        try:
            packet = decode(data)
        except BadPacket:
            return [], []
        request = self._pending.get(packet.id)
        if request is None:
            answered = self._answered.get(packet.id) if isinstance(packet, Data) and packet.kind == ANSWER else None
            return ([answered] if answered else []), []
        if isinstance(packet, Data):
            step = self._answer(now, request, packet) if packet.kind == ANSWER else ([], [])
        elif isinstance(packet, ExchangeState):
            step = (self._received(now, request, packet) if packet.kind == RECEIVED else []), []
        else:
            return [], [self._end(now, request, reason=packet.reason)]
        if packet.id in self._pending:
            self._set_deadline(request)
        return step

    def expire(self, now: float) -> Step:
        """Sends again, or gives up, what is due."""
        packets: list[bytes] = []
        ended: list[RequestEnded] = []
        for id in self._deadlines.due(now):
            request = self._pending[id]
            if now >= self._due(request):
                sent = None if now >= request.begun + self._timers.bound else self._again(now, request)
                if sent is None:
                    ended.append(self._end(now, request))
                    continue
                packets += sent
            self._set_deadline(request)
        return packets, ended

    def _again(self, now: float, request: _PendingRequest) -> list[bytes] | None:
        """Sends what is due again; None when it was sent often enough."""
        if not request.whole:
            request.outgoing.expire(now)
            return None if request.outgoing.exhausted else request.send(now)
        if request.tries > self._timers.max_retransmit:
            return None
        request.tries += 1
        request.probe_at = now + request.probe_time * 2 ** (request.tries - 1)
        return [request.taken()]

    def _received(self, now: float, request: _PendingRequest, packet: ExchangeState) -> list[bytes]:
        if request.whole:
            if packet.token != request.token:  # of a server that does not have the request
                return []
            request.arrived(now)
            return [request.taken()] if packet.prove else []
        known, request.token = request.token, packet.token
        if known not in {0, packet.token} and packet.first_missing == 0:  # a successor, which has nothing of it
            request.outgoing = Outgoing(request.payload, self._timers, self._random)
        request.outgoing.acknowledge(now, packet.first_missing, packet.ahead)
        if request.outgoing.done:
            request.arrived(now)
            return [request.taken()] if packet.prove else []
        if known == 0:
            request.outgoing.revive()
            request.outgoing.window = FIRST_WINDOW
        return request.send(now)

    def _answer(self, now: float, request: _PendingRequest, packet: Data) -> Step:
        incoming = request.incoming
        if incoming is None:
            if packet.length > self._limit:
                return [], [self._end(now, request, reason=TOO_LARGE)]
            incoming = request.incoming = Incoming(packet.length)
            request.token = packet.token
        elif packet.length != incoming.length or packet.token != request.token:
            return [], []
        request.arrived(now)
        incoming.add(packet.part, packet.payload)
        taken = request.taken()
        if not incoming.whole:
            return [taken], []
        if len(self._answered) >= _REMEMBERED:
            del self._answered[next(iter(self._answered))]
        self._answered[request.id] = taken
        return [taken], [self._end(now, request, answer=incoming.payload())]

    def _end(
        self, now: float, request: _PendingRequest, *, answer: bytes | None = None, reason: int | None = None
    ) -> RequestEnded:
        self.forget(request.id)
        tries = max(1, request.tries) if request.whole else request.outgoing.tries
        return RequestEnded(request.id, answer, reason, tries, now - request.begun)

    def _due(self, request: _PendingRequest) -> float:
        at = request.probe_at if request.whole else request.outgoing.deadline
        bound = request.begun + self._timers.bound
        return bound if at is None else min(at, bound)

    def _set_deadline(self, request: _PendingRequest) -> None:
        self._deadlines.set(request.id, self._due(request))


class _PendingRequest:
    """A request that has no answer yet."""

    __slots__ = ("begun", "id", "incoming", "outgoing", "payload", "probe_at", "probe_time", "token", "tries", "whole")

    def __init__(self, id: int, payload: bytes, now: float, timers: Timers, random: Random) -> None:
        self.id = id
        self.payload = payload
        self.begun = now
        self.token = 0
        self.outgoing = Outgoing(payload, timers, random, window=1)
        self.incoming: Incoming | None = None
        self.whole = False  # the server has the request
        self.tries = 0
        self.probe_time = timers.ack_timeout * random.uniform(1, timers.ack_random_factor)
        self.probe_at = now

    def arrived(self, now: float) -> None:
        """The server has the request: from now on it is asked for the answer."""
        self.whole, self.tries = True, 0
        self.probe_at = now + self.probe_time

    def taken(self) -> bytes:
        """The packet that says what of the answer has arrived."""
        incoming = self.incoming
        first_missing, ahead = (incoming.first_missing, incoming.ahead) if incoming else (0, 0)
        return encode(ExchangeState(TAKEN, self.id, self.token, first_missing, ahead))

    def send(self, now: float) -> list[bytes]:
        """The parts of the request to send now."""
        payload, length = self.payload, len(self.payload)
        return [
            encode(Data(REQUEST, self.id, self.token, length, part, payload[part * PART_SIZE : (part + 1) * PART_SIZE]))
            for part in self.outgoing.send(now)
        ]
