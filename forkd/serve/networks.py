"""Where clients come from: their addresses as octets, and whether those lie in some networks. Pure.

An IPv4 client of an IPv6 socket (an IPv4-mapped address, RFC 4291) is an IPv4 client. Of thousands of networks none is
looked at one by one: those of one length are a set, so a look costs one step for each length that there is.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forkd.config.units import Network

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


def origin(peer: Any) -> bytes:
    """What counts as one client's: its IPv4 address, or its IPv6 network of 64 bits; none for one without address."""
    address = packed(peer)
    return address if len(address) == 4 else address[:_V6_PREFIX]


def shown(peer: Any) -> str:
    """A peer as people read it: HOST:PORT, an IPv6 host in brackets; what unix(7) has instead."""
    if isinstance(peer, tuple):
        host, port = peer[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return str(peer or "unix")


class Networks:
    """Some networks.

    Args:
        networks: which; those of IPv4-mapped addresses are of IPv4.
    """

    def __init__(self, networks: Iterable[Network]) -> None:
        self._of_length: dict[int, dict[int, set[int]]] = {4: {}, 16: {}}
        for network in networks:
            address, length = network.network_address.packed, network.prefixlen
            if address.startswith(_MAPPED) and length >= 96:
                address, length = address[12:], length - 96
            shift = 8 * len(address) - length
            self._of_length[len(address)].setdefault(shift, set()).add(int.from_bytes(address) >> shift)

    def __bool__(self) -> bool:
        return any(self._of_length.values())

    def has(self, peer: Any) -> bool:
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
        if self._denied and self._denied.has(peer):
            return False
        return not self._allowed or self._allowed.has(peer)
