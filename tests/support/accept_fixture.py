"""What the tests of accepting in one process share: a worker's accepting half on a real poll loop, and clients.

The other worker, which this one compares itself with, is a row of the scoreboard that the test writes.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from time import monotonic_ns

import pytest

from forkd.serve.accept.acceptor import Acceptor, ConnectionStats
from forkd.serve.accept.balance import SLACK, Balance
from forkd.serve.deadlines import Deadlines
from forkd.serve.loop import PollLoop
from forkd.serve.stream.server import ProtocolFactory, ProtocolServer, compiled_server
from forkd.serve.stream.transport import ServerContext, StreamTransport
from forkd.system.scoreboard import Field, Row, Scoreboard
from tests.support.processes import DEADLINE
from tests.support.transport_contract import FAST, twin

FAR = 3600 * 10**9  # nanoseconds


class Echo(asyncio.Protocol):
    """Greets, then echoes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"hello")

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Failing(socket.socket):
    """A listener whose accept(2) fails."""

    error = 0

    def _accept(self) -> tuple[int, object]:
        raise OSError(self.error, os.strerror(self.error))


class AcceptFixture:
    """A worker's accepting half on a loop of its own, of either twin, and clients that use the same loop.

    Attributes:
        closed: how many connections were active at each end of one that the counters told of.
    """

    def __init__(self, stack: ExitStack, compiled: bool) -> None:
        self.stack = stack
        self._server = compiled_server(FAST) if compiled else ProtocolServer
        self.loop = PollLoop(selector=twin("compiled" if compiled else "forkd")[0])
        stack.callback(self.loop.close)
        self.board = Scoreboard(4)
        stack.callback(self.board.close)
        self.row, self.other = self.new_row(), self.new_row()
        self.stats = ConnectionStats(self.row, self)
        self.balance = Balance(self.loop, self.board, self.stats)
        self.closed: list[int] = []
        self.server = self.serve_by(Echo)
        self.listener, self.acceptor = self.listen(socket.socket)

    def new_row(self) -> Row:
        row = self.board.claim()
        row[Field.PID] = os.getpid()
        row[Field.HEARTBEAT] = monotonic_ns() + FAR  # never too old for these tests
        return row

    def connection_closed(self) -> None:
        self.closed.append(self.stats.active)
        self.balance.connection_closed()

    def serve_by(self, factory: ProtocolFactory) -> ProtocolServer:
        return self._server(ServerContext(self.loop, self.stats, Deadlines(self.loop)), factory)

    def listen(self, kind: type[socket.socket]) -> tuple[socket.socket, Acceptor]:
        listener = kind(socket.AF_INET, socket.SOCK_STREAM)
        self.stack.callback(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        listener.setblocking(False)
        return listener, Acceptor(self.loop, listener, self.server, self.balance)

    def client(self, listener: socket.socket | None = None) -> socket.socket:
        """One that is connected as far as the kernel goes; no worker has accepted it yet."""
        sock = socket.create_connection((listener or self.listener).getsockname(), DEADLINE)
        self.stack.callback(sock.close)
        sock.setblocking(False)
        return sock

    def hear(self, sock: socket.socket) -> bytes:
        """What a client hears next, while the loop runs."""
        return self.loop.run_until_complete(asyncio.wait_for(self.loop.sock_recv(sock, 100), DEADLINE))

    def clients(self, count: int) -> list[socket.socket]:
        """Clients that are served."""
        made = []
        for _ in range(count):
            made.append(self.client())
            assert self.hear(made[-1]) == b"hello"
        return made

    def turn(self, sock: socket.socket) -> None:
        """Lets the loop go round, by an echo to a client that is served; a listener that waits comes before it."""
        sock.send(b"there and back")
        assert self.hear(sock) == b"there and back"

    def end(self) -> None:
        self.balance.stop()
        for ready in list(self.loop.selector.served.values()):
            owner = getattr(ready, "__self__", None)
            if isinstance(owner, StreamTransport):
                owner.abort()
        self.loop.run_until_complete(asyncio.sleep(0))


@pytest.fixture(name="accept", params=["pure", "compiled"])
def accept_fixtures(request: pytest.FixtureRequest) -> Iterator[AcceptFixture]:
    with ExitStack() as stack:
        accept = AcceptFixture(stack, request.param == "compiled")
        try:
            yield accept
        finally:
            accept.end()


def overtake(accept: AcceptFixture) -> list[socket.socket]:
    """Serves more clients than it should while the other has none; a further one waits, the last of those returned."""
    accept.balance.start([accept.acceptor])
    accept.other[Field.LOAD] = 0
    clients = accept.clients(SLACK)
    assert accept.acceptor.queued
    clients += accept.clients(1)
    assert not accept.acceptor.queued
    clients.append(accept.client())
    accept.turn(clients[0])
    assert accept.stats.accepted == SLACK + 1
    return clients
