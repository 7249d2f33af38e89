"""An echo of whole lines whose answer is what the kernel has for the connection's options just then."""

from __future__ import annotations

import asyncio
import json
import socket

_NAMES = {
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "idle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    "interval": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "count": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    "user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "quickack": (socket.IPPROTO_TCP, socket.TCP_QUICKACK),
    "busy_poll": (socket.SOL_SOCKET, 46),
    "send_buffer": (socket.SOL_SOCKET, socket.SO_SNDBUF),
    "receive_buffer": (socket.SOL_SOCKET, socket.SO_RCVBUF),
}


class Told(asyncio.Protocol):
    """Tells them for each thing that it receives."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        sock = self.transport.get_extra_info("socket")
        known = _NAMES if sock.family != socket.AF_UNIX else {"send_buffer": _NAMES["send_buffer"]}
        found = {name: sock.getsockopt(*option) for name, option in known.items()}
        self.transport.write(json.dumps(found).encode() + b"\n")


class ToldBuffered(Told, asyncio.BufferedProtocol):
    """The same by a buffer of its own."""

    def get_buffer(self, sizehint: int) -> bytearray:
        self.buffer = bytearray(100)
        return self.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(self.buffer[:nbytes]))
