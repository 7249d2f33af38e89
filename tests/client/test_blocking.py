"""The client's calls on real sockets: one deadline for each, nothing read too much, and the socket left as it was."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic

import pytest

from forkd.client import (
    EndOfStream,
    LimitExceeded,
    ReceiveTimeout,
    SendTimeout,
    connect,
    recv_exactly,
    recv_until,
    send_all,
)
from tests.support.clients import read
from tests.support.daemon import Harness
from tests.support.needs import needs_program
from tests.support.transport_contract import MUCH, tcp_pair

SOON, LONG = 0.05, 20.0

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture(params=["unix", "tcp", "unix with a timeout", "tcp that does not block"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """The client's end, in one mode of its own or another, and the peer's, which blocks."""
    ours, theirs = tcp_pair() if request.param.startswith("tcp") else socket.socketpair()
    with ours, theirs:
        mode = {"unix": None, "tcp": None, "unix with a timeout": 1000.0}.get(request.param, 0.0)
        ours.settimeout(mode)
        theirs.settimeout(LONG)
        blocks = os.get_blocking(ours.fileno())
        yield ours, theirs
        assert (ours.gettimeout(), os.get_blocking(ours.fileno())) == (mode, blocks)


@contextlib.contextmanager
def beside(call: Callable[[], object]) -> Iterator[None]:
    """Runs something in another thread meanwhile."""
    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def by_bytes(sock: socket.socket, data: bytes) -> None:
    for byte in data:
        sock.sendall(bytes([byte]))


def test_exactly_so_many_bytes_come_however_they_are_sent(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"hello, world")
    assert recv_exactly(ours, 5, SOON) == b"hello"
    assert recv_exactly(ours, 0, SOON) == b""
    with beside(lambda: by_bytes(theirs, b"!" * 200)):
        assert recv_exactly(ours, 207, LONG) == b", world" + b"!" * 200


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n\r\n", b"aab"])
def test_data_behind_the_delimiter_stays_in_the_socket(pair: Pair, delimiter: bytes) -> None:
    ours, theirs = pair
    lines = [b"one\r" + delimiter, delimiter, b"aa" + delimiter]
    for send in (socket.socket.sendall, by_bytes):
        with beside(functools.partial(send, theirs, b"".join(lines) + b"rest")):
            assert [recv_until(ours, delimiter, LONG) for _ in lines] == lines
            assert recv_exactly(ours, 4, LONG) == b"rest"


def test_a_delimiter_far_away_is_found(pair: Pair) -> None:
    ours, theirs = pair
    with beside(lambda: theirs.sendall(b"x" * 500_000 + b"end" + b"y" * 500_000)):
        assert recv_until(ours, b"end", LONG) == b"x" * 500_000 + b"end"
        assert recv_exactly(ours, 500_000, LONG) == b"y" * 500_000


def test_much_is_sent_to_a_peer_that_reads_late(pair: Pair) -> None:
    ours, theirs = pair
    data = bytes(range(256)) * (MUCH // 256)
    seen = []
    with beside(lambda: seen.append(read(theirs, MUCH))):
        send_all(ours, memoryview(data).cast("I"), LONG)
        send_all(ours, memoryview(b"abcd").cast("B", (2, 2))[:0], LONG)
    assert seen == [data]


def test_a_peer_that_never_reads_costs_the_timeout_and_no_more(pair: Pair) -> None:
    ours, theirs = pair
    with pytest.raises(SendTimeout, match=r"only \d+ of \d+ bytes could be sent in 0\.05 s") as caught:
        send_all(ours, bytes(4 * MUCH), SOON)
    assert 0 < caught.value.sent < 4 * MUCH
    assert isinstance(caught.value, TimeoutError)
    theirs.setblocking(False)
    assert len(theirs.recv(1)) == 1


def test_peer_that_sends_too_little_costs_only_the_timeout(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"abc")
    with pytest.raises(ReceiveTimeout, match=r"only 3 of 10 bytes have come in 0\.05 s") as caught:
        recv_exactly(ours, 10, SOON)
    assert caught.value.partial == b"abc"
    theirs.sendall(b"def")
    with pytest.raises(ReceiveTimeout, match=r"no b'\\n' within 0\.05 s: 3 bytes have come") as caught:
        recv_until(ours, b"\n", SOON)
    assert caught.value.partial == b"def"


@pytest.mark.parametrize("call", ["exactly", "until"])
def test_a_peer_that_trickles_does_not_prolong_the_deadline(pair: Pair, call: str) -> None:
    ours, theirs = pair
    over = threading.Event()

    def trickle() -> None:
        while not over.wait(0.01):
            theirs.sendall(b"x")

    with beside(trickle):
        begun = monotonic()
        try:
            with pytest.raises(ReceiveTimeout) as caught:
                recv_exactly(ours, 10**6, 0.3) if call == "exactly" else recv_until(ours, b"\n", 0.3)
            assert monotonic() - begun >= 0.3
            assert 0 < len(caught.value.partial) < 10**6
        finally:
            over.set()


def test_a_peer_that_floods_does_not_prolong_the_deadline(pair: Pair) -> None:
    ours, theirs = pair

    def flood() -> None:
        with contextlib.suppress(OSError):
            while True:
                theirs.sendall(bytes(1 << 16))

    with beside(flood):
        try:
            with pytest.raises(ReceiveTimeout):
                recv_until(ours, b"\n", SOON, limit=1 << 40)
        finally:
            theirs.shutdown(socket.SHUT_RDWR)


def test_end_of_file_in_the_middle_is_told_with_partial_data(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"abcdef")
    theirs.shutdown(socket.SHUT_WR)
    assert recv_exactly(ours, 2, SOON) == b"ab"
    with pytest.raises(EndOfStream, match=r"ended its side before a b'\\n': 4 bytes have come"):
        recv_until(ours, b"\n", LONG)
    with pytest.raises(EOFError, match="after 0 of 3 bytes") as caught:
        recv_exactly(ours, 3, LONG)
    assert caught.value.partial == b""  # type: ignore[attr-defined]


def test_no_more_than_the_limit_is_received(pair: Pair) -> None:
    ours, theirs = pair
    theirs.sendall(b"abcdef\nrest")
    with pytest.raises(LimitExceeded, match="within 6 bytes") as caught:
        recv_until(ours, b"\n", LONG, limit=6)
    assert caught.value.partial == b"abcdef"
    assert recv_until(ours, b"\n", LONG, limit=1) == b"\n"
    assert recv_exactly(ours, 4, LONG) == b"rest"
    with pytest.raises(ValueError, match="an empty delimiter"):
        recv_until(ours, b"", LONG)


def test_a_reset_is_told_as_such() -> None:
    ours, theirs = tcp_pair()
    with ours:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        theirs.close()
        with pytest.raises(ConnectionResetError):
            recv_exactly(ours, 1, LONG)
        with pytest.raises(BrokenPipeError):
            send_all(ours, b"x", LONG)


def test_signals_neither_end_nor_prolong_a_call() -> None:
    ours, theirs = socket.socketpair()
    seen = []

    def see(*_: object) -> None:
        seen.append(1)
        if len(seen) == 5:
            theirs.sendall(b"x")

    before = signal.signal(signal.SIGALRM, see)
    try:
        with ours, theirs:
            signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
            assert recv_exactly(ours, 1, LONG) == b"x"
            with pytest.raises(ReceiveTimeout):
                recv_exactly(ours, 1, 0.1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(seen) > 5


def test_descriptors_above_1023_work() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2000:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2000, hard), hard))
    ours, theirs = socket.socketpair()
    try:
        with ours, theirs, socket.socket(fileno=os.dup2(ours.fileno(), 1500)) as high:
            theirs.sendall(b"a\n")
            assert high.fileno() == 1500
            assert recv_until(high, b"\n", LONG) == b"a\n"
            with pytest.raises(ReceiveTimeout):
                recv_exactly(high, 1, SOON)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# TLS


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's."""
    needs_program("openssl")
    path = tmp_path_factory.mktemp("tls") / "pair.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=test", "-days", "2", "-keyout", str(path), "-out", str(path.with_name("cert.pem"))),
        ],
        check=True,
        capture_output=True,
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path.with_name("cert.pem"), path)
    client = ssl.create_default_context(cafile=str(path.with_name("cert.pem")))
    client.check_hostname = False
    return server, client


