"""What the kernel's tables tell, against what the sockets themselves know."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from forkd.errors import ForkdError
from forkd.system import socket_stats
from forkd.system.socket_stats import (
    CLOSE_WAIT,
    ESTABLISHED,
    FIN_WAIT2,
    LISTEN,
    TcpSocket,
    UnixSocket,
    tcp_sockets,
    unix_sockets,
)
from tests.support.processes import eventually

SO_COOKIE = 57


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def cookie(sock: socket.socket) -> int:
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), sys.byteorder)


def connection(stack: ExitStack, family: int, listen: str, connect: str) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection: the client's, and the one that was accepted."""
    with socket.socket(family) as listener:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((listen, 0))
        listener.listen()
        client = stack.enter_context(socket.create_connection((connect, listener.getsockname()[1])))
        return client, stack.enter_context(listener.accept()[0])


def told(sock: socket.socket) -> TcpSocket:
    """What the kernel tells of an accepted socket."""
    found = [one for one in tcp_sockets(sock.getsockname()[1], sock.family) if one.inode == inode(sock)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("family", "listen", "connect"),
    [(socket.AF_INET, "127.0.0.1", "127.0.0.1"), (socket.AF_INET6, "::1", "::1"), (socket.AF_INET6, "::", "127.0.0.1")],
)
def test_a_tcp_connection_is_told_of_as_it_is(stack: ExitStack, family: int, listen: str, connect: str) -> None:
    client, served = connection(stack, family, listen, connect)
    client.sendall(bytes(1000))
    served.sendall(bytes(300))
    assert served.recv(400, socket.MSG_WAITALL) == bytes(400)
    assert client.recv(300, socket.MSG_WAITALL) == bytes(300)
    found = eventually(lambda: told(served) if told(served).acked else None, what="the acknowledgement")
    assert found.local == (connect, served.getsockname()[1])
    assert found.peer == (connect, client.getsockname()[1])
    assert (found.state, found.cookie) == (ESTABLISHED, cookie(served))
    assert (found.received, found.acked, found.unread, found.unacked) == (1000, 300, 600, 0)
    assert found.info.rtt > 0


def test_the_end_of_a_connection_is_no_byte_of_it(stack: ExitStack) -> None:
    client, served = connection(stack, socket.AF_INET, "127.0.0.1", "127.0.0.1")
    client.sendall(bytes(10))
    client.shutdown(socket.SHUT_WR)
    found = eventually(lambda: told(served) if told(served).state == CLOSE_WAIT else None, what="the end of file")
    assert (found.received, found.unread) == (10, 10)
    client, served = connection(stack, socket.AF_INET, "127.0.0.1", "127.0.0.1")
    served.sendall(bytes(10))
    served.shutdown(socket.SHUT_WR)
    found = eventually(lambda: told(served) if told(served).state == FIN_WAIT2 else None, what="its acknowledgement")
    assert (found.acked, found.unacked) == (10, 0)


def test_connection_not_yet_accepted_has_no_inode(stack: ExitStack) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        stack.callback(connection(stack, socket.AF_INET, "127.0.0.1", "127.0.0.1")[1].close)
        assert [(one.inode, one.local[1]) for one in tcp_sockets(port, socket.AF_INET)] == [(0, port)]
        assert tcp_sockets(port, socket.AF_INET6) == []


def unix_told(sock: socket.socket) -> UnixSocket:
    (found,) = unix_sockets(inode(sock))
    return found


@pytest.mark.parametrize("abstract", [False, True])
def test_a_unix_socket_is_told_of_as_it_is(stack: ExitStack, tmp_path: Path, abstract: bool) -> None:
    name = f"\0{tmp_path}" if abstract else str(tmp_path / "socket")
    listener = stack.enter_context(socket.socket(socket.AF_UNIX))
    listener.bind(name)
    listener.listen(7)
    client = stack.enter_context(socket.socket(socket.AF_UNIX))
    client.connect(name)
    waiting = unix_told(listener)
    assert (waiting.name, waiting.state, waiting.unread, waiting.unsent) == (name, LISTEN, 1, 7)
    served = stack.enter_context(listener.accept()[0])
    client.sendall(bytes(50))
    found = unix_told(served)
    assert (found.name, found.state, found.unread, found.uid) == (name, ESTABLISHED, 50, os.geteuid())
    assert (found.peer, found.cookie) == (inode(client), cookie(served))
    assert unix_told(client)._replace(unsent=0) in [one._replace(unsent=0) for one in unix_sockets()]
    client.close()
    assert unix_told(served).peer == 0


def test_inode_of_no_socket_has_no_entry(tmp_path: Path) -> None:
    assert unix_sockets(tmp_path.stat().st_ino) == []


def test_more_than_one_read_of_the_table_is_one_table(stack: ExitStack) -> None:
    pairs = [socket.socketpair() for _ in range(400)]
    for one in (sock for pair in pairs for sock in pair):
        stack.callback(one.close)
    inodes = {inode(sock) for pair in pairs for sock in pair}
    everyone = [one.inode for one in unix_sockets()]
    assert len(everyone) == len(set(everyone))
    assert inodes <= set(everyone)


def test_a_kernel_that_refuses_is_one_sentence() -> None:
    with pytest.raises(ForkdError, match=r"^the kernel does not list its sockets \(sock_diag\): \w+"):
        tcp_sockets(1, 200)


@pytest.mark.parametrize("data", [bytes(16), b"\xff\xff\0\0" + bytes(12), b"\x0f" + bytes(15)])
def test_messages_of_no_possible_length_end_the_reading(data: bytes) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADMSG)):
        list(socket_stats.netlink_messages(data))
