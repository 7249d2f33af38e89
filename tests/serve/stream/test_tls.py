"""TLS by the real daemon, with Python's and OpenSSL's own clients: each form of handler, certificates by name, those of
clients, what is refused, and renewal without a lost client.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from forkd.serve.stream.tls import TlsContexts
from tests.support.certificates import Authority
from tests.support.clients import at_end, echoes, endpoint, read
from tests.support.daemon import Daemon, Harness
from tests.support.once_process import OnceProcess
from tests.support.processes import DEADLINE, eventually
from tests.support.tls_client import TlsClient, pump


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    (tmp_path / "certificates").mkdir()
    return Authority(tmp_path / "certificates")


def settings_for(authority: Authority, *more: str) -> tuple[str, ...]:
    cert, key = authority.issue("localhost", "localhost")
    return tuple(f"listen.{one}" for one in (f"tls.cert={cert}", f"tls.key={key}", *more))


def start(harness: Harness, authority: Authority, *more: str, handler: str = "secret:Who", workers: int = 1) -> Daemon:
    return harness.daemon(target=handler, workers=workers, settings=settings_for(authority, *more)).start()


def client_context(authority: Authority, **options: Any) -> ssl.SSLContext:
    context = authority.trusted()
    for name, value in options.items():
        setattr(context, name, value)
    return context


def secure(harness: Harness, daemon: Daemon | str, context: ssl.SSLContext, name: str = "localhost") -> ssl.SSLSocket:
    """A client whose handshake is done."""
    sock = harness.connect(daemon)
    wrapped = context.wrap_socket(sock, server_hostname=name)
    harness.closing(wrapped)
    return wrapped


def known(client: socket.socket) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_line(client))
    return found


def _line(client: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"\n"):
        data += client.recv(1)
    return data


def ended(daemon: Daemon) -> dict[str, int]:
    return {reason: count for reason, count in daemon.status()["totals"]["ended"].items() if count}


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
def test_handler_talks_and_knows_of_tls(harness: Harness, authority: Authority, version: str) -> None:
    daemon = start(harness, authority, "tls.alpn=[echo/2, echo/1]")
    which = ssl.TLSVersion[version.replace(".", "_")]
    context = client_context(authority, minimum_version=which, maximum_version=which)
    context.set_alpn_protocols(["echo/1"])
    client = secure(harness, daemon, context)
    assert known(client) == {
        "version": version,
        "alpn": "echo/1",
        "cipher": True,
        "peercert": None,
        "binary": 0,
        "can_write_eof": False,
    }
    assert echoes(client, b"x" * 50_000)
    client.unwrap()
    eventually(lambda: daemon.status()["workers"][0]["clients"] == 0, what="the client's end")
    assert ended(daemon) == {}


@pytest.mark.parametrize("handler", ["forkd.builtin:Echo", "secret:Buffered", "blocking:echo"])
def test_much_data_comes_back_whole(harness: Harness, authority: Authority, handler: str) -> None:
    daemon = start(harness, authority, handler=handler)
    client = secure(harness, daemon, client_context(authority))
    data = os.urandom(3_000_000)
    assert pump(client, data) == data
    assert echoes(client)


@pytest.mark.parametrize("handler", ["secret:Bulk", "secret:file"])
def test_much_is_sent_while_nothing_is_read(harness: Harness, authority: Authority, handler: str) -> None:
    daemon = start(harness, authority, handler=handler)
    client = secure(harness, daemon, client_context(authority))
    assert len(read(client, 3_000_000)) == 3_000_000


@pytest.mark.parametrize("handler", ["secret:Bulk", "secret:sends", "blocking:sends"])
def test_client_that_resets_while_it_is_sent_to_is_no_error(
    harness: Harness, authority: Authority, handler: str
) -> None:
    settings = ("log.access=true", *settings_for(authority))
    daemon = harness.daemon(target=handler, workers=1, settings=settings).start()
    client = secure(harness, daemon, client_context(authority))
    assert client.recv(1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    daemon.wait_log("forkd.access: .*, reset$")
    assert daemon.status()["workers"][0]["errors"] == 0


@pytest.mark.parametrize("what", ["handler: 'forkd.builtin:Echo'", "command: [cat]"])
def test_chain_of_certificates_may_be_larger_than_the_sockets_buffer(
    harness: Harness, authority: Authority, tmp_path: Path, what: str
) -> None:
    cert, key = authority.issue("localhost", "localhost")
    cert.write_text(cert.read_text() + authority.cert.read_text() * 100)
    file = tmp_path / "chain.yaml"
    tls = f"{{cert: {cert}, key: {key}}}"
    file.write_text(f"listen: [{{address: 'tcp://127.0.0.1:0', {what}, tls: {tls}, socket: {{send_buffer: 4KiB}}}}]\n")
    daemon = harness.daemon(target=file, listen=(), workers=1).start()
    sock = harness.closing(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(DEADLINE)
    sock.connect(endpoint(daemon.address)[1])
    with client_context(authority).wrap_socket(sock, server_hostname="localhost") as client:
        assert echoes(client)


def test_streams_handler_ends_with_a_proper_end(harness: Harness, authority: Authority) -> None:
    daemon = start(harness, authority, handler="secret:lines")
    client = secure(harness, daemon, client_context(authority))
    client.sendall(b"hello\nbye\n")
    assert read(client, 14) == b"> hello\n> bye\n"
    assert client.read(1) == b""  # told by TLS: a closed connection alone would raise


def test_blocking_handler_ends_with_a_proper_end(harness: Harness, authority: Authority) -> None:
    daemon = start(harness, authority, handler="blocking:Lines", workers=1)
    client = secure(harness, daemon, client_context(authority))
    client.sendall(b"hello\n")
    assert read(client, 8) == b"> hello\n"
    assert client.unwrap().recv(1) == b""  # its end is answered
    daemon.wait_clients(0)


def test_blocking_handler_that_closes_may_go_on(harness: Harness, authority: Authority) -> None:
    daemon = start(harness, authority, handler="blocking:ends")
    client, other = (TlsClient(harness.connect(daemon), client_context(authority)) for _ in range(2))
    client.send(b"work")
    assert client.rest() == b"last word"
    other.send(b"done")
    assert other.rest() == b""
    daemon.wait_clients(0)


def test_certificate_is_that_of_the_name_that_is_asked_for(harness: Harness, authority: Authority) -> None:
    exact, wild = authority.issue("exact", "mail.example.org"), authority.issue("wild", "*.example.org")
    own = authority.issue("own", "localhost")
    file = harness.directory / "named.yaml"
    names = "".join(f", {{cert: {cert}, key: {key}}}" for cert, key in (exact, wild))[2:]
    tls = f"{{cert: {own[0]}, key: {own[1]}, names: [{names}]}}"
    file.write_text(f"listen: [{{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo', tls: {tls}}}]\n")
    daemon = harness.daemon(target=file, listen=(), workers=1).start()
    context = client_context(authority, check_hostname=False)
    for name, shown in [
        *(("mail.example.org", "mail.example.org"), ("MAIL.example.org", "mail.example.org")),
        *(("www.example.org", "*.example.org"), ("a.b.example.org", "localhost"), ("example.org", "localhost")),
        *(("localhost", "localhost"), ("127.0.0.1", "localhost")),
    ]:
        client = secure(harness, daemon, context, name)
        certificate: Any = client.getpeercert()
        assert certificate["subjectAltName"] == (("DNS", shown),), name
        assert echoes(client)


@pytest.mark.parametrize("handler", ["forkd.builtin:Echo", "blocking:echo"])
def test_name_that_is_not_ascii_is_refused_in_one_line(harness: Harness, authority: Authority, handler: str) -> None:
    cert, key = authority.issue("localhost", "localhost")
    file = harness.directory / "named.yaml"
    tls = f"{{cert: {cert}, key: {key}, names: [{{cert: {cert}, key: {key}}}]}}"
    file.write_text(f"listen: [{{address: 'tcp://127.0.0.1:0', handler: '{handler}', tls: {tls}}}]\n")
    daemon = harness.daemon(target=file, listen=(), workers=1).start()
    outgoing = ssl.MemoryBIO()
    hello = client_context(authority).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="unicode")
    with pytest.raises(ssl.SSLWantReadError):
        hello.do_handshake()
    client = harness.connect(daemon)
    client.sendall(outgoing.read().replace(b"unicode", b"un\xefcode"))
    assert len(read(client, 100)) == 7  # an alert
    daemon.wait_log(r"\(handshake\): the name that the client asks for is not in ASCII")
    assert "output" not in daemon.log.read_text()  # of what Python prints


@pytest.mark.parametrize("mode", ["optional", "required"])
def test_client_shows_a_certificate(harness: Harness, authority: Authority, mode: str) -> None:
    daemon = start(harness, authority, f"tls.client={mode}", f"tls.client_ca={authority.cert}")
    context = client_context(authority)
    context.load_cert_chain(*authority.issue("alice"))
    found = known(secure(harness, daemon, context))
    assert [["commonName", "alice"]] in found["peercert"]["subject"]
    assert found["binary"] > 100
    (harness.directory / "other").mkdir()
    stranger = client_context(authority)
    stranger.load_cert_chain(*Authority(harness.directory / "other", "other").issue("mallory"))
    for context, works in ((client_context(authority), mode == "optional"), (stranger, False)):
        try:
            found = known(secure(harness, daemon, context))
        except (ssl.SSLError, ConnectionError):  # with TLS 1.3 a client learns it when it reads
            assert not works
        else:
            assert works
            assert found["peercert"] is None
    count = 2 if mode == "required" else 1
    eventually(lambda: ended(daemon) == {"handshake": count}, what="the refused handshakes")


@pytest.mark.parametrize(
    ("hello", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: here\r\n\r\n", "http request"),
        (b"\x16\x03\x01\xff\xff" + bytes(100), "packet length too long|record layer failure|wrong version"),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", "length mismatch|bad length|too short|unexpected"),
        (b"\x00" * 50, "wrong version number|unsupported|unexpected"),
        (b"SSH-2.0-x\r\n", "wrong version number|unsupported"),
        (b"\x16\x03\x01\x40\x00\x01\xff\xff\xff" + bytes(16_380), "excessive message size"),  # its end is far away
    ],
)
def test_what_is_no_hello_is_refused(harness: Harness, authority: Authority, hello: bytes, reason: str) -> None:
    daemon = start(harness, authority, handler="forkd.builtin:Echo")
    with harness.connect(daemon) as client:
        client.sendall(hello)
        while client.recv(1000):  # an alert, perhaps
            pass
    daemon.wait_log(rf"forkd.tls: closed client .* \(handshake\): .*({reason})")
    eventually(lambda: ended(daemon) == {"handshake": 1}, what="one handshake that failed")
    assert echoes(secure(harness, daemon, client_context(authority)))


@pytest.mark.parametrize("handler", ["forkd.builtin:Echo", "blocking:echo"])
def test_silent_and_slow_handshakes_are_bounded(harness: Harness, authority: Authority, handler: str) -> None:
    daemon = start(harness, authority, "tls.handshake=1s", handler=handler)
    with harness.connect(daemon) as silent, harness.connect(daemon) as cut, harness.connect(daemon) as gone:
        cut.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        gone.close()
        assert echoes(secure(harness, daemon, client_context(authority)))  # meanwhile
        assert at_end(silent)
        assert at_end(cut)
    eventually(lambda: ended(daemon) == {"handshake": 3}, what="three handshakes that failed")
    daemon.wait_log(r"\(handshake\): it took longer than 1 s")


@pytest.mark.parametrize("handler", ["forkd.builtin:Echo", "blocking:echo"])
def test_deadlines_begin_after_the_handshake(harness: Harness, authority: Authority, handler: str) -> None:
    daemon = start(harness, authority, "timeouts.first_byte=1s", handler=handler)
    client = secure(harness, daemon, client_context(authority))
    assert at_end(client)  # what it has sent in its handshake is no first byte
    eventually(lambda: ended(daemon) == {"first_byte": 1}, what="the deadline")


@pytest.mark.parametrize(
    "handler", ["handler: 'asyncio:Protocol'", "handler: 'blocking:Lines'", "command: [sleep, '60']"]
)
def test_what_comes_with_the_handshakes_end_is_a_first_byte(
    harness: Harness, authority: Authority, handler: str
) -> None:
    cert, key = authority.issue("localhost", "localhost")
    file = harness.directory / "glued.yaml"
    listener = f"address: 'tcp://127.0.0.1:0', {handler}, tls: {{cert: {cert}, key: {key}}}"
    file.write_text(f"listen: [{{{listener}, timeouts: {{first_byte: 500ms, idle: 1s}}}}]\n")
    daemon = harness.daemon(target=file, listen=(), workers=1).start()
    sock = harness.connect(daemon)
    TlsClient(sock, client_context(authority), early=b"hello")
    assert eventually(lambda: ended(daemon) == {"idle": 1}, what="the deadline of one that has spoken")


@pytest.mark.parametrize("name", ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-CHACHA20-POLY1305"])
def test_ciphers_are_those_of_the_settings(harness: Harness, authority: Authority, name: str) -> None:
    daemon = start(harness, authority, f"tls.ciphers={name}", "tls.alpn=[a/1]", handler="forkd.builtin:Echo")
    assert f"Cipher is {name}" in s_client(daemon, "-tls1_2", "-alpn", "b/1")  # ALPN may agree on nothing
    assert "Cipher is (NONE)" in s_client(daemon, "-tls1_2", "-cipher", "ECDHE-ECDSA-AES256-GCM-SHA384")
    eventually(lambda: ended(daemon) == {"handshake": 1}, what="the one that has no cipher in common")
    assert "ALPN protocol: a/1" in s_client(daemon, "-tls1_3", "-alpn", "b/1,a/1")


def s_client(daemon: Daemon, *options: str, words: str = "") -> str:
    """What openssl's client says."""
    host, port = endpoint(daemon.address)[1][:2]
    command = ["openssl", "s_client", "-connect", f"{host}:{port}", *options]
    done = subprocess.run(command, input=words, capture_output=True, text=True, check=False, timeout=DEADLINE)
    return done.stdout + done.stderr


