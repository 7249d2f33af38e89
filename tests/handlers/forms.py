"""A handler of each form: each says which it is, then echoes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable


class AsClass(asyncio.Protocol):
    """Says its word, then echoes."""

    word = b"class\n"

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.word)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


def from_factory() -> AsClass:
    """A protocol with another word."""
    protocol = AsClass()
    protocol.word = b"factory\n"
    return protocol


async def as_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same by streams."""
    writer.write(b"streams\n")
    while data := await reader.read(4096):
        writer.write(data)
        await writer.drain()


async def with_farewell(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An echo that has something to do, over some turns of the loop, when its client has gone."""
    while data := await reader.read(4096):
        writer.write(data)
    for _ in range(20):
        await asyncio.sleep(0)
    logging.getLogger("forms").info("said farewell")


async def as_corked_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers each line by three writes that are one segment, and tells when the client has them."""
    while await reader.readline():
        with writer.transport.cork():  # type: ignore[attr-defined]
            for word in (b"one ", b"two ", b"three\n"):
                writer.write(word)
                await writer.drain()
        await writer.transport.wait_acked(10)  # type: ignore[attr-defined]
        writer.write(b"%d unacknowledged\n" % writer.transport.unacked())  # type: ignore[attr-defined]


class WithWord(AsClass):
    """Says the word that it is given."""

    def __init__(self, word: str, prefix: str = "") -> None:
        self.word = f"{prefix}{word}\n".encode()


def make_rooms(word: str) -> Callable[[], WithWord]:
    """A factory of protocols, of a loop that runs."""
    number = id(asyncio.get_running_loop())
    return lambda: WithWord(word if id(asyncio.get_running_loop()) == number else "of another loop")
