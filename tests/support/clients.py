"""Clients of a daemon under test: plain blocking sockets, with a deadline on every operation."""

from __future__ import annotations

import os
import random
import socket
from typing import Any

from tests.support.processes import DEADLINE


def endpoint(address: str) -> tuple[int, Any]:
    """The family and the address, for connect(2), of an address as users write it."""
    scheme, _, rest = address.partition(":")
    if scheme in ("unix", "unix-dgram"):
        return socket.AF_UNIX, "\0" + rest[1:] if rest.startswith("@") else rest
    host, _, port = rest.removeprefix("//").rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    return family, (host.strip("[]"), int(port))


def dial(address: str, seconds: float = DEADLINE) -> socket.socket:
    """A connected client; every operation on it fails after so many seconds."""
    family, where = endpoint(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.settimeout(seconds)
    try:
        sock.connect(where)
    except OSError:
        sock.close()
        raise
    return sock


def datagram_client(address: str, seconds: float = DEADLINE) -> socket.socket:
    """A datagram socket that is connected there, with a name of its own; every operation fails after so long."""
    family, where = endpoint(address)
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(seconds)
    if family == socket.AF_UNIX:
        sock.bind("")  # the kernel chooses an abstract name (unix(7), autobind)
    sock.connect(where)
    return sock


def read(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer at the end of file."""
    data = b""
    while len(data) < count and (portion := sock.recv(count - len(data))):
        data += portion
    return data


def echoes(sock: socket.socket, data: bytes = b"are you there?\n") -> bool:
    """Whether the server sends back what it is sent."""
    sock.sendall(data)
    return read(sock, len(data)) == data


def survives(sock: socket.socket) -> bool:
    """Whether a connection to an echo still works; it may have ended or been reset."""
    try:
        return echoes(sock)
    except ConnectionError:
        return False


def at_end(sock: socket.socket) -> bool:
    """Waits for the end of the connection: True when it comes, False when data comes first."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def refuses(address: str) -> bool:
    """Whether a connection there is refused."""
    try:
        dial(address).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:  # it is being closed
        return False
    return False


def is_free(address: str) -> bool:
    """Whether an address could be bound now."""
    family, where = endpoint(address)
    datagrams = address.startswith(("udp:", "unix-dgram:"))
    with socket.socket(family, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM) as sock:
        if not datagrams:  # where it would let a datagram socket share the address
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if isinstance(where, str) and where.startswith("/"):
            return not os.path.lexists(where)
        try:
            sock.bind(where)
            if not datagrams:
                sock.listen()
        except OSError:
            return False
        return True


def unshared_port() -> int:
    """A port that is free at all addresses, and that the kernel gives no one who asks for any (ip_local_port_range of
    ip(7)).
    """
    for port in random.sample(range(15_000, 30_000), 100):
        addresses = [f"{scheme}://{host}:{port}" for scheme in ("tcp", "udp") for host in ("0.0.0.0", "[::]")]
        if all(map(is_free, addresses)):
            return port
    raise AssertionError("no port is free at all addresses")
