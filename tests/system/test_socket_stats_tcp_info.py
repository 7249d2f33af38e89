"""What the kernel tells of a TCP connection, read at the right places."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from forkd.system.socket_stats import CLOSE_WAIT, ESTABLISHED, LISTEN, TcpInfo, read_tcp_info
from tests.support.processes import eventually


def info_of(sock: socket.socket) -> TcpInfo:
    info = read_tcp_info(sock)
    assert info is not None
    return info


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        server, _ = listener.accept()
        with server:
            yield server, client


def test_bytes_and_states_are_those_of_the_connection(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    client.sendall(b"x" * 1234)
    server.sendall(b"y" * 321)
    assert client.recv(321, socket.MSG_WAITALL)
    eventually(lambda: info_of(server).bytes_acked == 321, what="the acknowledgement")
    found = info_of(server)
    assert (found.state, found.bytes_received, found.bytes_sent, found.bytes_retrans) == (ESTABLISHED, 1234, 321, 0)
    assert (found.unacked, found.notsent) == (0, 0)
    assert 0 < found.rtt < 5_000_000
    client.shutdown(socket.SHUT_WR)
    eventually(lambda: info_of(server).state == CLOSE_WAIT, what="the client's end")
    assert (info_of(server).received, info_of(server).sent) == (1234, 321)


def test_times_tell_silence(pair: tuple[socket.socket, socket.socket]) -> None:
    server, client = pair
    eventually(lambda: info_of(server).last_data_received > 60, what="some silence")
    client.sendall(b"x")
    eventually(lambda: info_of(server).last_data_received < 50, what="what was sent")
    found = info_of(server)
    assert found.last_data_sent > found.last_data_received


def test_bytes_that_a_peer_does_not_take_wait(pair: tuple[socket.socket, socket.socket]) -> None:
    server, _ = pair
    server.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            server.send(bytes(65536))
    assert info_of(server).notsent > 0


def test_a_listener_tells_of_its_queue() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=7) as listener:
        address = listener.getsockname()
        with socket.create_connection(address), socket.create_connection(address):
            found = info_of(listener)
    assert (found.state, found.unacked, found.sacked) == (LISTEN, 2, 7)


def test_fields_that_an_older_kernel_lacks_are_zero() -> None:
    found = TcpInfo.parse(struct.pack("=B", ESTABLISHED) + bytes(103))
    assert found == (ESTABLISHED, *[0] * 11)


def test_socket_that_is_not_tcp_has_no_tcp_info() -> None:
    one, other = socket.socketpair()
    with one, other:
        assert read_tcp_info(one) is None
    assert read_tcp_info(one) is None
