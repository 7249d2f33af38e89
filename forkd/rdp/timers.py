"""The numbers of the reliable requests: when to send again, how long to remember, how much to keep.

The defaults and the derived times are those of RFC 7252, sections 4.2 and 4.8; seconds and bytes throughout.
Client and server should be given the same `Timers`: the server remembers an exchange for as long as these say that the
client may still send.
"""

from __future__ import annotations

from dataclasses import dataclass

#: RFC 7252, section 4.8.
ACK_TIMEOUT = 2.0
ACK_RANDOM_FACTOR = 1.5
MAX_RETRANSMIT = 4
#: RFC 7252, section 4.8.2: how long a datagram may be under way.
MAX_LATENCY = 100.0

#: Bytes of the largest answer that a client takes, and of the largest request and answer of a server, by default.
LARGEST = 16 << 20

#: How many times the bytes that came from it may be sent to a peer that has not shown that it is there (RFC 9000, 8.1).
AMPLIFICATION = 3

#: Parts under way at once: at first (RFC 6928), at most (as many as an acknowledgement can name and an ordinary receive
#: buffer takes), at least when single parts are lost, and after a silence.
FIRST_WINDOW, LARGEST_WINDOW, LOSSY_WINDOW, SILENT_WINDOW = 10, 64, 8, 2


@dataclass(frozen=True)
class Timers:
    """When a packet is sent again, and when both sides forget.

    Attributes:
        ack_timeout: the least time that the first try gets.
        ack_random_factor: the first try's time is drawn between `ack_timeout` and this times it.
        max_retransmit: how often a packet is sent again, each time after twice the time, before its sender gives up.
        max_latency: how long a datagram may be under way; a server remembers for twice that and more.
        acknowledge_after: an answer that takes longer is announced by an acknowledgement of the request.
        rto_minimum: the least time after which a part is sent again, once the round trip has been measured (RFC 6298).
        patience: the longest that a request takes in all, whatever is heard; None for `exchange_lifetime`.
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


@dataclass(frozen=True)
class Limits:
    """What a server keeps at most; at each bound it takes no new request, and forgets nothing early.

    Attributes:
        request: bytes of one request.
        answer: bytes of one answer; a larger one counts as a failure of the handler.
        exchanges: exchanges remembered, those under way and those that are over.
        answers: bytes of answers that have not been acknowledged; requests that run already may go beyond it.
        arriving: bytes of requests of several parts that have not arrived whole, by the lengths that they announce.
        arriving_per_host: the same for one host.
    """

    request: int = LARGEST
    answer: int = LARGEST
    exchanges: int = 1_000_000
    answers: int = 4 * LARGEST
    arriving: int = 4 * LARGEST
    arriving_per_host: int = 2 * LARGEST