def test_old_versions_and_renegotiation_are_refused(harness: Harness, authority: Authority) -> None:
    daemon = start(harness, authority, handler="forkd.builtin:Echo")
    for old in ("-tls1", "-tls1_1"):
        assert "Cipher is (NONE)" in s_client(daemon, old, "-cipher", "DEFAULT@SECLEVEL=0")
    eventually(lambda: ended(daemon) == {"handshake": 2}, what="two handshakes that failed")
    assert "no renegotiation" in s_client(daemon, "-tls1_2", words="R\n")
    assert "Cipher is (NONE)" not in s_client(daemon, "-tls1_2")
    modern = harness.daemon(
        name="modern", target="forkd.builtin:Echo", settings=settings_for(authority, "tls.min_version=1.3")
    ).start()
    assert "Cipher is (NONE)" in s_client(modern, "-tls1_2")
    assert "TLS_" in s_client(modern, "-tls1_3")


def test_renewal_by_a_reload_keeps_clients(harness: Harness, authority: Authority) -> None:
    daemon = start(harness, authority, handler="forkd.builtin:Echo")
    context = client_context(authority)
    first = secure(harness, daemon, context)
    authority.issue("localhost", "localhost")
    assert daemon.command("reload").returncode == 0
    second = secure(harness, daemon, context)
    assert first.getpeercert(True) != second.getpeercert(True)
    assert echoes(first)


