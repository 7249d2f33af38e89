"""Handlers that answer before they have heard all, and close: with 100,000 bytes, or with 3 MB where the first byte is
`L`; by a reset where it is `A`; by an end of file first where it is `E`.
"""

from __future__ import annotations

import asyncio

ANSWER, LONG_ANSWER = b"a" * 100_000, b"a" * 3_000_000


async def streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads ten bytes and returns."""
    answer(writer.transport, await reader.readexactly(10))


class Answering(asyncio.Protocol):
    """Answers the first that comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.transport.is_closing():
            answer(self.transport, data)
            self.transport.close()


def answer(transport: asyncio.WriteTransport, data: bytes) -> None:
    """Says the last word."""
    transport.write(LONG_ANSWER if data.startswith(b"L") else ANSWER)
    if data.startswith(b"A"):
        transport.abort()
    if data.startswith(b"E"):
        transport.write_eof()
