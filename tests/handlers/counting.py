"""Counts what its clients say: `LINES` a line, by its first word; another process where it is told to fork."""

from __future__ import annotations

import asyncio
import os

from forkd import metrics

LINES = metrics.Counter("test_lines_total", "Lines that have come.", ["word"])
OPEN = metrics.Gauge("test_open", "Connections that are open.")
SIZES = metrics.Histogram("test_line_bytes", "Bytes of a line.", buckets=[4, 8])


class Counting(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        OPEN.inc()

    def connection_lost(self, error: Exception | None) -> None:
        OPEN.dec()

    def data_received(self, data: bytes) -> None:
        for line in data.splitlines():
            word = line.decode(errors="surrogateescape").partition(" ")[0]
            if word == "fork":
                child = os.fork()
                if not child:
                    LINES.labels("fork").inc(100)
                    os._exit(0)
                os.waitpid(child, 0)
            LINES.labels(word).inc()
            SIZES.observe(len(line))
        self.transport.write(data)