def shows(harness: Harness, daemon: Daemon, context: ssl.SSLContext, known_before: set[bytes]) -> bytes:
    """The certificate that new clients are shown, when it is another one."""

    def found() -> bytes:
        with context.wrap_socket(harness.connect(daemon), server_hostname="localhost") as client:
            shown = client.getpeercert(True) or b""
            return b"" if shown in known_before else shown

    return eventually(found, what="another certificate")


@pytest.mark.parametrize("handler", ["forkd.builtin:Echo", "blocking:echo"])
def test_changed_file_is_taken_without_a_reload(harness: Harness, authority: Authority, handler: str) -> None:
    daemon = start(harness, authority, handler=handler, workers=2)
    context, workers = client_context(authority), daemon.workers()
    clients = [secure(harness, daemon, context) for _ in range(4)]
    seen = {clients[0].getpeercert(True) or b""}
    cert, _ = authority.issue("localhost", "localhost", "other.org", days=50)
    daemon.wait_log(rf"INFO .* listener tcp://.*: certificates are renewed: {cert}$")
    seen.add(shows(harness, daemon, context, seen))
    (listener,) = daemon.status()["listeners"]
    (said,) = listener["certificates"]
    assert (said["file"], said["names"]) == (str(cert), ["localhost", "other.org"])
    assert 49 < (said["expires"] - time.time()) / 86_400 <= 50
    assert f"{cert}  " in (text := daemon.command("status").stdout)
    assert re.search(r"\(in (49|50) days\) +localhost, other.org$", text, re.MULTILINE)
    # Another pair is moved into its place, one file after the other
    for made in authority.issue("new", "localhost"):
        made.replace(cert.with_suffix(made.suffix))
    seen.add(shows(harness, daemon, context, seen))
    assert len(seen) == 3
    assert all(echoes(client) for client in clients)
    assert daemon.workers() == workers


