"""One payload's way in numbered parts: what to send when (`Outgoing`), and what has arrived (`Incoming`).

Selective repeat: each part that arrives is acknowledged, and what is missing is sent again: when three parts that were
sent later have arrived, or when nothing has been acknowledged for a time. That time is RFC 7252's (section 4.2) until a
round trip has been measured, then RFC 6298's. A clock is passed in.
"""

from __future__ import annotations

from heapq import heappop, heappush
from random import Random

from forkd.rdp.packets import AHEAD, parts_of
from forkd.rdp.timers import FIRST_WINDOW, LARGEST_WINDOW, LOSSY_WINDOW, SILENT_WINDOW, Timers

#: A part is lost when so many that were sent after it have arrived (RFC 9002, section 6.1.1).
_OVERTAKEN = 3


class Incoming:
    """The parts of a payload of `length` bytes that have arrived."""

    __slots__ = ("_ahead", "_parts", "ahead", "count", "first_missing", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.count = parts_of(length)
        self.first_missing = 0
        self.ahead = 0  # bit n: part first_missing + 1 + n
        self._parts: list[bytes] = []
        self._ahead: dict[int, bytes] = {}

    def add(self, part: int, payload: bytes) -> None:
        """Takes a part; drops one that is there already, or too far ahead for an acknowledgement to name."""
        offset = part - self.first_missing
        if offset > 0:
            if offset <= AHEAD and part not in self._ahead:
                self._ahead[part] = payload
                self.ahead |= 1 << (offset - 1)
        elif offset == 0:
            self._parts.append(payload)
            self.first_missing += 1
            while self.ahead & 1:
                self._parts.append(self._ahead.pop(self.first_missing))
                self.first_missing += 1
                self.ahead >>= 1
            self.ahead >>= 1

    @property
    def whole(self) -> bool:
        """Whether all parts have arrived."""
        return self.first_missing == self.count

    def payload(self) -> bytes:
        """The payload, once it is whole."""
        return self._parts[0] if self.count == 1 else b"".join(self._parts)


class Outgoing:
    """The parts of a payload, and which of them are under way.

    Attributes:
        deadline: when `expire` is to be called; None while nothing is under way.
        tries: how often something was sent since the other side last acknowledged.
        exhausted: whether it was sent as often as the timers allow.
    """

    __slots__ = (
        "_arrived", "_cut", "_estimate", "_first_time", "_flight", "_fresh", "_last_heard", "_lost", "_missing",
        "_order", "_resent", "_timers", "_variation", "count", "deadline", "exhausted", "payload", "tries", "window",
    )  # fmt: skip

    def __init__(self, payload: bytes, timers: Timers, random: Random, *, window: int = FIRST_WINDOW) -> None:
        self.payload = payload
        self.count = parts_of(len(payload))
        self.window: float = window
        self.tries = 1
        self.exhausted = False
        self.deadline: float | None = None
        self._timers = timers
        self._first_time = timers.ack_timeout * random.uniform(1, timers.ack_random_factor)
        self._estimate: float | None = None
        self._variation = 0.0
        self._last_heard: float | None = None
        self._missing = 0  # the first part that is not known to have arrived
        self._arrived: set[int] = set()  # those after it that are
        self._flight: dict[int, tuple[int, float]] = {}  # part: its place in the order of sending, and when
        self._order = 0
        self._lost: list[int] = []
        self._resent: set[int] = set()
        self._fresh = 0  # the first part that was never sent
        self._cut = 0.0

    @property
    def done(self) -> bool:
        """Whether all parts have been acknowledged."""
        return self._missing == self.count

    def send(self, now: float) -> list[int]:
        """The numbers of the parts to send now."""
        parts: list[int] = []
        if self.exhausted:
            return parts
        while len(self._flight) < int(self.window):
            if self._lost:
                part = heappop(self._lost)
                if part < self._missing or part in self._arrived or part in self._flight:
                    continue
                self._resent.add(part)
            elif self._fresh < min(self.count, self._missing + AHEAD + 1):
                part = self._fresh
                self._fresh += 1
            else:
                break
            self._order += 1
            self._flight[part] = (self._order, now)
            parts.append(part)
        if parts:
            if self._last_heard is None:
                self._last_heard = now
            self.deadline = now + self._time()
        return parts

    def acknowledge(self, now: float, first_missing: int, ahead: int) -> bool:
        """Notes what has arrived; an acknowledgement of parts that were never sent is ignored.

        Returns:
            Whether any of it is new.
        """
        if first_missing + ahead.bit_length() > self._fresh - bool(ahead):
            return False
        offset = first_missing + 1
        news = [
            part
            for part in {*self._flight, *self._lost} - self._arrived
            if part < first_missing or (part >= offset and ahead >> part - offset & 1)
        ]
        progress = bool(news) or first_missing > self._missing
        if not progress:
            return False
        latest = 0
        for part in news:
            self._arrived.add(part)
            if part in self._flight:
                order, sent = self._flight.pop(part)
                latest = max(latest, order)
                if part not in self._resent:
                    self._measure(now - sent)
        if first_missing > self._missing:
            self._missing = first_missing
            self._arrived = {part for part in self._arrived if part >= first_missing}
        self.tries, self.exhausted, self._last_heard = 1, False, now
        self.window = min(LARGEST_WINDOW, self.window + len(news))
        self._find_lost(now, latest)
        self.deadline = now + self._time() if self._flight else None
        return True

    def expire(self, now: float) -> None:
        """When its time is up, counts what is under way as lost, or notes that it was sent often enough."""
        if self.deadline is None or now < self.deadline:
            return
        if self.tries > self._timers.max_retransmit and (self._estimate is None or now >= self._give_up_at()):
            self.deadline, self.exhausted = None, True
            return
        self.tries += 1
        self._all_lost()
        self.window = SILENT_WINDOW

    def revive(self) -> None:
        """Begins again to send what has not arrived, because the other side was heard."""
        self._all_lost()
        self.tries, self.exhausted, self._last_heard = 1, False, None
        self.window = max(self.window, SILENT_WINDOW)

    def _all_lost(self) -> None:
        for part in self._flight:
            heappush(self._lost, part)
        self._flight.clear()
        self.deadline = None

    def _find_lost(self, now: float, latest: int) -> None:
        lost = [part for part, (order, _) in self._flight.items() if order + _OVERTAKEN <= latest]
        for part in lost:
            del self._flight[part]
            heappush(self._lost, part)
        if lost and now >= self._cut:
            self.window = max(LOSSY_WINDOW, self.window * 0.7)
            self._cut = now + (self._estimate or 0.0)  # once a round trip

    def _measure(self, took: float) -> None:
        """RFC 6298, section 2; a part that was sent twice is not measured (section 3)."""
        if self._estimate is None:
            self._estimate, self._variation = took, took / 2
        else:
            self._variation += (abs(self._estimate - took) - self._variation) / 4
            self._estimate += (took - self._estimate) / 8

    def _time(self) -> float:
        backoff = float(2 ** (self.tries - 1))
        if self._estimate is None:
            return self._first_time * backoff
        estimated = max(self._timers.rto_minimum, self._estimate + 4 * self._variation)
        return min(estimated * backoff, self._first_time * float(2**self._timers.max_retransmit))

    def _give_up_at(self) -> float:
        """When the silence is as long as that after a single packet which was sent again `max_retransmit` times."""
        return (self._last_heard or 0.0) + self._first_time * (float(2 ** (self._timers.max_retransmit + 1)) - 1)
