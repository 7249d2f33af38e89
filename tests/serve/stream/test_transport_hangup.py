"""The transport while its protocol has paused reading: a peer that resets, closes, or shuts down its sending side.

asyncio's own transport sees none of it before reading is resumed. What both do then is the same, and is held to one
contract here; that forkd notices at once is for forkd alone.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from asyncio import base_events
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from tests.serve.stream.test_transport_closing import reset
from tests.support.clients import at_end, read
from tests.support.daemon import Harness
from tests.support.processes import eventually
from tests.support.transport_contract import (
    MUCH,
    AnyRecorder,
    BufferedRecorder,
    Kit,
    Recorder,
    RecorderClass,
    SocketPair,
    forkd_only,
    kits,
    read_exactly,
    read_to_end,
    tcp_pair,
)

kit = kits

RECORDERS = pytest.mark.parametrize("recorder", [Recorder, BufferedRecorder])
PAIRS = pytest.mark.parametrize("pair", [tcp_pair, socket.socketpair])


def pausing(recorder: RecorderClass, kit: Kit, **hooks: Callable[..., Any]) -> AnyRecorder:
    """A protocol that pauses as soon as it is connected."""
    return recorder(kit, connection_made=lambda p: p.transport.pause_reading(), **hooks)


def paused(
    recorder: RecorderClass, kit: Kit, pair: SocketPair = tcp_pair, **hooks: Callable[..., Any]
) -> tuple[AnyRecorder, Any, socket.socket]:
    """One that pauses later."""
    protocol = recorder(kit, **hooks)
    transport, peer = kit.connect(protocol, pair)
    transport.pause_reading()
    return protocol, transport, peer


def events(protocol: AnyRecorder) -> list[str]:
    return [name for name in protocol.calls if name not in ("get_buffer", "buffer_updated", "data_received")]


# As with asyncio


@PAIRS
@RECORDERS
def test_what_was_sent_before_the_end_of_file_comes_before_it(
    kit: Kit, recorder: RecorderClass, pair: SocketPair
) -> None:
    seen: list[bytes] = []
    protocol, transport, peer = paused(recorder, kit, pair, eof_received=lambda p: seen.append(bytes(p.received)))
    peer.sendall(b"the last words")
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    assert events(protocol) == ["connection_made"]
    transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert (seen, protocol.lost) == ([b"the last words"], [None])
    assert events(protocol) == ["connection_made", "eof_received", "connection_lost"]


@PAIRS
@RECORDERS
def test_a_peer_that_sends_no_more_gets_its_answer(kit: Kit, recorder: RecorderClass, pair: SocketPair) -> None:
    """It has had its request read, and the handler paused for as long as it works on it."""
    protocol, transport, peer = paused(recorder, kit, pair)
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    transport.write(b"the answer")
    kit.turn()
    assert kit.in_thread(read_exactly, peer, 10) == b"the answer"
    transport.write(b", and more")
    transport.resume_reading()
    assert kit.in_thread(read_to_end, peer) == b", and more"
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]
    assert events(protocol) == ["connection_made", "eof_received", "connection_lost"]


@RECORDERS
def test_a_protocol_that_keeps_it_open_is_told_once(kit: Kit, recorder: RecorderClass) -> None:
    protocol, transport, peer = paused(recorder, kit, eof_received=lambda _: True)
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    transport.resume_reading()
    kit.until(lambda: "eof_received" in protocol.calls)
    kit.turn()
    transport.write(b"still here")
    assert kit.in_thread(read_exactly, peer, 10) == b"still here"
    assert events(protocol) == ["connection_made", "eof_received"]


@PAIRS
def test_much_is_sent_to_a_slow_reader_while_nothing_is_read(kit: Kit, pair: SocketPair) -> None:
    protocol, transport, peer = paused(Recorder, kit, pair)
    peer.sendall(b"unread")
    peer.shutdown(socket.SHUT_WR)
    for _ in range(16):
        transport.write(os.urandom(MUCH // 16))
    assert transport.get_write_buffer_size() > 0
    assert len(kit.in_thread(read_exactly, peer, MUCH)) == MUCH
    kit.turn()
    assert transport.get_write_buffer_size() == 0
    transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert bytes(protocol.received) == b"unread"


@pytest.mark.parametrize("write", ["write", "writelines"])
def test_many_small_writes_where_writing_resumes_while_nothing_is_read(kit: Kit, write: str) -> None:
    """After a number of them the rest waits, though the socket took all of them."""

    def write_much(protocol: AnyRecorder) -> None:
        if protocol.calls.count("resume_writing") == 1:
            for _ in range(200):
                getattr(protocol.transport, write)(b"12345" if write == "write" else [b"123", b"45"])

    _, transport, peer = paused(Recorder, kit, tcp_pair, resume_writing=write_much)
    transport.write(bytes(MUCH))
    assert len(kit.in_thread(read_exactly, peer, MUCH + 1000)) == MUCH + 1000


@forkd_only
@pytest.mark.parametrize("held", [False, True])
def test_corked_writes_where_writing_resumes_while_nothing_is_read(kit: Kit, held: bool) -> None:
    """Held: in a cork that another task of the handler has."""

    def write_more(protocol: AnyRecorder) -> None:
        if protocol.calls.count("resume_writing") == 1:
            with nullcontext() if held else protocol.transport.cork():
                protocol.transport.write(b"12345")
                protocol.transport.write(b"67890")

    _, transport, peer = paused(Recorder, kit, tcp_pair, resume_writing=write_more)
    with transport.cork() if held else nullcontext():
        transport.write(bytes(MUCH))
        assert len(kit.in_thread(read_exactly, peer, MUCH)) == MUCH
        kit.turn()
    assert kit.in_thread(read_exactly, peer, 10) == b"1234567890"


def test_sendfile_to_a_peer_that_sends_no_more(kit: Kit, tmp_path: Path) -> None:
    """asyncio's own protocol for that takes an end of file for a mistake of the transport."""
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, tcp_pair, first=b"x")
    kit.until(lambda: protocol.received)
    (tmp_path / "file").write_bytes(bytes(MUCH))

    async def send(file: Any) -> Any:
        task = asyncio.ensure_future(kit.loop.sendfile(transport, file))
        await asyncio.sleep(0)
        peer.shutdown(socket.SHUT_WR)
        received = await kit.loop.run_in_executor(None, read_exactly, peer, MUCH)
        return await task, len(received)

    with (tmp_path / "file").open("rb") as file:
        assert kit.run(send(file)) == (MUCH, MUCH)
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]
    assert protocol.calls.count("eof_received") == 1


