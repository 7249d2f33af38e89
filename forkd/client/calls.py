"""Sending and receiving, each with one deadline for all that it does, and how they fail."""

from __future__ import annotations

import socket

from forkd.client.stream import Late, opened

#: Bytes that `recv_until` receives at most, where its caller says nothing else.
LIMIT = 1 << 20

_CHUNK = 1 << 16


class ReceiveTimeout(TimeoutError):
    """Less has come in time than was waited for.

    Attributes:
        partial: what had come. It is no longer in the socket.
    """

    def __init__(self, said: str, partial: bytes) -> None:
        super().__init__(said)
        self.partial = partial


class SendTimeout(TimeoutError):
    """The peer has not taken all in time.

    Attributes:
        sent: how many bytes the kernel has taken for it. The connection is of no more use, as nobody knows which of
            them the peer will see.
    """

    def __init__(self, said: str, sent: int) -> None:
        super().__init__(said)
        self.sent = sent


class EndOfStream(EOFError):
    """The peer has ended its side before all had come.

    Attributes:
        partial: what had come.
    """

    def __init__(self, said: str, partial: bytes) -> None:
        super().__init__(said)
        self.partial = partial


class LimitExceeded(ValueError):
    """As much as the limit has come, and no delimiter.

    Attributes:
        partial: what had come. What comes after it is still in the socket.
    """

    def __init__(self, said: str, partial: bytes) -> None:
        super().__init__(said)
        self.partial = partial


def send_all(sock: socket.socket, data: bytes | bytearray | memoryview, timeout: float) -> None:
    """Sends all of `data`.

    Args:
        sock: a connected stream socket.
        data: what to send.
        timeout: seconds for all of it.

    Raises:
        SendTimeout: the peer has not taken it all in time.
    """
    sent = 0
    with memoryview(data) as given, given.cast("B") as unsent, opened(sock, timeout) as stream:
        while sent < len(unsent):
            try:
                sent += stream.send(unsent[sent:])
            except Late:
                said = f"only {sent} of {len(unsent)} bytes could be sent in {timeout:g} s"
                raise SendTimeout(said, sent) from None


def recv_exactly(sock: socket.socket, count: int, timeout: float) -> bytes:
    """The next `count` bytes.

    Args:
        sock: a connected stream socket.
        count: how many.
        timeout: seconds for all of them.

    Raises:
        ReceiveTimeout: they have not all come in time.
        EndOfStream: the peer has ended its side before.
    """
    received = bytearray()
    with opened(sock, timeout) as stream:
        while len(received) < count:
            try:
                piece = stream.receive(min(count - len(received), _CHUNK))
            except Late:
                said = f"only {len(received)} of {count} bytes have come in {timeout:g} s"
                raise ReceiveTimeout(said, bytes(received)) from None
            if not piece:
                said = f"the peer has ended its side after {len(received)} of {count} bytes"
                raise EndOfStream(said, bytes(received))
            received += piece
    return bytes(received)


def recv_until(sock: socket.socket, delimiter: bytes, timeout: float, limit: int = LIMIT) -> bytes:
    """What comes up to a delimiter, and the delimiter. What comes behind it stays in the socket.

    Args:
        sock: a connected stream socket.
        delimiter: what to wait for.
        timeout: seconds for all of it.
        limit: bytes at most, with the delimiter.

    Raises:
        ReceiveTimeout: the delimiter has not come in time.
        EndOfStream: the peer has ended its side before.
        LimitExceeded: the delimiter is not within the limit.
    """
    if not delimiter:
        raise ValueError("an empty delimiter ends nothing")
    received = bytearray()
    with opened(sock, timeout) as stream:
        while len(received) < limit:
            try:
                piece = stream.peek(min(limit - len(received), _CHUNK))
            except Late:
                said = f"no {delimiter!r} within {timeout:g} s: {len(received)} bytes have come"
                raise ReceiveTimeout(said, bytes(received)) from None
            if not piece:
                said = f"the peer has ended its side before a {delimiter!r}: {len(received)} bytes have come"
                raise EndOfStream(said, bytes(received))
            before, searched = len(received), max(0, len(received) - len(delimiter) + 1)
            received += piece
            found = received.find(delimiter, searched)
            if found >= 0:
                del received[found + len(delimiter) :]
            stream.skip(len(received) - before)
            if found >= 0:
                return bytes(received)
    raise LimitExceeded(f"no {delimiter!r} within {limit} bytes", bytes(received))
