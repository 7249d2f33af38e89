"""The transport against asyncio's contract: reading, half-closing and what is known of a connection.

Each test runs against asyncio's own socket transport too, which shows that it tests the contract and not forkd.
The rest of the contract is in the modules of this name beside it.
"""

from __future__ import annotations

import asyncio
import contextvars
import socket
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from forkd.serve.accept.proxy_protocol import ProxiedSocket
from forkd.serve.stream.transport import StreamTransport
from tests.serve.stream.test_transport_closing import reset
from tests.support.transport_contract import (
    MUCH,
    AnyRecorder,
    Kit,
    Recorder,
    forkd_only,
    kits,
    read_exactly,
    read_to_end,
    tcp_pair,
)

kit = kits


def send_back(protocol: AnyRecorder, data: bytes) -> None:
    protocol.transport.write(data)


def test_connection_made_comes_before_data_that_was_there_first(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, _ = kit.connect(protocol, first=b"early")
    kit.until(lambda: protocol.received)
    assert (protocol.calls, protocol.transport) == (["connection_made", "data_received"], transport)
    assert protocol.received == b"early"


def test_requests_are_answered_one_after_another(kit: Kit) -> None:
    _, peer = kit.connect(Recorder(kit, data_received=send_back))
    for number in range(50):
        request = b"request %d" % number
        peer.sendall(request)
        assert kit.in_thread(read_exactly, peer, len(request)) == request


def test_data_comes_as_bytes(kit: Kit) -> None:
    kinds = []
    protocol = Recorder(kit, data_received=lambda _, data: kinds.append(type(data)))
    kit.connect(protocol, first=b"x")
    kit.until(lambda: kinds)
    assert kinds == [bytes]


def test_paused_reading_receives_nothing_until_resumed(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    assert transport.is_reading()
    for _ in range(2):
        transport.pause_reading()
    assert not transport.is_reading()
    peer.sendall(b"waits")
    kit.turn()
    assert protocol.received == b""
    for _ in range(2):
        transport.resume_reading()
    assert transport.is_reading()
    kit.until(lambda: protocol.received)
    assert protocol.received == b"waits"


@forkd_only  # asyncio's before 3.11.3 reads all the same
def test_reading_is_paused_from_connection_made(kit: Kit) -> None:
    protocol = Recorder(kit, connection_made=lambda p: p.transport.pause_reading())
    transport, _ = kit.connect(protocol, first=b"waits")
    kit.turn()
    assert protocol.calls == ["connection_made"]
    transport.resume_reading()
    kit.until(lambda: protocol.received)
    assert protocol.received == b"waits"


def test_reading_is_paused_and_resumed_within_connection_made(kit: Kit) -> None:
    def pause_and_resume(protocol: AnyRecorder) -> None:
        protocol.transport.pause_reading()
        protocol.transport.resume_reading()

    protocol = Recorder(kit, connection_made=pause_and_resume)
    kit.connect(protocol, first=b"comes")
    kit.until(lambda: protocol.received)
    assert protocol.received == b"comes"


def test_pausing_in_data_received_leaves_the_rest_unread(kit: Kit) -> None:
    protocol = Recorder(kit, data_received=lambda p, _: p.transport.pause_reading())
    _, peer = kit.connect(protocol)
    peer.sendall(b"first")
    kit.until(lambda: protocol.received)
    peer.sendall(b"second")
    kit.turn()
    assert protocol.received == b"first"


@pytest.mark.parametrize("stop", ["pause_reading", "close", "abort"])
def test_a_connection_stopped_in_the_same_round_gets_no_data(kit: Kit, stop: str) -> None:
    both: list[Recorder] = []

    def stop_the_other(protocol: AnyRecorder, _: Any) -> None:
        getattr(next(other for other in both if other is not protocol).transport, stop)()

    both += [Recorder(kit, data_received=stop_the_other) for _ in range(2)]
    for peer in [kit.connect(protocol)[1] for protocol in both]:
        peer.sendall(b"x")
    kit.turn()
    assert sorted(len(protocol.received) for protocol in both) == [0, 1]


def test_end_of_file_closes(kit: Kit) -> None:
    protocol = Recorder(kit)
    _, peer = kit.connect(protocol, first=b"last words")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: protocol.lost)
    assert protocol.calls == ["connection_made", "data_received", "eof_received", "connection_lost"]
    assert protocol.lost == [None]
    assert peer.recv(1) == b""


def test_end_of_file_sends_what_is_unsent_before_closing(kit: Kit) -> None:
    protocol = Recorder(kit, eof_received=lambda p: p.transport.write(b"x" * MUCH))
    _, peer = kit.connect(protocol)
    peer.shutdown(socket.SHUT_WR)
    assert len(kit.in_thread(read_to_end, peer)) == MUCH
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


def test_eof_received_that_returns_true_leaves_sending_open(kit: Kit) -> None:
    protocol = Recorder(kit, eof_received=lambda _: True)
    transport, peer = kit.connect(protocol)
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: "eof_received" in protocol.calls)
    kit.turn()
    assert protocol.calls == ["connection_made", "eof_received"]
    transport.write(b"still here")
    assert peer.recv(100) == b"still here"
    transport.close()
    kit.until(lambda: protocol.lost)
    assert (protocol.lost, peer.recv(1)) == ([None], b"")


