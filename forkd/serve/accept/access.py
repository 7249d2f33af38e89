"""Which clients may come in, by where they come from and how often: for listeners of connections, and of datagrams.

First where clients come from: their addresses as octets, and whether those lie in some networks; pure. Of thousands of
networks none is looked at one by one: those of one length are a set, so a look-up costs one step for each length that
there is. An IPv4 client of an IPv6 socket (an IPv4-mapped address, RFC 4291) is an IPv4 client.

Then `AccessPolicy`, one listener's rules in one worker, and `Refusals`, what becomes of a client that is refused: it is
counted, logged once a minute, told why if the settings say so, and closed so that it can hear that (`lingering`): for a
bounded time, and a bounded number of clients at once. A client that is denied is told nothing and closed at once.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from forkd.config.listener import Listener
from forkd.config.units import unescape
from forkd.serve.lingering import Lingering
from forkd.serve.loop import PollLoop
from forkd.system.scoreboard import Field, Row
from forkd.system.shared_counters import FAST, SharedCounters

if TYPE_CHECKING:
    from forkd.config.values import Network

log = logging.getLogger("forkd.accept")

#: Why a client is refused: there is no slot for it, there are too many of its address, too many of it came of late, it
#: may not come from where it comes, or the proxy that it comes by does not say who it is.
FULL, PER_IP, RATE, DENIED, PROXY_HEADER = "full", "per_ip", "rate", "denied", "proxy_header"

#: Where each is counted on the scoreboard.
COUNTED = {
    FULL: Field.REFUSED_FULL,
    PER_IP: Field.REFUSED_PER_IP,
    RATE: Field.REFUSED_RATE,
    DENIED: Field.REFUSED_DENIED,
    PROXY_HEADER: Field.REFUSED_PROXY_HEADER,
}

#: Seconds for which a client that was told something may still send, octets that it may send meanwhile, and how many
#: such clients there may be at a time; beyond that they are closed at once.
LINGER = 1.0
_MOST_READ = 65_536
_MOST_LINGERING = 64

_MINUTE = 60  # seconds between two lines about one reason and listener

#: Addresses of clients whose keys are known without hashing.
_MOST_KNOWN = 1024

_MAPPED = bytes(10) + b"\xff\xff"
_V6_PREFIX = 8  # octets of an IPv6 address that stand for one client's network


def packed(peer: Any) -> bytes:
    """A client's address, from what accept(2) gives: 4 octets, or 16; none for one that has no address."""
    if not isinstance(peer, tuple):
        return b""
    host = peer[0]
    if ":" not in host:
        return socket.inet_pton(socket.AF_INET, host)
    address = socket.inet_pton(socket.AF_INET6, host.partition("%")[0])
    return address[12:] if address.startswith(_MAPPED) else address


def client_network(peer: Any) -> bytes:
    """What counts as one client's: its IPv4 address, or its IPv6 network of 64 bits; none for one without address."""
    address = packed(peer)
    return address if len(address) == 4 else address[:_V6_PREFIX]


