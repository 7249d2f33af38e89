"""Serves ranges of the file `payload` in the working directory: a line `START LENGTH` asks, the bytes answer."""

from __future__ import annotations

import asyncio
import mmap
import socket

SLICE = 64 * 1024

with open("payload", "rb") as file:
    PAYLOAD = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


class Ranges(asyncio.Protocol):
    """One client; it reads as fast as it likes, since nothing is written while it does not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        # A thousand buffers as large as the kernel lets them grow would be gigabytes.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * SLICE)
        self.transport = transport
        self.asked = b""
        self.place = self.end = 0
        self.paused = False

    def data_received(self, data: bytes) -> None:
        self.asked += data
        if self.place == self.end and b"\n" in self.asked:
            line, _, self.asked = self.asked.partition(b"\n")
            self.place, length = map(int, line.split())
            self.end = self.place + length
            self.send()

    def send(self) -> None:
        """Sends until the client has its range, or does not keep up."""
        while self.place < self.end and not self.paused:
            piece = PAYLOAD[self.place : min(self.end, self.place + SLICE)]
            self.place += len(piece)
            self.transport.write(piece)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.send()
