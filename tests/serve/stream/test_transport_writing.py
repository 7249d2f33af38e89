"""The transport against asyncio's contract: what may be written, and that it arrives whole and in order.

write and writelines, with every kind of buffer, while something is unsent and while nothing is; and one long exchange
both ways in pieces of random sizes, every byte of which is compared.
"""

from __future__ import annotations

import array
import asyncio
import ctypes
import mmap
import random
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from tests.support.processes import DEADLINE
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


class Pair(ctypes.Structure):
    _fields_ = (("one", ctypes.c_char), ("two", ctypes.c_int))


@pytest.fixture(params=[0, MUCH], ids=["nothing unsent", "much unsent"])
def before(request: pytest.FixtureRequest) -> int:
    """How many bytes are written first."""
    return int(request.param)


def written(kit: Kit, before: int, write: Callable[[Any], object]) -> bytes:
    """What reaches the peer after `before` bytes of something else, when `write` was called with the transport."""
    transport, peer = kit.connect(Recorder(kit))
    transport.write(b"\0" * before)
    write(transport)
    transport.close()
    received: bytes = kit.in_thread(read_to_end, peer)
    assert received[:before].count(0) == before
    return received[before:]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_like_objects_are_sent(kit: Kit, before: int, kind: Any) -> None:
    assert written(kit, before, lambda transport: transport.write(kind(b"some bytes"))) == b"some bytes"


def test_a_view_of_items_wider_than_a_byte_is_sent_whole(kit: Kit) -> None:
    items = array.array("I", range(1000))
    assert written(kit, 0, lambda transport: transport.write(memoryview(items))) == items.tobytes()


