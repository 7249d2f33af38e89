"""Which of this machine's addresses a request came to, on a socket that is bound to them all, so that its answer leaves
from there: a client takes none from elsewhere (RFC 1122, section 4.1.3.5). The kernel tells it with each datagram and
takes it with each answer (IP_PKTINFO of ip(7), IPV6_PKTINFO of RFC 3542).
"""

from __future__ import annotations

import socket
import struct
from typing import Any

#: Peers whose address here is remembered; an answer that comes later, to one of more, leaves from where routing says.
MOST_PEERS = 4096

_IP_PKTINFO = getattr(socket, "IP_PKTINFO", 8)  # linux/in.h; Python names it from 3.14 on
_V4 = struct.Struct("=i4s4s")  # in_pktinfo: interface, local address, destination in the header
_V6 = struct.Struct("=16si")  # in6_pktinfo: address, interface
_SPACE = socket.CMSG_SPACE(max(_V4.size, _V6.size))
_WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 (compared with)

#: What sendmsg(2) is told of where to send from.
Ancillary = list[tuple[int, int, bytes]]


def receives_origin(sock: socket.socket) -> bool:
    """Whether a socket is bound to all addresses; if so the kernel tells which one it was, from now on.

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


class Origins:
    """Receives and sends for such a socket, and remembers.

    Args:
        sock: the socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._receive, self._send = sock.recvmsg, sock.sendmsg
        self._made: dict[bytes, Ancillary] = {}  # as many as this machine has addresses and interfaces
        self._known: dict[Any, tuple[Any, Ancillary]] = {}  # where to send to and from, by peer
        self._last: Ancillary = []

    def receive(self, size: int) -> tuple[bytes, Any]:
        """As recvfrom(2)."""
        data, ancillary, _, peer = self._receive(size, _SPACE)
        origin = self._last = self._origin(ancillary)
        known = self._known.get(peer)
        if known is None or known[1] is not origin:
            self._remember(peer, peer, origin)
        return data, peer

    def lead(self, client: Any, proxy: Any) -> None:
        """What is sent to a client goes by this proxy, from which a datagram was received just now."""
        self._remember(client, proxy, self._last)

    def _remember(self, peer: Any, to: Any, origin: Ancillary) -> None:
        self._known[peer] = (to, origin)
        if len(self._known) > MOST_PEERS:
            del self._known[next(iter(self._known))]

    def send(self, data: Any, addr: Any) -> None:
        """As sendto(2), from where the latest datagram of this peer has come to."""
        to, origin = self._known.get(addr) or (addr, ())
        self._send((data,), origin, 0, to)

    def _origin(self, ancillary: Ancillary) -> Ancillary:
        for level, kind, said in ancillary:
            made = self._made.get(said)
            if made is None:
                made = self._made[said] = _answer(level, kind, said)
            return made
        return []


def _answer(level: int, kind: int, said: bytes) -> Ancillary:
    """What an answer is sent with, from what a request came with. A group's address is nobody's to send from: then the
    interface's own is.
    """
    if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
        _, local, _ = _V4.unpack(said)
        return [(level, kind, _V4.pack(0, local, bytes(4)))]
    if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
        local, interface = _V6.unpack(said)
        if local[0] == 0xFF:
            return [(level, kind, _V6.pack(bytes(16), interface))]
        link_local = local[0] == 0xFE and local[1] & 0xC0 == 0x80
        return [(level, kind, _V6.pack(local, interface if link_local else 0))]
    return []
