"""Datagram sockets: one for each worker's slot, in a group among which the kernel spreads clients by their address.

A group (SO_REUSEPORT of socket(7)) may be joined by any program of the same user. So the first socket is bound alone,
which fails where another socket is bound already, and opens its group only then: there is no moment at which a daemon
could join another's.

A socket that is to go is connected to itself. The kernel passes over connected sockets of a group, so that what comes
from then on goes to the others, while what is in its queue can be read. There is no way back into the group.

`listeners` alone calls this; it owns the sockets.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Collection, Sequence
from typing import Any

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.errors import ForkdError
from forkd.system.channel import MOST_DESCRIPTORS
from forkd.system.host_addresses import bind_host, rivals_of
from forkd.system.inherited import is_connected
from forkd.system.socket_options import has_freebind, set_freebind

# linux/in.h, in6.h and asm-generic/socket.h, where Python has no names for them.
_IP_MULTICAST_ALL, _IPV6_MULTICAST_ALL = 49, 29


def bind_group(
    listener: Listener, slots: int, beside: Sequence[socket.socket] = ()
) -> tuple[list[socket.socket], tuple[str, ...]]:
    """Binds the sockets of a udp listener: slot by slot, those of a slot in the order of the host's addresses. With
    them it returns what of those the machine lacks, as `bind_host` does. Those that are `beside` are this daemon's, and
    may have the port too.

    Raises:
        OSError: one can't be bound.
        ForkdError: a multicast group can't be joined, or there would be too many sockets.
    """
    address = listener.address
    with contextlib.ExitStack() as undo:

        def bind(family: int, where: tuple[Any, ...]) -> socket.socket:
            joins = bool(rivals_of(socket.SOCK_DGRAM, family, where, beside))
            return _bind_first(family, where, freebind=listener.freebind, joins=joins)

        first, lacking = bind_host(address, socket.SOCK_DGRAM, bind)
        for sock in first:
            undo.callback(sock.close)
        for group in listener.multicast:
            _join(first, group, address)
        grown = grow_group(first, slots)
        undo.pop_all()
    return [*first, *grown], lacking


def _bind_first(family: int, where: tuple[Any, ...], *, freebind: bool, joins: bool) -> socket.socket:
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(_socket(family))
        set_freebind(sock, wanted=freebind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, joins)
        sock.bind(where)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        undo.pop_all()
    return sock


def grow_group(sockets: Sequence[socket.socket], slots: int) -> list[socket.socket]:
    """Binds the sockets that a group lacks for so many slots, as those of its first slot are bound.

    Raises:
        OSError: one can't be bound.
        ForkdError: there would be too many sockets.
    """
    width = sockets_per_slot(sockets)
    if slots * width > MOST_DESCRIPTORS:
        raise ForkdError(
            f"{slots} workers with {width} datagram sockets each are more than the {MOST_DESCRIPTORS} that one "
            "listener may have; use fewer workers, or one address instead of a host's name"
        )
    with contextlib.ExitStack() as undo:
        grown = []
        for number in range(len(sockets), slots * width):
            grown.append(undo.enter_context(rebind(sockets[number % width])))
        undo.pop_all()
    return grown


def rebind(sock: socket.socket) -> socket.socket:
    """Another socket of its group, bound as it is. Raises OSError."""
    with contextlib.ExitStack() as undo:
        fresh = undo.enter_context(_socket(sock.family))
        fresh.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        set_freebind(fresh, wanted=has_freebind(sock))
        fresh.bind(sock.getsockname())
        undo.pop_all()
    return fresh


def sockets_per_slot(sockets: Sequence[socket.socket]) -> int:
    """How many sockets each slot has: one for each address that the host's name stands for."""
    return len({sock.getsockname() for sock in sockets}) or 1


def arrange_by_slot(sockets: Sequence[socket.socket]) -> list[socket.socket]:
    """The sockets of a group in the order of the slots, in whatever order they come, without those that are to go."""
    by_name: dict[object, list[socket.socket]] = {}
    for sock in sockets:
        if is_connected(sock):
            sock.close()
        else:
            by_name.setdefault(sock.getsockname(), []).append(sock)
    return [sock for slot in zip(*by_name.values(), strict=False) for sock in slot]


def stop_receiving(sock: socket.socket) -> None:
    """Takes a socket out of its group; what is in its queue stays there. Raises OSError."""
    name = sock.getsockname()
    loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (looked up)
    sock.connect((loopback.get(name[0], name[0]), *name[1:]))


def update_multicast(sockets: Sequence[socket.socket], before: Collection[str], listener: Listener) -> None:
    """Joins the multicast groups of a listener's settings, and leaves those that only its settings before had.

    Args:
        sockets: of the listener, slot by slot.
        before: the groups until now.
        listener: its settings.

    Raises:
        ForkdError: one can't be joined.
    """
    for group in listener.multicast:
        _join(sockets, group, listener.address)
    for group in set(before) - set(listener.multicast):
        with contextlib.suppress(ForkdError, OSError):  # the interface may be gone, and the membership with it
            _change_membership(sockets, group, listener.address, socket.IPV6_LEAVE_GROUP, socket.IP_DROP_MEMBERSHIP)


def _socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    # A group's datagrams are for those that have joined it on this very socket.
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
    return sock


def _join(sockets: Sequence[socket.socket], group: str, address: Address) -> None:
    """Joins a multicast group, unless it is joined already."""
    try:
        _change_membership(sockets, group, address, socket.IPV6_JOIN_GROUP, socket.IP_ADD_MEMBERSHIP)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise ForkdError(f"can't join {group} at {address}: {error.strerror}") from None


def _change_membership(sockets: Sequence[socket.socket], group: str, address: Address, v6: int, v4: int) -> None:
    """Makes the first socket of the group's family join or leave it: the kernel gives a group's datagrams to every
    socket that has joined, and one worker is to serve them.
    """
    host, _, interface = group.partition("%")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = next((one for one in sockets if one.family == family), None)
    if sock is None:
        raise ForkdError(f"can't join {group} at {address}: they are of two families; bind an address of the group's")
    try:
        index = socket.if_nametoindex(interface) if interface else 0
    except OSError:
        raise ForkdError(f"can't join {group} at {address}: there is no network interface {interface}") from None
    packed = socket.inet_pton(family, host)
    if family == socket.AF_INET6:  # ipv6_mreq: group, interface
        sock.setsockopt(socket.IPPROTO_IPV6, v6, packed + struct.pack("=I", index))
    else:  # ip_mreqn: group, local address, interface
        sock.setsockopt(socket.IPPROTO_IP, v4, packed + bytes(4) + struct.pack("=i", index))
