"""The transport of datagrams: one contract, which asyncio's own transport and forkd's are held to by the same tests;
and what forkd's has beside it.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest

from forkd.compiled import load
from forkd.errors import ForkdError
from forkd.serve.datagram import peers, pktinfo
from forkd.serve.datagram import transport as datagram
from forkd.serve.datagram.peers import MOST_PEERS, RecentPeers, UnreadAnswers
from forkd.serve.datagram.pktinfo import Ancillary, ReplyRoutes, enable_pktinfo
from forkd.serve.datagram.transport import BATCH, MOST_OF_PEER, DatagramContext, DatagramTransport
from forkd.serve.loop import IN, PollLoop
from forkd.system.scoreboard import Field, Row
from forkd.system.socket_stats import unacknowledged_bytes
from tests.support.clients import datagram_client
from tests.support.needs import needs_compiled_twin
from tests.support.network_namespaces import private_network
from tests.support.processes import DEADLINE

EXTENSION = "forkd.serve.datagram._fast"


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

    def __init__(self, is_asyncio: bool = False) -> None:
        self.is_asyncio = is_asyncio
        self.loop = PollLoop()
        self.row = Row.unshared()
        self.drained: list[DatagramTransport] = []
        self.context = DatagramContext(
            self.loop, self.row.cells, "udp://test", on_drained=self.on_drained, on_closed=lambda _: None
        )
        self.failures: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda loop, context: self.failures.append(context))
        self.wanted: Callable[[], Any] | None = None
        self.sockets: list[socket.socket] = []
        self.transports: list[Any] = []

    def on_drained(self, transport: DatagramTransport) -> None:
        self.drained.append(transport)
        self.look()

    def bind(self, family: int = socket.AF_INET, host: str = "127.0.0.1") -> socket.socket:
        sock = socket.socket(family, socket.SOCK_DGRAM)
        self.sockets.append(sock)
        sock.bind("" if family == socket.AF_UNIX else (host, 0))
        sock.setblocking(False)
        return sock

    def serve(
        self,
        sock: socket.socket | None = None,
        more: dict[str, Any] | None = None,
        peer: tuple[str, int] | None = None,
        **hooks: Any,
    ) -> Recorder:
        """Serves a socket, with `more` in the context, by a recorder with these hooks."""
        sock = sock or self.bind()
        protocol = Recorder(self, hooks)
        if self.is_asyncio:
            self.loop.run_until_complete(self.loop.create_datagram_endpoint(lambda: protocol, sock=sock))
        else:
            DatagramTransport(sock, protocol, replace(self.context, **(more or {})), peer).start()
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


def choose_twin(twin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has transports take this twin of what is called for each datagram, `compiled` or `pure`."""
    if twin == "compiled":
        needs_compiled_twin()
    monkeypatch.setattr(datagram, "fast", load()[0][EXTENSION] if twin == "compiled" else None)


@pytest.fixture(params=["compiled", "pure", "asyncio"])
def kit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    choose_twin(request.param, monkeypatch)
    made = Kit(is_asyncio=request.param == "asyncio")
    yield made
    made.close()


@pytest.fixture(params=["compiled", "pure"])
def ours(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kit]:
    choose_twin(request.param, monkeypatch)
    made = Kit()
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


@pytest.mark.parametrize(
    "kit", ["compiled", "pure"], indirect=True
)  # asyncio's own ends the transport where bytes have gaps
@pytest.mark.parametrize("view", [memoryview(b"abcd")[::2], memoryview(b"abcd").cast("B", (2, 2)), memoryview(b"ac")])
def test_odd_view_is_a_datagram_of_its_bytes(kit: Kit, view: memoryview) -> None:
    server = kit.serve()
    client = kit.client(server)
    server.transport.sendto(view, client.getsockname())
    assert client.recv(100) == view.tobytes()


def test_protocol_is_told_what_can_not_be_sent(kit: Kit) -> None:
    server = kit.serve()
    server.transport.sendto(bytes(70_000), kit.client(server).getsockname())
    assert [error.strerror for error in server.errors if isinstance(error, OSError)] == ["Message too long"]
    assert not server.transport.is_closing()


