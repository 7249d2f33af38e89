"""The control socket: real unix sockets, and a real selector that serves both it and the test's clients.

The clients wait with the selector that serves the socket, so that a test goes on when something has happened and at no
other time. What is asked is the business of `test_requests`; here each request is answered by what it holds. How one
socket gives way to another is in `test_control_successors`.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import selectors
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from controlled import PATIENCE, Place, in_child, went_well

from forkd.errors import ForkdError
from forkd.master import control
from forkd.master.control import MOST_CLIENTS, ControlSocket
from forkd.wire import LARGEST

SOMEBODY = 65534  # a user who is neither root nor the one that runs the tests


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path / "control.sock", stack)


def test_several_clients_get_each_its_own_answers_in_order(place: Place) -> None:
    clients = [place.client() for _ in range(5)]
    for turn in range(3):
        for number, client in enumerate(clients):
            client.say({"from": number, "turn": turn})
    place.until(lambda: all(client.heard.count(b"\n") == 3 for client in clients))
    for number, client in enumerate(clients):
        assert [answer["echo"] for answer in client.answers] == [{"from": number, "turn": turn} for turn in range(3)]


def test_a_request_may_come_byte_by_byte_and_others_do_not_wait_for_it(place: Place) -> None:
    slow, other = place.client(), place.client()
    for byte in b'{"slow": 1}':
        slow.sock.sendall(bytes([byte]))
        assert place.ask(other, {"at": byte})["echo"] == {"at": byte}
    slow.sock.sendall(b"\n")
    place.until(lambda: slow.heard)
    assert slow.answers[0]["echo"] == {"slow": 1}


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"hello\n", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'"x"\n', b"\x00\xff\xfe\n", b"[" * 100_000 + b"\n"],
    ids=["empty", "text", "http", "list", "string", "bytes", "deep"],
)
def test_garbage_ends_that_clients_connection_and_nothing_else(place: Place, garbage: bytes) -> None:
    good, bad = place.client(), place.client()
    place.ask(good, {})
    bad.sock.sendall(garbage)
    place.until(lambda: bad.gone)
    assert bad.heard == b""
    assert place.ask(good, {"still": "here"})["echo"] == {"still": "here"}


def test_a_flood_without_a_line_feed_ends_the_connection(place: Place) -> None:
    client = place.client()
    sent = 0

    def flood() -> bool:
        nonlocal sent
        with suppress(BlockingIOError, BrokenPipeError):
            sent += client.sock.send(b"x" * 65536)
        return client.gone

    place.until(flood)
    assert sent > LARGEST
    assert sent < 3 * LARGEST
    assert place.ask(place.client(), {})["ok"] is True


def test_a_client_that_does_not_read_is_sent_away_and_others_are_served_meanwhile(place: Place) -> None:
    rude, other = place.client(), place.client()
    place.ask(rude, {})
    place.ask(other, {})
    rude.deaf()
    watched, asked = len(place.selector.get_map()), 0
    while len(place.selector.get_map()) == watched:
        asked += 1
        assert asked < 100, "it may let any number of answers lie"
        rude.say({"size": 100_000})
        place.ask(other, {})
    assert asked > LARGEST // 100_000
    place.ask(other, {})


def test_an_answer_larger_than_the_sockets_buffer_arrives_whole(place: Place) -> None:
    client, size = place.client(), LARGEST - 100
    assert len(place.ask(client, {"size": size})["filling"]) == size
    assert place.ask(client, {"again": 1})["echo"] == {"again": 1}


def test_an_answer_may_come_later_and_to_nobody(place: Place) -> None:
    patient, impatient = place.client(), place.client()
    patient.say({"later": True})
    impatient.say({"later": True})
    place.until(lambda: len(place.later) == 2)
    watched = len(place.selector.get_map())
    impatient.leave()
    place.until(lambda: len(place.selector.get_map()) == watched - 2)
    for reply in place.later:
        reply({"ok": True})
    place.until(lambda: patient.heard)
    assert patient.answers == [{"ok": True}]


def test_more_than_the_most_clients_wait_until_one_leaves(place: Place) -> None:
    clients = [place.client() for _ in range(MOST_CLIENTS)]
    for client in clients:
        place.ask(client, {})
    waiting = [place.client() for _ in range(2)]
    for client in waiting:
        client.say({"waited": True})
    for client in clients:
        place.ask(client, {})
    assert [client.heard for client in waiting] == [b"", b""]
    clients[3].leave()
    place.until(lambda: waiting[0].heard)
    for client in clients[4:]:
        place.ask(client, {})
    assert waiting[1].heard == b""
    clients[5].leave()
    place.until(lambda: waiting[1].heard)
    assert [client.answers[0]["echo"] for client in waiting] == [{"waited": True}] * 2


def test_another_user_is_refused_whatever_the_sockets_mode_says(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:  # then nobody else can be had, and this process plays one
        monkeypatch.setattr(control, "peer_uid", lambda sock: SOMEBODY)
    place.path.parent.chmod(0o711)
    place.path.chmod(0o666)
    reading, writing = socket.socketpair()
    place.stack.callback(reading.close)

    def ask() -> None:
        os.chdir(place.path.parent)  # the directories above are closed to others
        if os.geteuid() == 0:
            os.setgid(SOMEBODY)
            os.setuid(SOMEBODY)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(place.path.name)
            with suppress(BrokenPipeError):
                sock.sendall(b'{"verb": "stop"}\n')
            with suppress(ConnectionResetError):
                writing.sendall(b"answered" if sock.recv(100) else b"refused")
                return
            writing.sendall(b"refused")

    pid = in_child(ask)
    writing.close()
    words: list[bytes] = []
    place.selector.register(reading, selectors.EVENT_READ, lambda mask: words.append(reading.recv(100)))
    place.until(lambda: words)
    assert went_well(pid)
    assert words == [b"refused"]
    assert str(SOMEBODY) in caplog.text
    monkeypatch.undo()
    assert place.ask(place.client(), {})["ok"] is True


def test_the_masters_own_user_is_let_in_from_another_process(place: Place) -> None:
    reading, writing = socket.socketpair()
    place.stack.callback(reading.close)

    def ask() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(place.path))
            sock.sendall(b"{}\n")
            writing.sendall(sock.recv(100))

    pid = in_child(ask)
    writing.close()
    words: list[bytes] = []
    place.selector.register(reading, selectors.EVENT_READ, lambda mask: words.append(reading.recv(100)))
    place.until(lambda: words)
    assert went_well(pid)
    assert json.loads(words[0])["ok"] is True


def test_without_a_descriptor_for_a_client_the_master_does_not_spin(tmp_path: Path) -> None:
    def starve() -> None:  # in a child from the start: it would share a selector with its parent
        place = Place(tmp_path / "control.sock", ExitStack())
        place.client()
        spare = [os.dup(0) for _ in range(max(map(int, os.listdir("/proc/self/fd"))))]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for _ in range(3):
            for key, mask in place.selector.select(0):
                key.data(mask)
        listening = [key for key, _ in place.selector.select(0) if key.fd == place.control.fileno()]
        assert not listening, "it is ready for the same client again and again"

    assert went_well(in_child(starve))


def test_the_socket_is_for_its_owner_alone(place: Place) -> None:
    assert stat.S_IMODE(place.path.stat().st_mode) == 0o600


def test_remove_takes_the_file_away_once_and_for_all(place: Place) -> None:
    place.control.remove()
    assert not place.path.exists()
    place.control.remove()


def test_close_is_for_a_forked_child_and_leaves_the_file(place: Place) -> None:
    client = place.client()
    place.ask(client, {})

    def close() -> None:
        before = len(os.listdir("/proc/self/fd"))
        place.control.close()
        assert place.control.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) <= before - 2  # the listener's and the client's

    assert went_well(in_child(close))
    assert place.ask(client, {"still": 1})["echo"] == {"still": 1}


def test_a_dead_ones_socket_is_replaced_and_a_live_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with ExitStack() as stack:
        place = Place(path, stack)
        with pytest.raises(ForkdError, match=r"control\.sock"), selectors.DefaultSelector() as other:
            ControlSocket(path, other)
        assert place.ask(place.client(), {})["ok"] is True


@pytest.mark.parametrize("name", ["x" * 200, "no/such/directory"])
def test_a_path_that_can_not_be_is_an_error_that_says_which(tmp_path: Path, name: str) -> None:
    with selectors.DefaultSelector() as selector, pytest.raises(ForkdError, match=name[:20]):
        ControlSocket(tmp_path / name, selector)


def test_a_client_that_comes_and_goes_at_once_leaves_nothing(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    watched = len(place.selector.get_map())
    for _ in range(MOST_CLIENTS // 2):
        place.client().leave()
    place.ask(last := place.client(), {})
    last.leave()
    place.until(lambda: len(place.selector.get_map()) == watched)
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
