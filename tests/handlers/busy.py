"""Handlers that have much to do when a client wants it: echoes of lines in each form, endless answers, slow pieces."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from forkd.framing import LineProtocol

#: Seconds of work for one piece that is slow.
SLOW = 0.02


class Lines(LineProtocol):
    """Sends each line back."""

    def message_received(self, message: bytes) -> None:
        self.send_message(message)


class SlowLines(LineProtocol):
    """Sends each line back, and takes its time over it."""

    def message_received(self, message: bytes) -> None:
        time.sleep(SLOW)
        self.send_message(message)


class OwnLines(asyncio.Protocol):
    """Sends each line back, and takes the lines apart by itself."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        for line in data.splitlines(keepends=True):
            self.transport.write(line)


async def read_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends each line back."""
    while line := await reader.readline():
        writer.write(line)
        await writer.drain()


async def read_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends each line back, and takes its time over it."""
    while line := await reader.readline():
        time.sleep(SLOW)
        writer.write(line)


async def read_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Sends each byte back."""
    while byte := await reader.read(1):
        writer.write(byte)


async def write_always(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Echoes; a client that asks for `much` is sent zeros without end, as fast as it reads."""
    while (data := await reader.read(100)) != b"much":
        if not data:
            return
        writer.write(data)
    while True:
        writer.write(bytes(1000))
        await writer.drain()


class Always(OwnLines):
    """The same as a protocol: it writes while it may."""

    paused = False

    def data_received(self, data: bytes) -> None:
        if data == b"much":
            self.write_on()
        else:
            self.transport.write(data)

    def write_on(self) -> None:
        while not self.paused and not self.transport.is_closing():
            self.transport.write(bytes(1000))

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.write_on()


class SlowEcho(OwnLines):
    """Takes its time over whatever comes."""

    def data_received(self, data: bytes) -> None:
        time.sleep(SLOW)
        self.transport.write(data)


class SlowCallbacks(SlowEcho):
    """Takes its time in a callback."""

    def data_received(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(super().data_received, data)


class SlowTurns(OwnLines):
    """Takes its time again and again, while its client is there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.work_on()

    def work_on(self) -> None:
        if not self.transport.is_closing():
            time.sleep(10 * SLOW)
            asyncio.get_running_loop().call_later(SLOW / 10, self.work_on)


class SlowDatagrams(asyncio.DatagramProtocol):
    """Takes its time over each datagram."""

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        time.sleep(SLOW)
        self.transport.sendto(data, addr)
