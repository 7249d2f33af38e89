"""The transport against asyncio's contract: how a connection ends, and what its protocol is told of it.

By close, which sends what is unsent; by abort, which does not; by the peer's reset; by a write that fails. Each test
runs against asyncio's own socket transport too.
"""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

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


def reset(peer: socket.socket) -> None:
    """Ends a TCP connection by a RST."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


def test_close_sends_a_big_buffer_to_a_slow_reader_first(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, socket.socketpair)
    transport.write(b"x" * MUCH)
    for _ in range(2):
        transport.close()
    assert transport.is_closing()
    assert not transport.is_reading()
    received = 0
    while received < MUCH - (1 << 20):
        received += len(kit.in_thread(read_exactly, peer, 1 << 20))
        assert protocol.lost == []
    assert received + len(kit.in_thread(read_to_end, peer)) == MUCH
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


def test_nothing_is_received_after_close(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    transport.write(b"x" * MUCH)
    transport.close()
    transport.resume_reading()
    peer.sendall(b"too late")
    kit.turn()
    transport.abort()
    kit.until(lambda: protocol.lost)
    assert "data_received" not in protocol.calls


@pytest.mark.parametrize("end", ["close", "abort"])
@pytest.mark.parametrize("where", ["connection_made", "data_received", "eof_received"])
def test_a_callback_may_end_the_connection(kit: Kit, where: str, end: str) -> None:
    protocol = Recorder(kit, **{where: lambda p, *_: getattr(p.transport, end)()})
    _, peer = kit.connect(protocol, socket.socketpair, first=b"x")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: protocol.lost)
    kit.turn()
    assert protocol.calls[-2:] == [where, "connection_lost"]
    assert protocol.lost == [None]


def test_a_callback_may_write_and_close(kit: Kit) -> None:
    protocol = Recorder(kit, data_received=lambda p, _: (p.transport.write(b"y" * MUCH), p.transport.close()))
    _, peer = kit.connect(protocol, first=b"x")
    assert len(kit.in_thread(read_to_end, peer)) == MUCH
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


@pytest.mark.parametrize("closed_before", [False, True])
def test_abort_loses_what_is_unsent(kit: Kit, closed_before: bool) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    transport.write(b"x" * MUCH)
    if closed_before:
        transport.close()
    for _ in range(2):
        transport.abort()
    assert transport.is_closing()
    assert transport.get_write_buffer_size() == 0
    assert protocol.lost == []
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]
    assert len(read_to_end(peer)) < MUCH


@pytest.mark.parametrize("last", ["close", "abort"])
@pytest.mark.parametrize("first", ["close", "abort"])
def test_connection_lost_comes_once_and_not_within_the_call(kit: Kit, first: str, last: str) -> None:
    within = []

    def end(protocol: AnyRecorder, *_: Any) -> None:
        within.append(True)
        getattr(protocol.transport, first)()
        getattr(protocol.transport, last)()
        within.pop()

    def lost(protocol: AnyRecorder) -> None:
        seen.append(bool(within))
        end(protocol)

    seen: list[bool] = []
    protocol = Recorder(kit, data_received=end, connection_lost=lost)
    kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    kit.turn()
    assert (seen, protocol.lost) == ([False], [None])


def test_a_write_that_fails_ends_the_connection_later_and_once(kit: Kit) -> None:
    protocol = Recorder(kit, connection_made=lambda p: p.transport.pause_reading())
    transport, peer = kit.connect(protocol)
    peer.close()
    for _ in range(3):
        transport.write(b"into the void")
    assert (protocol.lost, transport.is_closing()) == ([], True)
    kit.until(lambda: protocol.lost)
    kit.turn()
    assert [type(error) for error in protocol.lost] == [BrokenPipeError]


def test_unsent_data_is_dropped_when_the_peer_is_gone(kit: Kit) -> None:
    protocol = Recorder(kit, connection_made=lambda p: p.transport.pause_reading())
    transport, peer = kit.connect(protocol)
    transport.write(b"x" * MUCH)
    peer.close()
    kit.until(lambda: protocol.lost)
    assert isinstance(protocol.lost[0], ConnectionError)
    assert transport.get_write_buffer_size() == 0


@pytest.mark.parametrize("unsent", [b"", b"x" * MUCH], ids=["idle", "sending"])
def test_a_reset_is_what_connection_lost_is_told(kit: Kit, unsent: bytes) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, tcp_pair)
    transport.write(unsent)
    reset(peer)
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [ConnectionResetError]
    assert "eof_received" not in protocol.calls


@pytest.mark.parametrize("answer", [b"", b"answer"], ids=["an empty answer", "an answer"])
def test_data_before_a_reset_is_received(kit: Kit, answer: bytes) -> None:
    protocol = Recorder(kit, data_received=lambda p, _: p.transport.write(answer))
    transport, peer = kit.connect(protocol, tcp_pair)
    transport.pause_reading()
    peer.sendall(b"last words")
    reset(peer)
    transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert protocol.received == b"last words"
    assert [type(error) for error in protocol.lost] == [ConnectionResetError]


def test_writing_to_a_lost_connection_is_passed_over(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    transport.close()
    kit.until(lambda: protocol.lost)
    for _ in range(4):
        transport.write(b"late")
    assert (peer.recv(1), transport.get_write_buffer_size(), caplog.messages) == (b"", 0, [])


@forkd_only
def test_a_handler_that_keeps_writing_when_lost_is_named_once(kit: Kit, caplog: pytest.LogCaptureFixture) -> None:
    protocol = Recorder(kit)
    transport, _ = kit.connect(protocol)
    transport.abort()
    for _ in range(100):
        transport.writelines([b"la", b"te"])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "Recorder" in caplog.text