def test_extra_info_tells_what_is_known_of_the_socket(kit: Kit) -> None:
    sock = kit.bind()
    transport = kit.serve(sock).transport
    assert kit.is_asyncio or isinstance(transport, asyncio.DatagramTransport)
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


def test_transport_receives_nothing_after_its_handler_closed_it(kit: Kit) -> None:
    server = kit.serve(datagram_received=lambda protocol, *_: protocol.transport.close())
    client = kit.client(server)
    for _ in range(3):
        client.send(b"x")
    kit.until(lambda: server.lost)
    assert len(server.received) == 1


def test_exception_of_a_handler_is_reported_and_ends_nothing(kit: Kit) -> None:
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


def test_datagrams_not_taken_now_are_sent_later_in_order(ours: Kit) -> None:
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


def test_unsent_datagrams_are_bounded_and_drops_are_counted(ours: Kit) -> None:
    server = ours.serve(ours.bind(socket.AF_UNIX))
    fill(server, ours.client(server), 500)
    assert ours.row[Field.DATAGRAMS_DROPPED] == 501 - MOST_OF_PEER
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


def connected_pair(kit: Kit) -> tuple[Recorder, socket.socket]:
    """A server whose unix socket is connected to its one client."""
    sock, client = kit.bind(socket.AF_UNIX), kit.bind(socket.AF_UNIX)
    client.connect(sock.getsockname())
    sock.connect(client.getsockname())
    return kit.serve(sock, peer=client.getsockname()), client


def test_the_handler_is_told_to_pause_and_to_resume(ours: Kit) -> None:
    server, client = connected_pair(ours)
    server.transport.set_write_buffer_limits(high=500, low=100)
    fill(server, client, 40)
    assert server.calls == ["connection_made", "pause_writing"]
    read_until(ours, client, lambda: "resume_writing" in server.calls)


def look_often(kit: Kit) -> None:
    """Has `until` look at its condition though nothing is called."""
    kit.look()
    kit.loop.call_later(0.01, look_often, kit)


def test_what_connection_made_sends_goes_out_when_the_peer_takes_it(ours: Kit) -> None:
    sock, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.sockets += [sock, peer]
    sock.setblocking(False)
    received = []

    def send_many(protocol: Recorder) -> None:
        protocol.transport.set_write_buffer_limits(100)
        for number in range(1000):
            protocol.transport.sendto(b"%d" % number)

    def take() -> None:
        received.append(int(peer.recv(100)))
        ours.look()

    server = ours.serve(sock, peer=("", 0), connection_made=send_many)
    ours.loop.add_reader(peer, take)
    ours.until(lambda: len(received) == 1000 and "resume_writing" in server.calls)
    ours.loop.remove_reader(peer)
    assert received == [*range(1000)]


def test_what_a_peer_does_not_take_expires(
    ours: Kit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datagram, "KEEP", 0.2)
    server = ours.serve(ours.bind(socket.AF_UNIX))
    silent = ours.bind(socket.AF_UNIX)
    count = fill(server, silent, 9)
    tries: list[bytes] = []
    transmit = server.transport._transmit

    def note_try(data: bytes, addr: Any) -> None:
        tries.append(data)
        transmit(data, addr)

    monkeypatch.setattr(server.transport, "_transmit", note_try)
    look_often(ours)
    ours.until(lambda: server.transport.get_write_buffer_size() == 0)
    assert 1 <= len(tries) <= 5  # after 10, 30, 70, 150 and 310 ms, unless the machine is late
    assert ours.row[Field.DATAGRAMS_DROPPED] == 10
    assert "pause_writing" not in server.calls
    server.transport.sendto(b"not kept", silent.getsockname())
    assert (ours.row[Field.DATAGRAMS_DROPPED], server.transport.get_write_buffer_size()) == (11, 0)
    server.transport.beat()
    server.transport.beat()
    assert caplog.text.count("dropped 11 datagrams that could not be sent in time, as their clients do not read") == 1
    assert [int(silent.recv(100)) for _ in range(count - 10)] == [*range(count - 10)]
    for number in range(count - 10 + 1):  # who reads again is served as before, and waited for
        server.transport.sendto(b"%d" % number, silent.getsockname())
    assert server.transport.get_write_buffer_size() > 0


