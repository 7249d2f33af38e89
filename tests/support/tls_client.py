"""Clients with TLS: one that can say its end and read on, where Python's own socket also reads when it says its end;
and much data that is sent and received at the same time.
"""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import time

from tests.support.processes import DEADLINE

_CHUNK = 65_536


class TlsClient:
    """A client whose handshake is done.

    Args:
        sock: its connected socket, which stays the caller's.
        context: what it trusts.
        name: the host that it asks for.
        early: what it sends in one piece with the end of its handshake; None: the end that TLS has.
    """

    def __init__(
        self, sock: socket.socket, context: ssl.SSLContext, name: str = "localhost", early: bytes | None = b""
    ) -> None:
        self._sock = sock
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=name)
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._exchange()
            else:
                break
        if early is None:
            self.say_end()
        else:
            self.send(early)

    def send(self, data: bytes) -> None:
        """Sends all of it."""
        self._tls.write(data)
        self._flush()

    def say_end(self) -> None:
        """Sends the end that TLS has, and does not wait for the other side's."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self._tls.unwrap()
        self._flush()

    def rest(self) -> bytes:
        """All that comes, up to the end that TLS has. Raises EOFError for a connection that is only closed."""
        found = b""
        while True:
            try:
                data = self._tls.read(_CHUNK)
            except ssl.SSLWantReadError:
                self._exchange()
                continue
            except ssl.SSLZeroReturnError:
                return found
            if not data:
                return found
            found += data

    def _exchange(self) -> None:
        self._flush()
        if not (data := self._sock.recv(_CHUNK)):
            raise EOFError("closed without the end that TLS has")
        self._in.write(data)

    def _flush(self) -> None:
        if data := self._out.read():
            self._sock.sendall(data)


def pump(client: ssl.SSLSocket, data: bytes) -> bytes:
    """What comes back for much data, up to its length. One thread sends and receives: OpenSSL does not allow two at a
    time for one connection, and not every Python keeps them apart.
    """
    received, left, deadline = bytearray(), memoryview(data), time.monotonic() + DEADLINE
    client.setblocking(False)
    while len(received) < len(data):
        assert time.monotonic() < deadline, f"{len(received)} of {len(data)} bytes have come back"
        moved = False
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            left = left[client.send(left[:_CHUNK]) :] if left else left
            moved = bool(left)
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
            chunk = client.recv(_CHUNK)
            assert chunk, f"the connection has ended after {len(received)} of {len(data)} bytes"
            received += chunk
            moved = True
        if not moved:
            select.select([client], [client] if left else [], [], 1)
    client.settimeout(DEADLINE)
    return bytes(received)
