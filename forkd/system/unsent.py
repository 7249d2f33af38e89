"""What lies in the kernel's sending queue of a connection (tcp(7), unix(7); the number is linux/sockios.h's)."""

from __future__ import annotations

import fcntl
import socket
import struct

_SIOCOUTQ = 0x5411  # TIOCOUTQ


def outgoing(sock: socket.socket) -> int:
    """What was written and has not been taken by the peer: for TCP the bytes that it has not acknowledged; for a unix
    socket the memory that those take which it has not read. Raises OSError.
    """
    return int(struct.unpack("i", fcntl.ioctl(sock, _SIOCOUTQ, bytes(4)))[0])
