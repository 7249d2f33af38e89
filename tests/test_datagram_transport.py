"""The transport of datagrams: one contract, which asyncio's own transport and forkd's are held to by the same tests;
and what forkd's has beside it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from clients import datagram_client

from forkd.serve import datagram_sending
from forkd.serve.datagram import BATCH, DatagramTransport
from forkd.serve.loop import PollLoop
from forkd.serve.recent import MOST_PEERS
from forkd.system.scoreboard import Field, Row

DEADLINE = 20.0


class Recorder(asyncio.DatagramProtocol):
    """Writes down what it is told; hooks, called with it and the arguments, do the rest."""

    def __init__(self, kit: Kit, hooks: dict[str, Callable[..., Any]]) -> None:
        self.kit, self.hooks = kit, hooks
        self.transport: Any = None
        self.calls: list[str] = []
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.lost: list[BaseException | None] = []

    def _called(self, name: str, *arguments: Any) -> None:
        self.calls.append(name)
        try:
            if name in self.hooks:
                self.hooks[name](self, *arguments)
        finally:
            self.kit.look()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self._called("connection_made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))
        self._called("datagram_received", data, addr)

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)
        self._called("error_received", exc)

    def pause_writing(self) -> None:
        self._called("pause_writing")

    def resume_writing(self) -> None:
        self._called("resume_writing")

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.append(exc)
        self._called("connection_lost", exc)

    def shutdown(self) -> None:
        self._called("shutdown")


class Kit:
    """A loop, transports on it, and clients of theirs."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.loop = PollLoop()
        self.row = Row.of_nobody()
        self.cells = self.row.cells
        self.write_limit, self.listener = 0, "udp://test"
        self.ended = 0
        self.failures: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.failures.append(context))
        self.wanted: Callable[[], Any] | None = None
        self.sockets: list[socket.socket] = []
        self.transports: list[Any] = []

    def lost(self, transport: Any) -> None:
        self.ended += 1

    def bind(self, family: int = socket.AF_INET, host: str = "127.0.0.1") -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sockets.append(sock)
        sock.bind("" if family == socket.AF_UNIX else (host, 0))
        sock.setblocking(False)
        return sock

    def serve(self, sock: socket.socket | None = None, more: dict[str, Any] | None = None, **hooks: Any) -> Recorder:
        sock = sock or self.bind()
        protocol = Recorder(self, hooks)
        if self.kind == "asyncio":
            self.loop.run_until_complete(self.loop.create_datagram_endpoint(lambda: protocol, sock=sock))
        else:
            DatagramTransport(self.loop, sock, protocol, self, **(more or {})).start()
        self.transports.append(protocol.transport)
        return protocol

    def client(self, server: Recorder) -> socket.socket:
        name = server.transport.get_extra_info("sockname")
        sock = socket.socket(socket.AF_UNIX if isinstance(name, bytes) else socket.AF_INET, socket.SOCK_DGRAM)
        self.sockets.append(sock)
        sock.settimeout(DEADLINE)
        sock.bind("" if isinstance(name, bytes) else ("127.0.0.1", 0))
        sock.connect(name)
        return sock

    def look(self) -> None:
        if self.wanted is not None and self.wanted():
            self.loop.stop()

    def until(self, condition: Callable[[], Any]) -> None:
        """Runs the loop until something is so."""
        self.wanted = condition
        timer = self.loop.call_later(DEADLINE, self.loop.stop)
        if not condition():
            self.loop.run_forever()
        timer.cancel()
        self.wanted = None
        assert condition()

    def turn(self) -> None:
        self.loop.run_until_complete(asyncio.sleep(0))

    def close(self) -> None:
        for transport in self.transports:
            transport.abort()
        self.turn()
        for sock in self.sockets:
            sock.close()
        self.loop.close()


@pytest.fixture(params=["forkd", "asyncio"])
def kit(request: pytest.FixtureRequest) -> Iterator[Kit]:
    made = Kit(request.param)
    yield made
    made.close()


@pytest.fixture
def ours() -> Iterator[Kit]:
    made = Kit("forkd")
    yield made
    made.close()


def echo(protocol: Recorder, data: bytes, addr: Any) -> None:
    protocol.transport.sendto(data, addr)


# One contract


