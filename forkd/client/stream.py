"""A socket for the time of one call: operations that try, then wait with what is left of the deadline."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any, TypeVar

_TLS_RECORD = 1 << 14  # RFC 8446, section 5.1
_LONGEST_WAIT = 1 << 20  # seconds: what poll(2) takes at once
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

T = TypeVar("T")


class Late(Exception):
    """The deadline is over."""


class Stream:
    """A plain socket.

    Args:
        sock: one on which nothing waits by itself.
        timeout: seconds from now until the deadline.
    """

    def __init__(self, sock: socket.socket, timeout: float) -> None:
        self._sock = sock
        self._end = monotonic() + timeout
        self._begun = False

    def send(self, data: memoryview) -> int:
        """Sends what the kernel takes; how many bytes. Raises Late, as the others do."""
        return self._until_ready(lambda: self._sock.send(data, _FLAGS), select.POLLOUT)

    def receive(self, count: int) -> bytes:
        """What is there, up to `count` bytes; empty at end of file."""
        return self._until_ready(lambda: self._sock.recv(count, _FLAGS), select.POLLIN)

    def peek(self, count: int) -> bytes:
        """As `receive`, but it stays there until `skip` takes it out."""
        return self._until_ready(lambda: self._sock.recv(count, _FLAGS | socket.MSG_PEEK), select.POLLIN)

    def skip(self, count: int) -> None:
        """Takes out so much of what `peek` has shown."""
        # A unix socket ends a read where descriptors were sent along with the data.
        while count > 0 and (taken := self._sock.recv(count, _FLAGS)):
            count -= len(taken)

    def _until_ready(self, operation: Callable[[], T], events: int) -> T:
        # What is there at once is taken without a look at the clock, and once also when the deadline is over.
        if self._begun and monotonic() >= self._end:
            raise Late
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
        """What to wait for after an operation for which `events` were missing; 0 when it has failed for good."""
        return events if isinstance(error, BlockingIOError) else 0

    def _wait(self, events: int) -> None:
        poll = select.poll()
        poll.register(self._sock, events)
        while (left := self._end - monotonic()) > 0:
            if poll.poll(min(left, _LONGEST_WAIT) * 1000):  # rounded up, so that it does not spin at the end
                return
        raise Late


class _TlsStream(Stream):
    """The same of an ssl.SSLSocket, which may have to write in order to read, and can't be peeked into."""

    def send(self, data: memoryview) -> int:
        # A send that is to be repeated must be repeated with the same data: one record at a time.
        return self._until_ready(lambda: self._sock.send(data[:_TLS_RECORD]), select.POLLOUT)

    def receive(self, count: int) -> bytes:
        return self._until_ready(lambda: self._sock.recv(count), select.POLLIN)

    def peek(self, count: int) -> bytes:
        """One byte, taken out at once: what OpenSSL has decrypted costs no system call."""
        return self.receive(min(count, 1))

    def skip(self, count: int) -> None:
        """What was shown is out already."""

    def _wanted(self, error: OSError, events: int) -> int:
        import ssl  # noqa: PLC0415 (who has such a socket has imported it)

        if isinstance(error, ssl.SSLWantReadError):
            return select.POLLIN
        return select.POLLOUT if isinstance(error, ssl.SSLWantWriteError) else 0


@contextlib.contextmanager
def opened(sock: socket.socket, timeout: float) -> Iterator[Stream]:
    """The stream of a socket, until `timeout` seconds from now; the socket is left as it was."""
    own: Any = sock.gettimeout()
    if hasattr(sock, "pending"):  # ssl's
        sock.settimeout(0.0)
        try:
            yield _TlsStream(sock, timeout)
        finally:
            sock.settimeout(own)
    elif own:
        # Python waits for a socket that has a timeout whatever the flags say. Another object for the same descriptor,
        # which does not block as it is, has none, and other threads that use the socket meanwhile see no difference.
        bare = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
        try:
            bare.settimeout(0.0)
            yield Stream(bare, timeout)
        finally:
            bare.detach()
    else:
        yield Stream(sock, timeout)
