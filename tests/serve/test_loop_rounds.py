"""One round of the poll loop: several descriptors are ready, and what is called for one changes what another is for.

What was taken out, closed, replaced or reused by then must neither be called nor lost, whichever event epoll reports
first. The tests of descriptors that asyncio watches run on asyncio's own loop too, in the order that means the same
there.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from forkd.serve.loop import IN
from tests.support.transport_contract import MUCH, Kit, Recorder, forkd_only, kits, read_exactly, tcp_pair, watched_pipe

kit = kits
pipe = watched_pipe

both_orders = pytest.mark.parametrize(
    ("kit", "served_first"),
    [("asyncio", True), ("forkd", True), ("forkd", False), ("compiled", True), ("compiled", False)],
    indirect=["kit"],
)


def in_one_round(kit: Kit, served_first: bool, hook: Callable[[], Any], make_ready: Callable[[], Any]) -> None:
    """Has a callback of a served connection call the hook in the round in which something else becomes ready."""
    protocol, send = kit.on_byte(hook)
    for step in (send, make_ready) if served_first else (make_ready, send):
        step()
    kit.turn()
    assert protocol.received == b"x"


@both_orders
def test_a_reader_removed_in_the_same_round_is_not_called(kit: Kit, served_first: bool, pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    called: list[object] = []
    kit.loop.add_reader(reading, called.append, "old")
    in_one_round(kit, served_first, lambda: kit.loop.remove_reader(reading), lambda: os.write(writing, b"x"))
    assert called == []


@both_orders
def test_a_reader_replaced_in_the_same_round_goes_on(kit: Kit, served_first: bool, pipe: tuple[int, int]) -> None:
    """What asyncio is told must not be of the reader that was replaced: it would remove the new one."""
    reading, writing = pipe
    called: list[object] = []

    def replace() -> None:
        kit.loop.remove_reader(reading)
        kit.loop.add_reader(reading, called.append, "new")

    kit.loop.add_reader(reading, called.append, "old")
    in_one_round(kit, served_first, replace, lambda: os.write(writing, b"x"))
    assert set(called) == {"new"}


@both_orders
def test_a_writer_added_in_the_same_round_keeps_the_reader(kit: Kit, served_first: bool) -> None:
    ours, theirs = kit.pair()
    called: list[object] = []
    kit.loop.add_reader(ours, called.append, "read")
    in_one_round(
        kit, served_first, lambda: kit.loop.add_writer(ours, called.append, "write"), lambda: theirs.sendall(b"x")
    )
    kit.loop.remove_reader(ours)
    kit.loop.remove_writer(ours)
    assert set(called) == {"read", "write"}


@both_orders
def test_a_paused_and_resumed_connection_of_asyncios_reads_on(kit: Kit, served_first: bool) -> None:
    """A served connection pauses and resumes a connection that asyncio serves, in the round in which that has data."""

    async def connect() -> Any:
        return await kit.loop.connect_accepted_socket(lambda: upstream, ours)

    upstream = Recorder(kit)
    ours, theirs = kit.pair()
    transport, _ = kit.run(connect())
    in_one_round(
        kit,
        served_first,
        lambda: (transport.pause_reading(), transport.resume_reading()),
        lambda: theirs.sendall(b"data"),
    )
    transport.abort()
    kit.turn()
    assert upstream.received == b"data"


@both_orders
def test_a_descriptor_closed_in_the_same_round_is_harmless(kit: Kit, served_first: bool) -> None:
    def close() -> None:
        kit.loop.remove_reader(ours)
        ours.close()

    ours, theirs = kit.pair()
    called: list[object] = []
    kit.loop.add_reader(ours, called.append, "read")
    in_one_round(kit, served_first, close, lambda: theirs.sendall(b"x"))
    assert called == []


@both_orders
def test_a_descriptor_reused_in_the_same_round_has_its_reader(kit: Kit, served_first: bool) -> None:
    """An event of the old file told to the new one's callback would say, of a connect, that it has succeeded."""
    old, old_peer = kit.pair()
    called: list[object] = []
    new: list[socket.socket] = []

    def use_number_again() -> None:
        kit.loop.remove_reader(old)
        number = old.fileno()
        old.close()
        new.extend(kit.pair())
        assert number in [each.fileno() for each in new]
        for each in new:
            kit.loop.add_reader(each, called.append, each.fileno())

    kit.loop.add_reader(old, called.append, "old")
    in_one_round(kit, served_first, use_number_again, lambda: old_peer.sendall(b"x"))
    stale = list(called)
    for each in new:
        each.sendall(b"x")
    kit.turn()
    for each in new:
        kit.loop.remove_reader(each)
    assert stale == []
    assert set(called) == {each.fileno() for each in new}


