"""The transport against asyncio's contract: buffered protocols, other protocols in mid-stream, TLS and files.

asyncio's own start_tls and sendfile work on the transport through set_protocol and the buffered interface. Each test
runs against asyncio's own socket transport too.
"""

from __future__ import annotations

import asyncio
import ssl

import pytest
from contract import (
    MUCH,
    BufferedRecorder,
    Recorder,
    anonymous,
    forkd_only,
    kits,
    read_exactly,
    read_to_end,
    tcp_pair,
)

kit = kits


def test_a_buffered_protocol_receives_into_its_own_buffer(kit):
    protocol = BufferedRecorder(kit, size=10, buffer_updated=lambda _, count: sizes.append(count))
    sizes = []
    _, peer = kit.connect(protocol)
    peer.sendall(bytes(range(100)))
    kit.until(lambda: len(protocol.received) == 100)
    assert protocol.received == bytes(range(100))
    assert sizes == [10] * 10
    assert protocol.calls[1:] == ["get_buffer", "buffer_updated"] * 10


@pytest.mark.parametrize("wrap", [bytearray, lambda size: memoryview(bytearray(size))], ids=["bytearray", "view"])
def test_get_buffer_may_return_any_writable_buffer(kit, wrap):
    given = wrap(100)
    protocol = BufferedRecorder(kit, get_buffer=lambda *_: given)
    kit.connect(protocol, first=b"here")
    kit.until(lambda: "buffer_updated" in protocol.calls)
    assert bytes(given[:4]) == b"here"


def test_get_buffer_is_given_no_size(kit):
    hints = []
    protocol = BufferedRecorder(kit, get_buffer=lambda _, hint: hints.append(hint))
    kit.connect(protocol, first=b"x")
    kit.until(lambda: hints)
    assert hints == [-1]


def test_a_buffered_protocol_is_told_of_end_of_file(kit):
    protocol = BufferedRecorder(kit)
    _, peer = kit.connect(protocol)
    peer.close()
    kit.until(lambda: protocol.lost)
    assert protocol.calls == ["connection_made", "get_buffer", "eof_received", "connection_lost"]
    assert protocol.lost == [None]


def test_a_buffered_protocol_pauses_and_resumes(kit):
    protocol = BufferedRecorder(kit, size=10, buffer_updated=lambda p, _: p.transport.pause_reading())
    transport, _ = kit.connect(protocol, first=bytes(range(20)))
    kit.until(lambda: protocol.received)
    kit.turn()
    assert protocol.received == bytes(range(10))
    transport.resume_reading()
    kit.until(lambda: len(protocol.received) > 10)
    assert protocol.received == bytes(range(20))


@pytest.mark.parametrize("second", [Recorder, BufferedRecorder])
@pytest.mark.parametrize("first", [Recorder, BufferedRecorder])
def test_another_protocol_takes_over_in_mid_stream(kit, first, second):
    def hand_over(protocol, _):
        if bytes(protocol.received) == b"yours":
            protocol.transport.set_protocol(successor)

    name = "data_received" if first is Recorder else "buffer_updated"
    protocol = first(kit, **{name: hand_over})
    successor = second(kit)
    transport, peer = kit.connect(protocol, first=b"yours")
    kit.until(lambda: transport.get_protocol() is successor)
    peer.sendall(b"mine")
    kit.until(lambda: successor.received)
    transport.set_write_buffer_limits(0)
    transport.write(bytes(MUCH))
    peer.close()
    kit.until(lambda: successor.lost)
    assert (protocol.received, successor.received) == (b"yours", b"mine")
    assert protocol.lost == []
    assert "connection_made" not in successor.calls
    assert "pause_writing" in successor.calls


