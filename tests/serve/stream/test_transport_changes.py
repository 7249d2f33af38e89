"""The transport against asyncio's contract: buffered protocols, other protocols in mid-stream, TLS and files.

asyncio's own start_tls and sendfile work on the transport through set_protocol and the buffered interface. Each test
runs against asyncio's own socket transport too.
"""

from __future__ import annotations

import asyncio
import io
import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.transport_contract import (
    MUCH,
    AnyRecorder,
    BufferedRecorder,
    Kit,
    Recorder,
    RecorderClass,
    anonymous,
    forkd_only,
    kits,
    read_exactly,
    read_to_end,
    tcp_pair,
)

kit = kits


def test_a_buffered_protocol_receives_into_its_own_buffer(kit: Kit) -> None:
    sizes: list[int] = []
    protocol = BufferedRecorder(kit, 10, buffer_updated=lambda _, count: sizes.append(count))
    _, peer = kit.connect(protocol)
    peer.sendall(bytes(range(100)))
    kit.until(lambda: len(protocol.received) == 100)
    assert protocol.received == bytes(range(100))
    assert sizes == [10] * 10
    assert protocol.calls[1:] == ["get_buffer", "buffer_updated"] * 10


@pytest.mark.parametrize("wrap", [bytearray, lambda size: memoryview(bytearray(size))], ids=["bytearray", "view"])
def test_get_buffer_may_return_any_writable_buffer(kit: Kit, wrap: Callable[[int], Any]) -> None:
    given = wrap(100)
    protocol = BufferedRecorder(kit, get_buffer=lambda *_: given)
    kit.connect(protocol, first=b"here")
    kit.until(lambda: "buffer_updated" in protocol.calls)
    assert bytes(given[:4]) == b"here"


def test_get_buffer_is_given_no_size(kit: Kit) -> None:
    hints = []
    protocol = BufferedRecorder(kit, get_buffer=lambda _, hint: hints.append(hint))
    kit.connect(protocol, first=b"x")
    kit.until(lambda: hints)
    assert hints == [-1]


def test_a_buffered_protocol_is_told_of_end_of_file(kit: Kit) -> None:
    protocol = BufferedRecorder(kit)
    _, peer = kit.connect(protocol)
    peer.close()
    kit.until(lambda: protocol.lost)
    assert protocol.calls == ["connection_made", "get_buffer", "eof_received", "connection_lost"]
    assert protocol.lost == [None]


def test_a_buffered_protocol_pauses_and_resumes(kit: Kit) -> None:
    protocol = BufferedRecorder(kit, 10, buffer_updated=lambda p, _: p.transport.pause_reading())
    transport, _ = kit.connect(protocol, first=bytes(range(20)))
    kit.until(lambda: protocol.received)
    kit.turn()
    assert protocol.received == bytes(range(10))
    transport.resume_reading()
    kit.until(lambda: len(protocol.received) > 10)
    assert protocol.received == bytes(range(20))


@pytest.mark.parametrize("second", [Recorder, BufferedRecorder])
@pytest.mark.parametrize("first", [Recorder, BufferedRecorder])
def test_another_protocol_takes_over_in_mid_stream(kit: Kit, first: RecorderClass, second: RecorderClass) -> None:
    def hand_over(protocol: AnyRecorder, _: Any) -> None:
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
    assert (bytes(protocol.received), bytes(successor.received)) == (b"yours", b"mine")
    assert protocol.lost == []
    assert "connection_made" not in successor.calls
    assert "pause_writing" in successor.calls


def has_received(protocol: AnyRecorder, count: int) -> bool:
    return len(protocol.received) == count


