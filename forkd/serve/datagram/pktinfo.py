"""Replies that leave from the address which their request came to, on a socket bound to all of the machine's addresses.

A client takes no answer from another address (RFC 1122, section 4.1.3.5). The kernel tells the destination with each
datagram and takes it with each answer (IP_PKTINFO of ip(7), IPV6_PKTINFO of RFC 3542). `transport` receives and sends
by this where the socket is bound so, or where a proxy's address has to be remembered.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

#: Peers whose route is remembered; a later answer to another peer leaves from where routing says. And addresses of this
#: machine that they have sent to: of a whole network, as 127.0.0.0/8, each may be its own.
MOST_PEERS, MOST_ADDRESSES = 4096, 1024

_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)  # linux/in.h; Python names it from 3.14 on
_V4 = struct.Struct("=i4s4s")  # in_pktinfo: interface, local address, destination in the header
_V6 = struct.Struct("=16si")  # in6_pktinfo: address, interface
_SPACE = socket.CMSG_SPACE(max(_V4.size, _V6.size))
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 (compared with)

#: The control messages that tell sendmsg(2) where to send from.
Ancillary = list[tuple[int, int, bytes]]


def enable_pktinfo(sock: socket.socket) -> bool:
    """Has the kernel tell each datagram's destination if the socket is bound to all addresses; whether it is.

    Raises:
        OSError: the kernel can't.
    """
    if sock.getsockname()[0] not in _WILDCARDS:
        return False
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
    return True


class ReplyRoutes:
    """Receives and sends for a socket, and remembers for each peer where its replies go, and from which address.

    Args:
        sock: the socket.
        checked: whether `remember` is called for each datagram whose peer is to be remembered, and for no other; else
            all are.
    """

    def __init__(self, sock: socket.socket, *, checked: bool = False) -> None:
        self._receive, self._send = sock.recvmsg, sock.sendmsg
        self._checked = checked
        self._replies: dict[bytes, Ancillary] = {}  # by address and interface
        self._routes: dict[Any, tuple[Any, Ancillary]] = {}  # where to send to and from, by peer
        self._last: Ancillary = []

    def receive(self, size: int) -> tuple[bytes, Any]:
        """As recvfrom(2)."""
        data, ancillary, _, peer = self._receive(size, _SPACE)
        origin = self._last = self._origin(ancillary)
        if not self._checked:
            self._remember(peer, peer, origin)
        return data, peer

    def send(self, data: Any, addr: Any) -> None:
        """As sendto(2), from the address that the peer's latest datagram came to."""
        to, origin = self._routes.get(addr) or (addr, ())
        self._send((data,), origin, 0, to)

    def remember(self, client: Any, peer: Any) -> None:
        """Has replies to a client go to the peer whose datagram is the one received last: to itself, or its proxy."""
        self._remember(client, peer, self._last)

    def _remember(self, client: Any, to: Any, origin: Ancillary) -> None:
        known = self._routes.get(client)
        if known is None or known[1] is not origin or known[0] != to:
            self._routes[client] = (to, origin)
            if len(self._routes) > MOST_PEERS:
                del self._routes[next(iter(self._routes))]

    def _origin(self, ancillary: Ancillary) -> Ancillary:
        for level, kind, pktinfo in ancillary:
            known = self._replies.get(pktinfo)
            if known is None:
                known = self._replies[pktinfo] = reply(level, kind, pktinfo)
                if len(self._replies) > MOST_ADDRESSES:
                    del self._replies[next(iter(self._replies))]
            return known
        return []


def reply(level: int, kind: int, pktinfo: bytes) -> Ancillary:
    """What a reply is sent with, from what its request came with. From a group's address no host can send: then the
    interface's own address is taken.
    """
    if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
        _, local, _ = _V4.unpack(pktinfo)
        return [(level, kind, _V4.pack(0, local, bytes(4)))]
    if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
        local, interface = _V6.unpack(pktinfo)
        if local[0] == 0xFF:
            return [(level, kind, _V6.pack(bytes(16), interface))]
        link_local = local[0] == 0xFE and local[1] & 0xC0 == 0x80
        return [(level, kind, _V6.pack(local, interface if link_local else 0))]
    return []