def test_what_a_shared_socket_does_not_take_expires(ours: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagram, "KEEP", 0.05)
    server = ours.serve()

    def refuse(*_: Any) -> None:
        raise BlockingIOError

    monkeypatch.setattr(server.transport, "_sendto", refuse)
    server.transport.sendto(b"one", ("127.0.0.1", 9))
    look_often(ours)
    ours.until(lambda: ours.row[Field.DATAGRAMS_DROPPED])
    assert server.transport.get_write_buffer_size() == 0


def test_one_peer_that_can_not_be_reached_harms_no_other(ours: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ours.serve()
    client = ours.client(server)
    sendto, refused = server.transport._sendto, [BlockingIOError()]

    def refuse(data: bytes, addr: Any) -> None:
        if refused:
            raise refused.pop()
        if addr[1] == 9:
            raise PermissionError(1, "Operation not permitted")
        sendto(data, addr)

    monkeypatch.setattr(server.transport, "_sendto", refuse)
    for data, addr in [(b"one", client.getsockname()), (b"two", ("127.0.0.1", 9)), (b"three", client.getsockname())]:
        server.transport.sendto(data, addr)
    server.transport.sendto(b"four", "no address")  # as it waits, it is not looked at yet
    server.transport.sendto(b"five", client.getsockname())
    ours.until(lambda: server.errors)
    ours.turn()
    assert [client.recv(100) for _ in range(3)] == [b"one", b"three", b"five"]
    assert [type(error) for error in server.errors] == [PermissionError]
    assert ours.row[Field.DATAGRAMS_DROPPED] == 1
    assert [type(context["exception"]) for context in ours.failures] == [TypeError]
    assert server.transport.get_write_buffer_size() == 0


def test_one_wake_up_takes_a_bounded_batch(ours: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagram, "SLICE", DEADLINE)  # fewer are taken where they take longer than that
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


def test_wake_up_for_nothing_leaves_all_in_order(ours: Kit) -> None:
    server = ours.serve(datagram_received=echo)
    client = ours.client(server)
    for count in (1, 3, 2 * BATCH):
        assert server.transport._reader(IN)  # the queue is empty
        for _ in range(count):
            client.send(b"x")
        ours.until(lambda: len(server.received) == count)  # noqa: B023 (called in this round)
        server.received.clear()
        assert [client.recv(100) for _ in range(count)] == [b"x"] * count


def known_client(kit: Kit, server: Recorder, host: str = "127.0.0.1") -> socket.socket:
    """A client that the server has had a datagram of."""
    client = datagram_client(f"udp://{host}:{server.transport.get_extra_info('sockname')[1]}")
    kit.sockets.append(client)
    count = len(server.received)
    client.send(b"hello")
    kit.until(lambda: len(server.received) > count)
    return client


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_kind_of_bytes_is_sent_to_a_peer_that_has_sent(ours: Kit, host: str, kind: Any) -> None:
    server = ours.serve(ours.bind(host=host))
    client = known_client(ours, server, "127.0.0.1" if host == "127.0.0.1" else "127.0.0.7")
    to = server.received[0][1]
    server.transport.sendto(kind(b"data"), to)
    server.transport.sendto(b"", (*to,))  # another object, but the same address
    assert (client.recv(100), client.recv(100)) == (b"data", b"")
    for wrong in ("data", None, 1):
        with pytest.raises(TypeError, match="bytes-like"):
            server.transport.sendto(wrong, to)
    for address in ("nowhere", [*to]):
        with pytest.raises(TypeError):
            server.transport.sendto(b"data", address)
    with pytest.raises((TypeError, ValueError), match="address"):
        server.transport.sendto(b"data")
    server.transport.sendto(bytes(70_000), to)
    assert [error.strerror for error in server.errors if isinstance(error, OSError)] == ["Message too long"]
    assert {one.peer: (one.received, one.sent) for one in server.transport.recent()} == {to: (1, 2)}
    assert ours.row[Field.DATAGRAMS_DROPPED] == 1


def test_ipv6_peer_is_what_pythons_sockets_say(ours: Kit) -> None:
    server = ours.serve(ours.bind(socket.AF_INET6, "::1"), datagram_received=echo)
    client = ours.bind(socket.AF_INET6, "::1")
    client.settimeout(DEADLINE)
    client.sendto(b"x", server.transport.get_extra_info("sockname"))
    ours.until(lambda: server.received)
    assert server.received == [(b"x", client.getsockname())]
    assert client.recvfrom(100) == (b"x", server.transport.get_extra_info("sockname"))


def test_largest_datagram_comes_whole(ours: Kit) -> None:
    server = ours.serve()
    client = ours.client(server)
    data = bytes(range(256)) * 255 + bytes(227)
    assert len(data) == 65_507  # what fits into a packet of IPv4
    client.send(data)
    client.send(b"small")
    ours.until(lambda: len(server.received) == 2)
    assert [one for one, _ in server.received] == [data, b"small"]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_peers_are_answered_though_more_have_come_than_are_kept(
    ours: Kit, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(pktinfo, "MOST_PEERS", 10)
    monkeypatch.setattr(datagram, "MOST_ROUTES", 10)
    server = ours.serve(ours.bind(host=host))
    clients = [known_client(ours, server) for _ in range(30)]
    for number, (_, peer) in enumerate(server.received):
        server.transport.sendto(b"%d" % number, peer)
    assert [int(client.recv(100)) for client in clients] == [*range(30)]
    assert {(one.received, one.sent) for one in server.transport.recent()} == {(1, 1)}


def test_strangers_push_out_no_route_of_a_peer(ours: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pktinfo, "MOST_PEERS", 10)
    monkeypatch.setattr(datagram, "MOST_ROUTES", 10)
    refused: list[Any] = []

    def admit(peer: Any) -> bool:
        if server.received:
            refused.append(peer)
        return not refused

    server = ours.serve(ours.bind(host="0.0.0.0"), {"admit": admit})
    client = known_client(ours, server, "127.0.0.7")
    port = server.transport.get_extra_info("sockname")[1]
    for _ in range(30):
        stranger = ours.bind()
        stranger.sendto(b"x", ("127.0.0.8", port))
        client.send(b"refused")
    look_often(ours)
    ours.until(lambda: len(refused) == 60)
    server.transport.sendto(b"late", client.getsockname())
    assert client.recv(100) == b"late"
    assert len(server.received) == 1


def test_closed_transport_leaves_nothing_behind(ours: Kit) -> None:
    def use() -> None:
        server = ours.serve(ours.bind(host="0.0.0.0"), {"admit": lambda peer: True}, datagram_received=echo)
        client = known_client(ours, server)
        server.transport.sendto(b"x", ("127.0.0.1", client.getsockname()[1]))
        server.transport.recent()
        server.transport.close()
        ours.until(lambda: server.lost)
        ours.transports.clear()
        while ours.sockets:
            ours.sockets.pop().close()

    counts = []
    for _ in range(4):
        use()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[3] == counts[2]


def test_nothing_is_sent_by_a_descriptor_that_is_anothers(ours: Kit) -> None:
    server = ours.serve(sock := ours.bind())
    known_client(ours, server)
    number = sock.fileno()
    sock.close()
    reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.sockets += [reader, writer]
    reader.setblocking(False)
    assert number in (reader.fileno(), writer.fileno())
    server.transport.sendto(b"x", server.received[0][1])
    assert [error.errno for error in server.errors if isinstance(error, OSError)] == [errno.EBADF]
    for end in (reader, writer):
        with pytest.raises(BlockingIOError):
            end.recv(100, socket.MSG_DONTWAIT)


#: Of the two ends of a wire (veth(4)).
MACS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")


def udp_frame(sender: tuple[str, int], receiver: tuple[str, int]) -> bytes:
    """An Ethernet frame to this address with a datagram, which is empty."""
    ip = [
        0x4500,
        28,
        0,
        0,
        0x4011,
        0,
        *struct.unpack("!4H", b"".join(socket.inet_aton(one[0]) for one in (sender, receiver))),
    ]
    ip[5] = 0xFFFF - (sum(ip) % 0xFFFF)
    return MACS[0] + MACS[1] + b"\x08\x00" + struct.pack("!10H", *ip) + struct.pack("!4H", sender[1], receiver[1], 8, 0)


@pytest.mark.parametrize("host", ["10.9.0.1", "0.0.0.0"])
def test_answers_to_a_peer_wait_while_the_socket_is_full(ours: Kit, host: str) -> None:
    with private_network():
        # The other end of the wire answers no ARP request; what is sent there waits for one in the kernel (arp(7)).
        for words in (
            f"link add w0 address {MACS[0].hex(':')} type veth peer name w1 address {MACS[1].hex(':')}",
            "addr add 10.9.0.1/16 dev w0",
            "link set w0 up",
            "link set w1 up",
        ):
            subprocess.run(["ip", *words.split()], check=True)
        sock = ours.bind(host=host)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
        server = ours.serve(sock)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800)) as wire:
            wire.settimeout(DEADLINE)
            wire.bind(("w1", 0))
            wire.send(udp_frame(("10.9.0.2", 4000), ("10.9.0.1", sock.getsockname()[1])))
            ours.until(lambda: server.received)
            assert server.received == [(b"", ("10.9.0.2", 4000))]
            sent = 0
            while server.transport.get_write_buffer_size() == 0:
                server.transport.sendto(b"%d" % sent, ("10.9.0.2", 4000))
                sent += 1
            server.transport.sendto(b"%d" % sent, ("10.9.0.2", 4000))
            subprocess.run(["ip", "neigh", "replace", "10.9.0.2", "lladdr", MACS[1].hex(":"), "dev", "w0"], check=True)
            look_often(ours)
            ours.until(lambda: server.transport.get_write_buffer_size() == 0)
            server.transport.sendto(b"%d" % (sent + 1), ("10.9.0.2", 4000))
            frames = [wire.recv(2000) for _ in range(sent + 2)]
        assert [int(frame[42:].rstrip(b"\0")) for frame in frames] == [*range(sent + 2)]
        assert ours.row[Field.DATAGRAMS_DROPPED] == 0


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