@pytest.mark.parametrize("mode", [None, 1000.0])
def test_the_same_calls_on_tls(contexts: tuple[ssl.SSLContext, ssl.SSLContext], mode: float | None) -> None:
    raw_theirs, raw_ours = tcp_pair()
    wrapped = []

    def shake_hands() -> None:
        wrapped.append(contexts[0].wrap_socket(raw_theirs, server_side=True))

    with beside(shake_hands):
        ours = contexts[1].wrap_socket(raw_ours)
    (theirs,) = wrapped
    with ours, theirs:
        ours.settimeout(mode)
        theirs.settimeout(LONG)
        theirs.sendall(b"one\ntwo\nthree")
        assert [recv_until(ours, b"\n", LONG), recv_until(ours, b"\n", LONG)] == [b"one\n", b"two\n"]
        assert recv_exactly(ours, 5, LONG) == b"three"
        with pytest.raises(ReceiveTimeout):
            recv_exactly(ours, 1, SOON)
        seen = []
        with beside(lambda: seen.append(read(theirs, MUCH))):
            send_all(ours, b"x" * MUCH, LONG)
        assert seen == [b"x" * MUCH]
        with pytest.raises(SendTimeout):
            send_all(ours, bytes(4 * MUCH), SOON)
        assert ours.gettimeout() == mode


