"""Handlers that call sys.exit() where their client says, beside an echo."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from forkd.builtin import Echo


async def _exit_later() -> None:
    await asyncio.sleep(0)
    sys.exit(3)


class Exits(Echo):
    """Exits at `callback`, `task`, `soon` or `later`, or in a child at `child`; echoes anything else."""

    def data_received(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        match data:
            case b"callback":
                sys.exit(3)
            case b"interrupt":
                raise KeyboardInterrupt
            case b"task":
                self.task = loop.create_task(_exit_later())
            case b"soon":
                loop.call_soon(sys.exit, "by text")
            case b"later":
                loop.call_later(0.01, sys.exit)
            case b"child":
                if (child := os.fork()) == 0:
                    sys.exit(5)
                self._write(b"%d" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            case _:
                self._write(data)


async def by_streams(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Exits at `streams`, echoes anything else."""
    while data := await reader.read(100):
        if data == b"streams":
            sys.exit(3)
        writer.write(data)


class Grams(asyncio.DatagramProtocol):
    """Exits at `exit`, echoes anything else."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def datagram_received(self, data: bytes, address: Any) -> None:
        if data == b"exit":
            sys.exit(3)
        self.transport.sendto(data, address)