def test_write_eof_ends_sending_and_reads_on(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    assert transport.can_write_eof()
    transport.write(b"all")
    for _ in range(2):
        transport.write_eof()
    assert read_to_end(peer) == b"all"
    peer.sendall(b"and back")
    kit.until(lambda: protocol.received)
    assert protocol.received == b"and back"
    assert not transport.is_closing()


def test_write_eof_waits_for_what_is_unsent(kit: Kit) -> None:
    transport, peer = kit.connect(Recorder(kit))
    transport.write(b"x" * MUCH)
    transport.write_eof()
    assert len(kit.in_thread(read_to_end, peer)) == MUCH
    assert not transport.is_closing()


@pytest.mark.parametrize("unsent", [b"", b"x" * MUCH], ids=["sent", "unsent"])
def test_writing_after_write_eof_raises(kit: Kit, unsent: bytes) -> None:
    transport, _ = kit.connect(Recorder(kit))
    transport.write(unsent)
    transport.write_eof()
    with pytest.raises(RuntimeError, match="after write_eof"):
        transport.write(b"more")
    with pytest.raises(RuntimeError, match="after write_eof"):
        transport.writelines([b"more", b"of it"])


def test_both_sides_half_closed_end_the_connection(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    transport.write_eof()
    assert peer.recv(1) == b""
    peer.close()
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


def test_extra_info_tells_addresses_and_socket(kit: Kit) -> None:
    transport, peer = kit.connect(Recorder(kit), tcp_pair)
    assert transport.get_extra_info("peername") == peer.getsockname()
    assert transport.get_extra_info("sockname") == peer.getpeername()
    sock = transport.get_extra_info("socket")
    assert (sock.family, sock.type) == (socket.AF_INET, socket.SOCK_STREAM)
    assert sock.getpeername() == peer.getsockname()
    assert not hasattr(sock, "recv")
    assert transport.get_extra_info("sslcontext") is None
    assert transport.get_extra_info("moon phase", "full") == "full"


@pytest.mark.parametrize("act", [socket.socket.close, reset], ids=["close", "reset"])
def test_addresses_are_known_when_the_client_has_gone(kit: Kit, act: Callable[[socket.socket], None]) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, tcp_pair)
    addresses = peer.getsockname(), peer.getpeername()
    act(peer)
    kit.until(lambda: protocol.lost)
    kit.turn()
    assert (transport.get_extra_info("peername"), transport.get_extra_info("sockname")) == addresses


@forkd_only
@pytest.mark.parametrize("known", ["peername", "sockname", "proxy_peername"])
def test_what_is_known_without_its_socket_is_not_asked_for(kit: Kit, known: str) -> None:
    kit.observer.sockname = "sockname"
    sock, _ = kit.pair()
    proxied = ProxiedSocket(fileno=sock.detach())
    proxied.proxy_peername = "proxy_peername"
    with proxied:
        transport = StreamTransport(kit.poll_loop, proxied, Recorder(kit), "peername", kit.observer)
    assert transport.get_extra_info(known) == known


def test_a_transport_tells_its_state(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, _ = kit.connect(protocol)
    fd = f"fd={transport.get_extra_info('socket').fileno()}"
    shown = [repr(transport)]
    assert (transport.is_closing(), transport.is_reading(), transport.get_protocol()) == (False, True, protocol)
    transport.write(b"x" * MUCH)
    transport.close()
    shown.append(repr(transport))
    assert (transport.is_closing(), transport.is_reading(), transport.get_protocol()) == (True, False, protocol)
    transport.abort()
    kit.until(lambda: protocol.lost)
    shown.append(repr(transport))
    assert all(fd in each for each in shown)
    assert ["closing" in each for each in shown[:2]] == [False, True]
    assert "closed" in shown[2]


def test_a_transport_can_be_referred_to_weakly(kit: Kit) -> None:
    transport, _ = kit.connect(Recorder(kit))
    assert weakref.ref(transport)() is transport


@pytest.mark.parametrize(
    "where", ["connection_made", "data_received", "eof_received", "pause_writing", "resume_writing", "connection_lost"]
)
def test_context_variables_are_those_of_one_connection(kit: Kit, where: str) -> None:
    user = contextvars.ContextVar("user", default="default")
    seen = []
    first = Recorder(kit, **{where: lambda *_: user.set("first") and None})
    others = [Recorder(kit, data_received=lambda *_: seen.append(user.get())) for _ in range(2)]
    (transport, peer), (_, earlier) = kit.connect(first), kit.connect(others[0])
    kit.loop.call_soon(transport.write, bytes(MUCH))
    kit.turn()
    kit.in_thread(read_exactly, peer, MUCH)
    peer.sendall(b"x")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: first.lost)
    assert where in first.calls
    _, later = kit.connect(others[1])
    for other in (earlier, later):
        other.sendall(b"x")
    kit.until(lambda: len(seen) == 2)
    assert seen == ["default", "default"]


def test_callbacks_find_the_running_loop(kit: Kit) -> None:
    seen = []
    protocol = Recorder(kit, data_received=lambda *_: seen.append(asyncio.get_running_loop()))
    kit.connect(protocol, first=b"x")
    kit.until(lambda: seen)
    assert seen == [kit.loop]