# At once


@forkd_only
@RECORDERS
@pytest.mark.parametrize("make", [pausing, None])
@pytest.mark.parametrize("first", [b"", b"unread"])
def test_a_reset_is_noticed_at_once(kit: Kit, recorder: RecorderClass, make: Any, first: bytes) -> None:
    if make is None:
        protocol, _, peer = paused(recorder, kit)
    else:
        protocol = make(recorder, kit)
        _, peer = kit.connect(protocol, tcp_pair)
    peer.sendall(first)
    reset(peer)
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [ConnectionResetError]
    assert (events(protocol), bytes(protocol.received)) == (["connection_made", "connection_lost"], b"")


@forkd_only
@pytest.mark.parametrize("first", [b"", b"unread"])
def test_a_reset_is_noticed_also_after_the_end_of_file(kit: Kit, first: bytes) -> None:
    protocol, _, peer = paused(Recorder, kit, eof_received=lambda _: True)
    peer.sendall(first)
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    assert protocol.calls.count("eof_received") == (0 if first else 1)
    reset(peer)
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [ConnectionResetError]


@forkd_only
def test_a_reset_is_noticed_when_reading_has_come_to_its_end(kit: Kit) -> None:
    protocol = Recorder(kit, eof_received=lambda _: True)
    _, peer = kit.connect(protocol, tcp_pair)
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: "eof_received" in protocol.calls)
    reset(peer)
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [ConnectionResetError]


@forkd_only
def test_a_reset_is_noticed_while_much_is_unsent(kit: Kit) -> None:
    protocol, transport, peer = paused(Recorder, kit)
    transport.write(bytes(MUCH * 4))
    kit.turn()
    assert transport.get_write_buffer_size() > 0
    reset(peer)
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [ConnectionResetError]


@forkd_only
@PAIRS
def test_a_protocol_that_pauses_when_connected_misses_nothing(kit: Kit, pair: SocketPair) -> None:
    """In asyncio's it goes on reading."""
    protocol = pausing(Recorder, kit)
    transport, peer = kit.connect(protocol, pair, first=b"the first words")
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    assert events(protocol) == ["connection_made"]
    transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert protocol.received == b"the first words"
    assert events(protocol) == ["connection_made", "eof_received", "connection_lost"]


@forkd_only
@PAIRS
@RECORDERS
def test_the_end_of_file_is_told_at_once_where_nothing_is_unread(
    kit: Kit, recorder: RecorderClass, pair: SocketPair
) -> None:
    protocol, transport, peer = paused(recorder, kit, pair)
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: "eof_received" in protocol.calls)
    kit.turn()
    assert (protocol.lost, transport.is_closing()) == ([], False)
    transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert protocol.calls.count("eof_received") == 1


@forkd_only
def test_a_new_protocol_is_told_what_the_old_one_was_not(kit: Kit) -> None:
    """As asyncio's sendfile puts its own in charge for a while."""
    protocol, transport, peer = paused(Recorder, kit)
    transport.set_protocol(base_events._SendfileFallbackProtocol(transport))  # type: ignore[attr-defined]
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    transport.set_protocol(protocol)
    kit.until(lambda: "eof_received" in protocol.calls)
    assert protocol.lost == []


