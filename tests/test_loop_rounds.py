"""One round of the poll loop: several descriptors are ready, and what is called for one changes what another is for.

What was taken out, closed, replaced or used anew by then must neither be called nor lost, whichever event epoll reports
first. The tests of descriptors that asyncio watches run on asyncio's own loop too, in the order that means the same
there.
"""

from __future__ import annotations

import os

import pytest
from contract import Recorder, forkd_only, kits, watched_pipe

from forkd.serve.loop import IN

kit = kits
pipe = watched_pipe

both_orders = pytest.mark.parametrize(
    ("kit", "served_first"), [("asyncio", True), ("forkd", True), ("forkd", False)], indirect=["kit"]
)


def in_one_round(kit, served_first, hook, make_ready):
    """Has a callback of a served connection call the hook in the round in which something else becomes ready."""
    protocol, send = kit.on_byte(hook)
    for step in (send, make_ready) if served_first else (make_ready, send):
        step()
    kit.turn()
    assert protocol.received == b"x"


@both_orders
def test_a_reader_that_a_served_callback_removes_in_the_same_round_is_not_called(kit, served_first, pipe):
    reading, writing = pipe
    called = []
    kit.loop.add_reader(reading, called.append, "old")
    in_one_round(kit, served_first, lambda: kit.loop.remove_reader(reading), lambda: os.write(writing, b"x"))
    assert called == []


@both_orders
def test_a_reader_that_a_served_callback_replaces_in_the_same_round_goes_on(kit, served_first, pipe):
    """What asyncio is told must not be of the reader that was replaced: it would remove the new one."""
    reading, writing = pipe
    called = []

    def replace():
        kit.loop.remove_reader(reading)
        kit.loop.add_reader(reading, called.append, "new")

    kit.loop.add_reader(reading, called.append, "old")
    in_one_round(kit, served_first, replace, lambda: os.write(writing, b"x"))
    assert set(called) == {"new"}


@both_orders
def test_a_writer_that_a_served_callback_adds_in_the_same_round_leaves_the_reader(kit, served_first):
    ours, theirs = kit.pair()
    called = []
    kit.loop.add_reader(ours, called.append, "read")
    in_one_round(
        kit, served_first, lambda: kit.loop.add_writer(ours, called.append, "write"), lambda: theirs.sendall(b"x")
    )
    kit.loop.remove_reader(ours)
    kit.loop.remove_writer(ours)
    assert set(called) == {"read", "write"}


@both_orders
def test_a_paused_and_resumed_connection_of_asyncios_reads_on(kit, served_first):
    """A served connection pauses and resumes a connection that asyncio serves, in the round in which that has data."""

    async def connect():
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
def test_a_descriptor_that_is_closed_in_the_same_round_does_not_end_the_loop(kit, served_first):
    def close():
        kit.loop.remove_reader(ours)
        ours.close()

    ours, theirs = kit.pair()
    called = []
    kit.loop.add_reader(ours, called.append, "read")
    in_one_round(kit, served_first, close, lambda: theirs.sendall(b"x"))
    assert called == []


@both_orders
def test_a_descriptor_that_is_closed_and_used_anew_in_the_same_round_has_its_own_reader(kit, served_first):
    """An event of the old file told to the new one's callback would say, of a connect, that it has succeeded."""
    old, old_peer = kit.pair()
    called = []
    new = []

    def use_anew():
        kit.loop.remove_reader(old)
        number = old.fileno()
        old.close()
        new.extend(kit.pair())
        assert number in [each.fileno() for each in new]
        for each in new:
            kit.loop.add_reader(each, called.append, each.fileno())

    kit.loop.add_reader(old, called.append, "old")
    in_one_round(kit, served_first, use_anew, lambda: old_peer.sendall(b"x"))
    stale = list(called)
    for each in new:
        each.sendall(b"x")
    kit.turn()
    for each in new:
        kit.loop.remove_reader(each)
    assert stale == []
    assert set(called) == {each.fileno() for each in new}


@forkd_only
def test_a_served_callback_that_takes_its_neighbours_out_in_the_same_round_keeps_events_from_them(kit):
    """`served` and epoll are forkd's own to change at any time."""
    selector = kit.loop.selector
    pairs = [kit.pair() for _ in range(5)]
    calls = []

    def take_all_out(_):
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
def test_listeners_are_served_before_the_rest_of_their_round(kit, listener):
    selector = kit.loop.selector
    pairs = [kit.pair() for _ in range(5)]
    order = []
    for ours, theirs in pairs:
        selector.served[ours.fileno()] = lambda _, sock=ours: order.append((sock.recv(1), sock)[1])
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