def test_recent_peers_are_bounded() -> None:
    recent = RecentPeers(lambda: 1.0)
    recent.senders.extend(("10.0.0.1", port) for port in range(2 * MOST_PEERS))
    assert recent.count() == (2 * MOST_PEERS, 0)
    assert [one.peer[1] for one in recent.list()] == [*range(MOST_PEERS, 2 * MOST_PEERS)]


def test_datagrams_of_peers_not_admitted_are_dropped(ours: Kit) -> None:
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


def test_connected_socket_hears_its_peer_alone_and_of_its_end(ours: Kit) -> None:
    sock = ours.bind()
    peer, stranger = (datagram_client(f"udp://127.0.0.1:{sock.getsockname()[1]}") for _ in range(2))
    ours.sockets += [peer, stranger]
    stranger.send(b"stranger")
    peer.send(b"peer")
    sock.connect(peer.getsockname())
    server = ours.serve(sock, peer=peer.getsockname(), datagram_received=lambda one, *_: one.transport.sendto(b"x"))
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


def test_a_shutdown_that_is_async_runs_as_a_task(ours: Kit) -> None:
    server = ours.serve()
    told: list[str] = []

    async def shutdown() -> None:
        await asyncio.sleep(0)
        told.append("shutdown")
        if len(told) == 1:
            raise ValueError("wrong")

    vars(server)["shutdown"] = shutdown
    server.transport.drain()
    for _ in range(3):  # the drain, and the task to its sleep and to its end
        ours.turn()
    assert told == ["shutdown"]
    assert [failure["message"] for failure in ours.failures] == ["protocol.shutdown() call failed."]
    ours.failures.clear()