def test_protocols_may_take_turns(kit: Kit) -> None:
    protocols: list[AnyRecorder] = [Recorder(kit), BufferedRecorder(kit)]
    transport, peer = kit.connect(protocols[0])
    for number in range(20):
        protocol = protocols[number % 2]
        transport.set_protocol(protocol)
        peer.sendall(b"%02d" % number)
        kit.until(partial(has_received, protocol, 2 * (number // 2 + 1)))
    assert [bytes(protocol.received) for protocol in protocols] == [
        b"".join(b"%02d" % number for number in range(start, 20, 2)) for start in (0, 1)
    ]


@pytest.mark.parametrize("successor_class", [Recorder, BufferedRecorder])
def test_a_protocol_set_while_paused_gets_what_comes_then(kit: Kit, successor_class: RecorderClass) -> None:
    protocol, successor = Recorder(kit), successor_class(kit)
    transport, peer = kit.connect(protocol)
    transport.pause_reading()
    peer.sendall(b"later")
    transport.set_protocol(successor)
    kit.turn()
    assert successor.calls == []
    transport.resume_reading()
    kit.until(lambda: successor.received)
    assert (bytes(protocol.received), bytes(successor.received)) == (b"", b"later")


def test_a_protocol_set_while_closing_is_told_of_the_end(kit: Kit) -> None:
    protocol, successor = Recorder(kit), Recorder(kit)
    transport, _ = kit.connect(protocol)
    transport.close()
    transport.set_protocol(successor)
    kit.until(lambda: successor.lost)
    assert (protocol.lost, successor.lost) == ([], [None])


def upgraded(kit: Kit, protocol: AnyRecorder) -> tuple[Any, ssl.SSLSocket]:
    """A connection over TCP that begins with a plain exchange and goes on under TLS: transport, peer's TLS socket."""

    async def serve() -> Any:
        over_tls = await kit.loop.start_tls(
            plain, protocol, anonymous(ssl.PROTOCOL_TLS_SERVER), server_side=True, ssl_shutdown_timeout=10
        )
        protocol.transport = over_tls
        return over_tls

    def go_ahead(starter: AnyRecorder, _: Any) -> None:
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
def test_start_tls_encrypts_in_mid_stream(kit: Kit, protocol_class: RecorderClass) -> None:
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
def test_a_protocol_under_tls_is_asked_to_end_too(kit: Kit) -> None:
    class Polite(Recorder):
        def shutdown(self) -> None:
            self.transport.write(b"goodbye")
            self.transport.close()

    protocol = Polite(kit)
    _, client = upgraded(kit, protocol)
    with client:
        kit.transports[0].notify_drain()
        assert kit.in_thread(read_exactly, client, 7) == b"goodbye"
        assert kit.in_thread(client.recv, 1) == b""
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


@pytest.mark.parametrize("end", ["abort", "close by the client"])
def test_a_connection_under_tls_ends(kit: Kit, end: str) -> None:
    protocol = Recorder(kit)
    transport, client = upgraded(kit, protocol)
    with client:
        if end == "abort":
            transport.abort()
        else:
            kit.in_thread(unwrap, client)
        kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]


def unwrap(client: Any) -> None:
    """Says goodbye in TLS and closes."""
    client.unwrap().close()


@forkd_only  # it needs a pause from connection_made, which asyncio's before 3.11.3 does not keep
def test_a_handshake_that_fails_ends_the_connection(kit: Kit) -> None:
    async def serve() -> None:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await kit.loop.start_tls(plain, Recorder(kit), anonymous(ssl.PROTOCOL_TLS_SERVER), server_side=True)

    starter = Recorder(kit, connection_made=lambda p: p.transport.pause_reading())
    plain, peer = kit.connect(starter, tcp_pair, first=b"this is not TLS\r\n\r\n")
    kit.run(serve())
    kit.in_thread(read_to_end, peer)
    assert plain.is_closing()
    kit.take_reported()


def test_sendfile_sends_a_file_in_its_place(kit: Kit, tmp_path: Path) -> None:
    content = bytes(range(256)) * (MUCH // 256)
    path = tmp_path / "file"
    path.write_bytes(content)
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)

    async def serve(file: Any) -> Any:
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


@pytest.mark.parametrize(("offset", "count", "sent"), [(0, 3, 3), (4, None, 4), (4, 100, 4), (8, 1, 0)])
def test_sendfile_sends_what_is_asked_for(kit: Kit, tmp_path: Path, offset: int, count: Any, sent: int) -> None:
    (tmp_path / "file").write_bytes(b"01234567")
    transport, peer = kit.connect(Recorder(kit))
    with (tmp_path / "file").open("rb") as file:
        assert kit.run(kit.loop.sendfile(transport, file, offset, count, fallback=False)) == sent
        assert file.tell() == (offset + sent if sent else 0)
    transport.close()
    assert kit.in_thread(read_to_end, peer) == b"01234567"[offset : offset + sent]


def test_sendfile_of_an_empty_file_sends_nothing(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    transport, _ = kit.connect(Recorder(kit))
    with (tmp_path / "file").open("rb") as file:
        assert kit.run(kit.loop.sendfile(transport, file, fallback=False)) == 0


def test_sendfile_of_what_is_no_file_reads_it(kit: Kit) -> None:
    transport, peer = kit.connect(Recorder(kit))
    with pytest.raises(asyncio.SendfileNotAvailableError):
        kit.run(kit.loop.sendfile(transport, io.BytesIO(b"content"), fallback=False))
    assert kit.run(kit.loop.sendfile(transport, io.BytesIO(b"content"))) == 7
    transport.close()
    assert kit.in_thread(read_to_end, peer) == b"content"


def test_sendfile_has_the_connection_for_itself(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MUCH))
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    peer.sendall(b"unread")

    async def serve(file: Any) -> Any:
        sending = asyncio.ensure_future(kit.loop.sendfile(transport, file))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError):
            transport.write(b"x")
        if kit.kind != "asyncio":  # which would lose the connection
            with pytest.raises(RuntimeError):
                await kit.loop.sendfile(transport, file)
        return await sending

    reading = kit.loop.run_in_executor(None, read_exactly, peer, MUCH)
    with (tmp_path / "file").open("rb") as file:
        assert kit.run(serve(file)) == MUCH
    assert kit.run(reading) == bytes(MUCH)
    kit.until(lambda: protocol.received)
    assert protocol.received == b"unread"


@forkd_only
def test_sendfile_that_is_cancelled_leaves_the_connection(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MUCH))
    transport, peer = kit.connect(Recorder(kit))

    async def serve(file: Any) -> None:
        sending = asyncio.ensure_future(kit.loop.sendfile(transport, file))
        await asyncio.sleep(0)
        sending.cancel()
        await asyncio.wait({sending})
        assert sending.cancelled()
        transport.write(b"tail")
        transport.close()

    with (tmp_path / "file").open("rb") as file:
        kit.run(serve(file))
        sent = kit.in_thread(read_to_end, peer)
        assert sent == bytes(file.tell()) + b"tail"


