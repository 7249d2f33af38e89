"""The transport against asyncio's contract: handlers that raise.

Whatever a callback raises is reported to the loop's exception handler, and the connection ends where it must, while the
loop and the other connections go on. Each test runs against asyncio's own socket transport too; where that is weaker,
forkd alone is held to more.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from forkd.serve.accept.acceptor import ConnectionStats
from forkd.serve.deadlines import Deadlines
from forkd.serve.stream.server import ProtocolServer
from forkd.serve.stream.transport import ServerContext
from forkd.system.scoreboard import Row
from tests.support.transport_contract import (
    MUCH,
    AnyRecorder,
    BufferedRecorder,
    Kit,
    Recorder,
    forkd_only,
    kits,
    read_exactly,
    tcp_pair,
)

kit = kits


def fail(error: BaseException) -> Callable[..., None]:
    """A hook that raises this."""

    def raising(*_: Any) -> None:
        raise error

    return raising


@pytest.fixture
def neighbour(kit: Kit) -> Iterator[None]:
    """Shows that the loop and a connection beside the failing one go on."""
    _, peer = kit.connect(Recorder(kit, data_received=lambda p, data: p.transport.write(data)))
    yield
    peer.sendall(b"alive?")
    assert kit.in_thread(read_exactly, peer, 6) == b"alive?"


def check_reported(kit: Kit, error: Any, protocol: AnyRecorder, transport: Any) -> None:
    reported = kit.take_reported()
    assert [context["exception"] for context in reported] == [error]
    assert reported[0]["protocol"] is protocol
    assert reported[0]["transport"] is transport
    if kit.kind != "asyncio":
        assert kit.observer.errors == 1


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), asyncio.CancelledError(), KeyError()], ids=repr)
@pytest.mark.parametrize("where", ["data_received", "eof_received"])
def test_a_callback_that_raises_ends_the_connection(kit: Kit, where: str, error: Any) -> None:
    protocol = Recorder(kit, **{where: fail(error)})
    transport, peer = kit.connect(protocol, first=b"x")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: protocol.lost)
    assert protocol.calls[-2:] == [where, "connection_lost"]
    assert protocol.lost == [error]
    assert peer.recv(1) == b""
    check_reported(kit, error, protocol, transport)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("where", ["get_buffer", "buffer_updated"])
def test_a_buffered_callback_that_raises_ends_the_connection(kit: Kit, where: str, error: Any) -> None:
    protocol = BufferedRecorder(kit, **{where: fail(error)})
    transport, _ = kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert protocol.calls[-2:] == [where, "connection_lost"]
    assert protocol.lost == [error]
    check_reported(kit, error, protocol, transport)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("buffer", [bytearray(), [], b"read only", [1, 2], 5, ""], ids=repr)
def test_a_buffer_of_no_use_ends_the_connection(kit: Kit, buffer: Any) -> None:
    protocol = BufferedRecorder(kit, get_buffer=lambda *_: buffer)
    transport, _ = kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert "buffer_updated" not in protocol.calls
    check_reported(kit, protocol.lost[0], protocol, transport)


def test_an_empty_buffer_is_named_as_such(kit: Kit) -> None:
    protocol = BufferedRecorder(kit, get_buffer=lambda *_: bytearray())
    kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert "empty buffer" in str(kit.take_reported()[0]["exception"])


@forkd_only
@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("where", ["data_received", "eof_received"])
def test_an_os_error_of_a_callback_is_reported_as_any_other(kit: Kit, where: str) -> None:
    # asyncio's own takes it for an error of the socket's and is silent.
    error = FileNotFoundError("data.txt")
    protocol = Recorder(kit, **{where: fail(error)})
    transport, peer = kit.connect(protocol, first=b"x")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [error]
    check_reported(kit, error, protocol, transport)


@forkd_only
@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("odd"), asyncio.CancelledError()], ids=repr)
def test_connection_made_that_raises_ends_the_connection(kit: Kit, error: Any) -> None:
    # asyncio's own goes on with a protocol that was never made ready.
    protocol = Recorder(kit, connection_made=fail(error))
    transport, peer = kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert protocol.calls == ["connection_made", "connection_lost"]
    assert protocol.lost == [error]
    check_reported(kit, error, protocol, transport)
    with pytest.raises(ConnectionResetError):  # the peer's data was not read
        peer.recv(1)


def test_connection_made_that_raises_is_reported(kit: Kit) -> None:
    error = ValueError("wrong")
    kit.connect(Recorder(kit, connection_made=fail(error)))
    assert [context["exception"] for context in kit.take_reported()] == [error]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("odd"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("end", ["close", "abort", "end of file"])
def test_connection_lost_that_raises_closes_the_socket(kit: Kit, end: str, error: Any) -> None:
    protocol = Recorder(kit, connection_lost=fail(error))
    transport, peer = kit.connect(protocol)
    peer.shutdown(socket.SHUT_WR) if end == "end of file" else getattr(transport, end)()
    assert kit.in_thread(peer.recv, 1) == b""
    assert len(protocol.lost) == 1
    assert [context["exception"] for context in kit.take_reported()] == [error]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("odd"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("where", ["pause_writing", "resume_writing"])
def test_flow_control_that_raises_is_reported_alone(kit: Kit, where: str, error: Any) -> None:
    protocol = Recorder(kit, **{where: fail(error)})
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    assert len(kit.in_thread(read_exactly, peer, MUCH)) == MUCH
    kit.until(lambda: "resume_writing" in protocol.calls)
    reported = kit.take_reported()
    assert [context["exception"] for context in reported] == [error]
    assert reported[0]["protocol"] is protocol
    assert not transport.is_closing()
    transport.write(b"on")
    assert kit.in_thread(peer.recv, 10) == b"on"


@forkd_only
@pytest.mark.parametrize("where", ["pause_writing", "resume_writing"])
def test_flow_control_that_raises_is_counted(kit: Kit, where: str) -> None:
    transport, peer = kit.connect(Recorder(kit, **{where: fail(ValueError("wrong"))}))
    transport.write(bytes(MUCH))
    kit.in_thread(read_exactly, peer, MUCH)
    kit.turn()
    assert len(kit.take_reported()) == 1
    assert kit.observer.errors == 1


def test_a_callback_that_closes_and_raises_is_lost_once(kit: Kit) -> None:
    error = ValueError("wrong")

    def close_and_raise(protocol: AnyRecorder, _: Any) -> None:
        protocol.transport.close()
        raise error

    protocol = Recorder(kit, data_received=close_and_raise)
    kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    kit.turn()
    assert protocol.lost == [None]
    assert [context["exception"] for context in kit.take_reported()] == [error]


def test_unsent_data_is_lost_when_a_callback_raises(kit: Kit) -> None:
    error = ValueError("wrong")
    protocol = Recorder(kit, data_received=fail(error))
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    peer.sendall(b"x")
    kit.until(lambda: protocol.lost)
    assert (protocol.lost, transport.get_write_buffer_size()) == ([error], 0)
    assert len(kit.take_reported()) == 1


@forkd_only
@pytest.mark.parametrize("where", ["data_received", "eof_received", "connection_lost"])
def test_exit_in_a_callback_ends_that_connection_alone(kit: Kit, where: str) -> None:
    other = Recorder(kit, data_received=lambda p, data: p.transport.write(data))
    _, other_peer = kit.connect(other)
    protocol = Recorder(kit, **{where: fail(SystemExit(3))})
    _, peer = kit.connect(protocol)
    peer.sendall(b"x")
    peer.shutdown(socket.SHUT_WR)
    kit.until(lambda: protocol.lost)
    other_peer.sendall(b"x")
    assert kit.in_thread(read_exactly, other_peer, 1) == b"x"
    (reported,) = kit.take_reported()
    assert isinstance(reported["exception"], SystemExit)


@forkd_only
def test_the_observer_is_told_once_of_each_failure_and_end(kit: Kit) -> None:
    for where in ("connection_made", "data_received", "connection_lost"):
        protocol = Recorder(kit, **{where: fail(ValueError(where))})
        _, peer = kit.connect(protocol)
        peer.close()
        if where == "data_received":
            protocol.hooks["eof_received"] = protocol.hooks.pop(where)
        kit.until(partial(getattr, protocol, "lost"))
    kit.turn()
    assert (kit.observer.errors, kit.observer.ended) == (3, 3)
    assert len(kit.take_reported()) == 3


@forkd_only
@pytest.mark.parametrize(
    "factory",
    [fail(ValueError("no")), fail(asyncio.CancelledError()), lambda: None],
    ids=["raises", "cancelled", "none"],
)
def test_a_factory_that_makes_no_protocol_leaves_nothing_behind(kit: Kit, factory: Callable[[], Any]) -> None:
    served, peer = kit.pair(tcp_pair)
    stats = ConnectionStats(Row.unshared(), kit.observer)
    context = ServerContext(kit.poll_loop, stats, Deadlines(kit.loop))
    ProtocolServer(context, factory)(served, peer.getsockname())
    assert peer.recv(1) == b""
    assert (served.fileno(), kit.poll_loop.selector.served) == (-1, {})
    assert (kit.observer.errors, stats.ended) == (1, 1)
    assert len(kit.take_reported()) == 1
