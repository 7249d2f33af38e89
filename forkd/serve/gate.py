"""Who may come in by where it comes from and how often it comes: for listeners of connections, and of datagrams."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any

from forkd.config.listener import Listener
from forkd.serve.networks import Permission, origin
from forkd.system.counts import Ledger
from forkd.system.scoreboard import Field

#: Why a client is refused: for whom there is no place, of whose address there are too many, or too many came, and who
#: may not come from where it comes.
FULL, PER_IP, RATE, DENIED = "full", "per_ip", "rate", "denied"

#: Where each is counted on the scoreboard.
COUNTED = {
    FULL: Field.REFUSED_FULL,
    PER_IP: Field.REFUSED_PER_IP,
    RATE: Field.REFUSED_RATE,
    DENIED: Field.REFUSED_DENIED,
}


def hashing(secret: bytes, address: str) -> Callable[[bytes], int]:
    """What makes keys of a listener's clients: hashes that nobody outside of the daemon can aim at.

    Args:
        secret: the daemon's.
        address: where it listens.
    """
    start = blake2b(address.encode() + b"\0", digest_size=8, key=secret)

    def key_of(what: bytes) -> int:
        found = start.copy()
        found.update(what)
        return int.from_bytes(found.digest(), signed=True) or 1

    return key_of


class Gate:
    """One listener's networks and its rate of one address, in one worker.

    Args:
        listener: its settings.
        address: where it really listens.
        ledger: what the worker counts with the others.

    Attributes:
        allows: whether a client may come from there at all.
    """

    def __init__(self, listener: Listener, address: str, ledger: Ledger) -> None:
        self.allows = Permission(listener.allow, listener.deny).allow
        self._key_of = hashing(ledger.secret, address)
        self._rate: Callable[[bytes], bool] | None = None
        if (rate := listener.limits.rate_per_ip) is not None:
            self._rate = partial(self._within, ledger.rates.claim, rate.count, rate.seconds)

    def has_time(self, peer: Any) -> bool:
        """Counts one that comes from there, unless too many came of late; whether it did."""
        return self._rate is None or not (address := origin(peer)) or self._rate(address)

    def _within(self, claim: Callable[[int, int, int], bool], count: int, seconds: int, address: bytes) -> bool:
        return claim(self._key_of(address) ^ seconds or 1, count, seconds)

    def admits(self, peer: Any) -> str:
        """Why somebody who comes from there is refused; empty when it is not, and then it is counted.

        Args:
            peer: its address as accept(2) or recvfrom(2) gives it.
        """
        if not self.allows(peer):
            return DENIED
        return "" if self.has_time(peer) else RATE
