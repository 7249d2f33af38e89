"""What the tests of the transport share: one kit for forkd's transport and asyncio's own, so that the same tests hold
both to one contract.

A kit has a loop, connects protocols to blocking peer sockets, runs the loop until something is so, and at its end finds
that nothing was left open and no failure went unlooked at.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest

from forkd import compiled
from forkd.ended import Ended
from forkd.serve.deadlines import Deadlines, TimeoutPolicy
from forkd.serve.loop import IN, PollLoop, PollSelector, compiled_selector
from forkd.serve.stream.tls import TlsContexts, TlsHandshake, TlsHandshakes, TlsSession
from forkd.serve.stream.transport import StreamTransport, compiled_transport
from tests.support.needs import needs_compiled_twin
from tests.support.processes import DEADLINE

FAST: Any = compiled.load()[0].get("forkd.serve._fast")

#: More than the kernel holds of a connection by a socket pair.
MUCH = 4 * 1024 * 1024


class RecordingObserver:
    """Counts what a transport tells of itself, and what forkd's loop tells of failures."""

    def __init__(self) -> None:
        self.write_limit = 0
        self.listener = ""
        self.sockname: Any = None
        self.timeouts: TimeoutPolicy | None = None
        self.linger = 0.0
        self.access_log = False
        self.measure = None
        self.reasons: list[str] = []
        self.ended = 0
        self.errors = 0

    def connection_closed(self) -> None:
        """As the counters of connections tell it; `closed` counts."""

    def closed(self) -> None:
        self.ended += 1

    def failed(self) -> None:
        self.errors += 1

    def ended_early(self, error: Ended) -> None:
        self.reasons.append(error.reason)


class Calls:
    """Writes down the calls of a protocol, and lets hooks (called with the protocol and the arguments) do the rest."""

    def __init__(self, kit: Kit, /, **hooks: Callable[..., Any]) -> None:
        self.kit = kit
        self.hooks = hooks
        self.calls: list[str] = []
        self.received = bytearray()
        self.lost: list[BaseException | None] = []
        self.transport: Any = None

    def called(self, name: str, *arguments: Any) -> Any:
        self.calls.append(name)
        try:
            return self.hooks[name](self, *arguments) if name in self.hooks else None
        finally:
            self.kit.look()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.called("connection_made")

    def eof_received(self) -> Any:
        return self.called("eof_received")

    def pause_writing(self) -> None:
        self.called("pause_writing")

    def resume_writing(self) -> None:
        self.called("resume_writing")

    def connection_lost(self, error: BaseException | None) -> None:
        self.lost.append(error)
        self.called("connection_lost")


class Recorder(Calls, asyncio.Protocol):
    def data_received(self, data: bytes) -> None:
        self.received += data
        self.called("data_received", data)


class BufferedRecorder(Calls, asyncio.BufferedProtocol):
    def __init__(self, kit: Kit, size: int = 4096, /, **hooks: Callable[..., Any]) -> None:
        super().__init__(kit, **hooks)
        self.buffer = bytearray(size)

    def get_buffer(self, sizehint: int) -> Any:
        replacement = self.called("get_buffer", sizehint)
        return memoryview(self.buffer) if replacement is None else replacement

    def buffer_updated(self, count: int) -> None:
        self.received += self.buffer[:count]
        self.called("buffer_updated", count)


AnyRecorder = Recorder | BufferedRecorder
RecorderClass = type[Recorder] | type[BufferedRecorder]
SocketPair = Callable[[], tuple[socket.socket, socket.socket]]


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection over loopback TCP: the accepted one and the client's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), timeout=DEADLINE)
        return listener.accept()[0], client


def anonymous(side: int) -> ssl.SSLContext:
    """TLS without a certificate, which needs no key pair here: one of the old suites of anonymous key exchange."""
    context = ssl.SSLContext(side)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("aNULL:@SECLEVEL=0")
    return context


class AcceptingServer(FAST.Server if FAST else object):  # type: ignore[misc]  # its module has no types
    """What an acceptor has connections of a kit served by: the first one by a protocol that does nothing."""

    def __init__(self, kit: Kit, protocol: Any) -> None:
        self._kit = kit
        self._loop = kit.loop
        self.protocol = object.__new__(type(protocol))
        for name in dir(type(protocol)):
            if not name.startswith("__"):
                setattr(self.protocol, name, lambda *_: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kit.observer, name)

    def _began(self, _: int) -> None: ...

    def _factory(self) -> Any:
        return self.protocol

    def transport(self, protocol: Any, sock: socket.socket, peer: Any) -> Any:
        assert self._kit.twin is not None
        self._kit.observer.ended -= 1
        return self._kit.twin[1](self._kit.poll_loop, sock, protocol, peer, self)


