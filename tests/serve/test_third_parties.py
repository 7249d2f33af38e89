"""Servers and clients that others have made, with handlers as their documentation has them."""

from __future__ import annotations

import smtplib
import ssl
import subprocess
from pathlib import Path

import pytest

from tests.serve.stream.test_transport_closing import reset
from tests.support.certificates import Authority
from tests.support.clients import at_end, dial, endpoint, read
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_package, needs_program
from tests.support.paths import HANDLERS

MESSAGE = b"Subject: news\r\n\r\n" + b"line after line\r\n" * 20_000


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "certificates").mkdir()
    return Authority(tmp_path / "certificates")


def serving(harness: Harness, *listeners: str) -> Daemon:
    """A daemon with two workers that serve these handlers, each on a port of its own."""
    file = harness.directory / "tested.yaml"
    items = "\n".join(f"- {{address: 'tcp://127.0.0.1:0', {one}}}" for one in listeners)
    file.write_text(f"name: tested\npython_path: ['{HANDLERS}']\nlisten:\n{items}\n")
    return harness.daemon(target=file, listen=(), workers=2).start()


def addresses(daemon: Daemon) -> list[str]:
    return [str(one["address"]) for one in daemon.status()["listeners"]]


def mail_server(harness: Harness, authority: Authority) -> tuple[Daemon, Path]:
    """aiosmtpd with STARTTLS, and behind it with TLS from the beginning; and where messages are kept."""
    needs_package("aiosmtpd")
    cert, key = authority.issue("localhost", "localhost")
    (kept := harness.directory / "kept").mkdir()
    files = f"directory: {kept}, cert: {cert}, key: {key}"
    listeners = f"args: {{{files}}}", f"args: {{directory: {kept}}}, tls: {{cert: {cert}, key: {key}}}"
    return serving(harness, *(f"handler: 'mail:smtp', {one}" for one in listeners)), kept


@pytest.mark.parametrize("how", ["plain", "starttls", "tls"])
def test_aiosmtpd_takes_mail_from_smtplib(harness: Harness, authority: Authority, how: str) -> None:
    daemon, kept = mail_server(harness, authority)
    context = ssl.create_default_context(cafile=authority.cert)
    host, port = endpoint(addresses(daemon)[how == "tls"])[1][:2]
    client = smtplib.SMTP_SSL(context=context, timeout=30) if how == "tls" else smtplib.SMTP(timeout=30)
    client._host = "localhost"  # type: ignore[attr-defined] # whose certificate it looks for
    client.connect(host, port)
    with client:
        if how == "starttls":
            client.starttls(context=context)
        for _ in range(2):
            assert client.sendmail("me@here", ["you@there"], MESSAGE) == {}
    assert sorted(one.read_bytes() for one in kept.iterdir()) == [MESSAGE, MESSAGE]
    assert {one.suffix for one in kept.iterdir()} == {".tls" if how == "starttls" else ".plain"}
    daemon.wait_clients(0)
    assert daemon.status()["totals"]["errors"] == 0


def test_aiosmtpd_forgets_what_came_before_its_handshake(harness: Harness, authority: Authority) -> None:
    daemon, _ = mail_server(harness, authority)
    plain = harness.connect(addresses(daemon)[0])
    replies = plain.makefile("rb", buffering=0)
    assert replies.readline().startswith(b"220 mail.example")
    plain.sendall(b"EHLO me\r\n")
    while not replies.readline().startswith(b"250 "):
        pass
    plain.sendall(b"STARTTLS\r\nNOOP injected\r\n")
    assert replies.readline() == b"220 Ready to start TLS\r\n"
    context = ssl.create_default_context(cafile=authority.cert)
    try:
        secure = harness.closing(context.wrap_socket(plain, server_hostname="localhost"))
    except (ssl.SSLError, ConnectionError):  # what came before is taken for a hello, which is as good
        assert at_end(plain)
        return
    secure.sendall(b"QUIT\r\n")
    assert read(secure, 4) == b"221 "


def test_server_of_aiohttp_serves_curl_over_tls(harness: Harness, authority: Authority, tmp_path: Path) -> None:
    needs_package("aiohttp")
    needs_program("curl")
    cert, key = authority.issue("localhost", "localhost")
    secure, plain = addresses(
        daemon := serving(
            harness,
            f"handler: 'pages:server', tls: {{cert: {cert}, key: {key}, alpn: [http/1.1]}}",
            "handler: 'pages:make', factory: true",
        )
    )
    (body := tmp_path / "body").write_bytes(b"x" * 1_000_000)
    port = endpoint(secure)[1][1]
    common = ["curl", "-sS", "-m", "30", "--data-binary", f"@{body}"]
    to = ["--cacert", str(authority.cert), "--connect-to", f"localhost:443:127.0.0.1:{port}"]
    for options, scheme in ((["https://localhost/a", "https://localhost/b", *to], "https"), ([], "http")):
        urls = options or [f"{plain.replace('tcp', 'http')}/{path}" for path in "ab"]
        done = subprocess.run([*common, *urls], capture_output=True, text=True, check=True)
        assert done.stdout == f"POST /a {scheme} 1000000\nPOST /b {scheme} 1000000\n"
    daemon.wait_clients(0)
    assert daemon.status()["totals"]["errors"] == 0


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["silent", "asking"])
def test_clients_that_reset_are_no_news_to_aiohttp(harness: Harness, said: bytes) -> None:
    needs_package("aiohttp")
    daemon = serving(harness, "handler: 'pages:make', factory: true")
    for _ in range(100):
        client = dial(daemon.address)
        client.sendall(said)
        reset(client)
    daemon.wait_clients(0)
    assert [record for record in daemon.records() if " ERROR " in record] == []
