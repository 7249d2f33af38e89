"""Logs counted lines, one after the other, until its client has had enough."""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger("chatty")


class Chatty(asyncio.Protocol):
    """Names the client's port in each line; ends when the client sends something, and tells how many lines it were."""

    count = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.port = transport.get_extra_info("peername")[1]
        self.go_on()

    def go_on(self) -> None:
        """One line more, and the next one soon."""
        if not self.transport.is_closing():
            self.count += 1
            log.info("port %d line %d", self.port, self.count)
            self.timer = asyncio.get_running_loop().call_later(0.001, self.go_on)

    def data_received(self, data: bytes) -> None:
        self.timer.cancel()
        self.transport.write(b"%d\n" % self.count)

    def connection_lost(self, error: Exception | None) -> None:
        self.timer.cancel()
