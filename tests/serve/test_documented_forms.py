"""The examples of docs/handlers.md, run as they stand there, on other ports."""

from __future__ import annotations

import re
import socket
from http.client import HTTPResponse

import pytest

from tests.support.clients import datagram_client, dial
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_package
from tests.support.paths import CHECKOUT
from tests.support.processes import eventually


def said(address: str, words: bytes) -> bytes:
    """All that is answered to these words."""
    with dial(address) as client:
        client.sendall(words)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def documented(harness: Harness, about: str, workers: int | None = None) -> Daemon:
    """A daemon of the settings that name this handler, with all modules beside them."""
    page = (CHECKOUT / "docs/handlers.md").read_text().replace("/tmp", str(harness.directory))
    for text in re.findall(r"```python\n(# \w+\.py\n.*?)```", page, re.DOTALL):
        name = text.splitlines()[0].removeprefix("# ")
        (harness.directory / name).write_text(text)
    (settings,) = (text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if about in text)
    file = harness.directory / "tested.yaml"
    file.write_text(re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:0", settings))
    return harness.daemon(target=file, listen=(), workers=workers)


def test_documented_handlers_serve_as_they_stand(harness: Harness) -> None:
    daemon = documented(harness, "each:Shout").start()
    shout, greet, lines, count, program, answer, counter = (str(one["address"]) for one in daemon.status()["listeners"])
    assert said(shout, b"hello") == b"HELLO"
    assert said(greet, b"you\n") == b"hello you\n"
    assert said(lines, b"abc\nxy\n") == b"cba\nyx\n"
    assert said(count, b"a\nb\n") == b"1 a\n2 b\n"
    assert said(program, b"hello") == b"HELLO"
    with datagram_client(answer) as client:
        client.send(b"hello")
        assert client.recv(100) == b"HELLO"
    assert [said(counter, b"") for _ in range(9)][-1] == b"visitor 9\n"
    assert len(daemon.workers()) == 2
    daemon.wait_clients(0)
    assert daemon.status()["totals"]["errors"] == 0


def test_documented_hooks_serve_as_they_stand(harness: Harness) -> None:
    daemon = documented(harness, "places:answer").start()
    assert said(daemon.address, b"here\nthere\n") == b"4000 m\n5000 m\n"
    daemon.wait_clients(0)


def get(client: socket.socket) -> bytes:
    """The body that is answered to a request; the connection stays."""
    client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
    response = HTTPResponse(client)
    response.begin()
    return response.read()


def answers(clients: list[socket.socket]) -> list[bytes]:
    """What the servers that answer requests, and Twisted's, say to the clients of all of them."""
    clients[6].sendall(b"ab")
    return [get(clients[0]), get(clients[1]), get(clients[3]), get(clients[4]), clients[6].recv(100)]


def test_documented_servers_serve_and_drain_as_they_stand(harness: Harness) -> None:
    for name in ("uvicorn", "hypercorn", "websockets", "aiohttp", "tornado", "asyncssh", "twisted", "grpclib"):
        needs_package(name)
    from websockets.exceptions import ConnectionClosed  # noqa: PLC0415 (only where it is there)
    from websockets.sync.client import connect  # noqa: PLC0415

    daemon = documented(harness, "uvicorn:Server", workers=1).start()
    addresses = [str(one["address"]) for one in daemon.status()["listeners"]]
    old = daemon.wait_workers(1)
    clients = [harness.connect(address) for address in addresses]
    chat, shell, rpc = clients[2], clients[5], clients[7]
    assert answers(clients) == [b"ASGI", b"ASGI", b"aiohttp", b"Tornado", b"abab"]
    with connect("ws://here/", sock=chat, close_timeout=0) as websocket:
        websocket.send("hello")
        assert websocket.recv() == "hello"
        assert shell.recv(8) == b"SSH-2.0-"
        assert rpc.recv(9)[3] == 4  # the type of a SETTINGS frame of HTTP/2
        daemon.wait_clients(8)
        assert daemon.command("reload").returncode == 0
        for client in clients:
            if client is not chat:
                client.close()
        eventually(lambda: not daemon.workers("draining"), what="the end of the old worker")
        with pytest.raises(ConnectionClosed, match="1001"):
            websocket.recv()
    assert daemon.wait_workers(1) != old
    clients = [harness.connect(address) for address in addresses]
    assert answers(clients) == [b"ASGI", b"ASGI", b"aiohttp", b"Tornado", b"abab"]
    assert daemon.status()["totals"]["errors"] == 0
