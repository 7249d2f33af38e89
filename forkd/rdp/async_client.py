"""The client for asyncio: any number of requests at the same time over one connected UDP socket."""

from __future__ import annotations

import asyncio
from random import Random, SystemRandom
from typing import Self

from forkd.rdp.errors import address_text, answer_of
from forkd.rdp.requester import RequestEnded, Requester
from forkd.rdp.timers import LARGEST, LoopTimer, Timers, timers_for

_ids = SystemRandom()


class AsyncRdpClient(asyncio.DatagramProtocol):
    """A client of one server; an asynchronous context manager. The first request opens the socket if it is not open.

    While the socket is open, repeated answers are acknowledged again. The arguments are those of `RdpClient`.
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
        self._host, self._port = host, port
        self._where = address_text(host, port)
        self._requester = Requester(timers_for(timers, timeout, retries), limit, Random())  # noqa: S311 - jitter
        self._waiters: dict[int, asyncio.Future[RequestEnded]] = {}
        self._opening: asyncio.Task[None] | None = None
        self._transport: asyncio.DatagramTransport | None = None
        self._closed = False
        self._errors = 0  # ICMP errors so far
        self._timer: LoopTimer | None = None

    async def request(self, payload: bytes) -> bytes:
        """Sends a request and returns its answer.

        Raises:
            OSError: the socket could not be opened.
            ConnectionAbortedError: the client was closed meanwhile.
            RdpError: as for `RdpClient.request`.
        """
        await self._open()
        loop = asyncio.get_running_loop()
        id = _ids.getrandbits(64)
        errors = self._errors
        waiter = self._waiters[id] = loop.create_future()
        try:
            self._send(self._requester.start(loop.time(), id, payload))
            ended = await waiter
        finally:
            del self._waiters[id]
            self._requester.forget(id)
        return answer_of(ended, self._where, unreachable=self._errors > errors)

    def close(self) -> None:
        """Closes the socket; requests under way end with ConnectionAbortedError."""
        self._closed = True
        if self._opening is not None and not self._opening.done():
            self._opening.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
            self._transport = None
        for waiter in self._waiters.values():
            if not waiter.done():
                waiter.set_exception(ConnectionAbortedError(f"the client of {self._where} was closed"))

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def _open(self) -> None:
        """Opens the socket once for all requests; after a failure the next request tries again."""
        if self._transport is None and not self._closed:
            if self._opening is None or self._opening.done():
                self._opening = asyncio.get_running_loop().create_task(self._connect())
            await asyncio.wait({self._opening})
            if not self._opening.cancelled():
                self._opening.result()
        if self._transport is None:
            raise ConnectionAbortedError(f"the client of {self._where} was closed")

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = LoopTimer(loop, self._expire)
        self._transport, _ = await loop.create_datagram_endpoint(lambda: self, remote_addr=(self._host, self._port))

    def datagram_received(self, data: bytes, addr: object) -> None:
        packets, ended = self._requester.receive(asyncio.get_running_loop().time(), data)
        self._finish(packets, ended)

    def error_received(self, exc: Exception) -> None:
        """An ICMP error may be forged, so that it is not final."""
        self._errors += 1

    def connection_lost(self, exc: Exception | None) -> None:
        self.close()

    def _expire(self, now: float) -> None:
        self._finish(*self._requester.expire(now))

    def _finish(self, packets: list[bytes], ended: list[RequestEnded]) -> None:
        self._send(packets)
        for one in ended:
            waiter = self._waiters.get(one.id)
            if waiter is not None and not waiter.done():
                waiter.set_result(one)

    def _send(self, packets: list[bytes]) -> None:
        if self._transport is not None and self._timer is not None:
            for packet in packets:
                self._transport.sendto(packet)
            self._timer.set(self._requester.deadline)
