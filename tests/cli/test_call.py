"""`forkd call`: requests to real servers over each kind of address, and to those that answer late, wrongly or never."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.cli.call import Attempts, CallFailed, call_datagrams, call_stream
from forkd.config.address import parse_address
from tests.support.clients import unshared_port
from tests.support.daemon import Harness
from tests.support.processes import DEADLINE, eventually

MUCH = 8 << 20
EVERY_BYTE = bytes(range(256))
HURRY = "--timeout=150ms"  # where no answer is to come

Result = subprocess.CompletedProcess[bytes]


def call(*arguments: object, data: bytes = b"", seconds: float = 60) -> Result:
    """What the command says; standard input is `data`."""
    command = [sys.executable, "-m", "forkd", "call", *map(str, arguments)]
    return subprocess.run(command, input=data, capture_output=True, timeout=seconds, check=False)


def said(result: Result) -> str:
    """The one sentence of a call that gave up."""
    assert (result.returncode, result.stdout) == (1, b"")
    text = result.stderr.decode()
    assert text.startswith("forkd: ")
    assert text.count("\n") == 1
    return text.removeprefix("forkd: ").rstrip("\n")


def answered(result: Result) -> bytes:
    assert (result.returncode, result.stderr) == (0, b"")
    return result.stdout


# Streams


@pytest.fixture(params=["tcp://127.0.0.1:0", "tcp://[::1]:0", "unix:{}/sock", "unix:@forkd-call-{}"])
def echo(request: pytest.FixtureRequest, harness: Harness) -> str:
    """The address of a daemon that echoes."""
    directory = harness.directory
    address = str(request.param).format(directory if "/sock" in request.param else directory.name)
    return harness.daemon(listen=(address,), workers=1).start().address


def test_a_daemon_is_called(echo: str) -> None:
    assert answered(call(echo, "hello")) == b"hello"
    assert answered(call(echo, data=EVERY_BYTE)) == EVERY_BYTE
    assert answered(call(echo, "-", data=EVERY_BYTE * (MUCH // 256))) == EVERY_BYTE * (MUCH // 256)
    assert answered(call(echo, "")) == b""


def test_an_answer_may_end_with_a_delimiter(harness: Harness) -> None:
    address = harness.daemon(target="framed:Lines", workers=1).start().address
    assert answered(call(address, "--until", r"\n", data=b"abc\ndef\n")) == b"cba\n"
    assert answered(call(address, "--until", r"\x66\x65d\n", data=b"abc\ndef\n")) == b"cba\nfed\n"
    assert "it fell silent, after 4 bytes of an answer" in said(call(address, "--until", "x", HURRY, data=b"abc\n"))


def test_hexadecimal_both_ways(harness: Harness) -> None:
    address = harness.daemon(workers=1).start().address
    assert answered(call(address, "00 ff0A", "--hex")) == b"00ff0a\n"
    assert answered(call(address, "--hex", data=b"cafe\n")) == b"cafe\n"


def test_a_terminal_gets_the_line_feed_that_the_answer_lacks(harness: Harness) -> None:
    address = harness.daemon(workers=1).start().address
    for request, shown in ((b"hello", b"hello\r\n"), (b"hello\n", b"hello\r\n")):
        ours, theirs = os.openpty()
        try:
            command = [sys.executable, "-m", "forkd", "call", address]
            subprocess.run(command, input=request, stdout=theirs, check=True, timeout=60)
            assert os.read(ours, 100) == shown
        finally:
            os.close(ours)
            os.close(theirs)


@contextlib.contextmanager
def stream_server(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that treats its one client so, in a thread that has ended afterwards."""

    def run() -> None:
        with listener.accept()[0] as client, contextlib.suppress(OSError):
            client.settimeout(DEADLINE)
            serve(client)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()


def hang_up(client: socket.socket) -> None:
    """Reads the request and closes the connection."""
    while client.recv(1 << 16):
        pass


def silent(client: socket.socket) -> None:
    """Holds the connection and says nothing until the client's process has ended."""
    while client.recv(1 << 16):
        pass
    gone.wait(DEADLINE)


