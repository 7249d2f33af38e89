"""The channel: messages arrive whole and in order whatever the socket does; the end, garbage and a peer that does not
read are each told apart from silence.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from forkd.messages import LARGEST, JsonObject, encode
from forkd.system.channel import MOST_DESCRIPTORS, Channel, ChannelClosed, channel_pair, peer_uid
from tests.support.forked import exit_code, start_child


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = channel_pair()
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def wired() -> Iterator[tuple[Channel, socket.socket]]:
    """A channel, and the bare socket at its other end."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        yield channel, theirs
        channel.close()


def wait(channel: Channel) -> None:
    assert select.select([channel], [], [], 20)[0]


def send_times(channel: Channel, message: JsonObject, times: int) -> None:
    for _ in range(times):
        channel.send(message)


def test_messages_go_both_ways_in_order(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    for number in range(3):
        ours.send({"n": number})
    theirs.send({"text": "ü\n\0"})
    wait(theirs)
    assert theirs.receive() == [{"n": 0}, {"n": 1}, {"n": 2}]
    wait(ours)
    assert ours.receive() == [{"text": "ü\n\0"}]
    assert not ours.has_unsent


def test_receive_without_a_message_does_not_block(pair: tuple[Channel, Channel]) -> None:
    ours, _ = pair
    assert ours.receive() == []


def test_a_message_in_parts_comes_when_it_is_whole(wired: tuple[Channel, socket.socket]) -> None:
    channel, peer = wired
    for byte in encode({"a": 1})[:-1]:
        peer.send(bytes([byte]))
        wait(channel)
        assert channel.receive() == []
    peer.send(b"\n" + encode({"b": 2}) + b"{")
    wait(channel)
    assert channel.receive() == [{"a": 1}, {"b": 2}]


def test_the_end_is_told_after_the_last_message(wired: tuple[Channel, socket.socket]) -> None:
    channel, peer = wired
    peer.send(encode({"last": True}) + b'{"cut": ')
    peer.close()
    assert channel.receive() == [{"last": True}]
    with pytest.raises(ChannelClosed, match="end of file"):
        channel.receive()


def test_the_death_of_the_other_process_is_the_end(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair

    def send() -> None:
        ours.close()
        theirs.send({"from": "child"})

    child = start_child(send)
    theirs.close()
    assert exit_code(child) == 0
    assert ours.receive() == [{"from": "child"}]
    with pytest.raises(ChannelClosed, match="end of file"):
        ours.receive()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n", b"[]\n", b"\xff\xfe\n", b"\n"])
def test_garbage_ends_the_channel(wired: tuple[Channel, socket.socket], garbage: bytes) -> None:
    channel, peer = wired
    peer.send(garbage)
    wait(channel)
    with pytest.raises(ChannelClosed, match="not"):
        channel.receive()


def test_a_line_that_never_ends_ends_the_channel(wired: tuple[Channel, socket.socket]) -> None:
    channel, peer = wired
    received = 0
    while received <= LARGEST - 65536:
        received += peer.send(b"x" * 65536)
        assert channel.receive() == []
    peer.send(b"x" * 65536)
    with pytest.raises(ChannelClosed, match=f"more than {LARGEST}"):
        channel.receive()


def test_send_to_a_closed_peer_raises(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.send({"a": 1})


def test_message_that_the_socket_does_not_take_arrives_later(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    sent: list[JsonObject] = []
    while not ours.has_unsent:
        sent.append({"n": len(sent), "x": "x" * 50_000})
        ours.send(sent[-1])
    sent.append({"n": "last"})
    ours.send(sent[-1])
    received: list[JsonObject] = []
    while len(received) < len(sent):
        ours.flush()
        wait(theirs)
        received += theirs.receive()
    assert received == sent
    assert not ours.has_unsent


def test_unsent_messages_are_bounded(pair: tuple[Channel, Channel]) -> None:
    ours, _ = pair
    message = {"x": "x" * (LARGEST // 4)}
    while not ours.has_unsent:
        ours.send(message)
    send_times(ours, message, 3)
    with pytest.raises(ChannelClosed, match="does not read"):
        send_times(ours, message, 2)


def test_flush_to_a_closed_peer_raises(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    while not ours.has_unsent:
        ours.send({"x": "x" * 100_000})
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.flush()


def test_closed_channel_has_no_descriptor_and_is_unusable(pair: tuple[Channel, Channel]) -> None:
    ours, _ = pair
    assert os.fstat(ours.fileno())
    assert not os.get_inheritable(ours.fileno())
    ours.close()
    ours.close()
    assert ours.fileno() == -1
    with pytest.raises(ChannelClosed):
        ours.receive()
    with pytest.raises(ChannelClosed):
        ours.send({})


def test_peer_uid_is_the_user_that_connected() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()
    with pytest.raises(OSError, match="Bad file descriptor"):
        peer_uid(ours)


def descriptors_here() -> list[str]:
    return os.listdir("/proc/self/fd")


@pytest.fixture
def files() -> Iterator[tuple[int, int]]:
    """Two files in memory that hold their own names."""
    made = [os.memfd_create(name) for name in ("one", "two")]
    for descriptor, name in zip(made, (b"one", b"two"), strict=True):
        os.write(descriptor, name)
    yield made[0], made[1]
    for descriptor in made:
        os.close(descriptor)


def contents(descriptor: int) -> bytes:
    return os.pread(descriptor, 10, 0)


def test_descriptors_come_as_copies_that_are_not_inherited(
    pair: tuple[Channel, Channel], files: tuple[int, int]
) -> None:
    ours, theirs = pair
    ours.send_with_descriptors({"with": 2}, files)
    ours.send({"with": 0})
    wait(theirs)
    assert theirs.receive()[0] == {"with": 2}
    assert [contents(descriptor) for descriptor in theirs.descriptors] == [b"one", b"two"]
    assert not set(theirs.descriptors) & set(files)
    assert [os.get_inheritable(descriptor) for descriptor in theirs.descriptors] == [False, False]


def test_descriptors_of_several_messages_come_in_their_order(
    pair: tuple[Channel, Channel], files: tuple[int, int]
) -> None:
    ours, theirs = pair
    for number in (0, 1, 0):
        ours.send_with_descriptors({"n": number}, [files[number]])
    received: list[JsonObject] = []
    while len(received) < 3:
        wait(theirs)
        received += theirs.receive()
    assert [message["n"] for message in received] == [0, 1, 0]
    assert [contents(descriptor) for descriptor in theirs.descriptors] == [b"one", b"two", b"one"]


def test_descriptors_come_up_to_the_most_of_one_message(pair: tuple[Channel, Channel], files: tuple[int, int]) -> None:
    ours, theirs = pair
    ours.send_with_descriptors({"many": True}, [files[0]] * MOST_DESCRIPTORS)
    wait(theirs)
    assert theirs.receive() == [{"many": True}]
    assert len(theirs.descriptors) == MOST_DESCRIPTORS
    with pytest.raises(ChannelClosed):
        ours.send_with_descriptors({"more": True}, [files[0]] * (MOST_DESCRIPTORS + 1))


def test_descriptors_that_may_not_be_sent_are_never_opened(
    pair: tuple[Channel, Channel], files: tuple[int, int]
) -> None:
    ours, theirs = pair
    before = descriptors_here()
    for number in range(3):
        theirs.send_with_descriptors({"n": number}, files)
        wait(ours)
        assert ours.receive() == [{"n": number}]
    assert ours.descriptors == []
    assert descriptors_here() == before
    ours.takes_descriptors = True
    theirs.send_with_descriptors({"n": 3}, files)
    wait(ours)
    assert ours.receive() == [{"n": 3}]
    assert len(ours.descriptors) == 2


def test_close_closes_the_descriptors_that_were_not_taken(files: tuple[int, int]) -> None:
    before = descriptors_here()
    ours, theirs = channel_pair()
    ours.send_with_descriptors({}, files)
    wait(theirs)
    theirs.receive()
    taken = theirs.descriptors.pop(0)
    os.close(theirs.descriptors[0])  # as by a bug, without taking it out of the list
    ours.close()
    theirs.close()
    assert theirs.descriptors == []
    assert contents(taken) == b"one"
    os.close(taken)
    assert descriptors_here() == before


def test_descriptors_are_closed_with_a_channel_that_ends_badly(files: tuple[int, int]) -> None:
    before = descriptors_here()
    ours, theirs = channel_pair()
    with theirs_raw(ours) as sock:
        socket.send_fds(sock, [b"no message\n"], list(files))
        wait(theirs)
        with pytest.raises(ChannelClosed, match="not JSON"):
            theirs.receive()
        theirs.close()
    ours.close()
    assert descriptors_here() == before


def theirs_raw(channel: Channel) -> socket.socket:
    """The bare socket of a channel, a copy."""
    return socket.socket(fileno=os.dup(channel.fileno()))


def test_a_message_with_descriptors_does_not_wait(pair: tuple[Channel, Channel], files: tuple[int, int]) -> None:
    ours, theirs = pair
    while not ours.has_unsent:
        ours.send({"x": "x" * 50_000})
    with pytest.raises(ChannelClosed, match="does not read"):
        ours.send_with_descriptors({"log": 1}, files)
    received: list[JsonObject] = []
    while ours.has_unsent:
        ours.flush()
        wait(theirs)
        received += theirs.receive()
    ours.send_with_descriptors({"log": 2}, files)
    while {"log": 2} not in received:
        wait(theirs)
        received += theirs.receive()
    assert {"log": 1} not in received
    assert len(theirs.descriptors) == 2


def test_message_with_descriptors_arrives_when_its_rest_is_sent(
    pair: tuple[Channel, Channel], files: tuple[int, int]
) -> None:
    ours, theirs = pair
    message = {"x": "x" * (LARGEST - 100)}
    ours.send_with_descriptors(message, files)
    assert ours.has_unsent
    received: list[JsonObject] = []
    while not received:
        ours.flush()
        wait(theirs)
        received += theirs.receive()
    assert received == [message]
    assert [contents(descriptor) for descriptor in theirs.descriptors] == [b"one", b"two"]


def test_descriptors_to_a_closed_peer_or_closed_ones_raise(
    pair: tuple[Channel, Channel], files: tuple[int, int]
) -> None:
    ours, theirs = pair
    closed = os.memfd_create("closed")
    os.close(closed)
    with pytest.raises(ChannelClosed, match="Bad file descriptor"):
        ours.send_with_descriptors({}, [closed])
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.send_with_descriptors({}, files)


def test_the_channel_of_a_descriptor_goes_on_where_another_was(wired: tuple[Channel, socket.socket]) -> None:
    channel, peer = wired
    peer.send(encode({"before": 1}))
    again = Channel.from_descriptor(os.dup(channel.fileno()))
    channel.close()
    assert again.receive() == [{"before": 1}]
    again.send({"after": 1})
    assert peer.recv(100) == encode({"after": 1})
    again.close()


def test_the_channel_of_no_descriptor_is_a_closed_one() -> None:
    before = descriptors_here()
    channel = Channel.from_descriptor(-1)
    assert channel.fileno() == -1
    with pytest.raises(ChannelClosed):
        channel.receive()
    channel.close()
    assert descriptors_here() == before