@forkd_only
@pytest.mark.parametrize("keep", [True, False])
def test_a_protocol_that_reads_on_when_it_is_told_is_told_once(kit: Kit, keep: bool) -> None:
    def eof(p: AnyRecorder) -> bool:
        p.transport.resume_reading()
        return keep

    protocol, transport, peer = paused(Recorder, kit, eof_received=eof)
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: "eof_received" in protocol.calls)
    kit.turn()
    assert protocol.calls.count("eof_received") == 1
    assert (protocol.lost, transport.is_closing()) == (([], False) if keep else ([None], True))


@forkd_only
def test_a_peer_that_is_gone_for_certain_is_not_waited_for(kit: Kit) -> None:
    """A unix socket tells a peer that has closed from one that sends no more."""
    protocol, _, peer = paused(Recorder, kit, socket.socketpair)
    peer.close()
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]
    assert events(protocol) == ["connection_made", "eof_received", "connection_lost"]


@forkd_only
def test_what_such_a_peer_has_sent_is_read_all_the_same(kit: Kit) -> None:
    protocol, transport, peer = paused(Recorder, kit, socket.socketpair)
    peer.sendall(b"the last words")
    peer.close()
    kit.turn()
    assert events(protocol) == ["connection_made"]
    transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert protocol.received == b"the last words"


@forkd_only
def test_a_connection_that_is_shut_in_both_directions_ends(kit: Kit) -> None:
    protocol, transport, peer = paused(Recorder, kit)
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: "eof_received" in protocol.calls)
    transport.write(b"all that there was to say")
    transport.write_eof()
    kit.until(lambda: protocol.lost)
    assert kit.in_thread(read_to_end, peer) == b"all that there was to say"


@forkd_only
def test_eof_received_that_raises_loses_the_connection(kit: Kit) -> None:
    def fail(_: Any) -> None:
        raise ValueError("oops")

    protocol, transport, peer = paused(Recorder, kit, eof_received=fail)
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [ValueError]
    assert [type(one["exception"]) for one in kit.take_reported()] == [ValueError]
    assert transport.is_closing()


@forkd_only
@PAIRS
@pytest.mark.parametrize("first", [b"", b"unread"])
@pytest.mark.parametrize("writing", [False, True])
def test_a_hang_up_that_lasts_does_not_wake_the_loop_again(
    kit: Kit, pair: SocketPair, first: bytes, writing: bool
) -> None:
    """Half closed, with something unread and without; while much is to be sent, and not."""
    protocol, transport, peer = paused(Recorder, kit, pair, eof_received=lambda _: True)
    if writing:
        transport.write(bytes(MUCH * 4))
    peer.sendall(first)
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    served, fd = kit.poll_loop.selector.served, transport.get_extra_info("socket").fileno()
    events, ready = [], served[fd]

    def count(mask: int) -> None:
        events.append(mask)
        ready(mask)

    served[fd] = count
    kit.run(asyncio.sleep(0.2))
    assert len(events) < 10
    assert protocol.lost == []


# With the daemon


@pytest.mark.parametrize("words", [b"pause\n", b"pause\nunread"])
def test_a_worker_that_holds_a_half_closed_connection_is_idle(harness: Harness, words: bytes) -> None:
    daemon = harness.daemon(target="pauses:Pauses", workers=1).run()
    worker = daemon.workers()[1]
    client = harness.connect(daemon)
    client.sendall(b"pause\n")
    assert read(client, 7) == b"paused\n"
    client.sendall(words.removeprefix(b"pause\n"))
    client.shutdown(socket.SHUT_WR)
    if words.endswith(b"\n"):
        daemon.wait_log("told of the end of file")

    def used() -> float:
        fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    start, before = time.monotonic(), used()
    eventually(lambda: time.monotonic() - start > 1.0, what="a second")
    assert used() - before < 0.25 * (time.monotonic() - start)
    assert daemon.wait_clients(1)


def test_a_client_that_resets_is_gone_though_not_read(harness: Harness) -> None:
    daemon = harness.daemon(target="pauses:Pauses", workers=1).run()
    client, other = harness.connect(daemon), harness.connect(daemon)
    for one in (client, other):
        one.sendall(b"pause\n")
        assert read(one, 7) == b"paused\n"
    reset(client)
    daemon.wait_log("lost it by ConnectionResetError")
    daemon.wait_clients(1)


def test_a_half_closed_client_of_a_daemon_gets_its_answer(harness: Harness) -> None:
    daemon = harness.daemon(target="pauses:Pauses", workers=1).run()
    client = harness.connect(daemon)
    client.sendall(b"answer later\n")
    client.shutdown(socket.SHUT_WR)
    assert read(client, 7) == b"paused\n"
    assert read(client, 7) == b"answer\n"
    assert at_end(client)
