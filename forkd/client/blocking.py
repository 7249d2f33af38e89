"""Calls on blocking sockets, each with one deadline for all that it does: connecting, sending and receiving.

`forkd.client` is the public name of all this; what a call promises is said there. `forkd call` and users' own programs
call it; the daemon does not. Below the public calls is the stream by which they try, then wait with what is left of the
deadline, over a plain socket or TLS.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

from forkd import LONGEST_WAIT
from forkd.config.address import Address, parse_address

#: Bytes that `recv_until` receives at most, where its caller says nothing else.
LIMIT = 1 << 20

_CHUNK = 1 << 16
_TLS_RECORD_SIZE = 1 << 14  # RFC 8446, section 5.1
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

T = TypeVar("T")


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
        TimeoutError: there was no answer in time.
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
    sock.settimeout(min(timeout, LONGEST_WAIT))
    return sock


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
    with memoryview(data) as given, _octets(given) as unsent, _open_stream(sock, timeout) as stream:
        while sent < len(unsent):
            try:
                sent += stream.send(unsent[sent:])
            except _DeadlinePassed:
                said = f"only {sent} of {len(unsent)} bytes could be sent in {timeout:g} s"
                raise SendTimeout(said, sent) from None


def _octets(data: memoryview) -> memoryview:
    """A view by bytes; of a copy where the data has gaps, zeros in its shape, or a format as ctypes has them."""
    try:
        return data.cast("B")
    except (TypeError, ValueError):
        return memoryview(data.tobytes())


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
    with _open_stream(sock, timeout) as stream:
        while len(received) < count:
            try:
                piece = stream.receive(min(count - len(received), _CHUNK))
            except _DeadlinePassed:
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
    with _open_stream(sock, timeout) as stream:
        while len(received) < limit:
            try:
                piece = stream.peek(min(limit - len(received), _CHUNK))
            except _DeadlinePassed:
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
        sent: how many bytes the kernel has taken for it. The connection is of no more use, as it can't be known which
            of them the peer will see.
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


def _connect_tcp(address: Address, end: float) -> socket.socket:
    found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    failed: OSError = TimeoutError(errno.ETIMEDOUT, "no answer")
    for tried, (family, kind, protocol, _, where) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.001, min((end - monotonic()) / (len(found) - tried), LONGEST_WAIT)))
            sock.connect(where)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            sock.close()
            failed = error
        else:
            return sock
    raise failed


def _connect_unix(path: str, end: float) -> socket.socket:
    """While the backlog is full only a blocking connect(2) waits, as long as SO_SNDTIMEO allows: unix(7), socket(7)."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(True)
        connected = False
        while not connected:
            left = max(1, int(min(end - monotonic(), LONGEST_WAIT) * 1e6))  # zero would be for ever
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", *divmod(left, 10**6)))
            sock.connect(path)
            with contextlib.suppress(
                OSError
            ):  # Python returns from a call that a signal has interrupted as if it were done
                sock.getpeername()
                connected = True
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, bytes(struct.calcsize("ll")))
    except BlockingIOError:
        sock.close()
        raise TimeoutError(errno.ETIMEDOUT, "not accepted in time") from None
    except BaseException:
        sock.close()
        raise
    return sock


class _DeadlinePassed(Exception):
    """The deadline is over."""


class _DeadlineStream:
    """A socket for the time of one call: operations that try, then wait with what is left of the deadline.

    Args:
        sock: a plain socket, which does not wait by itself.
        timeout: seconds from now until the deadline.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock = sock
        self._end = monotonic() + timeout
        self._begun = False

    def send(self, data: memoryview) -> int:
        """Sends what the kernel takes, and returns how many bytes. Raises _DeadlinePassed, as the others do."""
        return self._until_ready(lambda: self._sock.send(data, _FLAGS), select.POLLOUT)

    def receive(self, count: int) -> bytes:
        """What is there, up to `count` bytes; empty at end of file."""
        return self._until_ready(lambda: self._sock.recv(count, _FLAGS), select.POLLIN)

    def peek(self, count: int) -> bytes:
        """As `receive`, but it stays there until `skip` takes it out."""
        return self._until_ready(lambda: self._sock.recv(count, _FLAGS | socket.MSG_PEEK), select.POLLIN)

    def skip(self, count: int) -> None:
        """Takes out so many bytes of what `peek` has shown."""
        # A unix socket ends a read where descriptors were sent along with the data.
        while count > 0 and (taken := self._sock.recv(count, _FLAGS)):
            count -= len(taken)

    def _until_ready(self, operation: Callable[[], T], events: int) -> T:
        # What is there at once is taken without a look at the clock, and once also when the deadline is over.
        if self._begun and monotonic() >= self._end:
            raise _DeadlinePassed
        self._begun = True
        while True:
            try:
                return operation()
            except OSError as error:
                wanted = self._wanted(error, events)
                if not wanted:
                    raise
            self._wait(wanted)

    def _wanted(self, error: OSError, events: int) -> int:
        """The events to wait for after an operation that needs `events` has failed; 0 when it has failed for good."""
        return events if isinstance(error, BlockingIOError) else 0

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        while (left := self._end - monotonic()) > 0:
            if poll.poll(min(left, LONGEST_WAIT) * 1000):  # rounded up, so that it does not spin at the end
                return
        raise _DeadlinePassed


class _TlsDeadlineStream(_DeadlineStream):
    """The same of an ssl.SSLSocket, which may have to write in order to read, and can't be peeked into."""

    def send(self, data: memoryview) -> int:
        # A send that is to be repeated must be repeated with the same data: one record at a time.
        return self._until_ready(lambda: self._sock.send(data[:_TLS_RECORD_SIZE]), select.POLLOUT)

    def receive(self, count: int) -> bytes:
        return self._until_ready(lambda: self._sock.recv(count), select.POLLIN)

    def peek(self, count: int) -> bytes:
        """One byte, taken out at once: what OpenSSL has decrypted costs no system call."""
        return self.receive(min(count, 1))

    def skip(self, count: int) -> None:
        """What was shown is out already."""

    def _wanted(self, error: OSError, events: int) -> int:
        import ssl  # noqa: PLC0415 (imported already where there is such a socket)

        if isinstance(error, ssl.SSLWantReadError):
            return select.POLLIN
        return select.POLLOUT if isinstance(error, ssl.SSLWantWriteError) else 0


@contextlib.contextmanager
def _open_stream(sock: socket.socket, timeout: float) -> Iterator[_DeadlineStream]:
    """A context with the stream of a socket, until `timeout` seconds from now; the socket is left as it was."""
    own: Any = sock.gettimeout()
    if hasattr(sock, "pending"):  # ssl's
        sock.settimeout(0.0)
        try:
            yield _TlsDeadlineStream(sock, timeout)
        finally:
            sock.settimeout(own)
    elif own:
        # Python waits for a socket that has a timeout whatever the flags say. Another object for the same descriptor,
        # which does not block as it is, has none, and other threads that use the socket meanwhile see no difference.
        bare = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        try:
            bare.settimeout(0.0)
            yield _DeadlineStream(bare, timeout)
        finally:
            bare.detach()
    else:
        yield _DeadlineStream(sock, timeout)
