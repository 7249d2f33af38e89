"""The blocking client: one request at a time over a connected UDP socket, always within its bound. Loads no asyncio."""

from __future__ import annotations

import socket
from random import Random, SystemRandom
from time import monotonic
from typing import Self

from forkd import LONGEST_WAIT
from forkd.rdp.errors import address_text, answer_of
from forkd.rdp.packets import LARGEST_PACKET
from forkd.rdp.requester import RequestEnded, Requester
from forkd.rdp.timers import LARGEST, Timers, timers_for

_ids = SystemRandom()

#: Datagrams that are read before a request and at the end: repeated answers, whose acknowledgement was lost.
_LEFTOVERS = 64


class RdpClient:
    """A client of one server; a context manager. Not to be shared by threads.

    Args:
        host: a name or an address; a name is looked up here, once, and takes what that takes.
        port: of the server.
        timeout: the first try's time in seconds, at least (it is drawn between this and 1.5 times it); each further try
            gets twice the time of the one before.
        retries: how many further tries.
        timers: all the numbers; `timeout` and `retries` replace its own.
        limit: bytes of the largest answer that is taken.

    Raises:
        OSError: the name is not known, or there is no route.
        ValueError: a time or a number is out of range.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        timeout: float | None = None,
        retries: int | None = None,
        timers: Timers | None = None,
        limit: int = LARGEST,
    ) -> None:
        self._where = address_text(host, port)
        self._requester = Requester(timers_for(timers, timeout, retries), limit, Random())  # noqa: S311 - jitter
        self._unreachable = False
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, kind, protocol)
        try:
            self._socket.connect(address)
        except BaseException:
            self._socket.close()
            raise

    def request(self, payload: bytes) -> bytes:
        """Sends a request and returns its answer.

        Raises:
            GaveUp: no answer came within the bound.
            Failed: the handler failed.
            Busy: the server takes no more requests for now.
            TooLarge: the request is too large for the server, or the answer for this client.
        """
        self._acknowledge_again()
        self._unreachable = False
        now = monotonic()
        id = _ids.getrandbits(64)
        try:
            self._send(self._requester.start(now, id, payload))
            while not (ended := self._wait()):
                pass
        except BaseException:
            self._requester.forget(id)
            raise
        return answer_of(ended[0], self._where, unreachable=self._unreachable)

    def close(self) -> None:
        """Closes the socket, having acknowledged what was repeated; never waits."""
        if self._socket.fileno() >= 0:
            self._acknowledge_again()
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self) -> list[RequestEnded]:
        """Receives one datagram, or does what is due; the requests that have ended by it."""
        deadline = self._requester.deadline
        left = 0.0 if deadline is None else deadline - monotonic()
        if left > 0:
            self._socket.settimeout(min(left, LONGEST_WAIT))
            data = self._receive(0)
            if data is not None:
                packets, ended = self._requester.receive(monotonic(), data)
                self._send(packets)
                return ended
        packets, ended = self._requester.expire(monotonic())
        self._send(packets)
        return ended

    def _receive(self, flags: int) -> bytes | None:
        """A datagram; None: none came in time; empty: an ICMP error, which may be forged and is not final."""
        try:
            return self._socket.recv(LARGEST_PACKET + 1, flags)
        except (TimeoutError, BlockingIOError):
            return None
        except OSError:
            self._unreachable = True
            return b""

    def _send(self, packets: list[bytes]) -> None:
        for packet in packets:
            try:
                self._socket.send(packet, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return  # as if it were lost: it is sent again
            except OSError:  # the error of an earlier packet, or no route just now: the next try may go through
                self._unreachable = True

    def _acknowledge_again(self) -> None:
        """Reads what came since the last request, and acknowledges repeated answers again."""
        self._socket.settimeout(0)
        for _ in range(_LEFTOVERS):
            if (data := self._receive(socket.MSG_DONTWAIT)) is None:
                return
            self._send(self._requester.receive(monotonic(), data)[0])
