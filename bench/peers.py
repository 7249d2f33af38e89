"""Pre-forked echoes on other libraries, each as its documentation has it: peers.py NAME SHAPE WORKERS PORT.

SHAPE is stream, coroutine or datagram. Streams: all workers accept from one listener. Datagrams: each worker has a
socket of its own (SO_REUSEPORT).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import socketserver
import sys
from collections.abc import Callable
from typing import Any

from forkd.builtin import DatagramEcho, Echo

PR_SET_PDEATHSIG = 1


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The same as a coroutine."""
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def serve(shape: str, sock: socket.socket, *, aiofastnet: bool = False) -> None:
    """Serves for ever on a loop of asyncio's kind."""
    loop = asyncio.get_running_loop()
    if shape == "datagram":
        await loop.create_datagram_endpoint(DatagramEcho, sock=sock)
    elif aiofastnet:
        import aiofastnet as fast  # noqa: PLC0415

        await fast.create_server(loop, Echo, sock=sock, backlog=4096)
    elif shape == "coroutine":
        await asyncio.start_server(echo, sock=sock, backlog=4096)
    else:
        await loop.create_server(Echo, sock=sock, backlog=4096)
    await asyncio.Event().wait()


def on_asyncio(shape: str, sock: socket.socket) -> None:
    """asyncio."""
    asyncio.run(serve(shape, sock))


def on_uvloop(shape: str, sock: socket.socket) -> None:
    """uvloop."""
    import uvloop  # noqa: PLC0415

    uvloop.run(serve(shape, sock))


def on_aiofastnet(shape: str, sock: socket.socket) -> None:
    """aiofastnet's transports on uvloop."""
    import uvloop  # noqa: PLC0415

    uvloop.run(serve(shape, sock, aiofastnet=True))


def on_gevent(_: str, sock: socket.socket) -> None:
    """gevent's StreamServer."""
    from gevent.server import StreamServer  # noqa: PLC0415
    from gevent.socket import socket as cooperative  # noqa: PLC0415

    def handle(client: Any, _: Any) -> None:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(ConnectionError):
            while data := client.recv(65536):
                client.sendall(data)

    StreamServer(cooperative(fileno=sock.detach()), handle).serve_forever()


def on_tornado(_: str, sock: socket.socket) -> None:
    """tornado's TCPServer."""
    from tornado.iostream import StreamClosedError  # noqa: PLC0415
    from tornado.tcpserver import TCPServer  # noqa: PLC0415

    class Server(TCPServer):
        async def handle_stream(self, stream: Any, address: Any) -> None:
            stream.set_nodelay(True)
            with contextlib.suppress(StreamClosedError):
                while True:
                    await stream.write(await stream.read_bytes(65536, partial=True))

    async def main() -> None:
        sock.setblocking(False)
        Server().add_sockets([sock])
        await asyncio.Event().wait()

    asyncio.run(main())


def on_twisted(_: str, sock: socket.socket) -> None:
    """twisted, by adoptStreamPort."""
    from twisted.internet import protocol, reactor  # noqa: PLC0415

    class Echoing(protocol.Protocol):
        transport: Any

        def connectionMade(self) -> None:
            self.transport.setTcpNoDelay(True)

        def dataReceived(self, data: bytes) -> None:
            self.transport.write(data)

    sock.setblocking(False)
    adopting: Any = reactor
    adopting.adoptStreamPort(sock.fileno(), socket.AF_INET, protocol.Factory.forProtocol(Echoing))
    adopting.run()


def on_socketserver(_: str, sock: socket.socket) -> None:
    """socketserver, a thread for each client."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(ConnectionError):
                while data := self.request.recv(65536):
                    self.request.sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    server = Server(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = sock
    sock.setblocking(False)
    server.serve_forever()


PEERS: dict[str, Callable[[str, socket.socket], None]] = {
    "asyncio": on_asyncio,
    "uvloop": on_uvloop,
    "uvloop + aiofastnet": on_aiofastnet,
    "gevent": on_gevent,
    "tornado": on_tornado,
    "twisted": on_twisted,
    "socketserver": on_socketserver,
}


def listen(shape: str, port: int) -> socket.socket:
    """What a worker serves."""
    if shape != "datagram":
        return socket.create_server(("127.0.0.1", port), backlog=4096)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def main(name: str, shape: str, workers: int, port: int) -> None:
    """Forks, and serves in each child."""
    listener = None if shape == "datagram" else listen(shape, port)
    for _ in range(workers):
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            PEERS[name](shape, listener or listen(shape, port))
            os._exit(0)
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
