"""What is known of a datagram socket's peers: the latest, with counts; and which have not read their answers.

The transport appends each sender and each recipient to a list, which is added up by peer when it is a little longer; at
each heartbeat the sums are counted, and where there are a thousand of them. So times are as exact as that is often. No
peer is kept beyond `MOST_PEERS`.

`UnreadAnswers` and `BlockedPeer` are for a unix socket that many peers are answered from.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable
from time import monotonic
from typing import Any, NamedTuple

from forkd.errors import ForkdError
from forkd.system.socket_stats import UnixSocket, unacknowledged_bytes, unix_sockets

#: Peers that are remembered; of more, those that were silent for longest are forgotten.
MOST_PEERS = 1024

#: Entries of a list after which it is added up. Each is an address of its own, and a few stay in the processor's cache.
TALLY_AFTER = 64

#: Sums after which they are counted.
COUNT_AFTER = 1024

#: Bytes that the kernel counts for an unread datagram beside its payload, about.
_UNREAD_OVERHEAD = 768

#: How long, in units of the time that it takes, all sockets of the machine are not listed again.
_LIST_AFTER = 20


class RecentPeer(NamedTuple):
    """One peer.

    Attributes:
        peer: its address, as the handler sees it.
        first: when it was first counted since it was last forgotten, and
        last: when it was counted last; in seconds on the loop's clock.
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
        senders: the peer of each datagram that was received; to be appended to.
        recipients: the peer of each datagram that was sent; likewise.
    """

    __slots__ = ("_answered", "_clock", "_peers", "_received", "_sent", "recipients", "senders")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.senders: list[Any] = []
        self.recipients: list[Any] = []
        # Sums by peer: of the lists, and of both where they were the same, as each datagram was answered by one.
        self._received, self._sent, self._answered = Counter[Any](), Counter[Any](), Counter[Any]()
        self._clock = clock
        self._peers: dict[Any, RecentPeer] = {}  # in the order of their last datagram

    def tally(self) -> bool:
        """Adds up the lists and empties them; whether there are so many sums that they are to be counted."""
        if self.recipients == self.senders:
            self._answered.update(self.senders)
        else:
            self._received.update(self.senders)
            self._sent.update(self.recipients)
        self.senders.clear()
        self.recipients.clear()
        return len(self._received) + len(self._sent) + len(self._answered) > COUNT_AFTER

    def count(self, more: Iterable[tuple[Any, int, int]] = ()) -> tuple[int, int]:
        """Counts what came and went since the last time; how many datagrams were received, and how many sent.

        Args:
            more: peers, each with how many datagrams beside those in the lists were received, and sent.
        """
        self.tally()
        now, peers = self._clock(), self._peers
        received, sent = self._received + self._answered, self._sent + self._answered
        for counter in (self._received, self._sent, self._answered):
            counter.clear()
        for peer, came, went in more:
            received[peer] += came
            sent[peer] += went
        totals = received.total(), sent.total()
        for peer in received | sent:
            old = peers.pop(peer, None) or RecentPeer(peer, now, now, 0, 0)
            peers[peer] = RecentPeer(peer, old.first, now, old.received + received[peer], old.sent + sent[peer])
        while len(peers) > MOST_PEERS:
            del peers[next(iter(peers))]
        return totals

    def list(self) -> list[RecentPeer]:
        """The peers that were counted; the one that was silent for longest is first."""
        return list(self._peers.values())


class BlockedPeer:
    """One peer of a unix socket that takes nothing at the moment.

    Attributes:
        datagrams: what is kept for it.
        expires: until when, in seconds on the loop's clock.
        wait: seconds until the next try.
    """

    __slots__ = ("datagrams", "expires", "wait")

    def __init__(self, expires: float, wait: float) -> None:
        self.datagrams: deque[bytes] = deque()
        self.expires = expires
        self.wait = wait


class UnreadAnswers:
    """Which peers of a unix socket may be sent something, so that those that do not read leave room for the others.

    A datagram that its peer has not read takes up the send buffer of the socket that it was sent from (unix(7)), which
    is one for all peers, and for all workers. Where a client is connected to the socket nothing else bounds it, and
    from no other socket may that client be answered. So once a quarter of the buffer is taken, a peer gets more only if
    it has read what it got, as sock_diag(7) tells, but for a few datagrams, and for none when half is taken. Then no
    datagram may take more than a part of what is left, so that small answers come through for longest.

    Args:
        sock: the socket.
    """

    __slots__ = ("_allowed", "_empty", "_inodes", "_list_at", "_size", "_sock", "_unchecked")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._size = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._unchecked = 0  # bytes that were sent since the buffer was looked at and found to be roomy
        self._allowed: dict[Any, int] = {}  # bytes until a peer is looked at again
        self._empty: dict[Any, None] = {}  # peers that were sent an empty datagram, which the kernel does not show
        self._inodes: dict[str, list[int]] = {}  # of the sockets of each name
        self._list_at = 0.0

    def may_send(self, peer: Any, size: int) -> bool:
        """Whether so many bytes may be sent to a peer now. Raises OSError."""
        if not size and peer not in self._empty:
            _remember(self._empty, peer, None)
        size += _UNREAD_OVERHEAD
        self._unchecked += size
        return self._unchecked * 32 < self._size or self._may_send_more(peer, size)

    def _may_send_more(self, peer: Any, size: int) -> bool:
        taken = unacknowledged_bytes(self._sock)
        if taken * 4 < self._size:
            self._unchecked = 0
            self._allowed.clear()
            return True
        if size * 16 > self._size - taken:  # what is left is for the small ones
            return False
        allowed = self._allowed.get(peer, 0)
        if allowed < size:
            if self._has_unread(peer):
                return False
            allowed = max(size, (self._size // 2 - taken) // 16)
        _remember(self._allowed, peer, allowed - size)
        return True

    def _has_unread(self, peer: Any) -> bool:
        name = os.fsdecode(peer)
        try:
            found = [one for inode in self._inodes.get(name, ()) for one in unix_sockets(inode) if one.name == name]
            if not found:
                begun = monotonic()
                if begun < self._list_at:
                    return True
                found = self._list(name)
                now = monotonic()
                self._list_at = now + _LIST_AFTER * (now - begun)
        except ForkdError:  # this kernel does not tell
            return False
        return any(one.unread for one in found) or peer in self._empty

    def _list(self, name: str) -> list[UnixSocket]:
        """Lists the sockets of the machine; those of this name."""
        self._inodes.clear()
        found = unix_sockets()
        for one in found:
            if one.name:
                self._inodes.setdefault(one.name, []).append(one.inode)
        return [one for one in found if one.name == name]


def _remember(peers: dict[Any, Any], peer: Any, value: Any) -> None:
    """Sets an entry; of more than `MOST_PEERS` the oldest is forgotten."""
    peers[peer] = value
    if len(peers) > MOST_PEERS:
        del peers[next(iter(peers))]
