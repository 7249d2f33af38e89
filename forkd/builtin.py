"""Handlers that come with forkd, for its tests and benchmarks and to try it out."""

from __future__ import annotations

import asyncio
from typing import Any


class Echo(asyncio.Protocol):
    """Sends back what it gets (RFC 862); reads no more from a client that does not read its echo."""

    __slots__ = ("_transport", "_write")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._write = transport.write

    def data_received(self, data: bytes) -> None:
        self._write(data)

    def pause_writing(self) -> None:
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._transport.resume_reading()


class DatagramEcho(asyncio.DatagramProtocol):
    """Sends each datagram back to where it came from (RFC 862)."""

    __slots__ = ("_sendto",)

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._sendto = transport.sendto

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._sendto(data, addr)
