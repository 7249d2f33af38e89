"""A worker that has much to do in many small pieces: it is not taken for one that stands still, and serves the others.

The pieces are events of many connections, messages and lines of one, callbacks, datagrams, and answers without end to
a client that reads as fast as they come.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.clients import at_end, datagram_client, dial, echoes, read
from tests.support.daemon import Harness
from tests.support.processes import DEADLINE

#: Seconds of `stall_timeout`: much more than one piece takes (`busy.SLOW`), and less than all of them.
STALL = 1.0
PIECES = 60


@pytest.mark.parametrize("handler", ["SlowEcho", "SlowCallbacks"])
def test_slow_work_for_many_clients_is_no_stall(harness: Harness, handler: str) -> None:
    settings = (f"stall_timeout={STALL}s",)
    daemon = harness.daemon(target=f"busy:{handler}", workers=1, settings=settings).start()
    clients = [harness.connect(daemon) for _ in range(PIECES)]
    for client in clients:
        client.sendall(b"x")
    for client in clients:
        assert read(client, 1) == b"x"
    assert daemon.status()["deaths"] == []


def test_slow_work_for_many_clients_holds_no_thread_up(harness: Harness) -> None:
    file = harness.directory / "tested.yaml"
    file.write_text("""\
listen:
  - {address: 'tcp://127.0.0.1:0', handler: 'busy:SlowEcho'}
  - {address: 'tcp://127.0.0.1:0', handler: 'blocking:ends', threads: 2}
""")
    daemon = harness.daemon(target=file, listen=(), workers=1).start()
    busy, threads = (str(listener["address"]) for listener in daemon.status()["listeners"])
    clients, over = [harness.connect(busy) for _ in range(20)], threading.Event()

    def go_on(client: socket.socket) -> None:
        while not over.is_set():
            assert echoes(client, b"x")

    with ThreadPoolExecutor(len(clients)) as pool:
        done = pool.map(go_on, clients)
        try:
            for _ in range(6):
                with dial(threads) as client:
                    client.sendall(b"close")
                    assert read(client, 100) == b"last word"
                    assert at_end(client)
        finally:
            over.set()
        assert [*done] == [None] * len(clients)


@pytest.mark.parametrize("handler", ["SlowLines", "read_slowly"])
def test_slow_work_for_many_lines_is_no_stall(harness: Harness, handler: str) -> None:
    """And another client is served before the last of them."""
    settings = (f"stall_timeout={STALL}s",)
    daemon = harness.daemon(target=f"busy:{handler}", workers=1, settings=settings).start()
    flood, other = harness.connect(daemon), harness.connect(daemon)
    flood.sendall(b"\n" * PIECES)
    assert read(flood, 1) == b"\n"
    assert echoes(other)
    flood.setblocking(False)
    assert len(flood.recv(PIECES)) < PIECES - 2
    flood.settimeout(DEADLINE)
    other.sendall(b"quit\n")
    assert read(other, 5) == b"quit\n"
    assert daemon.status()["deaths"] == []


def test_slow_work_for_many_datagrams_is_no_stall(harness: Harness) -> None:
    settings = (f"stall_timeout={STALL}s",)
    listen = ("udp://127.0.0.1:0",)
    daemon = harness.daemon(target="busy:SlowDatagrams", listen=listen, workers=1, settings=settings).start()
    client = harness.closing(datagram_client(daemon.address))
    for number in range(PIECES):
        client.send(b"%d" % number)
    assert [int(client.recv(10)) for _ in range(PIECES)] == [*range(PIECES)]
    assert daemon.status()["deaths"] == []


@pytest.mark.parametrize("handler", ["Always", "write_always"])
def test_answers_without_end_do_not_keep_others_waiting(harness: Harness, handler: str) -> None:
    daemon = harness.daemon(target=f"busy:{handler}", workers=1).start()
    greedy, other = harness.connect(daemon), harness.connect(daemon)
    thread = threading.Thread(target=read_all, args=(greedy,))
    thread.start()
    greedy.sendall(b"much")
    try:
        assert all(echoes(other) for _ in range(3))
    finally:
        greedy.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE)


def read_all(sock: socket.socket) -> None:
    """Reads whatever comes, to the end."""
    with contextlib.suppress(OSError):
        while sock.recv(1 << 20):
            pass


@pytest.mark.parametrize("handler", ["Lines", "read_lines", "read_bytes"])
def test_many_short_lines_all_come_back_in_their_order(harness: Harness, handler: str) -> None:
    daemon = harness.daemon(target=f"busy:{handler}", workers=1).start()
    client = harness.connect(daemon)
    sent = b"".join(b"%d\n" % number for number in range(6000))
    client.sendall(sent)
    client.shutdown(socket.SHUT_WR)
    got = bytearray()
    while data := client.recv(1 << 16):
        got += data
    assert got == sent
