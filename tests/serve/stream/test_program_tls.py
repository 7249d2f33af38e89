"""Programs behind TLS: what they find, that ends and slowness are passed on, and how they are bounded and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkd.serve.stream.program import distinguished_name
from tests.support.certificates import Authority
from tests.support.clients import at_end, echoes, read
from tests.support.daemon import Daemon, Harness
from tests.support.once_process import OnceProcess
from tests.support.processes import descendants, eventually
from tests.support.tls_client import TlsClient, pump


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "certificates").mkdir()
    return Authority(tmp_path / "certificates")


def serving(harness: Harness, authority: Authority, *listeners: str, tls: str = "") -> Daemon:
    """A daemon with these listeners, each with TLS."""
    cert, key = authority.issue("localhost", "localhost")
    file = harness.directory / "tested.yaml"
    all_have = f"tls: {{cert: {cert}, key: {key}{tls}}}"
    items = [text if "address:" in text else f"address: 'tcp://127.0.0.1:0', {text}" for text in listeners]
    file.write_text("\n".join(["name: tested", "listen:", *(f"- {{{item}, {all_have}}}" for item in items)]))
    return harness.daemon(target=file, listen=(), workers=1).start()


def addresses(daemon: Daemon) -> list[str]:
    return [str(one["address"]) for one in daemon.status()["listeners"]]


def secure(harness: Harness, authority: Authority, address: str, **options: Any) -> ssl.SSLSocket:
    """A client whose handshake is done."""
    context = ssl.create_default_context(cafile=authority.cert)
    if "shows" in options:
        context.load_cert_chain(*options["shows"])
    if "alpn" in options:
        context.set_alpn_protocols(options["alpn"])
    wrapped = context.wrap_socket(harness.connect(address), server_hostname="localhost", suppress_ragged_eofs=False)
    harness.closing(wrapped)
    return wrapped


def speaking(harness: Harness, authority: Authority, address: str, version: ssl.TLSVersion | None = None) -> TlsClient:
    """One that can say its end and read on."""
    context = ssl.create_default_context(cafile=authority.cert)
    if version is not None:
        context.maximum_version = version
    return TlsClient(harness.connect(address), context)


def rest(client: ssl.SSLSocket) -> bytes:
    """All that comes, up to the end that TLS has; a connection that is only closed raises."""
    found = b""
    with contextlib.suppress(ssl.SSLZeroReturnError):
        while data := client.read(65536):
            found += data
    return found


def programs(daemon: Daemon) -> list[int]:
    return [pid for worker in daemon.workers().values() for pid in descendants(worker)]


def ended(daemon: Daemon) -> dict[str, int]:
    return {reason: count for reason, count in daemon.status()["totals"]["ended"].items() if count}


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_program_answers_after_the_clients_end(harness: Harness, authority: Authority, version: ssl.TLSVersion) -> None:
    unix = f"unix:@{harness.directory}"
    daemon = serving(harness, authority, "command: [sort]", f"address: '{unix}', command: [sort]")
    for address in addresses(daemon):
        client = speaking(harness, authority, address, version)
        client.send(b"two\nthree\none\n")
        client.say_end()
        assert client.rest() == b"one\nthree\ntwo\n"
    daemon.wait_clients(0)
    assert ended(daemon) == {}


def test_client_that_only_shuts_down_is_answered(harness: Harness, authority: Authority) -> None:
    daemon = serving(harness, authority, "command: [sort]", "handler: 'blocking:Lines'")
    for address in addresses(daemon):
        sock = harness.connect(address)
        client = TlsClient(sock, ssl.create_default_context(cafile=authority.cert))
        client.send(b"one\n")
        sock.shutdown(socket.SHUT_WR)  # without the end that TLS has
        assert client.rest().endswith(b"one\n")


def test_client_speaks_on_after_the_programs_end(harness: Harness, authority: Authority) -> None:
    told = harness.directory / "told"
    lines = (
        *("import socket, pathlib", "s = socket.socket(fileno=0)", "s.send(b'bye')", "s.shutdown(1)"),
        f"pathlib.Path('{told}').write_bytes(s.makefile('rb').read())",
    )
    daemon = serving(harness, authority, f'command: [{sys.executable}, -c, "{"; ".join(lines)}"]')
    client = speaking(harness, authority, daemon.address)
    assert client.rest() == b"bye"
    client.send(b"and more")
    client.say_end()
    daemon.wait_clients(0)
    assert eventually(lambda: told.exists() and told.read_bytes(), what="what the program was told") == b"and more"


def test_much_data_goes_through_both_ways(harness: Harness, authority: Authority) -> None:
    daemon = serving(harness, authority, "command: [cat]")
    client = secure(harness, authority, daemon.address)
    data = os.urandom(3_000_000)
    assert pump(client, data) == data
    assert echoes(client)


def test_last_words_of_a_program_come_whole(harness: Harness, authority: Authority) -> None:
    daemon = serving(
        harness,
        authority,
        "command: [head, -c, '2000000', /dev/zero]",
        "command: [sh, -c, 'sleep 60 & echo $!; exec head -c 100000 /dev/zero']",  # sleep is not waited for
    )
    large, left = (secure(harness, authority, address) for address in addresses(daemon))
    large.send(b"never read")
    assert len(rest(large)) == 2_000_000
    pid, _, zeros = rest(left).partition(b"\n")
    os.kill(int(pid), signal.SIGKILL)
    assert len(zeros) == 100_000
    daemon.wait_clients(0)


def test_slow_client_and_slow_program_hold_each_other_up(harness: Harness, authority: Authority) -> None:
    daemon = serving(
        harness,
        authority,
        "command: [yes], socket: {send_buffer: 64KiB}, limits: {write_buffer: 4KiB}",
        "command: [sleep, '60'], socket: {receive_buffer: 64KiB}",
    )
    writes, sleeps = addresses(daemon)
    secure(harness, authority, writes)  # reads nothing
    talks = secure(harness, authority, sleeps)
    talks.settimeout(0.2)
    with pytest.raises(TimeoutError):  # the program does not read, so the client comes to a stand
        send_much(talks)
    worker = next(iter(daemon.workers().values()))
    idle = eventually(lambda: cpu_stands(worker), what="a worker at rest")
    assert idle
    assert resident(worker) < 100 << 20


def send_much(client: socket.socket) -> None:
    for _ in range(1000):
        client.send(bytes(65536))


def cpu_stands(pid: int) -> bool:
    """Whether a process has used no time between two looks at it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    used = int(fields[11]) + int(fields[12])
    before, _seen[pid] = _seen.get(pid), used
    return used == before