# Connecting


def test_a_client_of_a_daemon(harness: Harness, tmp_path: Path) -> None:
    for address in ("tcp://127.0.0.1:0", f"unix:{tmp_path}/sock", f"unix:@{tmp_path.name}"):
        daemon = harness.daemon(f"d{len(harness.daemons)}", listen=(address,), workers=1).start()
        with connect(daemon.address, LONG) as sock:
            assert sock.gettimeout() == LONG
            send_all(sock, b"hello\nworld", LONG)
            assert recv_until(sock, b"\n", LONG) == b"hello\n"
            assert recv_exactly(sock, 5, LONG) == b"world"


def test_each_address_of_a_host_is_tried() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://localhost:{listener.getsockname()[1]}"
        with connect(address, LONG) as sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    with pytest.raises(ConnectionRefusedError):
        connect(address, LONG)


def test_address_that_can_not_be_connected_to_is_told(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect(f"unix:{tmp_path}/nobody", LONG)
    for address in ("fd:0", "nonsense"):
        with pytest.raises(ValueError, match="tcp://HOST:PORT"):
            connect(address, LONG)


def test_a_full_backlog_costs_the_timeout_and_no_more(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with connect(f"unix:{path}", LONG) as first:
            with pytest.raises(TimeoutError):
                connect(f"unix:{path}", SOON)
            with listener.accept()[0]:
                connect(f"unix:{path}", LONG).close()
                assert first.fileno() >= 0


def test_a_signal_in_the_middle_of_connecting_is_no_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(0)
            with connect(f"unix:{path}", LONG):
                signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
                with pytest.raises(TimeoutError):
                    connect(f"unix:{path}", 0.3)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_sigpipe_kills_no_program_that_has_it_as_it_was() -> None:
    program = (
        "import signal, socket\nfrom forkd.client import send_all\nsignal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "ours, theirs = socket.socketpair()\ntheirs.close()\n"
        "try: send_all(ours, b'x', 1)\nexcept BrokenPipeError: print('told')"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (0, "told\n")


def test_waiting_for_a_peer_costs_no_time_of_the_processor() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        before = sum(os.times()[:2])
        with pytest.raises(ReceiveTimeout):
            recv_exactly(ours, 1, 0.5)
        assert sum(os.times()[:2]) - before < 0.2
        assert select.select([ours], [], [], 0) == ([], [], [])
