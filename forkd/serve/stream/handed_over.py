"""A connection that something else reads and writes, a thread or a program, as the loop sees it.

The loop keeps a descriptor of its own and does not poll it. What it wants to know of the connection the kernel tells
(TCP_INFO of tcp(7)), and to end it shuts the socket down, so that reads and writes of the other copy end, too. So
deadlines, the list of clients, their end by an operator, the drain and the access log are as for a connection that the
loop reads. `threads` and `program` make them, and tell when they are done with one.
"""

from __future__ import annotations

import contextlib
import logging
import socket
from math import inf
from ssl import SSLEOFError
from time import monotonic
from typing import Any

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.ended import Ended
from forkd.serve.deadlines import (
    WRITE_CHECKS,
    ActivityStamps,
    ConnectionActivity,
    TimeoutPolicy,
    kernel_activity,
    timeout_error,
)
from forkd.serve.lingering import Lingering
from forkd.serve.loop import PollLoop
from forkd.serve.stream.transport import MOST_DROPPED, ServerContext, log_end
from forkd.system.channel import wait_ready
from forkd.system.socket_stats import cookie_of, read_tcp_info, unacknowledged_bytes, unread_bytes

log = logging.getLogger("forkd.transport")


# As a plain integer: to combine an enumeration's members costs two calls.
_PEEK = int(socket.MSG_PEEK | socket.MSG_DONTWAIT)


class HandOverServer:
    """What hands a listener's connections over, and counts them.

    Args:
        context: what the process's connections share.
        listener: its settings.
        address: where it really listens.

    Attributes:
        loop: the process's.
        listener, timeouts, linger, access_log, measure, closed, ended_early: as of `transport.ConnectionObserver`.
        check_every: seconds between two checks of a connection, at most; 0: none is needed.
        began: notes by its descriptor that a connection begins.
        lingering: connections that are closed, but not over yet.
    """

    def __init__(self, context: ServerContext, listener: Listener, address: Address) -> None:
        self.loop: PollLoop = context.loop
        self.listener = str(address)
        self.timeouts = TimeoutPolicy(listener, context.deadlines)
        self.linger = listener.socket.linger
        self.access_log = context.access_log
        spans = (self.timeouts.first_check, self.timeouts.write / WRITE_CHECKS)
        self.check_every = min(filter(None, spans), default=0.0)
        self.measure = context.stats.measure
        self.began = context.stats.began
        self.closed, self.ended_early = context.stats.closed, context.stats.ended_early
        self.lingering = 0
        self._freed = context.stats.freed

    def begin_lingering(self, sock: socket.socket) -> None:
        """Lets a connection that is closed linger (`lingering`). What has served it is free."""
        self.lingering += 1
        Lingering(self.loop, sock, self.linger, MOST_DROPPED, self._end_lingering)
        self._freed()

    def _end_lingering(self, _: Lingering) -> None:
        self.lingering -= 1
        self.closed()


