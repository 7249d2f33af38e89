"""The two ends of a rendezvous: one speaks first, the other answers, and both log what they have heard."""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger("ends")


class Callee(asyncio.Protocol):
    """Answers."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        log.info("heard %r", data)
        self.transport.write(b"pong")


class Caller(Callee):
    """Speaks first, and ends the connection when it is answered."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(b"ping")

    def data_received(self, data: bytes) -> None:
        log.info("heard %r", data)
        self.transport.close()


async def caller(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same by streams."""
    writer.write(b"ping")
    log.info("heard %r", await reader.readexactly(4))


async def callee(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same by streams."""
    log.info("heard %r", await reader.readexactly(4))
    writer.write(b"pong")
    await reader.read()
