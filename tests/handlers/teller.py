"""An echo that first tells which process serves."""

from __future__ import annotations

import asyncio
import os

from forkd.builtin import Echo


class Teller(Echo):
    """Says its pid in seven digits and a line feed, then echoes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._write(b"%07d\n" % os.getpid())
