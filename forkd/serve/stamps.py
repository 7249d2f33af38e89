"""Notes when data comes and goes on a unix socket, of which the kernel does not know; a TCP connection needs none."""

from __future__ import annotations

import socket
from time import monotonic

Buffer = bytes | bytearray | memoryview


class Stamps:
    """What calls that read and write note, for a socket of which the kernel tells nothing."""

    __slots__ = ("_recv", "_send", "bytes_in", "bytes_out", "heard", "told")

    def __init__(self, sock: socket.socket, opened: float) -> None:
        self._recv, self._send = sock.recv, sock.send
        self.heard = self.told = opened
        self.bytes_in = self.bytes_out = 0

    def recv(self, size: int) -> bytes:
        """As the socket's."""
        data = self._recv(size)
        self.note_in(len(data))
        return data

    def send(self, data: Buffer) -> int:
        """As the socket's."""
        sent = self._send(data)
        self.note_out(sent)
        return sent

    def note_in(self, count: int) -> None:
        """So many bytes have come."""
        if count:
            self.bytes_in += count
            self.heard = monotonic()

    def note_out(self, count: int) -> None:
        """So many bytes have gone."""
        if count:
            self.bytes_out += count
            self.told = monotonic()
