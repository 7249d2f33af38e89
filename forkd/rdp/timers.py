"""When to send again, how long to remember, how much to keep; and the deadlines that follow from it.

`Timers` and `Limits` are numbers alone, in seconds and bytes; the defaults and the derived times are those of RFC 7252,
sections 4.2 and 4.8. Client and server should be given the same `Timers`: the server remembers an exchange for as long
as these say that the client may still send. `DeadlineHeap` keeps the next deadline of each of many exchanges for the
state machines, which have no clock; `LoopTimer` calls one of them from an event loop. In both, a deadline that is put
off costs nothing: the old one passes, and what it was for is looked at and gets a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the blocking client loads no asyncio
    import asyncio

#: RFC 7252, section 4.8.
ACK_TIMEOUT = 2.0
ACK_RANDOM_FACTOR = 1.5
MAX_RETRANSMIT = 4
#: RFC 7252, section 4.8.2: how long a datagram may be under way.
MAX_LATENCY = 100.0

#: Bytes of the largest answer that a client takes, and of the largest request and answer of a server, by default.
LARGEST = 16 << 20

#: How many times the bytes that a peer sent may be sent to it before it has proved its address (RFC 9000, 8.1).
AMPLIFICATION = 3

#: Parts under way at once: at first (RFC 6928), at most (as many as an acknowledgement can name and an ordinary receive
#: buffer takes), at least when single parts are lost, and after a silence.
FIRST_WINDOW, LARGEST_WINDOW, LOSSY_WINDOW, SILENT_WINDOW = 10, 64, 8, 2


@dataclass(frozen=True)
class Timers:
    """When a packet is sent again, and when both sides forget an exchange.

    Attributes:
        ack_timeout: the least time that the first try gets.
        ack_random_factor: the first try's time is drawn between `ack_timeout` and this times it.
        max_retransmit: how often a packet is sent again, each time after twice the time, before its sender gives up.
        max_latency: how long a datagram may be under way; a server remembers for twice that and more.
        acknowledge_after: an answer that takes longer is announced by an acknowledgement of the request.
        rto_minimum: the least time after which a part is sent again, once the round trip has been measured (RFC 6298).
        patience: the longest that a request takes in all, whatever arrives; None for `exchange_lifetime`.
    """

    ack_timeout: float = ACK_TIMEOUT
    ack_random_factor: float = ACK_RANDOM_FACTOR
    max_retransmit: int = MAX_RETRANSMIT
    max_latency: float = MAX_LATENCY
    acknowledge_after: float = 0.5
    rto_minimum: float = 0.2
    patience: float | None = None

    def __post_init__(self) -> None:
        for name in ("ack_timeout", "max_latency", "acknowledge_after", "rto_minimum"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is to be a number of seconds above 0, not {getattr(self, name)!r}")
        if not 1 <= self.ack_random_factor < float("inf"):
            raise ValueError(f"ack_random_factor is to be at least 1, not {self.ack_random_factor!r}")
        if not 0 <= self.max_retransmit <= 30:
            raise ValueError(f"max_retransmit is to be from 0 to 30, not {self.max_retransmit!r}")
        if self.patience is not None and not self.patience > 0:
            raise ValueError(f"patience is to be a number of seconds above 0, or None, not {self.patience!r}")

    @property
    def max_transmit_span(self) -> float:
        """From the first time that a packet is sent to the last, at most."""
        return self.ack_timeout * (float(2**self.max_retransmit) - 1) * self.ack_random_factor

    @property
    def max_transmit_wait(self) -> float:
        """From the first time that a packet is sent until its sender gives up, at most."""
        return self.ack_timeout * (float(2 ** (self.max_retransmit + 1)) - 1) * self.ack_random_factor

    @property
    def exchange_lifetime(self) -> float:
        """How long after a packet of an exchange another one may arrive."""
        return self.max_transmit_span + 2 * self.max_latency + self.ack_timeout

    @property
    def bound(self) -> float:
        """The longest that a request takes in all."""
        return self.exchange_lifetime if self.patience is None else self.patience


def timers_for(timers: Timers | None, timeout: float | None, retries: int | None) -> Timers:
    """The timers of a client: `timeout` and `retries`, where given, replace `ack_timeout` and `max_retransmit`."""
    chosen = timers or Timers()
    if timeout is not None:
        chosen = replace(chosen, ack_timeout=timeout)
    return chosen if retries is None else replace(chosen, max_retransmit=retries)


@dataclass(frozen=True)
class Limits:
    """What a server keeps at most. At each bound it takes no new request, and forgets nothing early. Of exchanges and
    of answers a host may have four times of what is left.

    Attributes:
        request: bytes of one request.
        answer: bytes of one answer; a larger one counts as a failure of the handler.
        exchanges: exchanges remembered, those under way and those that are finished.
        answers: bytes of exchanges under way: 512 for each, and its answer until that is acknowledged with 1,536 more;
            requests that run already may go beyond it.
        arriving: bytes of requests of several parts that have not arrived whole, by the lengths that they announce.
        arriving_per_host: the same for one host.
        unproven: exchanges under way of peers that have not proven their address. Further ones are asked for the token
            first, for which nothing is kept; 0: all are.
    """

    request: int = LARGEST
    answer: int = LARGEST
    exchanges: int = 1_000_000
    answers: int = 4 * LARGEST
    arriving: int = 4 * LARGEST
    arriving_per_host: int = 2 * LARGEST
    unproven: int = 1000


#: Deadlines of exchanges that are over which a heap may have, beside as many as it has of others.
_HEAP_SLACK = 1024


class DeadlineHeap:
    """The next deadline of each exchange, by the exchange's number."""

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def set(self, key: int, at: float) -> None:
        """Makes an exchange due at this time, unless it is due earlier anyway."""
        if at < self._at.get(key, float("inf")):
            self._at[key] = at
            heappush(self._heap, (at, key))

    def forget(self, key: int) -> None:
        self._at.pop(key, None)
        if len(self._heap) > _HEAP_SLACK + 2 * len(self._at):  # else what is over would stay until it were due
            self._heap = [(at, one) for one, at in self._at.items()]
            heapify(self._heap)

    @property
    def next(self) -> float | None:
        """When the next exchange is due; None without any."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float, most: int | None = None) -> Iterator[int]:
        """The exchanges that are due, each once, and so many at most; one that has a further deadline has to be set
        again.
        """
        while most != 0 and (at := self.next) is not None and at <= now:
            most = None if most is None else most - 1
            _, key = heappop(self._heap)
            del self._at[key]
            yield key


class LoopTimer:
    """Calls a state machine when its deadline has come.

    Args:
        loop: the running loop.
        expire: called with the time, which may be too early; it is to set the next deadline.
    """

    __slots__ = ("_expire", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[float], None]) -> None:
        self._loop, self._expire = loop, expire
        self._handle: asyncio.TimerHandle | None = None

    def set(self, deadline: float | None) -> None:
        """Calls at this time, unless it calls earlier anyway; None: no deadline."""
        if deadline is None or (self._handle is not None and self._handle.when() <= deadline):
            return
        self.cancel()
        self._handle = self._loop.call_at(deadline, self._call)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _call(self) -> None:
        self._handle = None
        self._expire(self._loop.time())