_seen: dict[int, int] = {}


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("way", ["reset", "closed"])
def test_program_ends_when_its_client_has_gone(harness: Harness, authority: Authority, way: str) -> None:
    daemon = serving(harness, authority, "command: [yes]", "command: [cat]")
    for address in addresses(daemon):
        client = secure(harness, authority, address)
        if address == addresses(daemon)[0]:
            assert read(client, 4) == b"y\ny\n"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", way == "reset", 0))
        client.close()
    daemon.wait_clients(0)
    eventually(lambda: not programs(daemon), what="the programs' end")
    assert daemon.status()["totals"]["errors"] == 0


def test_deadlines_and_limits_hold_for_programs(harness: Harness, authority: Authority) -> None:
    daemon = serving(
        harness,
        authority,
        "command: [cat], timeouts: {first_byte: 1s}",
        "command: [cat], timeouts: {idle: 1s}, limits: {connections: 1, over: refuse}",
        "command: [sh, -c, 'trap \"\" TERM; yes'], timeouts: {write: 1s}",
        "command: [sh, -c, 'trap \"echo sorry; exit\" TERM; while :; do sleep 0.1; done'], timeouts: {lifetime: 1s}",
    )
    first, idle, write, lifetime = (secure(harness, authority, address) for address in addresses(daemon))
    assert echoes(idle)
    with pytest.raises(OSError, match=r".+"):
        echoes(secure(harness, authority, addresses(daemon)[1]))  # one over the limit
    for client in (first, idle):
        assert at_end(client)
    assert rest(lifetime) == b"sorry\n"
    eventually(lambda: ended(daemon) == {"first_byte": 1, "idle": 1, "write": 1, "lifetime": 1}, what="each deadline")
    daemon.wait_clients(0)
    write.close()
    eventually(lambda: not programs(daemon), what="the programs' end")