def test_drain_reads_the_queue_and_calls_shutdown(ours: Kit) -> None:
    server = ours.serve()
    client = ours.client(server)
    for _ in range(3 * BATCH):
        client.send(b"x")
    server.transport.drain()
    ours.until(lambda: ours.drained)
    assert ours.drained == [server.transport]
    assert server.calls.count("datagram_received") == 3 * BATCH
    assert server.calls[-1] == "shutdown"
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


def test_reply_to_an_ipv6_request_leaves_from_its_address(ours: Kit) -> None:
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


class SendmsgRecorder:
    """A socket that writes down the control messages which it is to send with."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.recvmsg = sock.recvmsg
        self.ancillary: list[Ancillary] = []

    def sendmsg(self, buffers: Any, ancillary: Ancillary, flags: int, to: Any) -> int:
        self.ancillary.append(ancillary)
        return self.sock.sendmsg(buffers, ancillary, flags, to)


def test_reply_route_names_the_ipv6_address_of_the_request(ours: Kit) -> None:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    ours.sockets.append(sock)
    sock.bind(("::", 0))
    assert enable_pktinfo(sock)
    client = datagram_client(f"udp://[::1]:{sock.getsockname()[1]}")
    ours.sockets.append(client)
    client.send(b"x")
    recorder = SendmsgRecorder(sock)
    routes = ReplyRoutes(recorder)  # type: ignore[arg-type]
    routes.send(*routes.receive(100))
    assert client.recv(100) == b"x"
    (origin,) = recorder.ancillary
    assert origin == [
        (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, struct.pack("=16si", socket.inet_pton(socket.AF_INET6, "::1"), 0))
    ]


def test_addresses_that_peers_have_sent_to_are_bounded(ours: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pktinfo, "MOST_ADDRESSES", 10)
    server = ours.serve(ours.bind(host="0.0.0.0"), datagram_received=echo)
    port = server.transport.get_extra_info("sockname")[1]
    client = ours.bind(host="0.0.0.0")
    client.settimeout(DEADLINE)
    for number in range(30):
        client.sendto(b"x", (f"127.0.1.{number}", port))
    ours.until(lambda: len(server.received) == 30)
    assert [client.recvfrom(100)[1] for _ in range(30)] == [(f"127.0.1.{number}", port) for number in range(30)]
    if datagram.fast is None:  # the compiled twin keeps one for each peer
        assert len(server.transport._routes._replies) == 10


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_datagrams_that_are_not_taken_change_no_reply_route(
    ours: Kit, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(pktinfo, "MOST_PEERS", 10)

    def unwrap(data: bytes, peer: Any) -> tuple[bytes, Any, Any] | None:
        return (data, ("192.0.2.7", int(data[5:])), None) if data.startswith(b"PROXY") else None

    server = ours.serve(ours.bind(host=host), {"unwrap": unwrap})
    proxy = ours.client(server)
    proxy.send(b"PROXY1")
    for _ in range(20):
        ours.client(server).send(b"no proxy")
    proxy.send(b"PROXY2")
    ours.until(lambda: len(server.received) == 2)
    server.transport.sendto(b"late", ("192.0.2.7", 1))
    assert proxy.recv(100) == b"late"


def test_peer_that_has_not_read_gets_no_more_until_it_has(ours: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]

    def one_later() -> float:
        seconds[0] += 1.0
        return seconds[0]

    monkeypatch.setattr(peers, "monotonic", one_later)
    sock = ours.bind(socket.AF_UNIX)
    client = ours.client(ours.serve(sock))
    unread, count = UnreadAnswers(sock), 0
    while unread.may_send(client.getsockname(), 1000):
        sock.sendto(bytes(1000), client.getsockname())
        count += 1
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) / 4 <= unacknowledged_bytes(sock)
    other = ours.client(ours.serve(ours.bind(socket.AF_UNIX)))
    assert not unread.may_send(other.getsockname(), 1000)  # all sockets were listed a moment ago, and it was not there
    seconds[0] += 1000.0
    assert unread.may_send(other.getsockname(), 1000)
    assert not unread.may_send(other.getsockname(), 50_000)
    for _ in range(count):
        client.recv(1000)
    assert unread.may_send(client.getsockname(), 1000)


def test_kernel_without_unix_diag_has_every_peer_sent_to(ours: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_inode: int = 0) -> NoReturn:
        raise ForkdError("the kernel does not list its sockets")

    sock = ours.bind(socket.AF_UNIX)
    client = ours.client(ours.serve(sock))
    monkeypatch.setattr(peers, "unix_sockets", refuse)
    unread = UnreadAnswers(sock)
    while unacknowledged_bytes(sock) * 4 < sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF):
        sock.sendto(bytes(1000), client.getsockname())
    assert all(unread.may_send(client.getsockname(), 1000) for _ in range(20))
