"""The control socket when masters follow each other: replies that carry descriptors, clients that another image of the
master takes in, and a socket that is made beside the one that serves and then takes its place.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from controlled import PATIENCE, Client, Place

from forkd.errors import ForkdError
from forkd.master.control import MOST_CLIENTS, ControlSocket
from forkd.wire import LARGEST


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def place(tmp_path: Path, stack: ExitStack) -> Place:
    return Place(tmp_path / "control.sock", stack)


@pytest.fixture
def file(stack: ExitStack) -> int:
    descriptor = os.memfd_create("handed")
    stack.callback(os.close, descriptor)
    os.write(descriptor, b"handed")
    return descriptor


def hear_with(client: Client) -> tuple[bytes, list[bytes]]:
    """What the client hears, and what is in the files that come with it."""
    client.deaf()
    client.sock.settimeout(PATIENCE)
    data, descriptors, _, _ = socket.recv_fds(client.sock, 1000, 10)
    found = [os.pread(descriptor, 100, 0) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    return data, found


def test_a_reply_may_carry_descriptors(place: Place, file: int) -> None:
    client = place.client()
    place.later_from(client)({"ok": True}, [file, file])
    assert hear_with(client) == (b'{"ok":true}\n', [b"handed", b"handed"])


def test_a_reply_with_descriptors_to_nobody_does_nothing(place: Place, file: int) -> None:
    client, other = place.client(), place.client()
    reply = place.later_from(client)
    client.leave()
    place.until(lambda: reply.fileno() == -1)
    reply({"ok": True}, [file])
    assert place.ask(other, {})["ok"] is True


def test_who_has_not_read_what_was_said_before_gets_no_descriptors_but_his_leave(place: Place, file: int) -> None:
    rude, other = place.client(), place.client()
    reply = place.later_from(rude)
    rude.deaf()
    reply({"filling": "x" * (LARGEST - 100)})
    assert reply.fileno() >= 0
    reply({"ok": True}, [file])
    assert reply.fileno() == -1
    assert place.ask(other, {})["ok"] is True


def test_a_client_may_send_no_descriptors(place: Place, file: int) -> None:
    client = place.client()
    place.ask(client, {})
    before = os.listdir("/proc/self/fd")
    for number in range(3):
        socket.send_fds(client.sock, [b'{"n": %d}\n' % number], [file] * 10)
    place.until(lambda: client.heard.count(b"\n") == 4)
    assert [answer["echo"] for answer in client.answers[1:]] == [{"n": number} for number in range(3)]
    assert os.listdir("/proc/self/fd") == before


def test_the_descriptor_of_a_reply_is_its_clients(place: Place) -> None:
    first, second = place.client(), place.client()
    one, other = place.later_from(first), place.later_from(second)
    with socket.socket(fileno=os.dup(one.fileno())) as sock:
        sock.send(b'{"to": "first"}\n')
    place.until(lambda: first.heard)
    assert first.answers == [{"to": "first"}]
    assert second.heard == b""
    assert other.fileno() != one.fileno()


def next_image(before: Place, stack: ExitStack) -> Place:
    """What the next image of a master makes of the listening descriptor; the one before it is gone by then."""
    descriptor = os.dup(before.control.fileno())
    before.control.close()
    return Place(before.path, stack, descriptor=descriptor)


def test_the_next_image_takes_in_who_waits_and_lets_others_in(place: Place, stack: ExitStack) -> None:
    client = place.client()
    handed = os.dup(place.later_from(client).fileno())
    inode = place.path.stat().st_ino
    after = next_image(place, stack)
    assert place.path.stat().st_ino == inode
    reply = after.control.adopt(handed)
    assert reply.fileno() == handed
    reply({"ok": True, "by": "the next image"})
    place.until(lambda: client.heard)
    assert client.answers == [{"ok": True, "by": "the next image"}]
    assert after.ask(after.client(), {"n": 1})["echo"] == {"n": 1}
    reply = after.control.adopt(os.dup(handed))
    client.leave()
    after.until(lambda: reply.fileno() == -1)


def test_who_was_taken_in_may_ask_on(place: Place, stack: ExitStack) -> None:
    client = place.client()
    handed = os.dup(place.later_from(client).fileno())
    after = next_image(place, stack)
    after.control.adopt(handed)
    client.say({"n": 2})
    after.ask(after.client(), {})
    place.until(lambda: client.heard)
    assert client.answers[0]["echo"] == {"n": 2}


def test_those_who_were_taken_in_count_among_the_most_clients(place: Place, stack: ExitStack) -> None:
    clients = [place.client() for _ in range(MOST_CLIENTS)]
    handed = [os.dup(place.later_from(client).fileno()) for client in clients]
    after = next_image(place, stack)
    replies = [after.control.adopt(descriptor) for descriptor in handed]
    waiting = after.client()
    waiting.say({})
    clients[0].leave()
    after.until(lambda: replies[0].fileno() == -1 or waiting.heard)
    assert waiting.heard == b""
    after.until(lambda: waiting.heard)


def test_the_next_image_removes_the_file_at_the_end(place: Place, stack: ExitStack) -> None:
    after = next_image(place, stack)
    after.control.remove()
    assert not place.path.exists()


def test_a_file_that_was_gone_when_the_next_image_came_is_nobodys(place: Place, stack: ExitStack) -> None:
    place.path.unlink()
    after = next_image(place, stack)
    assert not after.control.displaced
    place.path.write_text("somebody's")
    after.control.remove()
    assert place.path.read_text() == "somebody's"


def test_a_successor_is_made_beside_and_asked_nothing_before_it_takes_the_place(place: Place, stack: ExitStack) -> None:
    successor = Place(place.path, stack, beside=True)
    beside = place.path.with_name("control.sock.new")
    assert beside.is_socket()
    assert beside.stat().st_mode & 0o777 == 0o600
    assert not place.control.displaced
    assert place.ask(place.client(), {"to": "the one before"})["ok"] is True
    assert not successor.selector.select(0)


def test_who_takes_the_place_is_asked_and_the_one_before_answers_those_it_has(place: Place, stack: ExitStack) -> None:
    client = place.client()
    place.ask(client, {})
    successor = Place(place.path, stack, beside=True)
    successor.control.take_place()
    assert list(place.path.parent.iterdir()) == [place.path]
    assert (place.control.displaced, successor.control.displaced) == (True, False)
    assert successor.ask(successor.client(), {"n": 1})["echo"] == {"n": 1}
    assert place.ask(client, {"n": 2})["echo"] == {"n": 2}
    place.control.remove()
    assert place.path.exists()
    assert successor.ask(successor.client(), {"n": 3})["echo"] == {"n": 3}
    successor.control.remove()
    assert list(place.path.parent.iterdir()) == []


def test_a_successor_that_never_takes_the_place_leaves_it_as_it_was(place: Place, stack: ExitStack) -> None:
    successor = Place(place.path, stack, beside=True)
    successor.control.remove()
    assert list(place.path.parent.iterdir()) == [place.path]
    assert not place.control.displaced
    assert place.ask(place.client(), {})["ok"] is True


def test_what_a_successor_that_died_has_left_beside_is_replaced(place: Place, stack: ExitStack) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{place.path}.new")
    successor = Place(place.path, stack, beside=True)
    successor.control.take_place()
    assert successor.ask(successor.client(), {})["ok"] is True


def test_two_successors_at_once_can_not_be(place: Place, stack: ExitStack) -> None:
    successor = Place(place.path, stack, beside=True)
    with pytest.raises(ForkdError, match=r"control\.sock\.new"):
        ControlSocket(place.path, successor.selector, beside=True)
    assert not place.control.displaced


def test_where_the_file_was_taken_away_by_hand_nobody_has_the_place(place: Place) -> None:
    place.path.unlink()
    assert not place.control.displaced
    place.path.write_text("somebody's")
    assert place.control.displaced
    place.control.remove()
    assert place.path.read_text() == "somebody's"