class HandedOver:
    """One such connection. What serves it calls `finish` on the loop, in the end.

    Args:
        sock: its socket; this owns it.
        peer: the peer's address as accept(2) gave it.
        server: what made it.

    Attributes:
        due: as of `deadlines.Watched`.
        peer: as the argument.
        received_before: bytes that came before its TLS began, which to the kernel are data.
    """

    __slots__ = (
        "_ended",
        "_is_over",
        "_opened",
        "_progress",
        "_server",
        "_sock",
        "_stalled_since",
        "due",
        "peer",
        "received_before",
        "stamps",
    )

    def __init__(self, sock: socket.socket, peer: Any, server: HandOverServer) -> None:
        self._sock = sock
        self._server = server
        self.peer = peer
        self._opened = opened = monotonic()
        self._ended: Ended | None = None  # why forkd has ended it
        self._is_over = False
        # What has been sent and what has not at the last look, and since when that is so.
        self._progress = (0, 0)
        self._stalled_since = self.due = 0.0
        self.received_before = 0
        self.stamps: ActivityStamps | None = None  # notes what comes and goes, where the kernel does not
        server.loop.outside.add(self)
        if server.check_every:
            server.timeouts.deadlines.watch(self, opened + server.check_every)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} fd={self._sock.fileno()} peer={self.peer!r}>"

    # Deadlines

    def check(self, now: float) -> float:
        """As `deadlines.Watched`."""
        if self.is_over:
            return 0.0
        timeouts = self._server.timeouts
        activity = self._activity(now)
        when, kind = timeouts.deadline(activity)
        if now >= when:
            self.end(timeout_error(kind, activity, now))
            return 0.0
        if timeouts.write:
            when = min(when, now + timeouts.write / WRITE_CHECKS)
        return 0.0 if when == inf else when

    def __lt__(self, other: object) -> bool:
        """As `deadlines.Watched`."""
        return id(self) < id(other)

    def _activity(self, now: float) -> ConnectionActivity:
        if (info := read_tcp_info(self._sock)) is not None:
            stalled = self._look_for_stall(info.bytes_acked, now)
            # An end of file that comes first is no silence either.
            return kernel_activity(info, self._opened, now, stalled)._replace(
                has_received=info.bytes_received > self.received_before
            )
        if (stamps := self.stamps) is None:  # nothing is known of what a program does with a unix socket
            return ConnectionActivity(self._opened, True, now, now, self._look_for_stall(0, now))
        stalled = self._look_for_stall(stamps.bytes_out, now)
        with contextlib.suppress(OSError):
            if unread_bytes(self._sock):  # since when it is there is not known
                return ConnectionActivity(self._opened, True, now, stamps.last_sent, stalled)
        return ConnectionActivity(self._opened, stamps.bytes_in > 0, stamps.last_received, stamps.last_sent, stalled)

    def _look_for_stall(self, sent: int, now: float) -> float:
        """Since when the client has taken nothing of what is unsent; 0 where nothing is."""
        try:
            progress = sent, unacknowledged_bytes(self._sock)
        except OSError:  # it has gone in this moment
            return 0.0
        if not progress[1]:
            self._stalled_since = 0.0
        elif progress != self._progress or not self._stalled_since:
            self._stalled_since = now
        self._progress = progress
        return self._stalled_since

    # Ending

    @property
    def is_over(self) -> bool:
        """Whether forkd has ended it, or what served it is done."""
        return self._is_over or self._ended is not None

    def end(self, error: Ended) -> None:
        """Ends the connection, of forkd's own accord: the log says why, and it is counted."""
        if self.is_over:
            return
        self._ended = error
        log.info("closed client %r (%s): %s", self.peer, error.reason, error, extra=self.about())
        self._server.ended_early(error)
        self.cut()

    def cut(self) -> None:
        """Ends it, when forkd has decided so."""
        self.abort()

    def abort(self) -> None:
        """Shuts it down: what serves it can neither read nor write any more."""
        with contextlib.suppress(OSError):  # the client has gone
            self._sock.shutdown(socket.SHUT_RDWR)

    def notify_drain(self) -> None:
        """Tells what serves it that the worker drains: nothing, here."""

    def close_at_exit(self) -> None:
        """At the end of the process: nothing more is to be read; what serves it may have a last word."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the socket."""
        self._sock.close()

    def finish(self, error: BaseException | None = None) -> None:
        """What has served it is done with it, or has failed: closes it, and counts that.

        Args:
            error: what was raised, if anything was.
        """
        server, sock = self._server, self._sock
        if isinstance(error, Ended):
            self.end(error)
        self._is_over = True
        server.loop.outside.discard(self)
        if self.due:
            server.timeouts.deadlines.forget(self)
        failed = error is not None and not self._is_loss(error)
        if failed:
            server.loop.call_exception_handler(
                {"message": "The handler failed.", "exception": error, "transport": self}
            )
        lingers = server.linger > 0 and error is None and self._ended is None
        at_end = self._has_sent_end() if lingers or server.access_log else True
        if server.access_log:
            reason = "error" if failed else "reset" if error is not None else "eof" if at_end else "closed"
            reason = self._ended.reason if self._ended is not None else reason
            log_end(sock, self.peer, server.listener, (self._opened, reason), self.stamps)
        if server.measure is not None:
            server.measure(sock, self._opened, self.stamps)
        if lingers and not at_end:
            sock.setblocking(False)
            server.begin_lingering(sock)
        else:
            sock.close()
            server.closed()

    def _is_loss(self, error: BaseException) -> bool:
        """Whether it was raised because the client has gone, or was ended, which is no failure of the handler."""
        if not isinstance(error, OSError):
            return False
        if self._ended is not None:
            return True
        return isinstance(error, (ConnectionError, SSLEOFError)) and self.is_lost()

    def is_lost(self) -> bool:
        """Whether the client has reset the connection, or has vanished; one that has sent its end alone is not lost."""
        return wait_ready(self._sock, 0, 0)

    def _has_sent_end(self) -> bool:
        """Whether the client has sent its end, and all before that was read; or has gone."""
        try:
            return not self._sock.recv(1, _PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            return True

    def about(self) -> dict[str, str]:
        """Which connection a log record is about, as fields of it."""
        return {"client": str(self.peer), "listener": self._server.listener}

    @property
    def cookie(self) -> int:
        """What the kernel calls the connection. Raises OSError."""
        return cookie_of(self._sock)
