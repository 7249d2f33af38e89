"""A listener's limits in one worker: whom it takes, and for whom there is a place.

Where clients are to wait, a worker has a place in hand before it waits for one, and waits for none while it has not:
the places of all workers, in hand and taken, are never more than there are. The place in hand is the next client's, by
whichever of the listener's sockets it comes. Where they are to be refused there is nothing in hand, and who comes while
no place can be claimed is refused. `accept.Acceptor` alone serves a listener without limits.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from forkd.serve.accept import Acceptor, Serve
from forkd.serve.balance import Balance
from forkd.serve.gate import DENIED, FULL, PER_IP, RATE, Gate, hashing
from forkd.serve.loop import PollLoop
from forkd.serve.networks import origin
from forkd.serve.refusal import Refusals
from forkd.system.bound import BoundListener
from forkd.system.counts import Ledger
from forkd.system.scoreboard import Row


class Held(socket.socket):
    """A connection that has a place, which is free again when it is closed, by whomever."""

    __slots__ = ("_on_close",)

    def on_close(self, release: Callable[[], None]) -> None:
        """What to call then."""
        self._on_close: Callable[[], None] | None = release

    def close(self) -> None:
        """As a socket's."""
        super().close()
        release, self._on_close = getattr(self, "_on_close", None), None
        if release is not None:
            release()


def is_limited(bound: BoundListener) -> bool:
    """Whether anything is asked of who comes there."""
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


class Guard:
    """One listener's limits.

    Args:
        bound: the listener.
        ledger: what this worker counts with the others.
    """

    def __init__(self, bound: BoundListener, ledger: Ledger) -> None:
        limits, address = bound.listener.limits, str(bound.address)
        self.waits = limits.over == "wait"
        self.acceptors: list[GuardedAcceptor] = []
        self._connections, self._per_worker, self._per_ip = limits.connections, limits.per_worker, limits.per_ip
        self._places, self._addresses = ledger.places, ledger.addresses
        self._key_of = hashing(ledger.secret, address)
        self._own = self._key_of(b"places")
        self._gate = Gate(bound.listener, address, ledger)
        self._in_hand = False
        self._taken = 0  # places of this worker's connections

    def reach_for_place(self) -> bool:
        """Whether there is a place in hand for the next client, from now on."""
        if self.waits and not self._in_hand:
            self._in_hand = self._claim()
        return self._in_hand or not self.waits

    def put_back(self) -> None:
        """Lets somebody else have the place in hand."""
        if self._in_hand:
            self._in_hand = False
            self._give_back()

    def admit(self, peer: Any) -> tuple[str, Callable[[], None]]:
        """Takes a client that has come.

        Returns:
            Why it is refused; empty when it is not, and then what to call when it has gone.
        """
        if not self._gate.allows(peer):
            return DENIED, _nothing
        had = self._in_hand
        if not had and not self._claim():
            return FULL, _nothing
        self._in_hand = True
        address = origin(peer) if self._per_ip else b""
        key = self._key_of(address) if address else 0
        if key and not self._addresses.claim(key, self._per_ip):
            why = PER_IP
        elif not self._gate.has_time(peer):
            why = RATE
            if key:
                self._addresses.release(key)
        else:
            self._in_hand = False
            self._taken += 1
            return "", lambda: self._gone(key)
        if not had:
            self.put_back()
        return why, _nothing

    def _gone(self, key: int) -> None:
        self._taken -= 1
        self._give_back()
        if key:
            self._addresses.release(key)

    def _claim(self) -> bool:
        if 0 < self._per_worker <= self._taken:
            return False
        return not self._connections or self._places.claim(self._own, self._connections)

    def _give_back(self) -> None:
        if self._connections:
            self._places.release(self._own)


def _nothing() -> None:
    pass


class GuardedAcceptor(Acceptor):
    """One listening socket of a worker, with limits.

    Args:
        loop: the worker's loop.
        sock: a listening, non-blocking socket.
        serve: what serves each connection.
        balance: the worker's share.
        guard: the listener's limits.
        refusals: what becomes of those who are refused.
    """

    def __init__(
        self, loop: PollLoop, sock: socket.socket, serve: Serve, balance: Balance, guard: Guard, refusals: Refusals
    ) -> None:
        super().__init__(loop, sock, serve, balance)
        self._balance = balance
        self._guard = guard
        self._refusals = refusals
        guard.acceptors.append(self)

    def queue(self) -> bool:
        """Joins the wait queue, if there is a place for who comes."""
        return self._guard.reach_for_place() and super().queue()

    def leave(self) -> None:
        """Leaves the wait queue, and the place in hand to others unless it is for another socket's client."""
        super().leave()
        if not any(one.queued for one in self._guard.acceptors):
            self._guard.put_back()

    def requeue(self) -> None:
        """Goes to the end of the wait queue; where there is no place for who comes next, out of it."""
        if self._guard.reach_for_place():
            super().requeue()
            return
        for acceptor in self._guard.acceptors:
            acceptor.leave()
        self._balance.full()

    def last_call(self, count: Callable[[], None]) -> None:
        """As of one without limits, if there is a place for who may have come."""
        if self._guard.reach_for_place():
            super().last_call(count)
        else:
            self.leave()

    def _came(self, descriptor: int, peer: Any, accepted: Callable[[Acceptor], None]) -> None:
        refused, gone = self._guard.admit(peer)
        if not refused:
            held = Held(self._family, self._type, self._proto, descriptor)
            held.on_close(gone)
            accepted(self)
            held.setblocking(False)
            self._serve(held, peer)
            return
        if self.queued:
            super().requeue()
        sock = socket.socket(self._family, self._type, self._proto, descriptor)
        sock.setblocking(False)
        self._refusals.refuse(sock, peer, refused)


def guarded(
    bound: BoundListener, loop: PollLoop, serve: Serve, balance: Balance, ledger: Ledger, row: Row
) -> list[GuardedAcceptor]:
    """Acceptors for all sockets of a listener with limits."""
    guard = Guard(bound, ledger)
    refusals = Refusals(loop, str(bound.address), bound.listener.limits.message, row, ledger)
    return [GuardedAcceptor(loop, sock, serve, balance, guard, refusals) for sock in bound.sockets]
