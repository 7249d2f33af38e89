"""Who has sent datagrams lately: peers with counts, kept so that a datagram costs no more than an entry in a list.

Peers are noted in two lists, and the lists counted now and then, so times are as exact as that is often: once a
heartbeat, and after each thousand datagrams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

#: Peers that are remembered; of more, those that were silent for longest are forgotten.
MOST_PEERS = 1024

#: Entries after which the lists are counted.
MANY = 1024


class Recent(NamedTuple):
    """One peer.

    Attributes:
        peer: its address, as the handler sees it.
        first: when it was first noted since it was last forgotten, and
        last: when lately; in seconds on the loop's clock.
        received: datagrams from it, and
        sent: to it, since then.
    """

    peer: Any
    first: float
    last: float
    received: int
    sent: int


class RecentPeers:
    """The peers of one socket.

    Args:
        clock: the loop's.

    Attributes:
        heard: who has sent a datagram; to be appended to.
        told: to whom one was sent; likewise.
    """

    __slots__ = ("_clock", "_peers", "heard", "told")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.heard: list[Any] = []
        self.told: list[Any] = []
        self._clock = clock
        self._peers: dict[Any, Recent] = {}  # in the order of their last datagram

    def count(self) -> tuple[int, int]:
        """Counts what was noted; how many datagrams that were received, and how many sent."""
        now, peers = self._clock(), self._peers
        totals = len(self.heard), len(self.told)
        received, sent = Counter(self.heard), Counter(self.told)
        self.heard.clear()
        self.told.clear()
        for peer in received | sent:
            before = peers.pop(peer, None) or Recent(peer, now, now, 0, 0)
            peers[peer] = Recent(peer, before.first, now, before.received + received[peer], before.sent + sent[peer])
        while len(peers) > MOST_PEERS:
            del peers[next(iter(peers))]
        return totals

    def list(self) -> list[Recent]:
        """The peers, as far as they are counted, who was silent for longest first."""
        return list(self._peers.values())