@cache
def twin(kind: str) -> tuple[type[PollSelector], type[StreamTransport]]:
    """The selector and the transport of one of forkd's two twins."""
    if kind == "forkd":
        return PollSelector, StreamTransport
    needs_compiled_twin()
    return compiled_selector(FAST), compiled_transport(FAST)


class Kit:
    """A loop and connections on it (`kind`): asyncio's own, forkd's in Python, or forkd's compiled."""

    def __init__(self, kind: str, on_error: Callable[[], None] | None = None) -> None:
        self.kind = kind
        self.observer = RecordingObserver()
        self.twin = None if kind == "asyncio" else twin(kind)
        self.loop = (
            asyncio.SelectorEventLoop()
            if self.twin is None
            else PollLoop(on_error or self.observer.failed, selector=self.twin[0])
        )
        self.loop.set_exception_handler(lambda _, context: self.reported.append(context))
        self.reported: list[dict[str, Any]] = []
        self.transports: list[Any] = []
        self._sockets: list[socket.socket] = []
        self._served: list[socket.socket] = []
        self._waiting: tuple[Callable[[], bool], asyncio.Future[None]] | None = None

    @property
    def poll_loop(self) -> PollLoop:
        """The loop, which is forkd's."""
        assert isinstance(self.loop, PollLoop)
        return self.loop

    def connect(
        self,
        protocol: Any,
        pair: SocketPair | None = None,
        first: bytes = b"",
    ) -> tuple[Any, socket.socket]:
        """The protocol's transport and the peer's socket, on which `first` was sent before the protocol knew of it."""
        if self.kind == "accepted" and pair in (None, tcp_pair) and isinstance(protocol, Recorder):
            return self._accept(protocol, first)
        served, peer = self.pair(pair or socket.socketpair)
        self._served.append(served)
        peer.settimeout(DEADLINE)
        if first:  # nothing would be a packet to a socket of packets
            peer.sendall(first)
        return self.run(self._serve(protocol, served)), peer

    def _accept(self, protocol: Any, first: bytes) -> tuple[Any, socket.socket]:
        """As `connect`, by a listener, whose first connection has been another one's: that of its first is as of the
        kind `compiled`.
        """
        server, listener = AcceptingServer(self, protocol), socket.create_server(("127.0.0.1", 0))
        listening: Any = SimpleNamespace(queued=True)
        accept = FAST.Accept(listening, listener.fileno(), 0, server, lambda _: None, socket.socket)

        async def accept_one() -> None:
            accept(IN)

        with listener:
            one, peer = (socket.create_connection(listener.getsockname(), timeout=DEADLINE) for _ in range(2))
            self.run(accept_one())
            one.close()
            self.turn()
            server.protocol = protocol
            if first:
                peer.sendall(first)
            self._served.append(one)  # whose own end has a socket only when it is asked for
            self._sockets.append(peer)
            self.run(accept_one())
        self.transports.append(protocol.transport)
        return protocol.transport, peer

    def connect_with_tls(
        self, protocol: Any, contexts: TlsContexts, client: Callable[[socket.socket], Any]
    ) -> tuple[Any, socket.socket, Any]:
        """As `connect`, over TCP with TLS; and what `client` makes of the peer's socket. That is called in a
        thread, does its handshake, and has returned when the transport begins.
        """
        assert self.twin is not None
        served, peer = self.pair(tcp_pair)
        self._served.append(served)
        peer.settimeout(DEADLINE)
        name = peer.getsockname()
        session = TlsSession(contexts, served)
        shared = TlsHandshakes(self.poll_loop, Deadlines(self.poll_loop), contexts, DEADLINE)
        ended: asyncio.Future[tuple[bool, Ended | None]] = self.loop.create_future()

        async def begin() -> None:
            TlsHandshake(shared, session, served, name, lambda *how: ended.set_result(how))

        self.run(begin())
        made = self.in_thread(client, peer)
        watched, failure = self.run(ended)
        assert failure is None
        transport: Any = self.twin[1](self.poll_loop, served, protocol, name, self.observer, session)
        self.transports.append(transport)

        async def start() -> None:
            transport.start(watched=watched)

        self.run(start())
        return transport, peer, made

    def pair(
        self, pair: Callable[[], tuple[socket.socket, socket.socket]] = socket.socketpair
    ) -> tuple[socket.socket, socket.socket]:
        """Two ends of a connection, not blocking, which are closed with the kit at the latest."""
        ends = pair()
        self._sockets += ends
        for end in ends:
            end.setblocking(False)
        return ends

    async def _serve(self, protocol: Any, served: socket.socket) -> Any:
        if self.twin is not None:
            name = None
            with suppress(OSError):  # it has been reset
                name = served.getpeername()
            transport: Any = self.twin[1](self.poll_loop, served, protocol, name, self.observer)
            self.transports.append(transport)
            transport.start()
        else:
            transport, _ = await self.loop.connect_accepted_socket(lambda: protocol, served)
            self.transports.append(transport)
        return transport

    def run(self, awaitable: Any) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(awaitable, DEADLINE))

    def in_thread(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """What a blocking call returns while the loop runs on."""
        return self.run(self.loop.run_in_executor(None, call, *arguments))

    def until(self, condition: Callable[[], Any]) -> None:
        """Runs the loop until a call of a recorder's makes this true."""
        if not condition():
            self._waiting = condition, self.loop.create_future()
            self.run(self._waiting[1])

    @property
    def served(self) -> int:
        """How many connections there were."""
        return len(self._served)

    def look(self) -> None:
        if self._waiting and not self._waiting[1].done() and self._waiting[0]():
            self._waiting[1].set_result(None)

    def turn(self) -> None:
        """Runs the loop for some rounds, enough for whatever is ready to be seen to."""

        async def rounds() -> None:
            for _ in range(10):
                await asyncio.sleep(0)

        self.run(rounds())

    def on_byte(self, hook: Callable[[], Any]) -> tuple[Recorder, Callable[[], None]]:
        """A new connection whose protocol calls this when it receives, and what sends it a byte."""
        protocol = Recorder(self, data_received=lambda *_: hook())
        _, peer = self.connect(protocol)
        return protocol, lambda: peer.sendall(b"x")

    def take_reported(self) -> list[dict[str, Any]]:
        """What the loop's exception handler was told since it was asked last."""
        reported, self.reported = self.reported, []
        return reported

    def close(self) -> None:
        """Ends everything, and finds that the transports have closed their sockets."""
        try:
            for transport in self.transports:
                if transport.get_protocol() is not None:  # asyncio's own can't be aborted when it is over
                    transport.abort()
            self.turn()
            self.run(self.loop.shutdown_default_executor())
            assert [sock for sock in self._served if sock.fileno() != -1] == []
        finally:
            self.loop.close()
            for sock in self._sockets:
                sock.close()


def descriptors() -> Counter[str]:
    """What the descriptors of this process refer to, by kind."""
    found: Counter[str] = Counter()
    for name in os.listdir("/proc/self/fd"):
        try:
            found[os.readlink(f"/proc/self/fd/{name}").partition(":")[0]] += 1
        except OSError:  # the descriptor that lists the directory
            continue
    return found


def _kits(request: pytest.FixtureRequest) -> Iterator[Kit]:
    before = descriptors()
    kit = Kit(request.param)
    yield kit
    kit.close()
    assert kit.reported == [], kit.reported
    assert descriptors() == before
    if kit.kind != "asyncio":
        assert kit.poll_loop.selector.served == {}
        assert kit.observer.ended == kit.served


@pytest.fixture(name="pipe")
def watched_pipe(kit: Kit) -> Iterator[tuple[int, int]]:
    """A pipe for the loop to watch: the reading and the writing end."""
    ends = os.pipe()
    for end in ends:
        os.set_blocking(end, False)
    yield ends
    for end in ends:
        kit.loop.remove_reader(end)
        kit.loop.remove_writer(end)
        os.close(end)


kits = pytest.fixture(params=["asyncio", "forkd", "compiled", "accepted"], name="kit")(_kits)

#: For what asyncio does not promise, or does worse.
forkd_only = pytest.mark.parametrize("kit", ["forkd", "compiled", "accepted"], indirect=True)


def read_to_end(peer: socket.socket) -> bytes:
    """All that comes until end of file."""
    pieces = []
    while piece := peer.recv(1 << 20):
        pieces.append(piece)
    return b"".join(pieces)


def read_exactly(peer: socket.socket, count: int) -> bytes:
    """That many bytes, or fewer if the file ends before them."""
    pieces = []
    while count and (piece := peer.recv(count)):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
