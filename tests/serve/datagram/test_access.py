"""The datagrams that a real daemon takes: by network, by the rate of one address, and by what proxies say."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.support.clients import endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, eventually

UDP = "udp://127.0.0.1:0"
SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start(harness: Harness, *settings: str, handler: str = "From", workers: int = 1) -> Daemon:
    settings = tuple(f"listen.{setting}" for setting in settings)
    return harness.daemon(target=f"grams:{handler}", listen=(UDP,), settings=settings, workers=workers).start()


def client(stack: ExitStack, daemon: Daemon, source: str = "127.0.0.1") -> socket.socket:
    sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    sock.bind((source, 0))
    sock.connect(endpoint(daemon.address)[1])
    sock.settimeout(DEADLINE)
    return sock


def refused(daemon: Daemon) -> dict[str, int]:
    """By reason, those that are none left out."""
    counts = daemon.status()["totals"]["refused"]
    return {reason: count for reason, count in counts.items() if count}


def proxied(payload: bytes, source: str = "198.51.100.7", port: int = 4711) -> bytes:
    """What a proxy makes of a client's datagram (proxy-protocol.txt, section 2.2)."""
    addresses = socket.inet_aton(source) + socket.inet_aton("203.0.113.1") + struct.pack("!HH", port, 53)
    return SIGNATURE + struct.pack("!BBH", 0x21, 0x12, len(addresses)) + addresses + payload


@pytest.mark.parametrize("setting", ["deny=[127.0.0.2]", "allow=[127.0.0.1]", "allow=[127.0.0.0/8]"])
def test_datagrams_come_from_allowed_networks_alone(harness: Harness, stack: ExitStack, setting: str) -> None:
    daemon = start(harness, setting, "deny=[127.0.0.2]")
    welcome, other = client(stack, daemon), client(stack, daemon, "127.0.0.2")
    for _ in range(3):
        other.send(b"let me in")
    welcome.send(b"hello")
    assert welcome.recv(100).endswith(b" hello")
    eventually(lambda: refused(daemon) == {"denied": 3}, what="three refusals")
    daemon.wait_log(rf"INFO .*{daemon.address}: refused 127.0.0.2 \(denied\)")
    other.setblocking(False)
    with pytest.raises(BlockingIOError):
        other.recv(100)


def test_rate_bounds_the_datagrams_of_one_address(harness: Harness, stack: ExitStack) -> None:
    daemon = start(harness, "limits.rate_per_ip=5/h", workers=2)
    hasty = [client(stack, daemon) for _ in range(4)]  # of one address, whichever worker they come to
    for number in range(20):
        hasty[number % 4].send(b"?")
    eventually(lambda: refused(daemon) == {"rate": 15}, what="fifteen refusals")
    other = client(stack, daemon, "127.0.0.2")
    other.send(b"hello")
    assert other.recv(100).endswith(b" hello")


def test_a_proxy_says_who_its_client_is_and_gets_the_answer(harness: Harness, stack: ExitStack) -> None:
    daemon = start(harness, "proxy_protocol=[127.0.0.1]")
    proxy = client(stack, daemon)
    proxy.send(proxied(b"hello"))
    assert proxy.recv(100) == b"198.51.100.7:4711 hello"
    proxy.send(proxied(b"", "198.51.100.8", 1))
    assert proxy.recv(100) == b"198.51.100.8:1 "
    proxy.send(SIGNATURE + struct.pack("!BBH", 0x20, 0, 0) + b"my own")  # LOCAL: the proxy speaks for itself
    assert proxy.recv(100) == b"%s:%d my own" % (b"127.0.0.1", proxy.getsockname()[1])


def test_forged_missing_and_cut_headers_are_refused(harness: Harness, stack: ExitStack) -> None:
    daemon = start(harness, "proxy_protocol=[127.0.0.1]")
    proxy, stranger = client(stack, daemon), client(stack, daemon, "127.0.0.2")
    stranger.send(proxied(b"forged"))
    stranger.send(b"plain")
    proxy.send(b"no header")
    proxy.send(proxied(b"cut")[:20])
    eventually(lambda: refused(daemon) == {"denied": 2, "proxy_header": 2}, what="four refusals")
    proxy.send(proxied(b"hello"))
    assert proxy.recv(100) == b"198.51.100.7:4711 hello"


def test_the_networks_are_those_of_the_proxys_clients(harness: Harness, stack: ExitStack) -> None:
    daemon = start(harness, "proxy_protocol=[127.0.0.1]", "deny=[198.51.100.0/24]")
    proxy = client(stack, daemon)
    proxy.send(proxied(b"hello"))
    proxy.send(proxied(b"hello", "192.0.2.9"))
    assert proxy.recv(100) == b"192.0.2.9:4711 hello"
    eventually(lambda: refused(daemon) == {"denied": 1}, what="a refusal")
