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

from forkd.errors import ForkdError
from forkd.master.control_socket import MOST_CLIENTS, ControlSocket
from forkd.messages import LARGEST, DoneReply, ErrorReply, ScaledReply
from tests.support.control_fixture import Client, ControlFixture
from tests.support.processes import DEADLINE


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def fixture(tmp_path: Path, stack: ExitStack) -> ControlFixture:
    return ControlFixture(tmp_path / "control.sock", stack)


@pytest.fixture
def file(stack: ExitStack) -> int:
    descriptor = os.memfd_create("handed")
    stack.callback(os.close, descriptor)
    os.write(descriptor, b"handed")
    return descriptor


def hear_with(client: Client) -> tuple[bytes, list[bytes]]:
    """What the client hears, and what is in the files that come with it."""
    client.deaf()
    client.sock.settimeout(DEADLINE)
    data, descriptors, _, _ = socket.recv_fds(client.sock, 1000, 10)
    found = [os.pread(descriptor, 100, 0) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    return data, found


def test_reply_may_carry_descriptors(fixture: ControlFixture, file: int) -> None:
    client = fixture.client()
    fixture.later_from(client).reply(DoneReply(), [file, file])
    assert hear_with(client) == (b'{"ok":true}\n', [b"handed", b"handed"])


def test_reply_with_descriptors_to_a_gone_client_does_nothing(fixture: ControlFixture, file: int) -> None:
    client, other = fixture.client(), fixture.client()
    waiting = fixture.later_from(client)
    client.leave()
    fixture.until(lambda: waiting.fileno() == -1)
    waiting.reply(DoneReply(), [file])
    assert fixture.ask(other, {})["ok"] is True


def test_client_that_does_not_read_gets_no_descriptors(fixture: ControlFixture, file: int) -> None:
    rude, other = fixture.client(), fixture.client()
    waiting = fixture.later_from(rude)
    rude.deaf()
    waiting.reply(ErrorReply("x" * (LARGEST - 100)))
    assert waiting.fileno() >= 0
    waiting.reply(DoneReply(), [file])
    assert waiting.fileno() == -1
    assert fixture.ask(other, {})["ok"] is True


def test_client_may_send_no_descriptors(fixture: ControlFixture, file: int) -> None:
    client = fixture.client()
    fixture.ask(client, {})
    before = os.listdir("/proc/self/fd")
    for number in range(3):
        socket.send_fds(client.sock, [b'{"n": %d}\n' % number], [file] * 10)
    fixture.until(lambda: client.heard.count(b"\n") == 4)
    assert [answer["echo"] for answer in client.answers[1:]] == [{"n": number} for number in range(3)]
    assert os.listdir("/proc/self/fd") == before


def test_descriptor_of_a_reply_is_its_clients(fixture: ControlFixture) -> None:
    first, second = fixture.client(), fixture.client()
    one, other = fixture.later_from(first), fixture.later_from(second)
    with socket.socket(fileno=os.dup(one.fileno())) as sock:
        sock.send(b'{"to": "first"}\n')
    fixture.until(lambda: first.heard)
    assert first.answers == [{"to": "first"}]
    assert second.heard == b""
    assert other.fileno() != one.fileno()


def next_image(before: ControlFixture, stack: ExitStack) -> ControlFixture:
    """What the next image of a master makes of the listening descriptor; the one before it is gone by then."""
    descriptor = os.dup(before.control.fileno())
    before.control.close()
    return ControlFixture(before.path, stack, descriptor=descriptor)


def test_next_image_adopts_waiting_clients_and_lets_others_in(fixture: ControlFixture, stack: ExitStack) -> None:
    client = fixture.client()
    handed = os.dup(fixture.later_from(client).fileno())
    inode = fixture.path.stat().st_ino
    after = next_image(fixture, stack)
    assert fixture.path.stat().st_ino == inode
    waiting = after.control.adopt(handed)
    assert waiting.fileno() == handed
    waiting.reply(ScaledReply(7))
    fixture.until(lambda: client.heard)
    assert client.answers == [{"ok": True, "workers": 7}]
    assert after.ask(after.client(), {"n": 1})["echo"] == {"n": 1}
    waiting = after.control.adopt(os.dup(handed))
    client.leave()
    after.until(lambda: waiting.fileno() == -1)


def test_clients_that_wait_for_nothing_are_handed_over_as_well(fixture: ControlFixture) -> None:
    clients = [fixture.client() for _ in range(3)]
    idle, kept, waiting = clients
    assert fixture.ask(idle, {"n": 1})["echo"] == {"n": 1}
    fixture.later_from(kept)
    handed = fixture.later_from(waiting).fileno()
    assert handed in fixture.control.hand_over([handed])
    assert len(fixture.control.hand_over([handed])) == 3
    fixture.until(lambda: kept.heard)
    assert kept.answers == [{"ok": False, "error": "an upgrade has begun; ask again", "details": ""}]
    assert (len(idle.answers), waiting.answers) == (1, [])


def test_adopted_client_may_ask_on(fixture: ControlFixture, stack: ExitStack) -> None:
    client = fixture.client()
    handed = os.dup(fixture.later_from(client).fileno())
    after = next_image(fixture, stack)
    after.control.adopt(handed)
    client.say({"n": 2})
    after.ask(after.client(), {})
    fixture.until(lambda: client.heard)
    assert client.answers[0]["echo"] == {"n": 2}


def test_those_who_were_taken_in_count_among_the_most_clients(fixture: ControlFixture, stack: ExitStack) -> None:
    clients = [fixture.client() for _ in range(MOST_CLIENTS)]
    handed = [os.dup(fixture.later_from(client).fileno()) for client in clients]
    after = next_image(fixture, stack)
    replies = [after.control.adopt(descriptor) for descriptor in handed]
    after.ask(after.client(), {})
    assert [reply.fileno() == -1 for reply in replies] == [True] + [False] * (MOST_CLIENTS - 1)


def test_next_image_removes_the_file_at_the_end(fixture: ControlFixture, stack: ExitStack) -> None:
    after = next_image(fixture, stack)
    after.control.remove()
    assert not fixture.path.exists()


def test_file_gone_before_the_next_image_is_left_alone(fixture: ControlFixture, stack: ExitStack) -> None:
    fixture.path.unlink()
    after = next_image(fixture, stack)
    assert not after.control.displaced
    fixture.path.write_text("somebody's")
    after.control.remove()
    assert fixture.path.read_text() == "somebody's"


def test_successor_is_asked_nothing_before_it_takes_the_place(fixture: ControlFixture, stack: ExitStack) -> None:
    successor = ControlFixture(fixture.path, stack, beside=True)
    beside = fixture.path.with_name("control.sock.new")
    assert beside.is_socket()
    assert beside.stat().st_mode & 0o777 == 0o600
    assert not fixture.control.displaced
    assert fixture.ask(fixture.client(), {"to": "the one before"})["ok"] is True
    assert not successor.selector.select(0)


def test_successor_in_place_is_asked_the_former_answers_on(fixture: ControlFixture, stack: ExitStack) -> None:
    client = fixture.client()
    fixture.ask(client, {})
    successor = ControlFixture(fixture.path, stack, beside=True)
    successor.control.take_place()
    assert list(fixture.path.parent.iterdir()) == [fixture.path]
    assert (fixture.control.displaced, successor.control.displaced) == (True, False)
    assert successor.ask(successor.client(), {"n": 1})["echo"] == {"n": 1}
    assert fixture.ask(client, {"n": 2})["echo"] == {"n": 2}
    fixture.control.remove()
    assert fixture.path.exists()
    assert successor.ask(successor.client(), {"n": 3})["echo"] == {"n": 3}
    successor.control.remove()
    assert list(fixture.path.parent.iterdir()) == []


def test_successor_that_never_takes_the_place_changes_nothing(fixture: ControlFixture, stack: ExitStack) -> None:
    successor = ControlFixture(fixture.path, stack, beside=True)
    successor.control.remove()
    assert list(fixture.path.parent.iterdir()) == [fixture.path]
    assert not fixture.control.displaced
    assert fixture.ask(fixture.client(), {})["ok"] is True


def test_file_left_by_a_dead_successor_is_replaced(fixture: ControlFixture, stack: ExitStack) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{fixture.path}.new")
    successor = ControlFixture(fixture.path, stack, beside=True)
    successor.control.take_place()
    assert successor.ask(successor.client(), {})["ok"] is True


def test_two_successors_at_once_can_not_be(fixture: ControlFixture, stack: ExitStack) -> None:
    successor = ControlFixture(fixture.path, stack, beside=True)
    with pytest.raises(ForkdError, match=r"control\.sock\.new"):
        ControlSocket(fixture.path, successor.selector, beside=True)
    assert not fixture.control.displaced


def test_file_removed_by_hand_displaces_no_master(fixture: ControlFixture) -> None:
    fixture.path.unlink()
    assert not fixture.control.displaced
    fixture.path.write_text("somebody's")
    assert fixture.control.displaced
    fixture.control.remove()
    assert fixture.path.read_text() == "somebody's"
