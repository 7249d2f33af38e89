"""A listener's limits in one worker: which clients it takes, and which of them get a slot.

Where clients are to wait, a worker reserves a slot before it waits for a client, and waits for none while it has none
reserved: the slots of all workers, reserved and used, are never more than there are. The reserved slot is the next
client's, by whichever of the listener's sockets it comes. Where clients are to be refused nothing is reserved, and one
that comes while no slot can be claimed is refused. The worker makes the acceptors of each listener with limits by
`limited_acceptors`; a listener without them is served by `acceptor.Acceptor` alone.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from forkd.serve.accept.acceptor import Acceptor, Serve
from forkd.serve.accept.access import (
    DENIED,
    FULL,
    PER_IP,
    PROXY_HEADER,
    RATE,
    AccessPolicy,
    Networks,
    Refusals,
    keyed_hash,
)
from forkd.serve.accept.balance import Balance
from forkd.serve.accept.proxy_protocol import Header, ProxiedSocket, ProxyHeaderReader, header_seconds
from forkd.serve.loop import PollLoop
from forkd.system.listeners import BoundListener
from forkd.system.scoreboard import Row
from forkd.system.shared_counters import SharedCounters


def is_limited(bound: BoundListener) -> bool:
    """Whether the settings of a listener restrict its clients in any way."""
    limits, listener = bound.listener.limits, bound.listener
    return bool(
        limits.connections
        or limits.per_worker
        or limits.per_ip
        or limits.rate_per_ip is not None
        or listener.allow
        or listener.deny
        or listener.proxy_protocol
    )


class HasThreads(Protocol):
    """What serves each client by a thread."""

    @property
    def threads(self) -> int:
        """How many there are, at most."""

    @property
    def lingering(self) -> int:
        """Connections that have none any more, but are not over yet."""


def limited_acceptors(
    limiter: ConnectionLimiter, loop: PollLoop, serve: Serve, balance: Balance, counters: SharedCounters, row: Row
) -> list[LimitedAcceptor]:
    """Acceptors for all sockets of a listener with limits."""
    bound = limiter.bound
    refusals = Refusals(loop, str(bound.address), bound.listener.limits.message, row, counters)
    return [LimitedAcceptor(loop, sock, serve, balance, limiter, refusals) for sock in bound.sockets]


class ConnectionLimiter:
    """One listener's limits.

    Args:
        bound: the listener.
        counters: what this worker counts with the others.
        server: what serves each client by a thread; None: no thread is needed. Clients for which there is none are left
            to other workers, also where those over a limit are refused.

    Attributes:
        bound: as the argument.
        waits: whether clients wait for a slot; else they are refused.
        proxies: where the proxies are that clients come by; empty: they come by themselves.
        header_seconds: how long each has to say who its client is.
        acceptors: those of the listener's sockets in this worker.
    """

    def __init__(self, bound: BoundListener, counters: SharedCounters, server: HasThreads | None = None) -> None:
        self.bound = bound
        self._server = server
        limits, address = bound.listener.limits, str(bound.address)
        self.waits = limits.over == "wait"
        self.proxies = Networks(bound.listener.proxy_protocol)
        self.header_seconds = header_seconds(bound.listener.timeouts)
        self.acceptors: list[LimitedAcceptor] = []
        self._connections, self._per_worker, self._per_ip = limits.connections, limits.per_worker, limits.per_ip
        self._slots, self._addresses = counters.by_listener, counters.by_address
        self._slots_key = keyed_hash(counters.secret, address)(
            b"places"
        )  # so named by older images too, whose workers count by it
        self._access = AccessPolicy(bound.listener, address, counters)
        self._allows = self._access.allows
        self._counts_clients = bool(limits.per_ip or limits.rate_per_ip)
        self._reserved = False
        self._used = 0  # slots of this worker's connections

    @property
    def slots_taken(self) -> int:
        """The listener's slots that all workers have, used and reserved."""
        return self._slots.total(self._slots_key)

    def reserve(self) -> bool:
        """Reserves a slot for the next client, where it needs one before it comes; whether a client may come now."""
        if (server := self._server) is not None and self._used - server.lingering >= server.threads:
            return False
        if self.waits and not self._reserved:
            self._reserved = self._claim()
        return self._reserved or not self.waits

    def release_reserved(self) -> None:
        """Gives the reserved slot, if there is one, to other workers."""
        if self._reserved:
            self._reserved = False
            self._release()

    def admit(self, peer: Any) -> tuple[str, Callable[[], None]]:
        """Takes a client that has come.

        Returns:
            Why it is refused; empty when it is not, and then what to call when it has gone.
        """
        if self._allows is not None and not self._allows(peer):
            return DENIED, _nothing
        if not self._reserved and not self._claim():
            return FULL, _nothing
        if not self._counts_clients:
            self._reserved = False
            self._used += 1
            return "", self._on_close
        was_reserved, self._reserved = self._reserved, True
        reason, key = self._claim_client(peer)
        if not reason:
            self._reserved = False
            self._used += 1
            return "", partial(self._on_close, key) if key else self._on_close
        if not was_reserved:
            self.release_reserved()
        return reason, _nothing

    def admit_proxy(self, peer: Any) -> tuple[str, Callable[[], None]]:
        """Takes a connection of a proxy, whose client `admit_client` is to be asked about. Returns as `admit`."""
        if not self.proxies.contains(peer):
            return DENIED, _nothing
        if not self._reserved and not self._claim():
            return FULL, _nothing
        self._reserved = False
        self._used += 1
        return "", self._on_close

    def admit_client(self, peer: Any) -> tuple[str, Callable[[], None]]:
        """Takes the client of such a connection, which has its slot already. Returns as `admit`."""
        if self._allows is not None and not self._allows(peer):
            return DENIED, _nothing
        reason, key = self._claim_client(peer)
        return reason, partial(self._addresses.release, key) if key and not reason else _nothing

    def _claim_client(self, peer: Any) -> tuple[str, int]:
        """Counts a client of this address: why it is refused, and what to give back of one that is not; 0: nothing."""
        key = self._access.key_of(peer)
        held = key if self._per_ip else 0
        if held and not self._addresses.claim(held, self._per_ip):
            return PER_IP, 0
        if not self._access.is_within_rate(key):
            if held:
                self._addresses.release(held)
            return RATE, 0
        return "", held

    def _on_close(self, key: int = 0) -> None:
        self._used -= 1
        self._release()
        if key:
            self._addresses.release(key)

    def _claim(self) -> bool:
        if 0 < self._per_worker <= self._used:
            return False
        return not self._connections or self._slots.claim(self._slots_key, self._connections)

    def _release(self) -> None:
        if self._connections:
            self._slots.release(self._slots_key)