def test_datagrams_come_with_their_sender_and_are_answered(kit: Kit) -> None:
    server = kit.serve(datagram_received=echo)
    client = kit.client(server)
    for data in (b"one", b"two" * 1000):
        client.send(data)
    kit.until(lambda: len(server.received) == 2)
    assert server.received == [(b"one", client.getsockname()), (b"two" * 1000, client.getsockname())]
    assert [client.recv(9000), client.recv(9000)] == [b"one", b"two" * 1000]
    assert server.calls == ["connection_made", "datagram_received", "datagram_received"]


def test_an_empty_datagram_is_one(kit: Kit) -> None:
    server = kit.serve()
    kit.client(server).send(b"")
    kit.until(lambda: server.received)
    assert server.received[0][0] == b""


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_can_be_sent_and_nothing_else(kit: Kit, kind: Any) -> None:
    server = kit.serve()
    client = kit.client(server)
    server.transport.sendto(kind(b"data"), client.getsockname())
    assert client.recv(100) == b"data"
    with pytest.raises(TypeError):
        server.transport.sendto("data", client.getsockname())


def test_what_can_not_be_sent_is_told_to_the_protocol(kit: Kit) -> None:
    server = kit.serve()
    server.transport.sendto(bytes(70_000), kit.client(server).getsockname())
    assert [error.strerror for error in server.errors if isinstance(error, OSError)] == ["Message too long"]
    assert not server.transport.is_closing()


def test_what_is_known_of_it(kit: Kit) -> None:
    sock = kit.bind()
    transport = kit.serve(sock).transport
    assert kit.kind == "asyncio" or isinstance(transport, asyncio.DatagramTransport)
    assert transport.get_extra_info("sockname") == sock.getsockname()
    assert transport.get_extra_info("peername") is None
    assert transport.get_extra_info("socket").fileno() == sock.fileno()
    assert transport.get_extra_info("nothing", 7) == 7
    assert transport.get_write_buffer_size() == 0


def test_another_protocol_can_be_put_in_charge(kit: Kit) -> None:
    server = kit.serve()
    second = Recorder(kit, {})
    server.transport.set_protocol(second)
    assert server.transport.get_protocol() is second
    kit.client(server).send(b"x")
    kit.until(lambda: second.received)
    assert server.received == []


@pytest.mark.parametrize("how", ["close", "abort"])
def test_the_end_is_told_once_and_later(kit: Kit, how: str) -> None:
    server = kit.serve()
    getattr(server.transport, how)()
    getattr(server.transport, how)()
    assert server.transport.is_closing()
    assert server.lost == []
    kit.until(lambda: server.lost)
    kit.turn()
    assert server.lost == [None]


def test_nothing_is_received_after_the_handler_has_closed_it(kit: Kit) -> None:
    server = kit.serve(datagram_received=lambda protocol, *_: protocol.transport.close())
    client = kit.client(server)
    for _ in range(3):
        client.send(b"x")
    kit.until(lambda: server.lost)
    assert len(server.received) == 1


def test_what_a_handler_raises_is_reported_and_ends_nothing(kit: Kit) -> None:
    def fail(protocol: Recorder, data: bytes, addr: Any) -> None:
        raise ValueError(data)

    server = kit.serve(datagram_received=fail)
    client = kit.client(server)
    client.send(b"a")
    client.send(b"b")
    kit.until(lambda: len(server.received) == 2)
    kit.turn()
    assert [str(context["exception"]) for context in kit.failures] == ["b'a'", "b'b'"]
    assert not server.transport.is_closing()


# What forkd's has beside it


def fill(server: Recorder, client: socket.socket, more: int) -> int:
    """Sends a unix client that reads nothing as much as is taken for it, and then so many; how many in all."""
    count = 0
    while server.transport.get_write_buffer_size() == 0:
        server.transport.sendto(b"%d" % count, client.getsockname())
        count += 1
    for number in range(count, count + more):
        server.transport.sendto(b"%d" % number, client.getsockname())
    return count + more


def read_until(kit: Kit, client: socket.socket, condition: Callable[[], Any]) -> list[int]:
    """Has a client read whenever there is something, until something is so; what it read."""
    client.setblocking(False)
    received: list[int] = []

    def ready() -> None:
        received.append(int(client.recv(100)))
        kit.look()

    kit.loop.add_reader(client, ready)
    kit.until(condition)
    kit.loop.remove_reader(client)
    return received