def test_handshake_that_fails_starts_no_program(harness: Harness, authority: Authority) -> None:
    started = harness.directory / "started"
    daemon = serving(harness, authority, f"command: [touch, {started}]", tls=", handshake: 1s")
    with harness.connect(daemon) as plain, harness.connect(daemon) as silent:
        plain.sendall(b"EHLO me\r\n")
        assert at_end(silent)
    eventually(lambda: ended(daemon) == {"handshake": 2}, what="two handshakes that failed")
    assert not started.exists()


def test_environment_tells_of_tls(harness: Harness, authority: Authority) -> None:
    daemon = serving(
        harness,
        authority,
        "command: [env]",
        tls=f", alpn: [a/1, b/1], client: optional, client_ca: {authority.cert}",
    )
    shows = authority.issue("alice", "alice.example.org")
    found = variables(secure(harness, authority, daemon.address, shows=shows, alpn=["b/1"]))
    assert {name: found.get(name) for name in ("PROTO", "SSL_PROTOCOL", "SSL_TLS_SNI", "SSL_ALPN_PROTOCOL")} == {
        "PROTO": "TCP",
        "SSL_PROTOCOL": "TLSv1.3",
        "SSL_TLS_SNI": "localhost",
        "SSL_ALPN_PROTOCOL": "b/1",
    }
    assert found["TCPREMOTEIP"] == "127.0.0.1"
    assert (found["SSL_CLIENT_VERIFY"], found["SSL_CLIENT_S_DN"], found["SSL_CLIENT_I_DN"]) == (
        "SUCCESS",
        "CN=alice",
        "CN=authority",
    )
    assert found["SSL_CLIENT_CERT"].startswith("-----BEGIN CERTIFICATE-----")
    assert (int(found["SSL_CIPHER_USEKEYSIZE"]), found["SSL_CIPHER"][:4]) == (256, "TLS_")
    found = variables(secure(harness, authority, daemon.address))
    assert found["SSL_CLIENT_VERIFY"] == "NONE"
    assert "SSL_CLIENT_CERT" not in found
    assert "SSL_ALPN_PROTOCOL" not in found


def variables(client: ssl.SSLSocket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in rest(client).decode().splitlines() if "=" in line)


def test_worker_that_drains_waits_for_the_program(harness: Harness, authority: Authority) -> None:
    daemon = serving(harness, authority, "command: [cat]")
    client = secure(harness, authority, daemon.address)
    assert echoes(client)
    before = daemon.workers()
    assert daemon.command("reload").returncode == 0
    daemon.wait_workers(1, without=before.values())
    assert echoes(client)
    client.close()
    eventually(lambda: [one["pid"] for one in daemon.status()["workers"]] != [*before.values()], what="its end")


def test_one_client_is_served_by_a_program_with_tls(
    harness: Harness, single: Callable[..., OnceProcess], authority: Authority
) -> None:
    cert, key = authority.issue("localhost", "localhost")
    file = harness.directory / "one.yaml"
    listener = (
        f"address: 'tcp://127.0.0.1:0', command: [sh, -c, 'read line; exit 7'], tls: {{cert: {cert}, key: {key}}}"
    )
    file.write_text(f"mode: once\nlisten: [{{{listener}}}]\n")
    one = single(file, listen=None).start()
    client = secure(harness, authority, one.address)
    client.sendall(b"go\n")
    assert rest(client) == b""
    assert one.status() == 7


def test_distinguished_name_is_written_as_rfc_4514_has_it() -> None:
    name = (
        (("countryName", "DE"),),
        (("organizationName", "A, B+C"), ("emailAddress", "x@y")),
        (("commonName", "#\0 "),),
    )
    assert distinguished_name(name) == r"CN=\#\00\ ,O=A\, B\+C+emailAddress=x@y,C=DE"
    assert distinguished_name(((("commonName", " "),),)) == r"CN=\ "
