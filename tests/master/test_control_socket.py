"""The control socket: real unix sockets, and a real selector that serves both it and the test's clients.

The clients wait with the selector that serves the socket, so that a test goes on when something has happened and at no
other time. What is asked is in `test_commands`; here each request is answered by what it holds. How one socket gives
way to another is in `test_control_socket_successors`.
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

from forkd.errors import ForkdError
from forkd.master import control_socket
from forkd.master.control_socket import MOST_CLIENTS, MOST_REQUESTS, ControlSocket
from forkd.messages import LARGEST, DoneReply
from tests.support.control_fixture import ControlFixture
from tests.support.forked import exit_code, start_child
from tests.support.processes import DEADLINE

SOMEBODY = 65534  # a user who is neither root nor the one that runs the tests


@pytest.fixture
def fixture(tmp_path: Path) -> Iterator[ControlFixture]:
    with ExitStack() as stack:
        yield ControlFixture(tmp_path / "control.sock", stack)


def test_several_clients_get_each_its_own_answers_in_order(fixture: ControlFixture) -> None:
    clients = [fixture.client() for _ in range(5)]
    for turn in range(3):
        for number, client in enumerate(clients):
            client.say({"from": number, "turn": turn})
    fixture.until(lambda: all(client.heard.count(b"\n") == 3 for client in clients))
    for number, client in enumerate(clients):
        assert [answer["echo"] for answer in client.answers] == [{"from": number, "turn": turn} for turn in range(3)]


def test_request_that_comes_byte_by_byte_delays_no_other(fixture: ControlFixture) -> None:
    slow, other = fixture.client(), fixture.client()
    for byte in b'{"slow": 1}':
        slow.sock.sendall(bytes([byte]))
        assert fixture.ask(other, {"at": byte})["echo"] == {"at": byte}
    slow.sock.sendall(b"\n")
    fixture.until(lambda: slow.heard)
    assert slow.answers[0]["echo"] == {"slow": 1}


@pytest.mark.parametrize(
    "garbage",
    [b"\n", b"hello\n", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'"x"\n', b"\x00\xff\xfe\n", b"[" * 100_000 + b"\n"],
    ids=["empty", "text", "http", "list", "string", "bytes", "deep"],
)
def test_garbage_ends_that_clients_connection_and_nothing_else(fixture: ControlFixture, garbage: bytes) -> None:
    good, bad = fixture.client(), fixture.client()
    fixture.ask(good, {})
    bad.sock.sendall(garbage)
    fixture.until(lambda: bad.gone)
    assert bad.heard == b""
    assert fixture.ask(good, {"still": "here"})["echo"] == {"still": "here"}


def test_flood_without_a_line_feed_ends_the_connection(fixture: ControlFixture) -> None:
    client = fixture.client()
    sent = 0

    def flood() -> bool:
        nonlocal sent
        with suppress(BlockingIOError, BrokenPipeError):
            sent += client.sock.send(b"x" * 65536)
        return client.gone

    fixture.until(flood)
    assert sent > LARGEST
    assert sent < 3 * LARGEST
    assert fixture.ask(fixture.client(), {})["ok"] is True


def test_client_that_does_not_read_is_dropped_and_others_served(fixture: ControlFixture) -> None:
    rude, other = fixture.client(), fixture.client()
    fixture.ask(rude, {})
    fixture.ask(other, {})
    rude.deaf()
    watched, asked = len(fixture.selector.get_map()), 0
    while len(fixture.selector.get_map()) == watched:
        asked += 1
        assert asked < 100, "it may let any number of answers lie"
        rude.say({"size": 100_000})
        fixture.ask(other, {})
    assert asked > LARGEST // 100_000
    fixture.ask(other, {})


def test_answer_larger_than_the_sockets_buffer_arrives_whole(fixture: ControlFixture) -> None:
    client, size = fixture.client(), LARGEST - 100
    assert len(fixture.ask(client, {"size": size})["filling"]) == size
    assert fixture.ask(client, {"again": 1})["echo"] == {"again": 1}


def test_reply_may_come_later_and_to_a_client_that_has_gone(fixture: ControlFixture) -> None:
    patient, impatient = fixture.client(), fixture.client()
    patient.say({"later": True})
    impatient.say({"later": True})
    fixture.until(lambda: len(fixture.later) == 2)
    watched = len(fixture.selector.get_map())
    impatient.leave()
    fixture.until(lambda: len(fixture.selector.get_map()) == watched - 2)
    for waiting in fixture.later:
        waiting.reply(DoneReply())
    fixture.until(lambda: patient.heard)
    assert patient.answers == [{"ok": True}]


def test_client_too_many_takes_the_place_of_the_most_silent(fixture: ControlFixture) -> None:
    clients = [fixture.client() for _ in range(MOST_CLIENTS)]
    fixture.later_from(clients[0])  # one that waits for an answer stays before those that do not
    for client in clients[1:]:
        fixture.ask(client, {})
    fixture.ask(clients[1], {})
    for gone in (clients[2], clients[3]):
        fixture.ask(fixture.client(), {})
        fixture.until(lambda gone=gone: gone.gone)  # type: ignore[misc]
    assert [client for client in clients if client.gone] == clients[2:4]


def test_client_that_is_kept_stays_however_many_others_come(fixture: ControlFixture) -> None:
    kept = fixture.client()
    waiting = fixture.later_from(kept)
    waiting.keep()
    waiting.reply(DoneReply())
    for _ in range(2 * MOST_CLIENTS):
        fixture.ask(fixture.client(), {})
    assert fixture.ask(kept, {"still": "here"})["echo"] == {"still": "here"}


def test_client_with_many_requests_is_answered_one_a_turn(fixture: ControlFixture) -> None:
    many, other = fixture.client(), fixture.client()
    many.sock.sendall(b"{}\n" * MOST_REQUESTS)
    fixture.until(fixture.control.has_requests)
    fixture.ask(other, {})
    assert many.heard.count(b"\n") < MOST_REQUESTS // 2
    fixture.until(lambda: many.heard.count(b"\n") == MOST_REQUESTS)


def test_client_with_a_flood_of_requests_is_closed(fixture: ControlFixture) -> None:
    flood, other = fixture.client(), fixture.client()
    flood.sock.sendall(b"{}\n" * 20_000)
    fixture.until(lambda: flood.gone)
    assert not fixture.control.has_requests()
    assert fixture.ask(other, {})["ok"] is True


def test_another_user_is_refused_whatever_the_sockets_mode_says(
    fixture: ControlFixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if os.geteuid() != 0:  # then nobody else can be had, and this process plays one
        monkeypatch.setattr(control_socket, "peer_uid", lambda sock: SOMEBODY)
    fixture.path.parent.chmod(0o711)
    fixture.path.chmod(0o666)
    reading, writing = socket.socketpair()
    fixture.stack.callback(reading.close)

    def ask() -> None:
        os.chdir(fixture.path.parent)  # the directories above are closed to others
        if os.geteuid() == 0:
            os.setgid(SOMEBODY)
            os.setuid(SOMEBODY)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(fixture.path.name)
            with suppress(BrokenPipeError):
                sock.sendall(b'{"verb": "stop"}\n')
            with suppress(ConnectionResetError):
                writing.sendall(b"answered" if sock.recv(100) else b"refused")
                return
            writing.sendall(b"refused")

    pid = start_child(ask)
    writing.close()
    words: list[bytes] = []
    fixture.selector.register(reading, selectors.EVENT_READ, lambda mask: words.append(reading.recv(100)))
    fixture.until(lambda: words)
    assert exit_code(pid) == 0
    assert words == [b"refused"]
    assert str(SOMEBODY) in caplog.text
    monkeypatch.undo()
    assert fixture.ask(fixture.client(), {})["ok"] is True


def test_masters_own_user_is_let_in_from_another_process(fixture: ControlFixture) -> None:
    reading, writing = socket.socketpair()
    fixture.stack.callback(reading.close)

    def ask() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(DEADLINE)
            sock.connect(str(fixture.path))
            sock.sendall(b"{}\n")
            writing.sendall(sock.recv(100))

    pid = start_child(ask)
    writing.close()
    words: list[bytes] = []
    fixture.selector.register(reading, selectors.EVENT_READ, lambda mask: words.append(reading.recv(100)))
    fixture.until(lambda: words)
    assert exit_code(pid) == 0
    assert json.loads(words[0])["ok"] is True


def test_master_without_a_free_descriptor_does_not_spin(tmp_path: Path) -> None:
    def starve() -> None:  # in a child from the start: it would share a selector with its parent
        fixture = ControlFixture(tmp_path / "control.sock", ExitStack())
        fixture.client()
        spare = [os.dup(0) for _ in range(max(map(int, os.listdir("/proc/self/fd"))))]
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for _ in range(3):
            for key, mask in fixture.selector.select(0):
                key.data(mask)
        listening = [key for key, _ in fixture.selector.select(0) if key.fd == fixture.control.fileno()]
        assert not listening, "it is ready for the same client again and again"

    assert exit_code(start_child(starve)) == 0


def test_socket_is_for_its_owner_alone(fixture: ControlFixture) -> None:
    assert stat.S_IMODE(fixture.path.stat().st_mode) == 0o600


def test_remove_takes_the_file_away_once_and_for_all(fixture: ControlFixture) -> None:
    fixture.control.remove()
    assert not fixture.path.exists()
    fixture.control.remove()


def test_close_is_for_a_forked_child_and_leaves_the_file(fixture: ControlFixture) -> None:
    client = fixture.client()
    fixture.ask(client, {})

    def close() -> None:
        before = len(os.listdir("/proc/self/fd"))
        fixture.control.close()
        assert fixture.control.fileno() == -1
        assert len(os.listdir("/proc/self/fd")) <= before - 2  # the listener's and the client's

    assert exit_code(start_child(close)) == 0
    assert fixture.ask(client, {"still": 1})["echo"] == {"still": 1}


def test_dead_ones_socket_is_replaced_and_a_live_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with ExitStack() as stack:
        fixture = ControlFixture(path, stack)
        with pytest.raises(ForkdError, match=r"control\.sock"), selectors.DefaultSelector() as other:
            ControlSocket(path, other)
        assert fixture.ask(fixture.client(), {})["ok"] is True


@pytest.mark.parametrize("name", ["x" * 200, "no/such/directory"])
def test_path_that_can_not_be_is_an_error_that_says_which(tmp_path: Path, name: str) -> None:
    with selectors.DefaultSelector() as selector, pytest.raises(ForkdError, match=name[:20]):
        ControlSocket(tmp_path / name, selector)


def test_client_that_comes_and_goes_at_once_leaves_nothing(
    fixture: ControlFixture, caplog: pytest.LogCaptureFixture
) -> None:
    watched = len(fixture.selector.get_map())
    for _ in range(MOST_CLIENTS // 2):
        fixture.client().leave()
    fixture.ask(last := fixture.client(), {})
    last.leave()
    fixture.until(lambda: len(fixture.selector.get_map()) == watched)
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