def test_what_the_peer_does_not_take_now_is_sent_later_in_its_order(ours: Kit) -> None:
    server = ours.serve(ours.bind(socket.AF_UNIX))
    # Not connected to it: of such a one the queue's length counts, else what the server has under way altogether.
    slow, quick = ours.bind(socket.AF_UNIX), ours.client(server)
    count = fill(server, slow, 30)
    server.transport.sendto(b"hello", quick.getsockname())
    assert quick.recv(100) == b"hello"  # one that does not read holds up no other
    received = read_until(ours, slow, lambda: server.transport.get_write_buffer_size() == 0)
    slow.setblocking(False)
    while len(received) < count:
        received.append(int(slow.recv(100)))
    assert received == [*range(count)]
    assert server.errors == []


def test_what_waits_is_bounded_and_what_is_dropped_is_counted(ours: Kit) -> None:
    server = ours.serve(ours.bind(socket.AF_UNIX))
    fill(server, ours.client(server), 500)
    assert ours.row[Field.DATAGRAMS_DROPPED] == 501 - datagram_sending.MOST_OF_PEER
    server.transport.abort()
    ours.until(lambda: server.lost)


def test_a_close_sends_first_what_is_unsent(ours: Kit) -> None:
    server = ours.serve(ours.bind(socket.AF_UNIX))
    client = ours.client(server)
    count = fill(server, client, 20)
    server.transport.close()
    server.transport.sendto(b"late", client.getsockname())
    received = read_until(ours, client, lambda: server.lost)
    while len(received) < count:
        received.append(int(client.recv(100)))
    assert received == [*range(count)]
    with pytest.raises(BlockingIOError):
        client.recv(100)


def test_the_handler_is_told_to_pause_and_to_resume(ours: Kit) -> None:
    server = ours.serve(ours.bind(socket.AF_UNIX))
    server.transport.set_write_buffer_limits(high=500, low=100)
    client = ours.client(server)
    fill(server, client, 40)
    assert server.calls == ["connection_made", "pause_writing"]
    read_until(ours, client, lambda: "resume_writing" in server.calls)


def test_one_wake_up_takes_a_bounded_batch(ours: Kit) -> None:
    rounds: list[int] = []
    server = ours.serve(datagram_received=lambda *_: rounds.append(len(seen)))
    seen: list[None] = []

    def turn() -> None:
        seen.append(None)
        ours.loop.call_soon(turn)

    client = ours.client(server)
    for _ in range(BATCH + 10):
        client.send(b"x")
    turn()
    ours.until(lambda: len(server.received) == BATCH + 10)
    assert rounds.count(rounds[0]) == BATCH


def test_an_empty_datagram_can_be_sent(ours: Kit) -> None:
    server = ours.serve()
    client = ours.client(server)
    server.transport.sendto(b"", client.getsockname())
    assert client.recv(100) == b""


def test_a_datagram_that_is_cut_off_is_dropped(ours: Kit, caplog: pytest.LogCaptureFixture) -> None:
    server = ours.serve(ours.bind(socket.AF_UNIX))
    client = ours.client(server)
    client.setsockopt(socket.SOL_SOCKET, getattr(socket, "SO_SNDBUFFORCE", 32), 1 << 21)
    client.send(bytes(300_000))
    client.send(b"whole")
    ours.until(lambda: server.received)
    assert [data for data, _ in server.received] == [b"whole"]
    server.transport.beat()
    assert "dropped 1 datagrams" in caplog.text


def test_recent_peers_are_known_with_their_counts(ours: Kit) -> None:
    server = ours.serve(datagram_received=echo)
    first, second = ours.client(server), ours.client(server)
    for sock in (first, first, second):
        sock.send(b"x")
    ours.until(lambda: len(server.received) == 3)
    ours.turn()
    found = {one.peer: (one.received, one.sent) for one in server.transport.recent()}
    assert found == {first.getsockname(): (2, 2), second.getsockname(): (1, 1)}
    assert (ours.row[Field.DATAGRAMS_RECEIVED], ours.row[Field.DATAGRAMS_SENT]) == (3, 3)
    assert all(one.first <= one.last <= ours.loop.time() for one in server.transport.recent())


