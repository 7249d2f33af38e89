"""The transport with TLS, as a kit of the contract has it: how its connections end, and what OpenSSL holds back."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from forkd.config.listener import Tls
from forkd.serve.stream.coroutine import streams_factory
from forkd.serve.stream.tls import TlsContexts, say_end
from tests.serve.stream.test_transport_closing import reset
from tests.support.certificates import Authority
from tests.support.processes import DEADLINE
from tests.support.tls_client import TlsClient
from tests.support.transport_contract import AnyRecorder, BufferedRecorder, Kit, Recorder, kits, read_to_end, tcp_pair

kit = kits

twins = pytest.mark.parametrize("kit", ["forkd", "compiled"], indirect=True)

#: Makes a client of a socket, as `Kit.connect_with_tls` wants it.
MakeClient = Callable[..., TlsClient]


@pytest.fixture(scope="module", name="authority")
def one_authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module", name="contexts")
def one_certificate(authority: Authority) -> TlsContexts:
    cert, key = authority.issue("localhost", "localhost")
    return TlsContexts(Tls(cert=cert, key=key))


@pytest.fixture(name="client")
def clients(authority: Authority) -> MakeClient:
    return partial(TlsClient, context=authority.trusted())


def old(authority: Authority) -> ssl.SSLContext:
    """TLS 1.2, whose handshake ends with the server's word, and whose records say what they are."""
    context = authority.trusted()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context


async def listen(reader: asyncio.StreamReader, found: list[Any]) -> None:
    try:
        found.append(await reader.read(100))
    except ConnectionError as error:
        found.append(type(error))


def streams(kit: Kit, found: list[Any]) -> Any:
    """The protocol of a streams handler that reads once."""
    return streams_factory(lambda reader, _: listen(reader, found), kit.poll_loop, set())()


@twins
@pytest.mark.parametrize("form", ["protocol", "streams"])
def test_end_that_comes_with_the_handshakes_is_told(
    kit: Kit, contexts: TlsContexts, client: MakeClient, form: str
) -> None:
    found: list[Any] = []
    told = Recorder(kit, eof_received=lambda _: found.append(b""))
    protocol = told if form == "protocol" else streams(kit, found)
    transport, _, made = kit.connect_with_tls(protocol, contexts, partial(client, early=None))
    assert kit.in_thread(made.rest) == b""
    assert (found, transport.is_closing()) == ([b""], True)


@twins
@pytest.mark.parametrize("form", ["protocol", "streams"])
def test_reset_is_told_as_one(kit: Kit, contexts: TlsContexts, authority: Authority, form: str) -> None:
    found: list[Any] = []
    told = Recorder(kit)

    def vanish(sock: socket.socket) -> None:
        TlsClient(sock, old(authority))
        reset(sock)

    kit.connect_with_tls(told if form == "protocol" else streams(kit, found), contexts, vanish)
    kit.turn()
    assert found + list(map(type, told.lost)) == [ConnectionResetError]


FILL = b"\xff"


def fill(sock: socket.socket) -> None:
    """Sends behind what TLS has sent, until the socket takes no more."""
    with suppress(BlockingIOError):
        while True:
            sock.send(FILL * 65536, socket.MSG_DONTWAIT)


def is_alert(data: bytes) -> bool:
    """Whether what follows the filling is one whole record with an alert (RFC 5246, section 6.2.1)."""
    record = data.rpartition(FILL * 100)[2].lstrip(FILL)
    return record[:1] == b"\x15" and len(record) == 5 + int.from_bytes(record[3:5])


@twins
@pytest.mark.parametrize("way", ["close", "eof"])
def test_end_waits_for_a_socket_that_takes_no_more(
    kit: Kit, contexts: TlsContexts, authority: Authority, way: str
) -> None:
    protocol = Recorder(kit)
    transport, peer, _ = kit.connect_with_tls(protocol, contexts, lambda sock: TlsClient(sock, old(authority)))
    if way == "eof":
        peer.shutdown(socket.SHUT_WR)
    with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as same:
        fill(same)
    if way == "close":
        transport.close()
    kit.turn()
    transport.write(b"too late")
    assert is_alert(kit.in_thread(read_to_end, peer))
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


def test_end_of_a_blocking_handler_waits_for_a_socket_that_takes_no_more(
    contexts: TlsContexts, authority: Authority
) -> None:
    plain, peer = tcp_pair()
    peer.settimeout(DEADLINE)
    with peer, ThreadPoolExecutor() as pool:
        client = pool.submit(TlsClient, peer, old(authority))
        with contexts.default.wrap_socket(plain, server_side=True) as sock:
            client.result()
            with socket.socket(fileno=os.dup(sock.fileno())) as same:
                fill(same)
            read = pool.submit(read_to_end, peer)
            say_end(sock)
        assert is_alert(read.result())


@twins
@pytest.mark.parametrize("says_end", [False, True])
def test_what_a_small_buffer_has_left_comes_before_the_end(
    kit: Kit, contexts: TlsContexts, client: MakeClient, says_end: bool
) -> None:
    def pause(protocol: AnyRecorder, _: int) -> None:
        if len(protocol.received) == 100:
            protocol.transport.pause_reading()

    protocol = BufferedRecorder(kit, 100, buffer_updated=pause)
    transport, peer, made = kit.connect_with_tls(protocol, contexts, client)
    made.send(bytes(1000))
    kit.until(lambda: protocol.received)
    if says_end:
        made.say_end()
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert len(protocol.received) == 1000


@twins
@pytest.mark.parametrize("paused", [False, True])
def test_connection_ends_with_its_peer_whatever_the_protocol_answers(
    kit: Kit, contexts: TlsContexts, client: MakeClient, paused: bool
) -> None:
    protocol = Recorder(kit, eof_received=lambda _: True)
    transport, peer, _ = kit.connect_with_tls(protocol, contexts, client)
    if paused:
        transport.pause_reading()
    peer.shutdown(socket.SHUT_WR)
    kit.turn()
    if paused:
        transport.resume_reading()
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]