gone = threading.Event()


@pytest.fixture(autouse=True)
def nobody_gone() -> None:
    gone.clear()


def holding(server: Callable[[socket.socket], None], *arguments: object, data: bytes = b"") -> str:
    """What a call says that gives up on a server that treats it so as long as it runs."""
    with stream_server(server) as address:
        try:
            return said(call(address, *arguments, data=data)).replace(address, "it")
        finally:
            gone.set()


def trickle(client: socket.socket) -> None:
    while not gone.wait(0.02):
        client.sendall(b"x")


def never_read(_: socket.socket) -> None:
    gone.wait(DEADLINE)


def close_early(client: socket.socket) -> None:
    client.sendall(b"half")
    client.recv(100)


def reset(client: socket.socket) -> None:
    client.sendall(b"half")
    client.recv(4)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_a_server_that_says_nothing() -> None:
    sentence = holding(silent, "hello", HURRY)
    assert re.fullmatch(r"gave up on it after 1 try in \d+\.\d s: it took the request and says nothing", sentence)


def test_server_that_closes_without_an_answer_is_a_failure() -> None:
    with stream_server(hang_up) as address:
        sentence = said(call(address, "hello"))
    assert re.search(r"after 1 try in \d+\.\d s: it ended the connection without an answer$", sentence)


def test_a_server_that_sends_a_byte_now_and_then_for_ever() -> None:
    sentence = holding(trickle, "hello", "--deadline=400ms")
    assert re.fullmatch(
        r"gave up on it after 1 try in \d+\.\d s: the time for the whole is over, after \d+ bytes of an answer",
        sentence,
    )


def test_a_server_that_never_reads_a_large_request() -> None:
    sentence = holding(never_read, HURRY, data=bytes(2 * MUCH))
    assert re.search(rf"it takes no more of the request, [1-9]\d* of {2 * MUCH} bytes are unsent", sentence)


def test_a_server_that_ends_before_the_delimiter() -> None:
    sentence = holding(close_early, "hello", "--until", r"\r\n")
    assert sentence.endswith(r"it ended the connection before a b'\r\n', after 4 bytes of an answer")


def test_a_server_that_resets() -> None:
    sentence = holding(reset, "hello more than it reads", "--until", "x")
    assert sentence.endswith("Connection reset by peer, after 4 bytes of an answer")


def test_server_answering_before_reading_all_ends_orderly() -> None:
    def answer(client: socket.socket) -> None:
        client.sendall(b"no")
        client.shutdown(socket.SHUT_WR)
        while client.recv(1 << 16):
            pass

    with stream_server(answer) as address:
        assert answered(call(address, data=bytes(MUCH))) == b"no"


def test_missing_server_is_told(tmp_path: Path) -> None:
    address = f"tcp://127.0.0.1:{unshared_port()}"
    sentence = said(call(address, "hello"))
    assert re.fullmatch(rf"gave up on {address} after 1 try in \d+\.\d s: nothing listens there", sentence)
    sentence = said(call(address, "hello", "--retries=2"))
    found = re.search(r"after 3 tries in (\d+\.\d) s: nothing listens there", sentence)
    assert found
    assert float(found[1]) >= 0.1
    assert "there is no such socket" in said(call(f"unix:{tmp_path}/none", "hello"))
    assert "nothing listens there" in said(call("unix:@forkd-nobody", "hello"))


def in_thread(function: Callable[..., bytes], *arguments: Any) -> tuple[threading.Thread, list[bytes]]:
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(function(*arguments)))
    thread.start()
    return thread, answers


def test_connecting_is_tried_again_until_there_is_a_server() -> None:
    where = "127.0.0.1", unshared_port()
    tries = Attempts(retries=1000, timeout=0.05, end=float("inf"))
    thread, answers = in_thread(call_stream, parse_address(f"tcp://127.0.0.1:{where[1]}"), b"hello", tries, None)
    eventually(lambda: tries.made >= 2)
    with socket.create_server(where) as listener, listener.accept()[0] as client:
        tries.timeout = DEADLINE
        assert client.makefile("rb").read() == b"hello"
        client.sendall(b"late")
    thread.join()
    assert answers == [b"late"]