@forkd_only
@pytest.mark.parametrize("count", [1000, MUCH // 4])
@pytest.mark.parametrize("method", ["write", "writelines"])
def test_what_is_unsent_of_a_view_of_wide_items_is_kept_by_bytes(
    kit: Kit, before: int, method: str, count: int
) -> None:
    # asyncio's own cuts the view by items at the number of bytes that were sent.
    items = array.array("I", range(count))
    view = memoryview(items)
    pieces = view if method == "write" else [view[:7], view[7:]]
    assert written(kit, before, lambda transport: getattr(transport, method)(pieces)) == items.tobytes()


@forkd_only
@pytest.mark.parametrize("method", ["write", "writelines"])
def test_a_views_items_are_not_taken_for_its_sent_bytes(kit: Kit, method: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        taken = ours.send(b"x" * MUCH)
    view = memoryview(array.array("I", bytes(4 * taken)))
    pieces = view if method == "write" else [view[:10], view[10:]]
    assert len(written(kit, 0, lambda transport: getattr(transport, method)(pieces))) == 4 * taken


#: Views that have no bytes in a row, or none at all, or items that are no numbers of this machine.
ODD_VIEWS: dict[str, memoryview] = {
    "gaps": memoryview(b"abcdef")[::2],
    "backwards": memoryview(b"abcdef")[::-1],
    "two dimensions": memoryview(b"abcdef").cast("B", (2, 3)),
    "no rows": memoryview(b"abcdef").cast("B", (2, 3))[:0],
    "no items": memoryview(array.array("I"))[:0],
    "no dimensions": memoryview(b"abcd").cast("I", ()),
    "ctypes": memoryview((ctypes.c_int * 2)(1, 2)),
    "empty ctypes": memoryview((ctypes.c_int * 0)()),
    "structure": memoryview(Pair(b"1", 2)),
    "mapping": memoryview(mmap.mmap(-1, 16)),
}


@forkd_only  # asyncio's own ends the connection where bytes are not in a row
@pytest.mark.parametrize("view", ODD_VIEWS.values(), ids=ODD_VIEWS)
@pytest.mark.parametrize("method", ["write", "writelines"])
def test_odd_view_is_sent_as_its_bytes(kit: Kit, before: int, method: str, view: memoryview) -> None:
    pieces = view if method == "write" else [view, b"-", view]
    sent = written(kit, before, lambda transport: getattr(transport, method)(pieces))
    assert sent == (view.tobytes() if method == "write" else view.tobytes() + b"-" + view.tobytes())


@forkd_only  # asyncio's own takes items for bytes in Python 3.13
@pytest.mark.parametrize("odd", [array.array("I", [1, 2]), mmap.mmap(-1, 1)], ids=["array", "map"])
def test_other_buffer_is_a_piece_but_no_data(kit: Kit, before: int, odd: Any) -> None:
    def write(transport: Any) -> None:
        with pytest.raises(TypeError):
            transport.write(odd)
        transport.writelines([b"a", odd])

    assert written(kit, before, write) == b"a" + bytes(odd)


@pytest.mark.parametrize("wrong", ["text", None, 5])
def test_anything_else_is_refused(kit: Kit, before: int, wrong: Any) -> None:
    transport, peer = kit.connect(Recorder(kit))
    transport.write(b"\0" * before)
    with pytest.raises(TypeError):
        transport.write(wrong)
    with pytest.raises(TypeError):
        transport.writelines([b"a", wrong])
    transport.write(b"goes on")
    assert kit.in_thread(read_exactly, peer, before + 7)[before:] == b"goes on"


def test_writing_nothing_does_nothing(kit: Kit, before: int) -> None:
    def write(transport: Any) -> None:
        size = transport.get_write_buffer_size()
        for nothing in (b"", bytearray(), memoryview(b"")):
            transport.write(nothing)
        transport.writelines([])
        assert transport.get_write_buffer_size() == size

    assert written(kit, before, write) == b""


@forkd_only
def test_writelines_of_empty_pieces_does_nothing(kit: Kit, before: int) -> None:
    # asyncio's own never gets rid of them in Python 3.13.
    assert written(kit, before, lambda transport: transport.writelines([b"", b""])) == b""


@forkd_only
def test_what_was_written_may_be_changed_afterwards(kit: Kit, before: int) -> None:
    # asyncio's own has kept what is unsent by reference since Python 3.12.
    data = bytearray(b"x" * MUCH)

    def write(transport: Any) -> None:
        transport.write(data)
        transport.writelines([data, data])
        data[:] = b"y" * 10

    assert set(written(kit, before, write)) == {ord("x")}


PIECES = {
    "none": [],
    "empty among others": [b"", b"a", b"", b"b"],
    "one": [b"alone"],
    "kinds": [b"bytes", bytearray(b"bytearray"), memoryview(b"a view")],
    "many": [b"%d," % number for number in range(5000)],
    "big": [bytes([number]) * (MUCH // 8) for number in range(1, 9)],
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
def test_writelines_sends_every_piece_in_order(kit: Kit, before: int, pieces: list[bytes]) -> None:
    assert written(kit, before, lambda transport: transport.writelines(pieces)) == b"".join(pieces)


def test_writelines_takes_a_generator(kit: Kit, before: int) -> None:
    pieces = [b"%d," % number for number in range(2000)]
    assert written(kit, before, lambda transport: transport.writelines(each for each in pieces)) == b"".join(pieces)


def test_writes_of_both_kinds_keep_their_order(kit: Kit, before: int) -> None:
    def write(transport: Any) -> None:
        for number in range(300):
            transport.write(b"%d:" % number)
            transport.writelines([b"%d" % number, b";"])

    assert written(kit, before, write) == b"".join(b"%d:%d;" % (number, number) for number in range(300))


@pytest.mark.parametrize("protocol_class", [Recorder, BufferedRecorder])
@pytest.mark.parametrize("pair", [tcp_pair, socket.socketpair], ids=["tcp", "unix"])
@pytest.mark.parametrize("seed", range(2))
def test_a_long_exchange_loses_and_mixes_up_nothing(
    kit: Kit, seed: int, pair: SocketPair, protocol_class: RecorderClass
) -> None:
    """Both directions at once, in pieces of random sizes, with pauses of reading on either side."""
    ours, theirs = (random.Random(2 * seed + side).randbytes(5_000_000) for side in (0, 1))
    dice = random.Random(seed)

    def at_random(protocol: AnyRecorder, *_: Any) -> None:
        if dice.random() < 0.1:
            protocol.transport.pause_reading()
            kit.loop.call_soon(protocol.transport.resume_reading)

    name = "data_received" if protocol_class is Recorder else "buffer_updated"
    protocol = protocol_class(kit, **{name: at_random})
    transport, peer = kit.connect(protocol, pair)
    with ThreadPoolExecutor(2) as threads:
        sending = threads.submit(peer.sendall, theirs)
        reading = threads.submit(read_in_random_pieces, peer, random.Random(seed), len(ours))
        kit.run(write_in_random_pieces(protocol, transport, dice, ours))
        kit.until(lambda: len(protocol.received) == len(theirs))
        kit.in_thread(wait, [sending, reading], DEADLINE)
        sending.result(0)
        assert (protocol.received == theirs, reading.result(0) == ours) == (True, True)


async def write_in_random_pieces(protocol: AnyRecorder, transport: Any, dice: random.Random, data: bytes) -> None:
    """Writes it all, and no further while the protocol is paused."""
    may_write = asyncio.Event()
    may_write.set()
    protocol.hooks |= {"pause_writing": lambda _: may_write.clear(), "resume_writing": lambda _: may_write.set()}
    while data:
        await may_write.wait()
        size = dice.choice([1, 100, 4096, 65536, 300000])
        if dice.random() < 0.5:
            transport.writelines([data[: size // 2], data[size // 2 : size]])
        else:
            transport.write(data[:size])
        data = data[size:]
        if dice.random() < 0.05:
            await asyncio.sleep(0)


def read_in_random_pieces(peer: socket.socket, dice: random.Random, count: int) -> bytes:
    got = bytearray()
    while len(got) < count and (piece := peer.recv(dice.choice([10, 1000, 100000]))):
        got += piece
    return bytes(got)
