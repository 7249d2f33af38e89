"""A client's requests over one socket, as a state machine without input, output or clock.

Methods take the time and return the packets to send and the requests that have ended; `deadline` says when `expire` is
to be called. A request is sent until any of it is heard of; once the server has it whole it is not sent again (a
successor of the server would run it again), and the client asks where the answer is instead.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from forkd.rdp.alarms import Alarms
from forkd.rdp.packets import ANSWER, RECEIVED, REQUEST, TAKEN, TOO_LARGE, BadPacket, Data, State, decode, encode
from forkd.rdp.packets import PART as PART_SIZE
from forkd.rdp.timers import FIRST_WINDOW, Timers
from forkd.rdp.transfer import Incoming, Outgoing

#: Answered requests that are remembered, so that a repeated answer is acknowledged again.
_REMEMBERED = 1024


class Ended(NamedTuple):
    """A request that has its answer, or has none: refused for a reason (see `packets`), or given up (reason None)."""

    id: int
    answer: bytes | None
    reason: int | None
    tries: int
    seconds: float


Step = tuple[list[bytes], list[Ended]]


class _Call:
    """One request."""

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
        incoming = self.incoming
        first_missing, ahead = (incoming.first_missing, incoming.ahead) if incoming else (0, 0)
        return encode(State(TAKEN, self.id, self.token, first_missing, ahead))

    def send(self, now: float) -> list[bytes]:
        payload, length = self.payload, len(self.payload)
        return [
            encode(Data(REQUEST, self.id, self.token, length, part, payload[part * PART_SIZE : (part + 1) * PART_SIZE]))
            for part in self.outgoing.send(now)
        ]


class Requester:
    """Requests under way to one server.

    Args:
        timers: when to send again.
        limit: bytes of the largest answer that is taken.
        random: where the jitter comes from.
    """

    def __init__(self, timers: Timers, limit: int, random: Random) -> None:
        self._timers, self._limit, self._random = timers, limit, random
        self._calls: dict[int, _Call] = {}
        self._answered: dict[int, bytes] = {}  # the last acknowledgement of each
        self._alarms = Alarms()

    @property
    def deadline(self) -> float | None:
        return self._alarms.next

    def start(self, now: float, id: int, payload: bytes) -> list[bytes]:
        """Begins a request; its number has to be one that nobody can guess."""
        call = self._calls[id] = _Call(id, payload, now, self._timers, self._random)
        packets = call.send(now)
        self._wake(call)
        return packets

    def forget(self, id: int) -> None:
        """Nobody waits for it any more."""
        self._calls.pop(id, None)
        self._alarms.forget(id)

    def receive(self, now: float, data: bytes) -> Step:
        """Takes a datagram; what is no packet, or belongs to no request, is ignored."""
        try:
            packet = decode(data)
        except BadPacket:
            return [], []
        call = self._calls.get(packet.id)
        if call is None:
            answered = self._answered.get(packet.id) if isinstance(packet, Data) and packet.kind == ANSWER else None
            return ([answered] if answered else []), []
        if isinstance(packet, Data):
            step = self._answer(now, call, packet) if packet.kind == ANSWER else ([], [])
        elif isinstance(packet, State):
            step = (self._received(now, call, packet) if packet.kind == RECEIVED else []), []
        else:
            return [], [self._end(now, call, reason=packet.reason)]
        if packet.id in self._calls:
            self._wake(call)
        return step

    def expire(self, now: float) -> Step:
        """Does what is due."""
        packets: list[bytes] = []
        ended: list[Ended] = []
        for id in self._alarms.due(now):
            call = self._calls[id]
            if now >= self._due(call):
                sent = None if now >= call.begun + self._timers.bound else self._again(now, call)
                if sent is None:
                    ended.append(self._end(now, call))
                    continue
                packets += sent
            self._wake(call)
        return packets, ended

    def _again(self, now: float, call: _Call) -> list[bytes] | None:
        """Sends what is due again; None when that was done often enough."""
        if not call.whole:
            call.outgoing.expire(now)
            return None if call.outgoing.exhausted else call.send(now)
        if call.tries > self._timers.max_retransmit:
            return None
        call.tries += 1
        call.probe_at = now + call.probe_time * 2 ** (call.tries - 1)
        return [call.taken()]

    def _received(self, now: float, call: _Call, packet: State) -> list[bytes]:
        if call.whole:
            if packet.token != call.token:  # of a server that does not have the request
                return []
            call.arrived(now)
            return [call.taken()] if packet.prove else []
        known, call.token = call.token, packet.token
        if known not in {0, packet.token} and packet.first_missing == 0:  # a successor, which has nothing of it
            call.outgoing = Outgoing(call.payload, self._timers, self._random)
        call.outgoing.acknowledge(now, packet.first_missing, packet.ahead)
        if call.outgoing.done:
            call.arrived(now)
            return [call.taken()] if packet.prove else []
        if known == 0:
            call.outgoing.revive()
            call.outgoing.window = FIRST_WINDOW
        return call.send(now)

    def _answer(self, now: float, call: _Call, packet: Data) -> Step:
        incoming = call.incoming
        if incoming is None:
            if packet.length > self._limit:
                return [], [self._end(now, call, reason=TOO_LARGE)]
            incoming = call.incoming = Incoming(packet.length)
            call.token = packet.token
        elif packet.length != incoming.length or packet.token != call.token:
            return [], []
        call.arrived(now)
        incoming.add(packet.part, packet.payload)
        taken = call.taken()
        if not incoming.whole:
            return [taken], []
        if len(self._answered) >= _REMEMBERED:
            del self._answered[next(iter(self._answered))]
        self._answered[call.id] = taken
        return [taken], [self._end(now, call, answer=incoming.payload())]

    def _end(self, now: float, call: _Call, *, answer: bytes | None = None, reason: int | None = None) -> Ended:
        self.forget(call.id)
        tries = max(1, call.tries) if call.whole else call.outgoing.tries
        return Ended(call.id, answer, reason, tries, now - call.begun)

    def _due(self, call: _Call) -> float:
        at = call.probe_at if call.whole else call.outgoing.deadline
        bound = call.begun + self._timers.bound
        return bound if at is None else min(at, bound)

    def _wake(self, call: _Call) -> None:
        self._alarms.want(call.id, self._due(call))
