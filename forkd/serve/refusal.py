"""How a client is refused: told why if it is to be, closed so that it can hear that, counted, and logged once a minute.

A socket that is closed while there is unread data in it resets the connection, and the client may never see what it was
sent before (RFC 1122, 4.2.2.13). So who is told something is heard out for a moment, with bounded patience and for a
bounded number of clients at a time. Who is denied is told nothing and closed at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Any

from forkd.config.escapes import octets
from forkd.serve.gate import COUNTED, DENIED, hashing
from forkd.serve.loop import IN, PollLoop
from forkd.system.counts import Ledger
from forkd.system.scoreboard import Row

log = logging.getLogger("forkd.accept")

#: Seconds for which one that was told something is heard out, octets that it may say meanwhile, and how many of them
#: there may be at a time; beyond that they are closed at once.
PATIENCE = 1.0
_MOST_SAID = 65_536
_MOST_LINGERING = 64

_MINUTE = 60  # seconds between two lines about one reason and listener


class Refusals:
    """One listener's, in one worker.

    Args:
        loop: the worker's loop.
        address: where it listens.
        message: what those are told who are refused; None: nothing.
        row: where the worker counts them.
        ledger: what it counts with the others: lines in the log, here.
    """

    def __init__(self, loop: PollLoop, address: str, message: str | None, row: Row, ledger: Ledger) -> None:
        self._loop = loop
        self._address = address
        self._message = octets(message) if message else b""
        self._row = row
        self._windows = ledger.rates
        self._key_of = hashing(ledger.secret, f"{address} log")
        self._unsaid: dict[str, int] = {}  # by reason: refused since the last line
        self._lingering: set[Lingering] = set()

    def refuse(self, sock: socket.socket, peer: Any, reason: str) -> None:
        """Refuses one, whose non-blocking socket this owns from now on."""
        self.note(peer, reason)
        if reason == DENIED or not self._message or not _tell(sock, self._message):
            sock.close()
        elif len(self._lingering) >= _MOST_LINGERING:
            with contextlib.suppress(OSError):
                sock.recv(_MOST_SAID)
            sock.close()
        else:
            self._lingering.add(Lingering(self._loop, sock, self._lingering))

    def note(self, peer: Any, reason: str) -> None:
        """Counts one that is refused, and says so in the log, now or with others."""
        self._row[COUNTED[reason]] += 1
        self._unsaid[reason] = count = self._unsaid.get(reason, 0) + 1
        if self._windows.claim(self._key_of(reason.encode()), 1, _MINUTE):
            self._unsaid[reason] = 0
            more = f"; {count} since this worker last said so" if count > 1 else ""
            client = peer[0] if isinstance(peer, tuple) else "a client"
            log.info("%s: refused %s (%s)%s", self._address, client, reason, more)


def _tell(sock: socket.socket, message: bytes) -> bool:
    """Sends a message as far as it can be sent at once, and says that it was the last; whether the client is there."""
    try:
        sock.send(message)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        return False
    return True


class Lingering:
    """One that was told its last, until it has gone or its time is up."""

    def __init__(self, loop: PollLoop, sock: socket.socket, among: set[Lingering]) -> None:
        self._selector = loop.selector
        self._sock = sock
        self._among = among
        self._left = _MOST_SAID
        self._timer: asyncio.TimerHandle = loop.call_later(PATIENCE, self._close)
        self._selector.served[sock.fileno()] = self._hear
        self._selector.epoll.register(sock.fileno(), IN)

    def _hear(self, mask: int) -> None:
        try:
            said = len(self._sock.recv(self._left))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = 0
        self._left -= said
        if not said or not self._left:
            self._close()

    def _close(self) -> None:
        self._timer.cancel()
        self._selector.epoll.unregister(self._sock.fileno())
        del self._selector.served[self._sock.fileno()]
        self._sock.close()
        self._among.discard(self)