# Datagrams

Answer = Callable[[socket.socket, list[tuple[bytes, Any]]], None]


@contextlib.contextmanager
def datagram_server(sock: socket.socket, answer: Answer) -> Iterator[list[tuple[bytes, Any]]]:
    """Calls `answer` with all requests up to now at each that comes; those are what it gives."""
    requests: list[tuple[bytes, Any]] = []
    ours, theirs = socket.socketpair()

    def run() -> None:
        while select.select([sock, theirs], [], [])[0] == [sock]:
            requests.append(sock.recvfrom(65536))
            answer(sock, requests)

    thread = threading.Thread(target=run)
    with ours, theirs, sock:
        thread.start()
        try:
            yield requests
        finally:
            ours.send(b"x")
            thread.join()


def udp(host: str = "127.0.0.1") -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 0))
    return sock


def udp_address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"udp://[{host}]:{port}" if ":" in host else f"udp://{host}:{port}"


def back(sock: socket.socket, requests: list[tuple[bytes, Any]]) -> None:
    sock.sendto(*requests[-1])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_datagram_is_answered(host: str) -> None:
    sock = udp(host)
    address = udp_address(sock)
    with datagram_server(sock, back) as requests:
        assert answered(call(address, "hello")) == b"hello"
        assert answered(call(address, data=EVERY_BYTE)) == EVERY_BYTE
        assert answered(call(address, "")) == b""
        assert answered(call(address, "00ff", "--hex")) == b"00ff\n"
    assert len(requests) == 4


@pytest.mark.parametrize("form", ["unix-dgram:{}/sock", "unix-dgram:@forkd-call-{}"])
def test_a_unix_datagram_is_answered(tmp_path: Path, form: str) -> None:
    address = form.format(tmp_path if "/sock" in form else tmp_path.name)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(address.removeprefix("unix-dgram:").replace("@", "\0"))
    with datagram_server(sock, back):
        assert answered(call(address, "hello")) == b"hello"
    assert "nothing listens there" in said(call(address, "hello", HURRY, "--retries=1"))


def test_host_is_asked_at_its_next_address_after_a_refusal() -> None:
    with udp() as nobody:
        refused = nobody.getsockname()
    sock = udp()
    places: list[tuple[int, Any]] = [(socket.AF_INET, refused), (socket.AF_INET, sock.getsockname())]
    tries = Attempts(retries=0, timeout=DEADLINE, end=float("inf"))
    with datagram_server(sock, back):
        assert call_datagrams(places, b"hello", tries) == b"hello"
    assert tries.made == 1


def test_a_late_answer_is_an_answer() -> None:
    def second(sock: socket.socket, requests: list[tuple[bytes, Any]]) -> None:
        if len(requests) == 3:
            sock.sendto(b"late", requests[0][1])

    sock = udp()
    with datagram_server(sock, second) as requests:
        assert answered(call(udp_address(sock), "hello", HURRY)) == b"late"
    assert len(requests) >= 3
    assert {request for request, _ in requests} == {b"hello"}
    assert len({peer for _, peer in requests}) == 1


def test_an_answer_from_another_address_is_none() -> None:
    with udp() as other, udp("127.0.0.1") as sock:

        def forge_first(sock: socket.socket, requests: list[tuple[bytes, Any]]) -> None:
            other.sendto(b"forged", requests[-1][1])
            if len(requests) == 2:
                sock.sendto(b"right", requests[-1][1])

        with datagram_server(sock, forge_first):
            assert answered(call(udp_address(sock), "hello", HURRY)) == b"right"


def test_an_answer_that_comes_twice_is_one() -> None:
    def twice(sock: socket.socket, requests: list[tuple[bytes, Any]]) -> None:
        back(sock, requests)
        back(sock, requests)

    sock = udp()
    with datagram_server(sock, twice):
        assert answered(call(udp_address(sock), "hello")) == b"hello"


