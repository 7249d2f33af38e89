"""Handlers that `guard` serves beside the built-in echo."""

from __future__ import annotations

import asyncio
import ctypes
import os
from typing import cast

#: See mark.c.
LIBRARY = ctypes.CDLL(os.environ["FORKD_GUARD_MARK"])


class Mark(asyncio.Protocol):
    """Ends a stretch of instructions at each message, and answers with the worker's pid."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Marks, and says so."""
        LIBRARY.mark()
        self.transport.write(str(os.getpid()).encode())


class Datagrams(asyncio.DatagramProtocol):
    """Sends each datagram back."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self.transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        """Answers."""
        self.transport.sendto(data, address)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends back what comes, until the client ends."""
    while data := await reader.read(4096):
        writer.write(data)
        await writer.drain()
    writer.close()