def test_broken_file_is_refused_once_and_the_old_one_kept(harness: Harness, authority: Authority) -> None:
    daemon = start(harness, authority, handler="forkd.builtin:Echo", workers=2)
    context = client_context(authority)
    before = secure(harness, daemon, context).getpeercert(True)
    cert, key = authority.issue("other", "localhost")
    own = cert.with_name("localhost.crt")
    daemon.expect("changed certificates are refused, and the former ones kept")
    own.write_bytes(cert.read_bytes())  # without its key
    daemon.wait_log(rf"former ones kept: tls.cert {own} .*localhost.key: the key is another certificate's")
    daemon.expect("worker . .*could not boot: .*: tls.cert", "reload: failed, and nothing has changed")
    refused = daemon.command("reload")
    assert (refused.returncode, "the key is another certificate's" in refused.stderr) == (1, True)
    # A worker that begins now has the former ones, too
    os.kill(daemon.workers()[1], signal.SIGKILL)
    daemon.expect("worker 1 .*killed|SIGKILL")
    daemon.wait_workers(2)
    for _ in range(4):
        client = secure(harness, daemon, context)
        assert client.getpeercert(True) == before
        assert echoes(client)
    own.with_suffix(".key").write_bytes(key.read_bytes())
    shows(harness, daemon, context, {before or b""})
    assert sum("certificates are refused" in record for record in daemon.records()) == 1


