"""Senders of more than a client may want: one that stops at pause_writing, and one that does not."""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger("flood")

PIECE = bytes(64 * 1024)
PIECES = 2048


class Considerate(asyncio.Protocol):
    """Sends without end while it may, and logs when it may not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.paused = False
        self.go_on()

    def go_on(self) -> None:
        """Sends a piece, and the next one when others have had their turn."""
        if not self.paused and not self.transport.is_closing():
            self.transport.write(PIECE)
            asyncio.get_running_loop().call_soon(self.go_on)

    def pause_writing(self) -> None:
        log.info("paused with %d bytes unsent", self.transport.get_write_buffer_size())
        self.paused = True

    def resume_writing(self) -> None:
        log.info("resumed")
        self.paused = False
        self.go_on()


class Unstoppable(asyncio.Protocol):
    """Sends 128 MiB, whether the client reads them or not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        for _ in range(PIECES):
            transport.write(PIECE)

    def connection_lost(self, error: Exception | None) -> None:
        log.info("lost it by %s", type(error).__name__)