def test_a_server_that_never_answers_is_given_up() -> None:
    sock = udp()
    address = udp_address(sock)
    with datagram_server(sock, lambda *_: None) as requests:
        sentence = said(call(address, "hello", "--timeout=100ms", "--retries=2"))
        assert re.fullmatch(rf"gave up on {address} after 3 tries in \d+\.\d s: no answer", sentence)
        eventually(lambda: len(requests) == 3)
        sentence = said(call(address, "hello", "--timeout=200ms", "--deadline=300ms"))
        assert re.search(r"after [12] tr(y|ies) in \d+\.\d s: no answer", sentence)


def test_missing_datagram_server_is_told_after_all_tries() -> None:
    sock = udp()
    address = udp_address(sock)
    sock.close()
    sentence = said(call(address, "hello", "--timeout=1h", "--retries=0"))
    assert re.search(r"after 1 try in \d\.\d s: nothing listens there", sentence)
    sentence = said(call(address, "hello", "--timeout=100ms", "--retries=2"))
    found = re.search(r"after 3 tries in (\d+\.\d) s: nothing listens there", sentence)
    assert found
    assert float(found[1]) >= 0.1


def test_a_server_that_comes_while_it_is_asked_answers() -> None:
    with udp() as sock:
        where = sock.getsockname()
    tries = Attempts(retries=1000, timeout=0.05, end=float("inf"))
    thread, answers = in_thread(call_datagrams, [(socket.AF_INET, where)], b"hello", tries)
    eventually(lambda: tries.made >= 3)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(where)
    with datagram_server(sock, back):
        thread.join()
    assert answers == [b"hello"]


def test_request_too_long_for_a_datagram_is_told() -> None:
    with udp() as sock:
        assert "70000 bytes are too long for one datagram" in said(call(udp_address(sock), data=bytes(70000)))


def test_full_queue_of_a_unix_datagram_server_costs_tries(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as filler,
    ):
        server.bind(path)
        with contextlib.suppress(BlockingIOError):
            while True:
                filler.sendto(b"x", path)
        tries = Attempts(retries=1, timeout=0.05, end=float("inf"))
        with pytest.raises(CallFailed, match="no answer"):
            call_datagrams([(socket.AF_UNIX, path)], b"hello", tries)
        assert tries.made == 2


# The command line


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tcp://127.0.0.1"], "has no port"),
        (["udp://127.0.0.1"], "has no port; write udp://HOST:PORT"),
        (["unix-dgram:sock"], "write unix-dgram: and an absolute path"),
        (["tcp://127.0.0.1:0"], "port 0 is no server's"),
        (["fd:0"], "can't be called; write tcp://HOST:PORT"),
        (["unix:@x", "zz", "--hex"], "b'zz' is not hexadecimal"),
        (["unix:@x", "x", "--timeout=1"], "--timeout: '1' has no unit; did you mean 1s?"),
        (["unix:@x", "x", "--deadline=0"], "--deadline: no answer comes in no time"),
        (["unix:@x", "x", "--until="], "--until: an empty delimiter"),
        (["unix:@x", "x", r"--until=\q"], "has no escape \\q (character 1)"),
        (["unix:@x", "x", "--until=\\"], "has no escape \\ (character 1)"),
        (["udp://127.0.0.1:9", "x", "--until=x"], "--until is for streams"),
        (["tcp://127.0.0.1:9", "x", "--rdp"], "--rdp goes over udp://HOST:PORT"),
        (["unix-dgram:@x", "x", "--rdp"], "--rdp goes over udp://HOST:PORT"),
    ],
)
def test_a_wrong_command_line_is_told(arguments: list[str], sentence: str) -> None:
    result = call(*arguments)
    assert (result.returncode, result.stdout) == (64, b"")
    assert sentence in result.stderr.decode()


def test_a_request_has_a_largest_size() -> None:
    result = call("unix:@x", data=bytes((64 << 20) + 1))
    assert result.returncode == 64
    assert b"a request of more than 67108864 bytes" in result.stderr