@forkd_only
@pytest.mark.parametrize("end", ["close", "abort"])
def test_sendfile_ends_with_its_connection(kit: Kit, tmp_path: Path, end: str) -> None:
    (tmp_path / "file").write_bytes(bytes(MUCH))
    transport, _ = kit.connect(Recorder(kit))

    async def serve(file: Any) -> None:
        sending = asyncio.ensure_future(kit.loop.sendfile(transport, file))
        await asyncio.sleep(0)
        getattr(transport, end)()
        with pytest.raises(ConnectionError):
            await sending

    with (tmp_path / "file").open("rb") as file:
        kit.run(serve(file))


@forkd_only
def test_sendfile_comes_behind_what_is_corked(kit: Kit, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    transport, peer = kit.connect(Recorder(kit))

    async def serve(file: Any) -> None:
        with transport.cork():
            transport.write(b"head ")
            sending = asyncio.ensure_future(kit.loop.sendfile(transport, file))
            await asyncio.sleep(0)
            transport.write_eof()
            await sending

    with (tmp_path / "file").open("rb") as file:
        kit.run(serve(file))
    assert kit.in_thread(read_to_end, peer) == b"head content"


def test_sendfile_ends_when_the_client_goes_away(kit: Kit, tmp_path: Path) -> None:
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
