"""Connecting to an address as forkd's users write it, by a deadline."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from time import monotonic

from forkd.config.address import Address, parse_address


def connect(address: str | Address, timeout: float) -> socket.socket:
    """A new connection.

    Args:
        address: `tcp://HOST:PORT`, `unix:/path` or `unix:@name`.
        timeout: seconds until it is there. A host's addresses share them. The resolver, which knows no deadline, takes
            its own time where a name is to be looked up.

    Returns:
        The socket, whose own timeout is `timeout` too. A TCP one sends small messages at once (TCP_NODELAY).

    Raises:
        ValueError: there is no such address.
        TimeoutError: nobody has answered in time.
        OSError: there is no connecting, as the system tells it.
    """
    parsed = parse_address(address) if isinstance(address, str) else address
    end = monotonic() + timeout
    if parsed.scheme == "unix":
        sock = _connect_unix("\0" + parsed.path[1:] if parsed.abstract else parsed.path, end)
    elif parsed.scheme == "tcp":
        sock = _connect_tcp(parsed, end)
    else:
        raise ValueError(f"{parsed} can't be connected to; write tcp://HOST:PORT, unix:/path or unix:@name")
    sock.settimeout(timeout)
    return sock


def _connect_tcp(address: Address, end: float) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    failed: OSError = TimeoutError(errno.ETIMEDOUT, "nobody answers")
    for tried, (family, kind, protocol, _, where) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.001, (end - monotonic()) / (len(found) - tried)))
            sock.connect(where)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            failed = error
        else:
            return sock
    raise failed


def _connect_unix(path: str, end: float) -> socket.socket:
    """While the backlog is full, only a blocking connect(2) waits, which heeds SO_SNDTIMEO: unix(7), socket(7)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(True)
        connected = False
        while not connected:
            left = max(1, int((end - monotonic()) * 1e6))  # zero would be for ever
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *divmod(left, 10**6)))
            sock.connect(path)
            with contextlib.suppress(OSError):  # of a call that a signal interrupts Python knows no better
                sock.getpeername()
                connected = True
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bytes(struct.calcsize("ll")))
    except BlockingIOError:
        sock.close()
        raise TimeoutError(errno.ETIMEDOUT, "nobody accepts") from None
    except BaseException:
        sock.close()
        raise
    return sock
