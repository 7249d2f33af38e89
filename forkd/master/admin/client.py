"""One client of an address of the master's own: what is sent to it, and for how long.

A client is in one of three phases: it is read from, sent to, or left to take the last that it was sent. In the last one
whatever it still sends is thrown away, since a connection that is closed before that is reset, and the client might
lose the answer. Each phase has a deadline; the server closes what is later than that.
"""

from __future__ import annotations

import socket
import time
from enum import Enum, auto
from selectors import EVENT_READ, EVENT_WRITE

#: Seconds for a client to take an answer, and to close after the last one.
SEND_SECONDS = 10.0
CLOSE_SECONDS = 1.0

#: Bytes that are thrown away after the last answer.
_MOST_IGNORED = 1 << 16

_CHUNK = 16_384


class Phase(Enum):
    """What is done with a client."""

    READING = auto()
    SENDING = auto()
    CLOSING = auto()


class Client:
    """A client that is sent one text; `HttpClient` is one that asks.

    Args:
        sock: its connection, which does not block.
        data: what to send.

    Attributes:
        phase: what is done with it.
        deadline: when it is closed, on the monotonic clock.
        idle: whether it has asked for nothing that it waits for.
    """

    def __init__(self, sock: socket.socket, data: bytes = b"") -> None:
        self._sock = sock
        self._unsent = memoryview(b"")
        self._is_last = True
        self._ignored = 0
        self.phase = Phase.READING
        self.deadline = time.monotonic() + CLOSE_SECONDS
        self.idle = False
        if data:
            self.send(data, last=True)

    @property
    def events(self) -> int:
        """What to wait for, as a selector has it."""
        return EVENT_WRITE if self.phase is Phase.SENDING else EVENT_READ

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._sock.fileno()

    def ready(self) -> bool:
        """Goes on with it when it is ready; whether the connection goes on."""
        try:
            if self.phase is Phase.SENDING:
                return self._flush()
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        if self.phase is Phase.CLOSING:
            self._ignored += len(data)
            return bool(data) and self._ignored <= _MOST_IGNORED
        return self.receive(data)

    def receive(self, data: bytes) -> bool:
        """Takes what it has sent, nothing at its end; whether the connection goes on."""
        return bool(data)

    def sent(self) -> None:
        """All is sent, and not the last."""

    def send(self, data: bytes, *, last: bool) -> bool:
        """Sends it, and closes after it if it is the last; whether the connection goes on."""
        self._unsent, self._is_last = memoryview(data), last
        self.phase, self.deadline, self.idle = Phase.SENDING, time.monotonic() + SEND_SECONDS, False
        try:
            return self._flush()
        except BlockingIOError:
            return True
        except OSError:
            return False

    def _flush(self) -> bool:
        """Sends what it takes now; whether the connection goes on. Raises OSError."""
        self._unsent = self._unsent[self._sock.send(self._unsent) :]
        if self._unsent:
            return True
        if self._is_last:
            self._sock.shutdown(socket.SHUT_WR)
            self.phase, self.deadline = Phase.CLOSING, time.monotonic() + CLOSE_SECONDS
        else:
            self.sent()
        return True

    def close(self) -> None:
        """Closes the connection."""
        self._sock.close()
