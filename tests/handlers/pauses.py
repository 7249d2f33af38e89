"""A handler that stops reading at its client's word, for good or until it has answered."""

from __future__ import annotations

import asyncio
import logging

log = logging.getLogger("pauses")


class Pauses(asyncio.Protocol):
    """Pauses; after `answer later` it answers when the end of file is there, or a moment is over, and reads on."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.pause_reading()
        self.transport.write(b"paused\n")
        if data == b"answer later\n":
            asyncio.get_running_loop().call_later(0.2, self._answer)

    def _answer(self) -> None:
        self.transport.write(b"answer\n")
        self.transport.resume_reading()

    def eof_received(self) -> None:
        log.info("told of the end of file")

    def connection_lost(self, error: Exception | None) -> None:
        log.info("lost it by %s", type(error).__name__)