def _nothing() -> None:
    pass


class SlotSocket(ProxiedSocket):
    """A connection that has a slot, which is free again when the socket is closed, by whatever code."""

    __slots__ = ("_releases",)

    def __init__(self, family: int = -1, kind: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, kind, proto, fileno)
        self._releases: list[Callable[[], None]] = []

    def on_close(self, release: Callable[[], None]) -> None:
        """What to call then, too."""
        self._releases.append(release)

    def close(self) -> None:
        """As a socket's."""
        super().close()
        releases, self._releases = self._releases, []
        for release in releases:
            release()


class LimitedAcceptor(Acceptor):
    """One listening socket of a worker, with limits.

    Args:
        loop: the worker's loop.
        sock: a listening, non-blocking socket.
        serve: what serves each connection.
        balance: the worker's share.
        limiter: the listener's limits.
        refusals: what becomes of clients that are refused.
    """

    connection_class = SlotSocket

    def __init__(
        self,
        loop: PollLoop,
        sock: socket.socket,
        serve: Serve,
        balance: Balance,
        limiter: ConnectionLimiter,
        refusals: Refusals,
    ) -> None:
        super().__init__(loop, sock, serve, balance, None if limiter.proxies else limiter.admit)
        self._balance = balance
        self._limiter = limiter
        self._refusals = refusals
        limiter.acceptors.append(self)

    def successor(self, sock: socket.socket) -> Acceptor:
        """As of one without limits; of the same limits, by which the clients of both are counted."""
        return LimitedAcceptor(self._loop, sock, self._serve, self._balance, self._limiter, self._refusals)

    def close(self) -> None:
        """As of one without limits."""
        super().close()
        self._limiter.acceptors.remove(self)

    def queue(self) -> bool:
        """Joins the wait queue, if there is a slot for the client that comes."""
        return self._limiter.reserve() and super().queue()

    def requeue(self) -> None:
        """Goes to the end of the wait queue; where there is no slot for the next client, out of it."""
        if self._limiter.reserve():
            self._selector.requeue(self._fd)
            return
        for acceptor in self._limiter.acceptors:
            acceptor.leave()
        self._balance.full()

    def leave(self) -> None:
        """Leaves the wait queue, and the reserved slot to other workers unless it is for another socket's client."""
        super().leave()
        if not any(acceptor.queued for acceptor in self._limiter.acceptors):
            self._limiter.release_reserved()

    def last_call(self, count: Callable[[], None]) -> None:
        """As of one without limits, if there is a slot for a client that may have come."""
        if self._limiter.reserve():
            super().last_call(count)
        else:
            self.leave()

    def _has_room(self) -> bool:
        return self._limiter.reserve()

    def refuse(self, sock: socket.socket, peer: Any, reason: str) -> None:
        """Refuses a client that was accepted. The next one wakes another worker all the same."""
        if self.queued:
            super().requeue()
        self._refusals.refuse(sock, peer, reason)

    def _take(self, descriptor: int, peer: Any, accepted: Callable[[Acceptor], None]) -> None:
        reason, release = (self._admit or self._limiter.admit_proxy)(peer)
        sock = SlotSocket(self._family, self._type, self._proto, descriptor)
        sock.setblocking(False)
        if reason:
            self.refuse(sock, peer, reason)
            return
        sock.on_close(release)
        accepted(self)
        if self._admit is not None:
            self._serve(sock, peer)
        else:
            found = partial(self._take_client, sock, peer)
            failed = partial(self._header_failed, sock, peer)
            ProxyHeaderReader(self._loop, sock, self._limiter.header_seconds, found, failed)

    def _take_client(self, sock: SlotSocket, proxy: Any, header: Header) -> None:
        """Serves the client that a proxy speaks for; the proxy itself where it speaks for none."""
        peer = header.source or proxy
        reason, release = self._limiter.admit_client(peer)
        if not reason:
            sock.on_close(release)
            sock.proxy_header, sock.proxy_peername = header, proxy
            self._serve(sock, peer)
            return
        self._refusals.refuse(sock, peer, reason)
        self._balance.not_served()

    def _header_failed(self, sock: SlotSocket, proxy: Any, why: str) -> None:
        if why:  # else it is how a proxy looks whether the port is open
            self._refusals.note(proxy, PROXY_HEADER, why)
        sock.close()
        self._balance.not_served()