def format_peer(peer: Any) -> str:
    """A peer as people read it: HOST:PORT, an IPv6 host in brackets; what unix(7) has instead."""
    if isinstance(peer, tuple):
        host, port = peer[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return str(peer or "unix")


class Networks:
    """A set of networks, asked for the addresses in them.

    Args:
        networks: which; those of IPv4-mapped addresses are of IPv4. `values.UNIX` stands for what has no address, as
            what connects to a unix socket.
    """

    def __init__(self, networks: Iterable[Network | str]) -> None:
        self._of_length: dict[int, dict[int, set[int]]] = {0: {}, 4: {}, 16: {}}
        for network in networks:
            if isinstance(network, str):
                self._of_length[0] = {0: {0}}
                continue
            address, length = network.network_address.packed, network.prefixlen
            if address.startswith(_MAPPED) and length >= 96:
                address, length = address[12:], length - 96
            shift = 8 * len(address) - length
            self._of_length[len(address)].setdefault(shift, set()).add(int.from_bytes(address) >> shift)

    def __bool__(self) -> bool:
        return any(self._of_length.values())

    def contains(self, peer: Any) -> bool:
        """Whether a client comes from one of them."""
        address = packed(peer)
        number = int.from_bytes(address)
        return any(number >> shift in those for shift, those in self._of_length.get(len(address), {}).items())


class Permission:
    """Where clients may come from.

    Args:
        allowed: networks that they must be of; empty: of any.
        denied: networks that they must not be of, also where those are in allowed ones.
    """

    def __init__(self, allowed: Iterable[Network], denied: Iterable[Network]) -> None:
        self._allowed, self._denied = Networks(allowed), Networks(denied)

    def allow(self, peer: Any) -> bool:
        """Whether a client may come from there. One without an address may not, where some are asked for."""
        if self._denied and self._denied.contains(peer):
            return False
        return not self._allowed or self._allowed.contains(peer)


def keyed_hash(secret: bytes, address: str) -> Callable[[bytes], int]:
    """A function that makes keys of a listener's clients: hashes that an attacker outside of the daemon can't aim at.

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


class ClientKeys:
    """By what a listener's clients are counted: hashes of their addresses, or of their networks in IPv6.

    Args:
        secret: the daemon's.
        address: where it listens.

    Attributes:
        known: the latest ones, by the client's host: to hash takes longer than to look up.
    """

    def __init__(self, secret: bytes, address: str) -> None:
        self._hash = keyed_hash(secret, address)
        self.known: dict[str, int] = {}

    def key_of(self, peer: Any) -> int:
        """A client's key, from what accept(2) gives; 0 for one that has no address."""
        if not isinstance(peer, tuple):
            return 0
        key = self.known.get(peer[0])
        if key is None:
            if len(self.known) >= _MOST_KNOWN:
                self.known.clear()
            key = self.known[peer[0]] = self._hash(client_network(peer))
        return key


class AccessPolicy:
    """One listener's networks and its rate of one address, in one worker.

    Args:
        listener: its settings.
        address: where it really listens.
        counters: what the worker counts with the others.

    Attributes:
        allows: whether a client may come from there at all; None: it may from anywhere.
        key_of: a client's key.
        rate: how many of one address may come within which time; None: any.
    """

    def __init__(self, listener: Listener, address: str, counters: SharedCounters) -> None:
        restricted = listener.allow or listener.deny
        self.allows = Permission(listener.allow, listener.deny).allow if restricted else None
        self._keys = ClientKeys(counters.secret, address)
        self.key_of = self._keys.key_of
        self.rate = listener.limits.rate_per_ip
        self._rates = counters.rates

    def is_within_rate(self, key: int) -> bool:
        """Counts a client that has come, by its key, unless too many came of late; whether it did."""
        rate = self.rate
        return rate is None or not key or self._rates.claim(key ^ rate.seconds or 1, rate.events, rate.seconds)

    def admission(self, refused: Callable[[Any, str], None]) -> Callable[[Any], bool] | None:
        """What says of a client, by its address, whether it may come in; None where every client may.

        Args:
            refused: called with the address of one that may not, and why.
        """
        if self.allows is None:
            if self.rate is None:
                return None
            if FAST is not None:
                gate: Callable[[Any], bool] = FAST.PeerRate(
                    self._rates, self.key_of, self._keys.known, *self.rate, lambda peer: refused(peer, RATE)
                )
                return gate

        def admit(peer: Any) -> bool:
            if reason := self.refusal(peer):
                refused(peer, reason)
            return not reason

        return admit

    def refusal(self, peer: Any) -> str:
        """Why a client is refused; empty when it is not, and then it is counted.

        Args:
            peer: its address as accept(2) or recvfrom(2) gives it.
        """
        if self.allows is not None and not self.allows(peer):
            return DENIED
        return "" if self.rate is None or self.is_within_rate(self.key_of(peer)) else RATE


class Refusals:
    """What becomes of the clients that one listener refuses, in one worker.

    Args:
        loop: the worker's loop.
        address: where the listener listens.
        message: what a refused client is told; None: nothing.
        row: where the worker counts them.
        counters: what it counts with the others: lines in the log, here.
    """

    def __init__(self, loop: PollLoop, address: str, message: str | None, row: Row, counters: SharedCounters) -> None:
        self._loop = loop
        self._address = address
        self._message = unescape(message) if message else b""
        self._row = row
        self._windows = counters.rates
        self._key_of = keyed_hash(counters.secret, f"{address} log")
        self._unlogged: dict[str, int] = {}  # by reason: refused since the last line
        self._quiet_until: dict[str, float] = {}  # likewise: until when this worker says nothing of it
        self._lingering: set[Lingering] = set()

    def refuse(self, sock: socket.socket, peer: Any, reason: str) -> None:
        """Refuses a client, whose non-blocking socket this owns from now on."""
        self.note(peer, reason)
        if reason == DENIED or not self._message:
            sock.close()
            return
        with contextlib.suppress(OSError):  # it does not take it, or has gone
            sock.send(self._message)
        if len(self._lingering) < _MOST_LINGERING:
            self._lingering.add(Lingering(self._loop, sock, LINGER, _MOST_READ, self._lingering.discard))
            return
        with contextlib.suppress(OSError):
            sock.recv(_MOST_READ)
        sock.close()

    @property
    def lingering(self) -> int:
        """Clients that were told something and may still send."""
        return len(self._lingering)

    def note(self, peer: Any, reason: str, why: str = "") -> None:
        """Counts a client that is refused, and says so in the log, now or with others; where it is known, also why."""
        self._row[COUNTED[reason]] += 1
        self._unlogged[reason] = count = self._unlogged.get(reason, 0) + 1
        now = self._loop.time()
        if now < self._quiet_until.get(reason, 0.0):  # what all workers share may have no room for it
            return
        if self._windows.claim(self._key_of(reason.encode()), 1, _MINUTE):
            self._quiet_until[reason] = now + _MINUTE
            self._unlogged[reason] = 0
            more = f"; {count} since this worker last said so" if count > 1 else ""
            client = peer[0] if isinstance(peer, tuple) else "a client"
            log.info("%s: refused %s (%s)%s", self._address, client, f"{reason}: {why}" if why else reason, more)
