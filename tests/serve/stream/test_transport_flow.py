"""The transport against asyncio's contract: the write buffer, its water marks, and telling the protocol to pause.

Each test runs against asyncio's own socket transport too, but for what forkd adds: the limit at which a client that
does not read is given up.
"""

from __future__ import annotations

import resource
import select
import socket
from collections.abc import Callable
from typing import Any

import pytest

from forkd.ended import WriteBufferFull
from tests.support.transport_contract import (
    MUCH,
    AnyRecorder,
    Kit,
    Recorder,
    forkd_only,
    kits,
    read_exactly,
    read_to_end,
)

kit = kits


def of(name: str) -> Callable[[AnyRecorder], int]:
    return lambda protocol: protocol.calls.count(name)


pauses, resumes = of("pause_writing"), of("resume_writing")


def fill(transport: Any) -> int:
    """Writes until the kernel takes no more; how many bytes it took."""
    written = 0
    while not transport.get_write_buffer_size():
        transport.write(bytes(1000))
        written += 1000
    return written - int(transport.get_write_buffer_size())


def test_the_protocol_pauses_and_resumes_at_the_marks(kit: Kit) -> None:
    sizes = []
    protocol = Recorder(kit, resume_writing=lambda p: sizes.append(p.transport.get_write_buffer_size()))
    transport, peer = kit.connect(protocol, socket.socketpair)
    assert transport.get_write_buffer_limits() == (16 * 1024, 64 * 1024)
    taken = fill(transport)
    transport.write(bytes(64 * 1024 - transport.get_write_buffer_size()))
    assert (transport.get_write_buffer_size(), pauses(protocol)) == (64 * 1024, 0)
    transport.write(b"x")
    transport.write(bytes(MUCH))
    assert (transport.get_write_buffer_size(), pauses(protocol)) == (64 * 1024 + 1 + MUCH, 1)
    kit.in_thread(read_exactly, peer, MUCH // 2)
    kit.turn()
    assert (pauses(protocol), resumes(protocol)) == (1, 0)
    kit.in_thread(read_exactly, peer, taken + 64 * 1024 + 1 + MUCH // 2)
    kit.until(lambda: resumes(protocol))
    assert sizes[0] <= 16 * 1024


def test_between_the_marks_nothing_changes(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol, socket.socketpair)
    low, high = MUCH // 4, MUCH // 4 * 3
    transport.set_write_buffer_limits(high, low)
    transport.write(bytes(MUCH))
    assert pauses(protocol) == 1
    kit.in_thread(read_exactly, peer, MUCH // 2)
    kit.turn()
    assert low < transport.get_write_buffer_size() < high
    assert resumes(protocol) == 0
    kit.in_thread(read_exactly, peer, MUCH // 4)
    kit.until(lambda: resumes(protocol))
    assert 0 < transport.get_write_buffer_size() <= low
    transport.write(bytes(low))
    assert low < transport.get_write_buffer_size() < high
    assert pauses(protocol) == 1


def test_what_the_socket_takes_at_once_pauses_nothing(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, _ = kit.connect(protocol)
    transport.set_write_buffer_limits(0)
    transport.write(b"short")
    assert (transport.get_write_buffer_size(), pauses(protocol)) == (0, 0)


def test_pausing_and_resuming_alternate(kit: Kit) -> None:
    def write_until_paused(protocol: AnyRecorder) -> None:
        while pauses(protocol) == resumes(protocol) < 4:
            protocol.transport.write(bytes(MUCH))

    protocol = Recorder(kit, resume_writing=write_until_paused)
    transport, peer = kit.connect(protocol)
    write_until_paused(protocol)
    reading = kit.loop.run_in_executor(None, read_to_end, peer)
    kit.until(lambda: resumes(protocol) == 4)
    transport.close()
    assert len(kit.run(reading)) >= 4 * MUCH
    assert protocol.calls[1:-1] == ["pause_writing", "resume_writing"] * 4


@pytest.mark.parametrize(
    ("high", "low", "limits"),
    [
        (None, None, (16384, 65536)),
        (100, None, (25, 100)),
        (None, 100, (100, 400)),
        (100, 100, (100, 100)),
        (0, None, (0, 0)),
        (5, 0, (0, 5)),
    ],
)
def test_limits_follow_from_each_other(kit: Kit, high: int | None, low: int | None, limits: Any) -> None:
    transport, _ = kit.connect(Recorder(kit))
    transport.set_write_buffer_limits(high=high, low=low)
    assert transport.get_write_buffer_limits() == limits


@pytest.mark.parametrize(("high", "low"), [(1, 2), (-1, None), (None, -1), (5, -1)])
def test_wrong_limits_are_refused_and_change_nothing(kit: Kit, high: int | None, low: int | None) -> None:
    transport, _ = kit.connect(Recorder(kit))
    transport.set_write_buffer_limits(10, 5)
    with pytest.raises(ValueError, match="must be >="):
        transport.set_write_buffer_limits(high=high, low=low)
    assert transport.get_write_buffer_limits() == (5, 10)


def test_a_lower_limit_pauses_at_once(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, _ = kit.connect(protocol)
    fill(transport)
    assert pauses(protocol) == 0
    transport.set_write_buffer_limits(0)
    assert pauses(protocol) == 1


def test_a_limit_of_zero_resumes_when_all_is_sent(kit: Kit) -> None:
    sizes = []
    protocol = Recorder(kit, resume_writing=lambda p: sizes.append(p.transport.get_write_buffer_size()))
    transport, peer = kit.connect(protocol)
    transport.set_write_buffer_limits(0)
    fill(transport)
    kit.in_thread(peer.recv, 1 << 20)
    kit.until(lambda: sizes)
    assert sizes == [0]


def test_connection_made_may_write_more_than_the_socket_takes(kit: Kit) -> None:
    protocol = Recorder(kit, connection_made=lambda p: p.transport.write(bytes(MUCH)))
    _, peer = kit.connect(protocol, first=b"and reads on")
    assert len(kit.in_thread(read_exactly, peer, MUCH)) == MUCH
    kit.until(lambda: protocol.received and resumes(protocol))
    assert protocol.received == b"and reads on"


def test_data_is_received_while_much_is_unsent(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    peer.sendall(b"meanwhile")
    kit.until(lambda: protocol.received)
    assert (bytes(protocol.received), pauses(protocol), resumes(protocol)) == (b"meanwhile", 1, 0)


def test_a_proxy_that_pauses_either_side_passes_all_on(kit: Kit) -> None:
    there = Recorder(
        kit,
        pause_writing=lambda _: here.transport.pause_reading(),
        resume_writing=lambda _: here.transport.resume_reading(),
    )
    here = Recorder(kit, data_received=lambda _, data: there.transport.write(data))
    (_, source), (_, sink) = kit.connect(here), kit.connect(there)
    sending = kit.loop.run_in_executor(None, source.sendall, bytes(MUCH))
    kit.until(lambda: pauses(there))
    kit.turn()
    assert there.transport.get_write_buffer_size() < MUCH // 4
    assert len(kit.in_thread(read_exactly, sink, MUCH)) == MUCH
    kit.run(sending)


@pytest.mark.parametrize("end", ["close", "abort"])
def test_the_connection_may_end_where_writing_pauses(kit: Kit, end: str) -> None:
    check_end(kit, "pause_writing", end)


@forkd_only
@pytest.mark.parametrize("end", ["close", "abort"])
def test_the_connection_may_end_where_writing_resumes(kit: Kit, end: str) -> None:
    # asyncio's own calls connection_lost twice then, and reports an error of its own.
    check_end(kit, "resume_writing", end)


def check_end(kit: Kit, where: str, end: str) -> None:
    protocol = Recorder(kit, **{where: lambda p: getattr(p.transport, end)()})
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    received = kit.in_thread(read_to_end, peer)
    kit.until(lambda: protocol.lost)
    kit.turn()
    assert protocol.lost == [None]
    assert len(received) == MUCH or end == "abort"


def test_write_eof_where_writing_resumes(kit: Kit) -> None:
    protocol = Recorder(kit, resume_writing=lambda p: p.transport.write_eof())
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    assert len(kit.in_thread(read_to_end, peer)) == MUCH
    peer.sendall(b"still open")
    kit.until(lambda: protocol.received)
    assert not transport.is_closing()


def writes_once_resumed(kit: Kit, word: bytes) -> Recorder:
    return Recorder(kit, resume_writing=lambda p: resumes(p) == 1 and p.transport.write(word))


@forkd_only
@pytest.mark.parametrize("word", [b"last", b"long" * MUCH], ids=["short", "more than the socket takes"])
def test_a_closing_connection_sends_what_resuming_writes(kit: Kit, word: bytes) -> None:
    # asyncio's own in Python 3.12 and 3.13 calls None for ever where the socket does not take all of it at once.
    protocol = writes_once_resumed(kit, word)
    transport, peer = kit.connect(protocol)
    transport.set_write_buffer_limits(0)
    transport.write(bytes(MUCH))
    transport.close()
    assert kit.in_thread(read_to_end, peer)[MUCH:] == word
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


def test_closing_connections_write_to_their_own_peers_alone(kit: Kit) -> None:
    """Each is closed with unsent data, and writes its last word when that is sent, all in one round."""
    words = [b"first", b"second", b"third"]
    peers = []
    for word in words:
        transport, peer = kit.connect(writes_once_resumed(kit, word), socket.socketpair)
        transport.set_write_buffer_limits(0)
        fill(transport)
        transport.close()
        peers.append(peer)
    for peer in peers:
        drain(peer)
    tails = [kit.in_thread(read_to_end, peer).lstrip(b"\0") for peer in peers]
    assert tails == words


@forkd_only  # asyncio's own may call None for ever: as of `test_a_closing_connection_sends_what_resuming_writes`
def test_bytes_of_a_closing_connection_are_unsent_on_no_other(kit: Kit) -> None:
    sizes = []
    bystander, _ = kit.connect(Recorder(kit))
    bystander.write_eof()

    def write_and_look(protocol: AnyRecorder) -> None:
        if resumes(protocol) == 1:
            protocol.transport.write(b"last")
            sizes.append(bystander.get_write_buffer_size())

    transport, peer = kit.connect(Recorder(kit, resume_writing=write_and_look))
    transport.set_write_buffer_limits(0)
    transport.write(bytes(MUCH))
    transport.close()
    assert kit.in_thread(read_to_end, peer)[MUCH:] == b"last"
    assert sizes == [0]


def drain(peer: socket.socket) -> None:
    """Reads what is there."""
    while select.select([peer], [], [], 0)[0]:
        peer.recv(1 << 20)


@forkd_only
def test_writelines_pauses_the_protocol_as_write_does(kit: Kit) -> None:
    # asyncio's own does not in Python 3.13.
    protocol = Recorder(kit)
    transport, _ = kit.connect(protocol)
    transport.writelines([bytes(MUCH), b"x"])
    assert pauses(protocol) == 1


@forkd_only
@pytest.mark.parametrize("method", ["write", "writelines"])
def test_a_client_that_does_not_read_is_given_up_at_the_limit(
    kit: Kit, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    kit.observer.write_limit = 1 << 20
    protocol = Recorder(kit)
    transport, _ = kit.connect(protocol)
    most = 0
    for _ in range(1000):
        data = bytes(100_000)
        transport.write(data) if method == "write" else transport.writelines([data[:50_000], data[50_000:]])
        most = max(most, transport.get_write_buffer_size())
    assert 1 << 20 < most <= (1 << 20) + 100_000
    assert (transport.is_closing(), transport.get_write_buffer_size(), protocol.lost) == (True, 0, [])
    kit.until(lambda: protocol.lost)
    assert [type(error) for error in protocol.lost] == [WriteBufferFull]
    assert isinstance(protocol.lost[0], ConnectionError)
    assert (kit.observer.ended, kit.observer.errors) == (1, 0)
    assert len([message for message in caplog.messages if "does not read" in message]) == 1


@forkd_only
def test_memory_stays_bounded_with_a_client_that_does_not_read(kit: Kit) -> None:
    kit.observer.write_limit = 1 << 20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    transport, _ = kit.connect(Recorder(kit))
    data = bytes(100_000)
    for _ in range(5000):
        transport.write(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


@forkd_only
def test_one_write_may_be_larger_than_the_limit(kit: Kit) -> None:
    kit.observer.write_limit = 1000
    transport, peer = kit.connect(Recorder(kit))
    transport.write(bytes(MUCH))
    assert len(kit.in_thread(read_exactly, peer, MUCH)) == MUCH
    assert not transport.is_closing()


@forkd_only
def test_without_a_limit_everything_is_kept(kit: Kit) -> None:
    transport, _ = kit.connect(Recorder(kit))
    for _ in range(100):
        transport.write(bytes(100_000))
    assert transport.get_write_buffer_size() > 5_000_000
    assert not transport.is_closing()
