"""The channel: messages arrive whole and in order whatever the socket does; the end, garbage and a peer that does not
read are each told apart from silence.
"""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator

import pytest

from forkd.system.channel import Channel, ChannelClosed, channel_pair, peer_uid
from forkd.wire import LARGEST, Message, encode


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


def send_times(channel: Channel, message: Message, times: int) -> None:
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
    assert not ours.waiting


def test_without_a_message_receiving_does_not_block(pair: tuple[Channel, Channel]) -> None:
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
    child = os.fork()
    if child == 0:
        ours.close()
        theirs.send({"from": "child"})
        os._exit(0)
    theirs.close()
    assert os.waitpid(child, 0)[1] == 0
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


def test_sending_to_who_has_gone_tells_so(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.send({"a": 1})


def test_what_the_socket_does_not_take_waits_and_arrives_whole(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    sent: list[Message] = []
    while not ours.waiting:
        sent.append({"n": len(sent), "x": "x" * 50_000})
        ours.send(sent[-1])
    sent.append({"n": "last"})
    ours.send(sent[-1])
    received: list[Message] = []
    while len(received) < len(sent):
        ours.flush()
        wait(theirs)
        received += theirs.receive()
    assert received == sent
    assert not ours.waiting


def test_what_waits_for_who_does_not_read_is_bounded(pair: tuple[Channel, Channel]) -> None:
    ours, _ = pair
    message = {"x": "x" * (LARGEST // 4)}
    while not ours.waiting:
        ours.send(message)
    send_times(ours, message, 3)
    with pytest.raises(ChannelClosed, match="does not read"):
        send_times(ours, message, 2)


def test_flushing_to_who_has_gone_tells_so(pair: tuple[Channel, Channel]) -> None:
    ours, theirs = pair
    while not ours.waiting:
        ours.send({"x": "x" * 100_000})
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.flush()


def test_a_closed_channel_has_no_descriptor_and_is_no_more_to_be_used(pair: tuple[Channel, Channel]) -> None:
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


def test_who_connected_a_unix_socket_is_known() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()
    with pytest.raises(OSError, match="Bad file descriptor"):
        peer_uid(ours)
