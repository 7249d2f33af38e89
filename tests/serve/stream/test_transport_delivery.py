"""What the transport tells of delivery, and in how many pieces it sends: a socket of packets shows each send as one."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener, Timeouts
from forkd.ended import WriteTimeout
from forkd.serve.deadlines import Deadlines, TimeoutPolicy
from tests.serve.stream.test_transport_closing import reset
from tests.support.transport_contract import (
    MUCH,
    Kit,
    Recorder,
    SocketPair,
    forkd_only,
    kits,
    read_exactly,
    read_to_end,
    tcp_pair,
)

kit = kits
pytestmark = forkd_only


#: A transport, its peer, and its protocol.
Ends = tuple[Any, socket.socket, Recorder]


def packets() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@pytest.fixture
def ends(kit: Kit) -> Ends:
    protocol = Recorder(kit)
    return *kit.connect(protocol, packets), protocol


def sent(peer: socket.socket) -> list[bytes]:
    """What has come, a piece for each send; at the end of file an empty one."""
    peer.setblocking(False)
    found: list[bytes] = []
    try:
        while not found or found[-1]:
            found.append(peer.recv(1 << 20))
    except BlockingIOError:
        pass
    return found


# One segment


def test_several_lines_are_one_send(ends: Ends) -> None:
    transport, peer, _ = ends
    transport.writelines([b"one", bytearray(b"two"), memoryview(b"three")])
    transport.write(b"four")
    assert sent(peer) == [b"onetwothree", b"four"]


def test_what_is_written_in_a_block_is_one_send_at_its_end(ends: Ends) -> None:
    transport, peer, _ = ends
    with transport.cork():
        for word in (b"one", b"two", bytearray(b"three")):
            transport.write(word)
        transport.writelines([b"four", b"five"])
        assert sent(peer) == []
        assert transport.get_write_buffer_size() == 19
    assert sent(peer) == [b"onetwothreefourfive"]
    transport.write(b"at once")
    assert (sent(peer), transport.get_write_buffer_size()) == ([b"at once"], 0)


def test_blocks_nest(ends: Ends) -> None:
    transport, peer, _ = ends
    with transport.cork():
        with transport.cork():
            transport.write(b"one")
        transport.write(b"two")
        assert sent(peer) == []
    assert sent(peer) == [b"onetwo"]


def test_an_empty_block_changes_nothing(ends: Ends) -> None:
    transport, peer, _ = ends
    with transport.cork():
        pass
    transport.write(b"at once")
    assert sent(peer) == [b"at once"]


def test_an_exception_in_a_block_still_sends_what_was_written(ends: Ends) -> None:
    transport, peer, _ = ends

    def fail() -> None:
        with transport.cork():
            transport.write(b"before it")
            raise ValueError("oops")

    with pytest.raises(ValueError, match="oops"):
        fail()
    assert sent(peer) == [b"before it"]


def test_a_block_may_await(kit: Kit, ends: Ends) -> None:
    transport, peer, _ = ends

    async def speak() -> None:
        with transport.cork():
            transport.write(b"one")
            await asyncio.sleep(0)
            transport.write(b"two")
            assert sent(peer) == []

    kit.run(speak())
    assert sent(peer) == [b"onetwo"]


def test_blocks_of_two_tasks_end_with_the_last(kit: Kit, ends: Ends) -> None:
    transport, peer, _ = ends
    gate = asyncio.Event()

    async def first() -> None:
        with transport.cork():
            transport.write(b"one")
            await gate.wait()

    async def second() -> None:
        with transport.cork():
            transport.write(b"two")
        assert sent(peer) == []
        gate.set()

    async def both() -> None:
        await asyncio.gather(first(), second())

    kit.run(both())
    assert sent(peer) == [b"onetwo"]


def test_closing_in_a_block_sends_what_was_written(kit: Kit, ends: Ends) -> None:
    transport, peer, protocol = ends
    with transport.cork():
        transport.write(b"one")
        transport.write(b"two")
        transport.close()
    kit.until(lambda: protocol.lost)
    assert (sent(peer), protocol.lost) == ([b"onetwo", b""], [None])


def test_an_end_of_file_in_a_block_comes_after_what_was_written(kit: Kit, ends: Ends) -> None:
    transport, peer, _ = ends
    with transport.cork():
        transport.write(b"one")
        transport.write_eof()
        with pytest.raises(RuntimeError):
            transport.write(b"too late")
    kit.turn()
    assert sent(peer) == [b"one", b""]


def test_an_end_of_file_alone_in_a_block_is_sent_at_once(ends: Ends) -> None:
    transport, peer, _ = ends
    with transport.cork():
        transport.write_eof()
        assert sent(peer) == [b""]


@pytest.mark.parametrize("words", [b"", b"lost"])
def test_aborting_in_a_block_sends_nothing(kit: Kit, ends: Ends, words: bytes) -> None:
    transport, peer, protocol = ends
    with transport.cork():
        transport.write(words)
        transport.abort()
    kit.until(lambda: protocol.lost)
    assert sent(peer) == [b""]


def test_what_is_gathered_is_bounded_by_the_high_water_mark(ends: Ends) -> None:
    transport, peer, protocol = ends
    transport.set_write_buffer_limits(1000)
    with transport.cork():
        for _ in range(25):
            transport.write(bytes(100))
            assert transport.get_write_buffer_size() <= 1000
    assert [len(piece) for piece in sent(peer)] == [1100, 1100, 300]
    assert "pause_writing" not in protocol.calls


def test_what_is_gathered_is_no_clients_fault(kit: Kit) -> None:
    """The limit above which a client that does not read is given up is for what the socket does not take."""
    kit.observer.write_limit = 1000
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, packets)
    with transport.cork():
        for _ in range(50):
            transport.write(bytes(100))
    assert sum(map(len, sent(peer))) == 5000
    assert protocol.lost == []


@pytest.mark.parametrize("closing", [False, True])
def test_only_what_the_socket_does_not_take_is_stuck(kit: Kit, closing: bool) -> None:
    """A handler may hold what it gathers for longer than `timeouts.write`; a client may not."""
    timeouts = Timeouts(first_byte=0.0, idle=0.0, write=5.0)
    listener = Listener(address=parse_address("tcp://127.0.0.1:0"), handler="a:b", timeouts=timeouts)
    kit.observer.timeouts = TimeoutPolicy(listener, Deadlines(kit.loop))
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, socket.socketpair)
    transport.write(b"x" * MUCH)  # something was stuck before
    kit.in_thread(read_exactly, peer, MUCH)
    kit.turn()
    kit.observer.timeouts.deadlines.forget(transport)
    with transport.cork():
        transport.write(b"x" * 100)
        assert [transport.check(monotonic() + later) for later in (60, 120)] == [0.0, 0.0]
        transport.set_write_buffer_limits(2 * MUCH)
        transport.write(b"x" * MUCH)
        if closing:
            transport.close()
    kit.turn()
    assert transport.get_write_buffer_size() > 0
    assert (protocol.lost, transport.due > 0) == ([], True)
    for later in (60, 120):
        transport.check(monotonic() + later)
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [WriteTimeout]


def test_a_mark_lowered_in_a_block_pauses_no_longer(ends: Ends) -> None:
    transport, _, protocol = ends
    with transport.cork():
        transport.write(b"one")
        transport.set_write_buffer_limits(0)
    assert protocol.calls == ["connection_made", "pause_writing", "resume_writing"]


@pytest.mark.parametrize("handler", ["plain", "in data_received"])
def test_much_in_a_block_arrives_whole_and_pauses_the_protocol(kit: Kit, handler: str) -> None:
    """As without a block; the peer reads when all is written."""

    def speak(transport: Any) -> None:
        with transport.cork():
            for number in range(64):
                transport.write(bytes([number]) * (MUCH // 64))

    protocol = Recorder(kit, data_received=lambda p, _: speak(p.transport))
    transport, peer = kit.connect(protocol, first=b"" if handler == "plain" else b"go")
    if handler == "plain":
        speak(transport)
    else:
        kit.until(lambda: protocol.received)
    assert "pause_writing" in protocol.calls
    received = kit.in_thread(read_exactly, peer, MUCH)
    assert received == b"".join(bytes([number]) * (MUCH // 64) for number in range(64))
    kit.until(lambda: "resume_writing" in protocol.calls)
    kit.turn()
    transport.write(b"at once")
    assert transport.get_write_buffer_size() == 0


def test_a_block_behind_a_backlog_keeps_the_order(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    transport.write(b"x" * MUCH)
    assert transport.get_write_buffer_size() > 0

    async def speak() -> Any:
        with transport.cork():
            transport.write(b"one")
            received = await kit.loop.run_in_executor(None, read_exactly, peer, MUCH + 3)
            transport.write(b"two")
            assert transport.get_write_buffer_size() == 3
        return received

    assert kit.run(speak()) == b"x" * MUCH + b"one"
    assert kit.in_thread(read_exactly, peer, 3) == b"two"
    assert transport.get_write_buffer_size() == 0


def test_a_peer_that_resets_during_a_block_ends_it_as_ever(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, tcp_pair)
    with transport.cork():
        transport.write(b"one")
        reset(peer)
        kit.until(lambda: protocol.lost)
        transport.write(b"two")
    assert [type(error) for error in protocol.lost] == [ConnectionResetError]


def test_a_write_that_fails_at_a_blocks_end_ends_all(kit: Kit, ends: Ends) -> None:
    transport, peer, protocol = ends
    with transport.cork():
        transport.write(b"one")
        peer.close()
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [BrokenPipeError]


# Acknowledgements


def stuffed(kit: Kit, pair: SocketPair = tcp_pair, **hooks: Callable[..., Any]) -> tuple[Recorder, Any, socket.socket]:
    """A transport with much unsent to a peer that does not read."""
    protocol = Recorder(kit, **hooks)
    transport, peer = kit.connect(protocol, pair)
    transport.write(bytes(MUCH * 4))
    return protocol, transport, peer


def test_what_is_written_is_unacknowledged_until_the_peer_has_it(kit: Kit) -> None:
    protocol, transport, peer = stuffed(kit)
    assert transport.unacked() > transport.get_write_buffer_size() > 0
    before = transport.unacked()
    kit.in_thread(read_exactly, peer, MUCH)
    kit.turn()
    assert 0 < transport.unacked() < before
    assert len(kit.in_thread(read_exactly, peer, MUCH * 3)) == MUCH * 3
    kit.run(transport.wait_acked(10))
    assert transport.unacked() == 0
    assert protocol.lost == []


def test_corked_bytes_count_and_are_sent_before_waiting(kit: Kit) -> None:
    transport, peer = kit.connect(Recorder(kit), tcp_pair)

    async def speak() -> None:
        with transport.cork():
            transport.write(b"one")
            assert transport.unacked() == 3
            await transport.wait_acked(10)
            transport.write(b"two")
            assert transport.unacked() == 3

    kit.run(speak())
    assert kit.in_thread(read_exactly, peer, 6) == b"onetwo"


@pytest.mark.parametrize("timeout", [0, 0.02])
def test_wait_acked_times_out_and_sending_goes_on(kit: Kit, timeout: float) -> None:
    _, transport, peer = stuffed(kit)
    with pytest.raises(TimeoutError, match=rf"\d+ bytes are unacknowledged after {timeout:g} s"):
        kit.run(transport.wait_acked(timeout))

    async def patient() -> None:
        waiting = asyncio.ensure_future(transport.wait_acked())
        await kit.loop.run_in_executor(None, read_exactly, peer, MUCH * 4)
        await waiting

    kit.run(patient())
    assert transport.unacked() == 0


def test_unacked_of_a_unix_socket_is_what_is_unread(kit: Kit) -> None:
    transport, peer = kit.connect(Recorder(kit), socket.socketpair)
    assert transport.unacked() == 0
    transport.write(b"one")
    assert transport.unacked() > 0
    with pytest.raises(TimeoutError):
        kit.run(transport.wait_acked(0.01))
    peer.setblocking(True)
    assert peer.recv(100) == b"one"
    kit.run(transport.wait_acked(10))


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (lambda _, peer: reset(peer), ConnectionResetError),
        (lambda transport, _: transport.abort(), ConnectionAbortedError),
    ],
)
def test_wait_acked_raises_when_the_connection_is_lost(
    kit: Kit, end: Callable[[Any, socket.socket], None], error: type[BaseException]
) -> None:
    protocol, transport, peer = stuffed(kit, connection_lost=lambda p: left.append(p.transport.unacked()))
    left: list[int] = []

    async def wait() -> None:
        waiting = asyncio.ensure_future(transport.wait_acked())
        await asyncio.sleep(0)
        end(transport, peer)
        await waiting

    with pytest.raises(error):
        kit.run(wait())
    kit.until(lambda: protocol.lost)
    assert len(left) == len(protocol.lost) == 1
    assert left[0] > 0
    for ask in (transport.unacked, lambda: kit.run(transport.wait_acked(1))):
        with pytest.raises(error):
            ask()


def test_an_end_of_file_counts_until_it_is_acknowledged(kit: Kit) -> None:
    transport, peer = kit.connect(Recorder(kit), tcp_pair)
    transport.write(b"one")
    transport.write_eof()
    kit.run(transport.wait_acked(10))
    assert kit.in_thread(read_to_end, peer) == b"one"