def test_recent_peers_are_bounded(ours: Kit) -> None:
    server = ours.serve()
    recent = server.transport._recent
    recent.heard.extend(("10.0.0.1", port) for port in range(2 * MOST_PEERS))
    found = server.transport.recent()
    assert [one.peer[1] for one in found] == [*range(MOST_PEERS, 2 * MOST_PEERS)]


def test_only_those_who_are_admitted_are_heard(ours: Kit) -> None:
    admitted: list[Any] = []
    server = ours.serve(more={"admit": lambda peer: peer in admitted})
    stranger, friend = ours.client(server), ours.client(server)
    admitted.append(friend.getsockname())
    stranger.send(b"let me in")
    friend.send(b"hello")
    ours.until(lambda: server.received)
    assert server.received == [(b"hello", friend.getsockname())]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_an_answer_to_a_proxys_client_goes_by_the_proxy(ours: Kit, host: str) -> None:
    client = ("192.0.2.7", 4000)

    def unwrap(data: bytes, peer: Any) -> tuple[bytes, Any, Any] | None:
        return (data[5:], client, None) if data.startswith(b"PROXY") else None

    server = ours.serve(ours.bind(host=host), {"unwrap": unwrap}, datagram_received=echo)
    proxy = ours.client(server)
    proxy.send(b"no header")
    proxy.send(b"PROXYhello")
    ours.until(lambda: server.received)
    assert server.received == [(b"hello", client)]
    assert proxy.recv(100) == b"hello"


def test_a_connected_one_hears_its_peer_alone_and_of_its_end(ours: Kit) -> None:
    sock = ours.bind()
    peer, stranger = (datagram_client(f"udp://127.0.0.1:{sock.getsockname()[1]}") for _ in range(2))
    ours.sockets += [peer, stranger]
    stranger.send(b"stranger")
    peer.send(b"peer")
    sock.connect(peer.getsockname())
    server = ours.serve(
        sock, {"peer": peer.getsockname()}, datagram_received=lambda one, *_: one.transport.sendto(b"x")
    )
    ours.until(lambda: server.received)
    assert server.received == [(b"peer", peer.getsockname())]
    assert server.transport.get_extra_info("peername") == peer.getsockname()
    assert peer.recv(100) == b"x"
    with pytest.raises(ValueError, match="Invalid address"):
        server.transport.sendto(b"x", stranger.getsockname())
    peer.close()
    server.transport.sendto(b"x")
    ours.until(lambda: server.errors)
    assert isinstance(server.errors[0], ConnectionRefusedError)


def test_it_finishes_with_what_lies_in_the_queue(ours: Kit) -> None:
    done: list[list[str]] = []
    server = ours.serve()
    client = ours.client(server)
    for _ in range(3 * BATCH):
        client.send(b"x")
    server.transport.finish(lambda: (done.append(server.calls[:]), ours.look()))
    ours.until(lambda: done)
    assert done[0].count("datagram_received") == 3 * BATCH
    assert done[0][-1] == "shutdown"
    client.send(b"not for this one")
    ours.turn()
    server.transport.sendto(b"still there", client.getsockname())
    assert client.recv(100) == b"still there"
    assert len(server.received) == 3 * BATCH


def test_a_late_answer_leaves_from_where_the_request_came_to(ours: Kit) -> None:
    server = ours.serve(ours.bind(host="0.0.0.0"))
    port = server.transport.get_extra_info("sockname")[1]
    clients = [datagram_client(f"udp://{host}:{port}") for host in ("127.0.0.2", "127.0.0.3")]
    ours.sockets += clients
    for client in clients:
        client.send(b"x")
    ours.until(lambda: len(server.received) == 2)
    for _, peer in server.received:
        server.transport.sendto(b"late", peer)
    assert [client.recv(100) for client in clients] == [b"late", b"late"]


def test_who_is_asked_from_an_ipv6_address_is_answered_from_it(ours: Kit) -> None:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    ours.sockets.append(sock)
    sock.bind(("::", 0))
    sock.setblocking(False)
    server = ours.serve(sock, datagram_received=echo)
    client = datagram_client(f"udp://[::1]:{sock.getsockname()[1]}")
    ours.sockets.append(client)
    client.send(b"x")
    ours.until(lambda: server.received)
    assert client.recv(100) == b"x"
    ((_, origin),) = server.transport._origins._known.values()
    assert origin == [
        (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", socket.inet_pton(socket.AF_INET6, "::1"), 0))
    ]
