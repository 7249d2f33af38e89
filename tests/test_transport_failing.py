"""The transport against asyncio's contract: handlers that raise.

Whatever a callback raises is reported to the loop's exception handler, and the connection ends where it must, while the
loop and the other connections go on. Each test runs against asyncio's own socket transport too; where that is weaker,
forkd alone is held to more.
"""

from __future__ import annotations

import asyncio
import socket

import pytest
from contract import MUCH, BufferedRecorder, Recorder, forkd_only, kits, read_exactly, tcp_pair

from forkd.serve.handlers.protocol import ProtocolServer

kit = kits


def fail(error):
    """A hook that raises this."""

    def raising(*_):
        raise error

    return raising


@pytest.fixture
def neighbour(kit):
    """Shows that the loop and a connection beside the failing one go on."""
    _, peer = kit.connect(Recorder(kit, data_received=lambda p, data: p.transport.write(data)))
    yield
    peer.sendall(b"alive?")
    assert kit.in_thread(read_exactly, peer, 6) == b"alive?"


def check_reported(kit, error, protocol, transport):
    reported = kit.take_reported()
    assert [context["exception"] for context in reported] == [error]
    assert reported[0]["protocol"] is protocol
    assert reported[0]["transport"] is transport
    if kit.kind == "forkd":
        assert kit.keeper.errors == 1


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), asyncio.CancelledError(), KeyError()], ids=repr)
@pytest.mark.parametrize("where", ["data_received", "eof_received"])
def test_a_callback_that_raises_is_reported_and_ends_the_connection(kit, where, error):
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
def test_a_buffered_callback_that_raises_is_reported_and_ends_the_connection(kit, where, error):
    protocol = BufferedRecorder(kit, **{where: fail(error)})
    transport, _ = kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert protocol.calls[-2:] == [where, "connection_lost"]
    assert protocol.lost == [error]
    check_reported(kit, error, protocol, transport)


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("buffer", [bytearray(), [], b"read only", [1, 2], 5, ""], ids=repr)
def test_a_buffer_of_no_use_ends_the_connection(kit, buffer):
    protocol = BufferedRecorder(kit, get_buffer=lambda *_: buffer)
    transport, _ = kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert "buffer_updated" not in protocol.calls
    check_reported(kit, protocol.lost[0], protocol, transport)


def test_an_empty_buffer_is_named_as_such(kit):
    protocol = BufferedRecorder(kit, get_buffer=lambda *_: bytearray())
    kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert "empty buffer" in str(kit.take_reported()[0]["exception"])


@forkd_only
@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("where", ["data_received", "eof_received"])
def test_an_error_of_the_systems_that_a_callback_raises_is_reported_as_any_other(kit, where):
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
def test_connection_made_that_raises_ends_the_connection(kit, error):
    # asyncio's own goes on with a protocol that was never made ready.
    protocol = Recorder(kit, connection_made=fail(error))
    transport, peer = kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    assert protocol.calls == ["connection_made", "connection_lost"]
    assert protocol.lost == [error]
    check_reported(kit, error, protocol, transport)
    with pytest.raises(ConnectionResetError):  # the peer's data was not read
        peer.recv(1)


def test_connection_made_that_raises_is_reported(kit):
    error = ValueError("wrong")
    kit.connect(Recorder(kit, connection_made=fail(error)))
    assert [context["exception"] for context in kit.take_reported()] == [error]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("odd"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("end", ["close", "abort", "end of file"])
def test_connection_lost_that_raises_is_reported_and_the_socket_closed(kit, end, error):
    protocol = Recorder(kit, connection_lost=fail(error))
    transport, peer = kit.connect(protocol)
    peer.shutdown(socket.SHUT_WR) if end == "end of file" else getattr(transport, end)()
    assert kit.in_thread(peer.recv, 1) == b""
    assert len(protocol.lost) == 1
    assert [context["exception"] for context in kit.take_reported()] == [error]


@pytest.mark.usefixtures("neighbour")
@pytest.mark.parametrize("error", [ValueError("wrong"), OSError("odd"), asyncio.CancelledError()], ids=repr)
@pytest.mark.parametrize("where", ["pause_writing", "resume_writing"])
def test_flow_control_that_raises_is_reported_and_the_connection_goes_on(kit, where, error):
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
def test_flow_control_that_raises_is_counted(kit, where):
    transport, peer = kit.connect(Recorder(kit, **{where: fail(ValueError("wrong"))}))
    transport.write(bytes(MUCH))
    kit.in_thread(read_exactly, peer, MUCH)
    kit.turn()
    assert len(kit.take_reported()) == 1
    assert kit.keeper.errors == 1


def test_a_callback_that_closes_and_then_raises_loses_the_connection_once(kit):
    error = ValueError("wrong")

    def close_and_raise(protocol, _):
        protocol.transport.close()
        raise error

    protocol = Recorder(kit, data_received=close_and_raise)
    kit.connect(protocol, first=b"x")
    kit.until(lambda: protocol.lost)
    kit.turn()
    assert protocol.lost == [None]
    assert [context["exception"] for context in kit.take_reported()] == [error]


def test_unsent_data_is_lost_when_a_callback_raises(kit):
    error = ValueError("wrong")
    protocol = Recorder(kit, data_received=fail(error))
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    peer.sendall(b"x")
    kit.until(lambda: protocol.lost)
    assert (protocol.lost, transport.get_write_buffer_size()) == ([error], 0)
    assert len(kit.take_reported()) == 1


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["data_received", "eof_received", "connection_lost"])
def test_an_exit_leaves_the_loop_which_can_be_run_again(kit, where, error):
    def leave_once(protocol, *_):
        if protocol.calls.count(where) == 1:
            raise error

    _, peer = kit.connect(Recorder(kit, **{where: leave_once}))
    other = Recorder(kit, data_received=lambda p, data: p.transport.write(data))
    _, other_peer = kit.connect(other)
    for each in (peer, other_peer):
        each.sendall(b"x")
    peer.shutdown(socket.SHUT_WR)
    with pytest.raises(error):
        kit.loop.run_forever()
    assert kit.in_thread(read_exactly, other_peer, 1) == b"x"


@forkd_only
def test_the_keeper_is_told_once_of_each_failure_and_each_end(kit):
    for where in ("connection_made", "data_received", "connection_lost"):
        protocol = Recorder(kit, **{where: fail(ValueError(where))})
        _, peer = kit.connect(protocol)
        peer.close()
        if where == "data_received":
            protocol.hooks["eof_received"] = protocol.hooks.pop(where)
        kit.until(lambda protocol=protocol: protocol.lost)
    kit.turn()
    assert (kit.keeper.errors, kit.keeper.ended) == (3, 3)
    assert len(kit.take_reported()) == 3


@forkd_only
@pytest.mark.parametrize("factory", [fail(ValueError("no")), fail(asyncio.CancelledError()), lambda: None], ids=str)
def test_a_factory_that_makes_no_protocol_leaves_nothing_behind(kit, factory):
    served, peer = kit.pair(tcp_pair)
    ProtocolServer(kit.loop, factory, kit.keeper, 0)(served, peer.getsockname())
    assert peer.recv(1) == b""
    assert (served.fileno(), kit.loop.selector.served) == (-1, {})
    assert (kit.keeper.errors, kit.keeper.ended) == (1, 1)
    assert len(kit.take_reported()) == 1
    kit.keeper.ended = 0
