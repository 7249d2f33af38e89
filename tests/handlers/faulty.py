"""Echoes with faults that a client calls up by what it sends."""

from __future__ import annotations

import asyncio

from forkd.builtin import Echo


class Faulty(Echo):
    """Raises on `raise MESSAGE`, never returns on `loop`, else echoes."""

    def data_received(self, data: bytes) -> None:
        if data.startswith(b"raise "):
            raise ValueError(data.removeprefix(b"raise ").decode())
        while data == b"loop":
            pass
        super().data_received(data)


async def faulty_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same by streams, but for the loop."""
    while data := await reader.read(4096):
        if data.startswith(b"raise "):
            raise ValueError(data.removeprefix(b"raise ").decode())
        writer.write(data)
