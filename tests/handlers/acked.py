"""A handler that speaks to one client at the word of another, and logs what becomes of what it has said."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, ClassVar

log = logging.getLogger("acked")


class Acked(asyncio.Protocol):
    """Each client gives itself a name; `speak NAME BYTES` sends as many to that one, `pause NAME` stops reading it."""

    known: ClassVar[dict[str, Acked]] = {}
    tasks: ClassVar[set[asyncio.Task[None]]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.name = ""

    def data_received(self, data: bytes) -> None:
        match data.decode().split():
            case ["speak", name, count]:
                self.tasks.add(asyncio.ensure_future(self.known[name].speak(int(count))))
            case ["pause", name]:
                self.known[name].transport.pause_reading()
            case [name]:
                self.name = name
                self.known[name] = self
        self.transport.write(b"ok\n")

    async def speak(self, count: int) -> None:
        """Sends, and waits with and without a deadline."""
        self.transport.write(bytes(count))
        try:
            try:
                await self.transport.wait_acked(0.5)
            except TimeoutError as error:
                log.info("%s: %s", self.name, error)
                await self.transport.wait_acked()
        except ConnectionError as error:
            log.info("%s: lost by %s", self.name, type(error).__name__)
        else:
            log.info("%s: has it", self.name)

    def connection_lost(self, error: Exception | None) -> None:
        log.info("%s: its connection was lost by %s", self.name or "unnamed", type(error).__name__)
