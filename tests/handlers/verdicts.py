"""Handlers that end in different ways, or tell about their process."""

from __future__ import annotations

import asyncio
import os
import sys

from forkd.builtin import Echo


class InConnectionMade(Echo):
    """Raises when its client comes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raise ValueError("in connection_made")


class InDataReceived(Echo):
    """Raises when its client speaks."""

    def data_received(self, data: bytes) -> None:
        raise ValueError("in data_received")


class InEofReceived(Echo):
    """Raises when its client has said all."""

    def eof_received(self) -> None:
        raise ValueError("in eof_received")


class InConnectionLost(Echo):
    """Raises when its client has gone."""

    def connection_lost(self, error: Exception | None) -> None:
        raise ValueError("in connection_lost")


class InCallback(Echo):
    """Raises in what it has scheduled."""

    def data_received(self, data: bytes) -> None:
        asyncio.get_running_loop().call_soon(self.fail)

    def fail(self) -> None:
        self._transport.close()
        raise ValueError("in callback")


def in_factory() -> Echo:
    """Raises before there is a protocol."""
    raise ValueError("in factory")


async def in_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Raises when its client has said a line."""
    await reader.readline()
    raise ValueError("in streams")


async def after_its_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Raises a while after its client has gone."""
    await reader.read()
    await asyncio.sleep(0.05)
    raise ValueError("after its client")


class Exits(Echo):
    """Ends the process with the status that its client says."""

    def data_received(self, data: bytes) -> None:
        sys.exit(int(data))


async def exits_by_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same by streams."""
    sys.exit(int(await reader.readline()))


class Where(Echo):
    """Says which descriptor its connection has, whether programs inherit it, and what stands at 0; then echoes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        number = transport.get_extra_info("socket").fileno()
        self._write(f"{number} {os.get_inheritable(number)} {os.readlink('/proc/self/fd/0')}\n".encode())


async def prints(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Prints what its client says, to where a program prints."""
    print("printed:", (await reader.readline()).decode(), end="")
    print("complained", file=sys.stderr)
    writer.write(b"done\n")
