"""A pre-forked echo on asyncio or uvloop, for `compare`: peer.py asyncio|uvloop WORKERS PORT."""

from __future__ import annotations

import asyncio
import os
import socket
import sys


class Echo(asyncio.Protocol):
    """What forkd's built-in echo does."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keeps the transport."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Sends it back."""
        self.transport.write(data)


async def serve(listener: socket.socket) -> None:
    """Serves for ever."""
    server = await asyncio.get_running_loop().create_server(Echo, sock=listener)
    await server.serve_forever()


def main(kind: str, workers: int, port: int) -> None:
    """Forks, then serves in each process."""
    listener = socket.create_server(("127.0.0.1", port), backlog=4096)
    for _ in range(workers - 1):
        if os.fork() == 0:
            break
    if kind == "uvloop":
        import uvloop  # noqa: PLC0415

        uvloop.run(serve(listener))
    else:
        asyncio.run(serve(listener))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
