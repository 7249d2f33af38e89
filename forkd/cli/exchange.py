"""One request and its answer, over a stream or by datagrams, each wait with an end: what `forkd call` does.

Over a stream a request that has been sent is not sent again, since the server may have acted upon it; only connecting
is tried again. By datagrams it is sent again when no answer comes: the server must cope with the same request twice.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from forkd.client import connect
from forkd.config.address import Address

#: Bytes of a request or an answer at most.
LARGEST = 1 << 26

_CHUNK = 1 << 16
_PAUSE = 0.1  # seconds before a refused connection is tried again; longer each time
_LONGEST_WAIT = 1 << 20  # seconds: what poll(2) takes at once


class Failed(Exception):
    """There is no answer; the reason is one for the user."""


@dataclass(slots=True)
class Tries:
    """What a call may cost, and what it has cost.

    Attributes:
        retries: tries beyond the first.
        timeout: seconds that a try takes at most; over a stream, seconds without a byte either way.
        end: when all is over, on the monotonic clock.
        made: tries up to now.
        began: when the first began.
    """

    retries: int
    timeout: float
    end: float
    made: int = 0
    began: float = field(default_factory=monotonic)

    def begin(self) -> float:
        """Counts another try; when it is over."""
        self.made += 1
        return min(monotonic() + self.timeout, self.end)

    @property
    def last(self) -> bool:
        """Whether the one that is made is the last."""
        return self.made > self.retries or monotonic() >= self.end


def _poll(poll: select.poll, until: float) -> list[tuple[int, int]]:
    """What has happened by then; nothing when that is over."""
    left = until - monotonic()
    return poll.poll(min(left, _LONGEST_WAIT) * 1000) if left > 0 else []


def _reason(error: OSError) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nobody listens there"
    if isinstance(error, TimeoutError):
        return "nobody answers"
    if isinstance(error, FileNotFoundError):
        return "there is no such socket"
    return error.strerror or str(error)


# Streams


def exchange(address: Address, request: bytes, tries: Tries, until: bytes | None) -> bytes:
    """Sends a request over a new connection and returns the answer.

    Args:
        address: a tcp or unix one.
        request: what to send.
        tries: how often to try to connect, and how long to wait.
        until: what the answer ends with; None: with the server's end of the connection, after our half of it has ended.

    Raises:
        Failed: there is no whole answer.
    """
    with _connect(address, tries) as sock:
        return _Exchange(sock, request, until).run(tries)


def _connect(address: Address, tries: Tries) -> socket.socket:
    pause = _PAUSE
    while True:
        until = tries.begin()
        try:
            return connect(address, max(0.001, until - monotonic()))
        except OSError as error:
            if tries.last:
                raise Failed(_reason(error)) from None
        time.sleep(max(0.0, min(pause, tries.timeout, tries.end - monotonic())))
        pause *= 2


class _Exchange:
    """Sends and receives at the same time: a server that answers while it reads could not go on otherwise."""

    def __init__(self, sock: socket.socket, request: bytes, until: bytes | None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._unsent = memoryview(request)
        self._size = len(request)
        self._takes = True  # whether the server takes more of the request
        self._until = until
        self._answer = bytearray()

    def run(self, tries: Tries) -> bytes:
        """The answer. Raises Failed."""
        poll = select.poll()
        self._send()
        while True:
            poll.register(self._sock, select.POLLIN | (select.POLLOUT if self._unsent and self._takes else 0))
            events = _poll(poll, min(monotonic() + tries.timeout, tries.end))
            if not events:
                raise Failed(self._silence(tries))
            if self._unsent and self._takes and events[0][1] & ~select.POLLIN:
                self._send()
            if events[0][1] & ~select.POLLOUT and self._received_all():
                return bytes(self._answer)
            if monotonic() >= tries.end:
                raise Failed(self._silence(tries))

    def _send(self) -> None:
        try:
            if self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent[:_CHUNK], socket.MSG_NOSIGNAL) :]
            if not self._unsent and self._until is None:
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except OSError:  # which reading will tell of; it may have answered before
            self._takes = False

    def _received_all(self) -> bool:
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError as error:
            raise Failed(f"{_reason(error)}, after {self._so_far}") from None
        if not data:
            if self._until is not None:
                raise Failed(f"it ended the connection before a {self._until!r}, after {self._so_far}")
            if self._unsent and not self._answer:
                raise Failed(f"it ended the connection with {len(self._unsent)} of {self._size} bytes unsent")
            return True
        searched = max(0, len(self._answer) - len(self._until or b"") + 1)
        self._answer += data
        if self._until is not None and (found := self._answer.find(self._until, searched)) >= 0:
            del self._answer[found + len(self._until) :]
            return True
        if len(self._answer) > LARGEST:
            raise Failed(f"the answer has more than {LARGEST} bytes")
        return False

    def _silence(self, tries: Tries) -> str:
        over = "the time for the whole is over" if monotonic() >= tries.end else ""
        if self._unsent:
            return f"{over or 'it takes no more of the request'}, {len(self._unsent)} of {self._size} bytes are unsent"
        if over or self._answer:
            return f"{over or 'it fell silent'}, after {self._so_far}"
        return "it took the request and says nothing"

    @property
    def _so_far(self) -> str:
        return f"{len(self._answer)} bytes of an answer"


# Datagrams


def ask(places: list[tuple[int, Any]], request: bytes, tries: Tries) -> bytes:
    """Sends a request as one datagram, again when no answer comes, and returns the first answer.

    An answer is what comes from the very address that was asked: the sockets are connected, so the kernel drops what
    comes from others. That nobody listens there (an ICMP message, which anybody can forge) ends no try but the last
    one: the server may be just about to start.

    Args:
        places: family and address of each address of the server. Where nobody listens at one, the next is asked.
        request: what to send.
        tries: how often, and how long to wait for an answer each time.

    Raises:
        Failed: there is no answer.
    """
    with contextlib.ExitStack() as stack:
        asked = _Asked(places, request, stack)
        while True:
            until = tries.begin()
            refusals = asked.send()
            while events := _poll(asked.poll, until) if len(refusals) < len(places) or not tries.last else []:
                for descriptor, _ in events:
                    answer = asked.receive(descriptor, refusals)
                    if answer is not None:
                        return answer
            if tries.last:
                raise Failed(refusals[-1] if refusals else "no answer")


class _Asked:
    """The sockets of a request by datagrams, one for each place that was asked, the present one's number, and a poll
    that watches them all: an answer to an earlier try is one too.
    """

    def __init__(self, places: list[tuple[int, Any]], request: bytes, stack: contextlib.ExitStack) -> None:
        self.poll = select.poll()
        self._places = places
        self._request = request
        self._stack = stack
        self._sockets: dict[int, socket.socket] = {}
        self._turn = -1

    def send(self) -> list[str]:
        """Asks the next place, and the one after it where nobody listens; why nobody does at each that was refused."""
        refusals: list[str] = []
        self._send(refusals)
        return refusals

    def _send(self, refusals: list[str]) -> None:
        while len(refusals) < len(self._places):
            self._turn = (self._turn + 1) % len(self._places)
            try:
                sock = self._sockets.get(self._turn) or self._open()
                sock.connect(self._places[self._turn][1])  # anew each time: a unix socket may be another by now
                sock.send(self._request)
            except BlockingIOError:  # its queue is full, so that this try is lost
                return
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise Failed(f"{len(self._request)} bytes are too long for one datagram") from None
                refusals.append(_reason(error))
            else:
                return

    def _open(self) -> socket.socket:
        family, _ = self._places[self._turn]
        sock = self._stack.enter_context(socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK))
        if family == socket.AF_UNIX:
            sock.bind("")  # to any abstract name, where the answer can come to: unix(7), autobind
        self._sockets[self._turn] = sock
        self.poll.register(sock, select.POLLIN)
        return sock

    def receive(self, descriptor: int, refusals: list[str]) -> bytes | None:
        """The answer that has come on a socket; None, and the next place asked, when it is that nobody listens."""
        sock = next(one for one in self._sockets.values() if one.fileno() == descriptor)
        try:
            return sock.recv(_CHUNK)
        except BlockingIOError:
            return None
        except OSError as error:
            refusals.append(_reason(error))
            self._send(refusals)
            return None
