"""A connection after its last word: it sends no more, and what still comes is thrown away, for a bounded time.

A socket that is closed while there is unread data in it, or before more comes, resets the connection, and the client
may never see what it was sent before (RFC 1122, 4.2.2.13; RFC 9112, 9.6). So the sending side is closed first, and the
socket when the client has sent its end. Transports linger so, and clients that are told why they are refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

from forkd.serve.loop import IN, PollLoop

#: Bytes that are thrown away at a time.
_CHUNK = 65_536


class Lingering:
    """One such connection.

    Args:
        loop: the process's loop.
        sock: its non-blocking socket; this owns it from now on.
        seconds: how long it lasts at most.
        most: how many bytes are thrown away at most.
        ended: called once, when the socket is closed.
        watched: whether epoll watches it already, for reading.
    """

    __slots__ = ("_ended", "_fd", "_left", "_selector", "_sock", "_timer")

    def __init__(
        self,
        loop: PollLoop,
        sock: socket.socket,
        seconds: float,
        most: int,
        ended: Callable[[Lingering], object],
        *,
        watched: bool = False,
    ) -> None:
        self._selector = loop.selector
        self._sock = sock
        self._fd = sock.fileno()
        self._left = most
        self._ended = ended
        if not watched:  # first, since it may fail: epoll has a bound (epoll(7), max_user_watches)
            self._selector.epoll.register(self._fd, IN)
        self._selector.served[self._fd] = self._discard
        self._timer: asyncio.TimerHandle = loop.call_later(seconds, self.close)
        with contextlib.suppress(OSError):  # the client has gone, as the next read tells
            sock.shutdown(socket.SHUT_WR)

    def _discard(self, mask: int) -> None:
        try:
            count = len(self._sock.recv(min(self._left, _CHUNK)))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            count = 0
        self._left -= count
        if not count or not self._left:
            self.close()

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the socket."""
        self._sock.close()

    def close(self) -> None:
        """Closes the socket now."""
        if self._sock.fileno() < 0:
            return
        self._timer.cancel()
        self._selector.epoll.unregister(self._fd)
        del self._selector.served[self._fd]
        self._sock.close()
        self._ended(self)
