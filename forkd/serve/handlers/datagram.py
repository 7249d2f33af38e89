"""Hosts handlers that are an `asyncio.DatagramProtocol` class or factory: one protocol and one transport a socket."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from forkd.serve.datagram import DatagramTransport
from forkd.serve.loop import PollLoop

DatagramFactory = Callable[[], asyncio.DatagramProtocol]


class DatagramServer:
    """Serves the sockets of one listener.

    Args:
        loop: the process's loop.
        factory: makes a protocol.
        cells: the row of the scoreboard that datagrams are counted on.
        write_limit: bytes of unsent datagrams that each keeps at most.
        listener: what the log calls it.
        on_lost: told of each transport that is closed.
    """

    def __init__(
        self,
        loop: PollLoop,
        factory: DatagramFactory,
        cells: memoryview,
        write_limit: int,
        listener: str,
        on_lost: Callable[[DatagramTransport], None],
    ) -> None:
        self._loop = loop
        self._factory = factory
        self.cells = cells
        self.write_limit = write_limit
        self.listener = listener
        self.lost = on_lost

    def serve(self, sock: socket.socket, **more: Any) -> DatagramTransport:
        """Serves one socket, and owns it; `more` as of `DatagramTransport`. Raises what the handler raises."""
        sock.setblocking(False)
        transport = DatagramTransport(self._loop, sock, self._factory(), self, **more)
        transport.start()
        return transport
