"""Handlers that say what they know of TLS."""

from __future__ import annotations

import asyncio
import json
import tempfile
from typing import Any

from lasting import Filling  # type: ignore[import-not-found]  # beside this file

from forkd.builtin import Echo

MUCH = 3_000_000


class Who(Echo):
    """Sends what is known of the client, a line of JSON, then echoes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        tls: Any = transport.get_extra_info("ssl_object")
        known = {
            "version": tls.version(),
            "alpn": tls.selected_alpn_protocol(),
            "cipher": transport.get_extra_info("cipher")[0] == tls.cipher()[0],
            "peercert": transport.get_extra_info("peercert"),
            "binary": len(tls.getpeercert(True) or b""),
            "can_write_eof": transport.can_write_eof(),
        }
        transport.write(json.dumps(known).encode() + b"\n")


class Buffered(Filling):  # type: ignore[misc]
    """An echo by a buffer that is smaller than a record of TLS."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = bytearray(1000)

    def pause_writing(self) -> None:
        self.transport.pause_reading()

    def resume_writing(self) -> None:
        self.transport.resume_reading()


class Bulk(asyncio.Protocol):
    """Sends much, and reads nothing until it has."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        transport.write(bytes(MUCH))


async def file(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends as much from a file."""
    with tempfile.TemporaryFile() as content:
        content.truncate(MUCH)
        await asyncio.get_running_loop().sendfile(writer.transport, content)


async def sends(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends for as long as it is read."""
    while True:
        writer.write(bytes(10_000))
        await writer.drain()


async def lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An echo of lines; closes after the word "bye"."""
    while line := await reader.readline():
        writer.writelines([b"> ", line])
        await writer.drain()
        if line == b"bye\n":
            return
