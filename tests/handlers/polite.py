"""Handlers that end when their worker drains: by a `shutdown()`, by waiting for it, and by asking whether it does."""

from __future__ import annotations

import asyncio

from forkd.builtin import Echo
from forkd.drain import draining, wait_draining


class Polite(Echo):
    """An echo that says goodbye and closes when its worker drains; after `raise` it raises then, after `stay` stays."""

    mood = b""

    def data_received(self, data: bytes) -> None:
        self.mood = data
        super().data_received(data)

    def shutdown(self) -> None:
        if self.mood == b"raise":
            raise ValueError("in no mood to end")
        if self.mood != b"stay":
            self._write(b"goodbye")
            self._transport.close()


async def polite_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same by streams: waits for its client or for the drain, until one of them comes."""
    drain = asyncio.ensure_future(wait_draining())
    try:
        while not drain.done():
            read = asyncio.ensure_future(reader.read(4096))
            await asyncio.wait({read, drain}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():
                read.cancel()
                writer.write(b"goodbye")
            elif data := read.result():
                writer.write(data)
            else:
                break
    finally:
        drain.cancel()


class Curious(asyncio.Protocol):
    """Answers with what it knows of the drain."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(b"%d%d" % (draining(), self.transport.get_extra_info("draining")))