def test_protocols_may_take_turns(kit):
    protocols = [Recorder(kit), BufferedRecorder(kit)]
    transport, peer = kit.connect(protocols[0])
    for number in range(20):
        protocol = protocols[number % 2]
        transport.set_protocol(protocol)
        peer.sendall(b"%02d" % number)
        kit.until(lambda protocol=protocol, due=2 * (number // 2 + 1): len(protocol.received) == due)
    assert [bytes(protocol.received) for protocol in protocols] == [
        b"".join(b"%02d" % number for number in range(start, 20, 2)) for start in (0, 1)
    ]


@pytest.mark.parametrize("successor_class", [Recorder, BufferedRecorder])
def test_a_protocol_that_takes_over_while_reading_is_paused_gets_what_comes_then(kit, successor_class):
    protocol, successor = Recorder(kit), successor_class(kit)
    transport, peer = kit.connect(protocol)
    transport.pause_reading()
    peer.sendall(b"later")
    transport.set_protocol(successor)
    kit.turn()
    assert successor.calls == []
    transport.resume_reading()
    kit.until(lambda: successor.received)
    assert (protocol.received, successor.received) == (b"", b"later")


def test_a_protocol_that_takes_over_a_closing_connection_is_told_of_its_end(kit):
    protocol, successor = Recorder(kit), Recorder(kit)
    transport, _ = kit.connect(protocol)
    transport.close()
    transport.set_protocol(successor)
    kit.until(lambda: successor.lost)
    assert (protocol.lost, successor.lost) == ([], [None])


def upgraded(kit, protocol):
    """A connection over TCP that begins with a plain exchange and goes on under TLS: transport, peer's TLS socket."""

    async def serve():
        over_tls = await kit.loop.start_tls(
            plain, protocol, anonymous(ssl.PROTOCOL_TLS_SERVER), server_side=True, ssl_shutdown_timeout=10
        )
        protocol.transport = over_tls
        return over_tls

    def go_ahead(starter, _):
        starter.transport.pause_reading()  # what comes from here on is for TLS
        starter.transport.write(b"go ahead")

    starter = Recorder(kit, data_received=go_ahead)
    plain, peer = kit.connect(starter, tcp_pair, first=b"STARTTLS")
    assert kit.in_thread(read_exactly, peer, 8) == b"go ahead"
    client = anonymous(ssl.PROTOCOL_TLS_CLIENT)
    wrapping = kit.loop.run_in_executor(None, lambda: client.wrap_socket(peer, do_handshake_on_connect=True))
    transport = kit.run(serve())
    return transport, kit.run(wrapping)


@pytest.mark.parametrize("protocol_class", [Recorder, BufferedRecorder])
def test_start_tls_encrypts_in_mid_stream(kit, protocol_class):
    protocol = protocol_class(kit)
    transport, client = upgraded(kit, protocol)
    with client:
        assert transport.get_extra_info("ssl_object").version() == "TLSv1.2"
        assert transport.get_extra_info("peername") == client.getsockname()
        client.sendall(b"secret")
        kit.until(lambda: protocol.received)
        assert protocol.received == b"secret"
        transport.write(bytes(MUCH))
        assert len(kit.in_thread(read_exactly, client, MUCH)) == MUCH
        transport.close()
        assert kit.in_thread(client.recv, 1) == b""
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


@forkd_only
def test_a_protocol_under_tls_is_asked_to_end_too(kit):
    protocol = Recorder(kit)
    protocol.shutdown = lambda: (protocol.transport.write(b"goodbye"), protocol.transport.close())
    _, client = upgraded(kit, protocol)
    with client:
        kit.transports[0].ask_to_end()
        assert kit.in_thread(read_exactly, client, 7) == b"goodbye"
        assert kit.in_thread(client.recv, 1) == b""
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


@pytest.mark.parametrize("end", ["abort", "close by the client"])
def test_a_connection_under_tls_ends(kit, end):
    protocol = Recorder(kit)
    transport, client = upgraded(kit, protocol)
    with client:
        if end == "abort":
            transport.abort()
        else:
            kit.in_thread(unwrap, client)
        kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


def unwrap(client):
    """Says goodbye in TLS and closes."""
    client.unwrap().close()


@forkd_only  # it needs a pause from connection_made, which asyncio's before 3.11.3 does not keep
def test_a_handshake_that_fails_ends_the_connection(kit):
    async def serve():
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await kit.loop.start_tls(plain, Recorder(kit), anonymous(ssl.PROTOCOL_TLS_SERVER), server_side=True)

    starter = Recorder(kit, connection_made=lambda p: p.transport.pause_reading())
    plain, peer = kit.connect(starter, tcp_pair, first=b"this is not TLS\r\n\r\n")
    kit.run(serve())
    kit.in_thread(read_to_end, peer)
    assert plain.is_closing()
    kit.take_reported()


def test_sendfile_sends_a_file_in_its_place(kit, tmp_path):
    content = bytes(range(256)) * (MUCH // 256)
    path = tmp_path / "file"
    path.write_bytes(content)
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)

    async def serve(file):
        transport.write(b"head")
        sent = await kit.loop.sendfile(transport, file, offset=256)
        transport.write(b"tail")
        return sent

    reading = kit.loop.run_in_executor(None, read_exactly, peer, len(content) + 8 - 256)
    with path.open("rb") as file:
        assert kit.run(serve(file)) == len(content) - 256
    assert (kit.run(reading) == b"head" + content[256:] + b"tail") is True
    assert (transport.get_protocol(), transport.is_reading()) == (protocol, True)
    peer.sendall(b"thanks")
    kit.until(lambda: protocol.received)
    assert protocol.received == b"thanks"


def test_sendfile_ends_when_the_client_goes_away(kit, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(MUCH))
    transport, peer = kit.connect(Recorder(kit))
    with path.open("rb") as file:
        sending = asyncio.ensure_future(kit.loop.sendfile(transport, file), loop=kit.loop)
        kit.turn()
        peer.close()
        with pytest.raises(ConnectionError):
            kit.run(sending)
    kit.turn()
    assert transport.is_closing()
