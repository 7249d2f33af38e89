"""The accept queue of a listening socket: who is connected, as far as the kernel goes, and waits to be accepted.

Depth and limit of a TCP listener's are what TCP_INFO (tcp(7)) has in `tcpi_unacked` and `tcpi_sacked`; a connection is
let in while the depth is not above the limit. Each that finds it full is dropped and counted, a client that tries again
each time (SO_MEMINFO of linux/sock_diag.h, SK_MEMINFO_DROPS). A unix listener's come from `sock_diag`; nothing is
dropped there: who finds the queue full waits in connect(2).
"""

from __future__ import annotations

import os
import socket
import struct
from contextlib import suppress
from typing import NamedTuple

from forkd.errors import ForkdError
from forkd.system.sock_diag import unix_sockets
from forkd.system.tcp_info import LISTEN, read_tcp_info

_SO_MEMINFO = 55  # asm-generic/socket.h
_DROPS = struct.Struct("=32xI")  # the ninth of its 32-bit numbers


class Queue(NamedTuple):
    """An accept queue: how many wait, how many may, how many found it full; None for what the system does not tell."""

    waiting: int | None
    limit: int | None
    drops: int | None


def queue_of(sock: socket.socket) -> Queue:
    """The accept queue of a listening socket, as it is now."""
    if sock.family == socket.AF_UNIX:
        with suppress(ForkdError, OSError):
            for found in unix_sockets(os.fstat(sock.fileno()).st_ino):
                return Queue(found.unread, found.unsent, None)
        return Queue(None, None, None)
    info = read_tcp_info(sock)
    if info is None or info.state != LISTEN:
        return Queue(None, None, None)
    return Queue(info.unacked, info.sacked, _drops(sock))


def _drops(sock: socket.socket) -> int | None:
    with suppress(OSError, struct.error):
        return int(_DROPS.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _DROPS.size))[0])
    return None