def test_key_of_root_serves_workers_of_another_user(open_harness: Harness) -> None:
    authority = Authority(open_harness.directory)
    cert, key = authority.issue("localhost", "localhost")
    key.chmod(0o600)
    settings = (f"listen.tls.cert={cert}", f"listen.tls.key={key}", "user=nobody")
    daemon = open_harness.daemon(target="forkd.builtin:Echo", workers=1, settings=settings).start()
    context = client_context(authority)
    client = secure(open_harness, daemon, context)
    assert echoes(client)
    authority.issue("localhost", "localhost")
    key.chmod(0o600)
    shows(open_harness, daemon, context, {client.getpeercert(True) or b""})
    assert echoes(client)


def test_workers_in_a_chroot_are_said_to_need_a_reload(open_harness: Harness) -> None:
    authority = Authority(open_harness.directory)
    cert, key = authority.issue("localhost", "localhost")
    (open_harness.directory / "root").mkdir(mode=0o755)
    settings = (f"listen.tls.cert={cert}", f"listen.tls.key={key}", "user=nobody", "preload=true")
    chroot = f"chroot={open_harness.directory / 'root'}"
    daemon = open_harness.daemon(target="forkd.builtin:Echo", workers=1, settings=(*settings, chroot)).start()
    context = client_context(authority)
    before = secure(open_harness, daemon, context).getpeercert(True) or b""
    authority.issue("localhost", "localhost")
    daemon.wait_log("WARNING .*: certificates have changed; workers in a chroot need a forkd reload")
    assert daemon.command("reload").returncode == 0
    shows(open_harness, daemon, context, {before})


