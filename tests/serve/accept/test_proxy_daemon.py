"""Connections behind proxies, by the real daemon and HAProxy: who a client is, which headers are taken, and that the
handler gets all that follows them.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from forkd.serve.accept.proxy_protocol import SIGNATURE
from tests.support.certificates import Authority
from tests.support.clients import at_end, echoes, endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program
from tests.support.processes import DEADLINE, eventually

# What proxies write: a client at 198.51.100.7 has connected to 203.0.113.1.
V1 = b"PROXY TCP4 198.51.100.7 203.0.113.1 4711 7007\r\n"
V2 = SIGNATURE + struct.pack("!BBH", 0x21, 0x11, 12 + 6) + bytes([198, 51, 100, 7, 203, 0, 113, 1])
V2 += struct.pack("!HH", 4711, 7007) + b"\x02\0\3a.b"
UNSAID = ("unique_id", "alpn", "ssl", "ssl_version", "ssl_cipher", "ssl_verified", "nothing")
LOCAL = SIGNATURE + struct.pack("!BBH", 0x20, 0, 0)


def start(harness: Harness, *settings: str, handler: str = "behind:Who", workers: int = 1) -> Daemon:
    more = tuple(f"listen.{one}" for one in ("proxy_protocol=[127.0.0.1]", *settings))
    return harness.daemon(target=handler, workers=workers, settings=(*more, "log.access=true")).start()


def known(sock: socket.socket) -> dict[str, Any]:
    """What the handler knows of its client."""
    found: dict[str, Any] = json.loads(sock.makefile("rb", buffering=0).readline())
    return found


def refused(daemon: Daemon) -> dict[str, int]:
    return {reason: count for reason, count in daemon.status()["totals"]["refused"].items() if count}


def test_handler_and_log_know_the_client_and_the_proxy(harness: Harness) -> None:
    daemon = start(harness)
    with harness.connect(daemon) as proxy:
        here = list(proxy.getsockname())
        proxy.sendall(V2 + b"hello")
        assert known(proxy) == {
            "peername": ["198.51.100.7", 4711],
            "sockname": ["203.0.113.1", 7007],
            "proxy_peername": here,
            "proxy_authority": "a.b",
            **dict.fromkeys(f"proxy_{name}" for name in UNSAID),
        }
        assert proxy.recv(5) == b"hello"
    daemon.wait_log(r"forkd.access: 198.51.100.7:4711 on tcp://")
    with harness.connect(daemon) as proxy:
        proxy.sendall(LOCAL)
        assert known(proxy)["peername"] == list(proxy.getsockname())
    with harness.connect(daemon) as proxy:  # a second header is payload
        proxy.sendall(V1 + V1)
        assert known(proxy)["peername"] == ["198.51.100.7", 4711]
        assert proxy.recv(100) == V1
    assert refused(daemon) == {}


@pytest.mark.parametrize("header", [V1, V2])
def test_header_may_come_in_any_pieces(harness: Harness, header: bytes) -> None:
    daemon = start(harness)
    for size in (1, 5, 7, 15, 16, 17):
        with harness.connect(daemon) as proxy:
            proxy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(header), size):
                proxy.sendall(header[at : at + size] + (b"hello" if at + size >= len(header) else b""))
            assert known(proxy)["peername"] == ["198.51.100.7", 4711]
            assert proxy.recv(5) == b"hello"


def test_streams_handler_is_served_with_quick_ack_too(harness: Harness) -> None:
    daemon = start(harness, "socket.quickack=true", handler="behind:streams")
    with harness.connect(daemon) as proxy:
        proxy.sendall(V1 + b"hello\n")
        assert proxy.recv(100) == b"198.51.100.7 203.0.113.1 hello\n"


def test_only_proxies_are_heard_and_only_with_a_header(harness: Harness) -> None:
    daemon = start(harness)
    with socket.create_connection(endpoint(daemon.address)[1], DEADLINE, ("127.0.0.2", 0)) as stranger:
        stranger.sendall(V1 + b"forged")
        assert at_end(stranger)
    for wrong in (b"GET / HTTP/1.0\r\n\r\n", b"PROXY TCP4 1.2.3.4\r\n", SIGNATURE + b"\x31\x11\0\x0c" + bytes(12)):
        with harness.connect(daemon) as proxy:
            proxy.sendall(wrong)
            assert at_end(proxy)
    harness.connect(daemon).close()  # how a proxy looks whether the port is open
    eventually(lambda: refused(daemon) == {"denied": 1, "proxy_header": 3}, what="four refusals")
    daemon.wait_log(r"refused 127.0.0.1 \(proxy_header: no PROXY header: what came begins otherwise\)")
    daemon.wait_clients(0)
    with harness.connect(daemon) as proxy:
        proxy.sendall(V1)
        assert known(proxy)["peername"] == ["198.51.100.7", 4711]


def listed(daemon: Daemon) -> dict[str, dict[str, Any]]:
    """The online clients, by their addresses."""
    return {one["client"]: one for one in json.loads(daemon.command("clients", "--json").stdout)}


V1_OF_IPV6 = b"PROXY TCP6 2001:db8::7 2001:db8::1 4712 7007\r\n"


@pytest.mark.parametrize("handler", ["behind:Who", "behind:thread"])
def test_clients_of_proxies_are_listed_and_closed(harness: Harness, handler: str) -> None:
    daemon = start(harness, handler=handler, workers=2)
    with harness.connect(daemon) as first, harness.connect(daemon) as second, harness.connect(daemon) as check:
        for proxy, header in ((first, V1), (second, V1_OF_IPV6), (check, LOCAL)):
            proxy.sendall(header)
            assert proxy.recv(1000).endswith(b"\n")  # it is served
        names = [f"{host}:{port}" for host, port in (one.getsockname() for one in (first, second, check))]
        expected = {"198.51.100.7:4711": names[0], "[2001:db8::7]:4712": names[1], names[2]: None}
        known = listed(daemon)
        assert {client: one["proxy"] for client, one in known.items()} == expected
        assert "198.51.100.7:4711" in daemon.command("clients").stdout
        assert daemon.command("clients", "--kill-ip", names[0].partition(":")[0]).stdout.endswith("closed 1 client\n")
        assert at_end(check)  # which has no other client than the proxy itself
        assert daemon.command("clients", "--kill-ip", "2001:db8::/32").returncode == 0
        assert at_end(second)
        assert daemon.command("clients", "--kill", str(known["198.51.100.7:4711"]["id"])).returncode == 0
        assert at_end(first)
    daemon.wait_clients(0)
    with harness.connect(daemon) as another:  # by the same descriptor as one before
        another.sendall(LOCAL)
        assert another.recv(1000).endswith(b"\n")
        assert [one["proxy"] for one in listed(daemon).values()] == [None]


def test_connection_is_closed_before_its_handler_has_it(harness: Harness, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("localhost", "localhost")
    daemon = start(harness, f"tls.cert={cert}", f"tls.key={key}", "timeouts.first_byte=1h", "tls.handshake=1h")
    with harness.connect(daemon) as silent, harness.connect(daemon) as slow, harness.connect(daemon) as other:
        slow.sendall(V1)
        other.sendall(V1_OF_IPV6)
        eventually(lambda: {"198.51.100.7:4711", "[2001:db8::7]:4712"} < listed(daemon).keys(), what="the headers")
        proxy = "{}:{}".format(*silent.getsockname())
        assert daemon.command("clients", "--kill", str(listed(daemon)[proxy]["id"])).returncode == 0
        assert at_end(silent)
        assert daemon.command("clients", "--kill-ip", "198.51.100.0/24").returncode == 0
        assert at_end(slow)
        assert listed(daemon).keys() == {"[2001:db8::7]:4712"}
        assert daemon.command("clients", "--kill", str(listed(daemon)["[2001:db8::7]:4712"]["id"])).returncode == 0
        assert at_end(other)
    daemon.wait_clients(0)
    assert daemon.status()["totals"]["ended"]["killed"] == 2
    assert refused(daemon) == {}


def test_rules_are_about_the_proxys_clients(harness: Harness) -> None:
    daemon = start(harness, "deny=[198.51.100.0/24]", "limits.per_ip=1", "limits.connections=3")
    with harness.connect(daemon) as first, harness.connect(daemon) as second, harness.connect(daemon) as third:
        first.sendall(V1.replace(b"198.51.100.7", b"192.0.2.1"))
        assert known(first)["peername"][0] == "192.0.2.1"
        second.sendall(V1.replace(b"198.51.100.7", b"192.0.2.1"))
        assert at_end(second)
        third.sendall(V1)
        assert at_end(third)
        eventually(lambda: refused(daemon) == {"denied": 1, "per_ip": 1}, what="two refusals")
        for _ in range(4):  # more than there are slots: those of the others came back
            with harness.connect(daemon) as another:
                another.sendall(V1.replace(b"198.51.100.7", b"192.0.2.2"))
                assert known(another)["peername"][0] == "192.0.2.2"
            daemon.wait_clients(1)


def test_silent_proxy_is_closed_and_holds_up_no_drain(harness: Harness) -> None:
    daemon = start(harness, "timeouts.first_byte=4s")
    with harness.connect(daemon) as silent, harness.connect(daemon) as slow:
        slow.sendall(V1[:20])
        daemon.wait_clients(2)
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("reload: done")
        slow.sendall(V1[20:])
        assert known(slow)["peername"] == ["198.51.100.7", 4711]
        assert echoes(slow)
        assert at_end(silent)
        daemon.wait_log(r"proxy_header: no PROXY header within 4.0 s")


# HAProxy in front


@contextmanager
def haproxy(directory: Path, servers: Sequence[str], listen: str = "") -> Iterator[list[str]]:
    """HAProxy in front of a server by each of its lines; the addresses of its front ends.

    Args:
        directory: for its file of settings.
        servers: what follows the address of a server.
        listen: what follows that of each front end.
    """
    needs_program("haproxy")
    config = ["global", " log stdout format raw local0", "defaults", " mode tcp", " unique-id-format %ci-%cp"]
    config += [" timeout connect 5s", " timeout client 30s", " timeout server 30s"]
    with ExitStack() as stack:
        fronts = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in servers]
        for front, server in zip(fronts, servers, strict=True):
            config += [f"listen front{front.fileno()}", f" bind fd@{front.fileno()} {listen}", f" server s {server}"]
        (directory / "haproxy.cfg").write_text("\n".join(config) + "\n")
        command = ["haproxy", "-db", "-q", "-f", str(directory / "haproxy.cfg")]
        process = stack.enter_context(subprocess.Popen(command, pass_fds=[front.fileno() for front in fronts]))
        try:
            yield ["tcp://{}:{}".format(*front.getsockname()) for front in fronts]
        finally:
            process.terminate()


def from_client(front: str) -> socket.socket:
    """A client with an address that is neither the proxy's nor the server's."""
    return socket.create_connection(endpoint(front)[1], DEADLINE, ("127.0.0.5", 0))


def test_haproxy_tells_of_its_clients_in_either_version(harness: Harness, tmp_path: Path) -> None:
    daemon = start(harness, "allow=[127.0.0.5]")
    host, port = endpoint(daemon.address)[1][:2]
    how = ("send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options unique-id check-send-proxy check inter 100ms")
    with haproxy(tmp_path, [f"{host}:{port} {one}" for one in how]) as fronts:
        for number, front in enumerate(fronts):
            with from_client(front) as client:
                found = known(client)
                assert found["peername"] == [*client.getsockname()]
                assert found["sockname"] == [*client.getpeername()]
                assert found["proxy_peername"][0] == "127.0.0.1"
                assert bool(found["proxy_unique_id"]) == (number == 2)
                client.sendall(b"hello")
                assert client.recv(100) == b"hello"
                assert "{}:{}".format(*client.getsockname()) in listed(daemon)
        # Checks come from the proxy itself, which may not come in as a client.
        eventually(lambda: refused(daemon).get("denied", 0) > 2, what="some checks")
    assert refused(daemon).keys() == {"denied"}


@pytest.mark.parametrize("how", ["send-proxy", "send-proxy-v2"])
def test_haproxy_tells_of_its_clients_at_a_unix_socket(harness: Harness, tmp_path: Path, how: str) -> None:
    path = tmp_path / "behind.sock"
    settings = ("listen.proxy_protocol=[unix]", "listen.allow=[127.0.0.5]", "listen.limits.per_ip=1")
    daemon = harness.daemon(target="behind:Who", listen=(f"unix:{path}",), settings=settings).start()
    with haproxy(tmp_path, [f"unix@{path} {how}"]) as (front,), from_client(front) as client:
        found = known(client)
        assert (found["peername"], found["sockname"]) == ([*client.getsockname()], [*client.getpeername()])
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        with from_client(front) as second:
            assert at_end(second)
        assert re.fullmatch(r"uid=\d+,pid=\d+", listed(daemon)["{}:{}".format(*client.getsockname())]["proxy"])
        with harness.connect(daemon) as stranger:
            stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert at_end(stranger)
        with harness.connect(daemon) as proxy:
            proxy.sendall(V1)  # of a client from where none may come
            assert at_end(proxy)
        assert daemon.command("clients", "--kill-ip", "127.0.0.5").stdout.endswith("closed 1 client\n")
        assert at_end(client)
    daemon.wait_clients(0)
    assert refused(daemon) == {"per_ip": 1, "proxy_header": 1, "denied": 1}


def test_haproxy_tells_of_the_tls_that_it_has_ended(harness: Harness, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.issue("localhost", "localhost")
    (both := tmp_path / "both.pem").write_bytes(b"".join(one.read_bytes() for one in files))
    daemon = start(harness)
    host, port = endpoint(daemon.address)[1][:2]
    servers = [f"{host}:{port} send-proxy-v2 proxy-v2-options ssl,cert-cn,ssl-cipher,authority"]
    with haproxy(tmp_path, servers, f"ssl crt {both} alpn x/1") as fronts:
        context = ssl.create_default_context(cafile=authority.cert)
        context.set_alpn_protocols(["x/1"])
        with from_client(fronts[0]) as plain, context.wrap_socket(plain, server_hostname="localhost") as client:
            found = known(client)
            assert found["peername"] == [*client.getsockname()]
            names = ("authority", "alpn", "ssl", "ssl_version", "ssl_verified")
            assert [found[f"proxy_{name}"] for name in names] == ["localhost", "x/1", True, client.version(), False]
            assert found["proxy_ssl_cipher"] == (client.cipher() or ["?"])[0]


def test_haproxy_passes_on_tls_to_a_tls_listener(harness: Harness, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("localhost", "localhost")
    daemon = start(harness, f"tls.cert={cert}", f"tls.key={key}")
    host, port = endpoint(daemon.address)[1][:2]
    with haproxy(tmp_path, [f"{host}:{port} send-proxy", f"{host}:{port} send-proxy-v2"]) as fronts:
        context = ssl.create_default_context(cafile=authority.cert)
        for front in fronts:
            with from_client(front) as plain, context.wrap_socket(plain, server_hostname="localhost") as client:
                assert known(client)["peername"] == [*client.getsockname()]
                assert "{}:{}".format(*client.getsockname()) in listed(daemon)
    assert refused(daemon) == {}
