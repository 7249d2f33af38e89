"""A handler that says who its client is, as far as a proxy has told it."""

from __future__ import annotations

import asyncio
import json
import socket

DETAILS = ("peername", "authority", "unique_id", "alpn", "ssl", "ssl_version", "ssl_cipher", "ssl_verified", "nothing")
KNOWN = ("peername", "sockname", *(f"proxy_{name}" for name in DETAILS))


class Who(asyncio.Protocol):
    """Sends what is known of the client, a line of JSON, then echoes."""

    transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        known = {name: transport.get_extra_info(name) for name in KNOWN}
        transport.write(json.dumps(known, default=repr).encode() + b"\n")

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same of a streams handler, of one line."""
    line = await reader.readline()
    writer.write(f"{writer.get_extra_info('peername')[0]} {writer.get_extra_info('sockname')[0]} ".encode() + line)


def thread(sock: socket.socket, address: tuple[str, int]) -> None:
    """One that says a line, and blocks until its client has gone."""
    sock.sendall(f"{address[0]}\n".encode())
    while sock.recv(100):
        pass