def test_one_client_is_served_with_tls(
    harness: Harness, single: Callable[..., OnceProcess], authority: Authority
) -> None:
    options = [part for one in settings_for(authority) for part in ("--set", one)]
    one = single("forkd.builtin:Echo", *options).start()
    client = secure(harness, one.address, client_context(authority))
    assert echoes(client)
    client.close()
    assert one.status() == 0


def test_certificates_that_are_of_no_use_are_told(harness: Harness, authority: Authority) -> None:
    cert, key = authority.issue("localhost")
    _, other = authority.issue("other")
    secret = harness.directory / "secret.key"
    locking = ["openssl", "ec", "-in", str(key), "-out", str(secret), "-aes128", "-passout", "pass:word"]
    subprocess.run(locking, check=True, capture_output=True)
    none = harness.directory / "none.pem"
    for options, sentence in [
        ([f"tls.cert={none}"], f"tls.cert {none}: No such file or directory"),
        ([f"tls.cert={cert}"], f"tls.cert {cert}: the file is not in PEM, or lacks its certificate or key"),
        ([f"tls.cert={cert}", f"tls.key={other}"], f"tls.cert {cert} {other}: the key is another certificate's"),
        ([f"tls.cert={cert}", f"tls.key={secret}"], "the key has a password; take one without"),
        ([f"tls.cert={cert}", f"tls.key={key}", "tls.ciphers=NONSENSE"], "tls.ciphers: names no cipher that OpenSSL"),
        ([f"tls.key={key}"], "tls.key: needs tls.cert"),
        ([f"tls.cert={cert}", f"tls.key={key}", "tls.client=required"], "tls.client: required needs tls.client_ca"),
        ([f"tls.cert={cert}", f"tls.key={key}", "limits.message=full"], "limits.message: is sent in the clear, and"),
    ]:
        settings = tuple(f"listen.{one}" for one in options)
        done = harness.daemon(name="wrong", target="forkd.builtin:Echo", settings=settings).command("check")
        assert (done.returncode, sentence in done.stderr) == (78, True), done


def test_certificate_that_ends_soon_is_warned_of(harness: Harness, authority: Authority) -> None:
    cert, key = authority.issue("localhost", days=20)
    settings = (f"listen.tls.cert={cert}", f"listen.tls.key={key}")
    daemon = harness.daemon(target="forkd.builtin:Echo", workers=1, settings=settings).start()
    daemon.wait_log(rf"WARNING .*listener tcp://.*: certificate {cert} ends in (19|20) days")
    assert daemon.command("upgrade").returncode == 0
    authority.issue("localhost", days=19)
    daemon.wait_log("certificates are renewed")
    (said,) = daemon.status()["listeners"][0]["certificates"]
    assert said["expires"] < time.time() + 19 * 86_400
    assert sum("ends in" in record for record in daemon.records()) == 1  # of each once a day


def test_contexts_are_found_by_name(authority: Authority) -> None:
    from forkd.config.listener import Tls, TlsName  # noqa: PLC0415

    cert, key = authority.issue("own", "own.org", "*.own.org")
    other = TlsName(cert=(pair := authority.issue("other", "a.own.org"))[0], key=pair[1])
    contexts = TlsContexts(Tls(cert=cert, key=key, names=(other,)))
    assert contexts.find("b.own.org") is contexts.default
    assert contexts.find("a.own.org.") is not contexts.default
    assert contexts.find(None) is contexts.default
