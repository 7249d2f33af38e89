"""Echoes with faults that a client calls up by what it sends."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

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


_calls = itertools.count()


def nothing_first() -> Any:
    """No protocol at first, then an echo."""
    return Echo() if next(_calls) else None


def misfit_first() -> asyncio.BaseProtocol:
    """A protocol that is not for connections at first, then an echo."""
    return Echo() if next(_calls) else asyncio.SubprocessProtocol()


class ClosesItself(Echo):
    """On `close` it closes its socket behind its transport's back, and the transport a moment later."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if data == b"close":
            self.transport.get_extra_info("socket")._sock.close()
            asyncio.get_running_loop().call_later(0.1, self.transport.abort)
        else:
            super().data_received(data)