@forkd_only
def test_neighbours_taken_out_in_the_same_round_get_no_events(kit: Kit) -> None:
    """`served` and epoll are forkd's own to change at any time."""
    selector = kit.poll_loop.selector
    pairs = [kit.pair() for _ in range(5)]
    calls = []

    def take_all_out(_: Any) -> None:
        calls.append("one")
        for ours, _ in pairs:
            selector.epoll.unregister(ours.fileno())
            del selector.served[ours.fileno()]

    for ours, theirs in pairs:
        selector.served[ours.fileno()] = take_all_out
        selector.epoll.register(ours.fileno(), IN)
        theirs.sendall(b"x")
    kit.turn()
    assert calls == ["one"]


@forkd_only
@pytest.mark.parametrize("listener", range(5))
def test_listeners_are_served_before_the_rest_of_their_round(kit: Kit, listener: int) -> None:
    selector = kit.poll_loop.selector
    pairs = [kit.pair() for _ in range(5)]
    order: list[socket.socket] = []

    def read(sock: socket.socket, mask: int) -> None:
        sock.recv(1)
        order.append(sock)

    for ours, theirs in pairs:
        selector.served[ours.fileno()] = partial(read, ours)
        selector.epoll.register(ours.fileno(), IN)
        theirs.sendall(b"x")
    first = pairs[listener][0].fileno()
    selector.listeners[first] = selector.served.pop(first)
    kit.turn()
    for ours, _ in pairs:
        selector.epoll.unregister(ours.fileno())
        selector.served.pop(ours.fileno(), None)
    del selector.listeners[first]
    assert order[0] is pairs[listener][0]
    assert len(order) == len(set(order)) == 5


@forkd_only
def test_a_round_that_takes_long_is_cut_and_goes_on_in_turn(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.serve.loop.SLICE", 0.0)
    monkeypatch.setattr("forkd.serve.loop.AT_ONCE", 1)
    selector = kit.poll_loop.selector
    pairs = [kit.pair() for _ in range(5)]
    order: list[int] = []
    callbacks: list[int] = []

    def note(number: int, mask: int) -> None:
        order.append(number)
        kit.loop.call_soon(callbacks.append, len(order))

    for number, (ours, theirs) in enumerate(pairs):
        selector.served[ours.fileno()] = partial(note, number)
        selector.epoll.register(ours.fileno(), IN)
        theirs.sendall(b"x")
    kit.turn()
    for ours, _ in pairs:
        selector.epoll.unregister(ours.fileno())
        del selector.served[ours.fileno()]
    assert len(order) >= 10
    assert all(len(set(order[start : start + 5])) == 5 for start in range(len(order) - 5)), "one had no turn"
    assert callbacks[:9] == [*range(1, 10)], "callbacks had none between two events"


@forkd_only
def test_a_hang_up_in_a_round_that_is_cut_is_not_lost(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.serve.loop.SLICE", 0.0)
    monkeypatch.setattr("forkd.serve.loop.AT_ONCE", 1)
    recorders = [Recorder(kit) for _ in range(5)]
    peers = []
    for recorder in recorders:
        transport, peer = kit.connect(recorder)
        transport.pause_reading()
        peers.append(peer)
    for peer in peers:
        peer.close()
    kit.until(lambda: all("eof_received" in recorder.calls for recorder in recorders))
    assert not kit.poll_loop.selector.left


@forkd_only
def test_writability_in_a_round_that_is_cut_is_not_lost(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.serve.loop.SLICE", 0.0)
    monkeypatch.setattr("forkd.serve.loop.AT_ONCE", 1)
    peers = []
    for _ in range(5):
        transport, peer = kit.connect(Recorder(kit), tcp_pair)
        transport.pause_reading()
        transport.write(bytes(MUCH))
        peers.append(peer)
    for peer in peers:
        read_exactly(peer, MUCH // 4)  # the loop does not run: all of them have become writable at its next turn
    for peer in peers:
        assert len(kit.in_thread(read_exactly, peer, MUCH - MUCH // 4)) == MUCH - MUCH // 4
    assert not kit.poll_loop.selector.left


@forkd_only
def test_callbacks_that_take_long_leave_the_rest_for_the_next_turn(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.serve.loop.SLICE", 0.0)
    monkeypatch.setattr("forkd.serve.loop.AT_ONCE", 1)
    order: list[object] = []
    protocol, send = kit.on_byte(lambda: order.append("event"))
    for number in range(20):
        kit.loop.call_soon(order.append, number)
    send()
    kit.until(lambda: protocol.received)
    kit.run(asyncio.sleep(0))
    assert [one for one in order if one != "event"] == [*range(20)]
    assert order.index("event") < 5
