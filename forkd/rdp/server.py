"""`ReliableDatagram`: a handler of requests as an asyncio.DatagramProtocol, on forkd's transport or asyncio's own.

It connects a `Responder` with a transport, the loop's clock and the handler, and reports what the handler raises. It
decides nothing of the protocol itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from inspect import isawaitable
from random import Random
from typing import Any

from forkd.rdp.responder import Packets, Request, Responder
from forkd.rdp.timers import Limits, LoopTimer, Timers

Handler = Callable[[bytes, Any], bytes | Awaitable[bytes]]

_request_id: ContextVar[int] = ContextVar("forkd.rdp.request_id")


def request_id() -> int:
    """The message id of the request that the handler runs for: 64 bits that the client drew, the same in every worker
    that receives the request.

    Raises:
        LookupError: called outside a handler.
    """
    return _request_id.get()


class ReliableDatagram(asyncio.DatagramProtocol):
    """Answers requests of `RdpClient`, and runs the handler at most once for each.

    Args:
        handler: called with the request's payload and the peer's address; a plain function, or a coroutine function;
            returns the answer's payload.
        timers: when to send again and to forget; the same as the clients'.
        limits: what to keep at most.
    """

    def __init__(self, handler: Handler, *, timers: Timers | None = None, limits: Limits | None = None) -> None:
        self._handler = handler
        self._limits = limits or Limits()
        self._responder = Responder(timers or Timers(), self._limits, Random(), os.urandom(32))  # noqa: S311 - jitter
        self._transport: asyncio.DatagramTransport | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: asyncio.Event | None = None

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._timer = LoopTimer(self._loop, self._expire)

    def datagram_received(self, data: bytes, addr: Any) -> None:
        transport = self._transport
        if transport is None or not addr:  # a unix datagram socket without a name cannot be answered
            return
        packets, request = self._responder.receive(self._loop.time(), data, addr)
        for packet in packets:
            transport.sendto(packet, addr)
        if request is not None:
            self._run(request)
        self._after()

    def error_received(self, exc: Exception) -> None:
        """A client is gone; its answer is sent again as often as the timers say, and then forgotten."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def shutdown(self) -> None:
        """Takes no new request; keeps a task on the loop until those that are here have been answered."""
        if not self._responder.draining:
            self._responder.draining = True
            self._finished = asyncio.Event()
            self._keep(self._loop.create_task(self._drained()))
            self._after()

    async def _drained(self) -> None:
        if self._finished is not None:
            await self._finished.wait()

    def _run(self, request: Request) -> None:
        set_before = _request_id.set(request.id)
        try:
            answer = self._handler(request.payload, request.peer)
            if isawaitable(answer):
                self._keep(self._loop.create_task(self._wait(request, answer)))
            else:
                self._answer(request, answer)
        except Exception as error:  # noqa: BLE001 - the border to the handler
            self._fail(request, error)
        finally:
            _request_id.reset(set_before)

    async def _wait(self, request: Request, answer: Awaitable[bytes]) -> None:
        try:
            self._answer(request, await answer)
        except asyncio.CancelledError:
            self._send(self._responder.fail(self._loop.time(), request.key))
            raise
        except Exception as error:  # noqa: BLE001 - the border to the handler
            self._fail(request, error)

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answer(self, request: Request, answer: object) -> None:
        if not isinstance(answer, bytes | bytearray | memoryview):
            raise TypeError(f"a handler is to return bytes, not {type(answer).__name__}")
        payload = bytes(answer)
        if len(payload) > self._limits.answer:
            raise ValueError(f"an answer of {len(payload)} bytes is above the limit of {self._limits.answer}")
        self._send(self._responder.answer(self._loop.time(), request.key, payload))

    def _fail(self, request: Request, error: Exception) -> None:
        text = f"the handler of reliable requests failed for a request of {request.peer}"
        self._loop.call_exception_handler({"message": text, "exception": error, "protocol": self})
        self._send(self._responder.fail(self._loop.time(), request.key))

    def _expire(self, now: float) -> None:
        self._send(self._responder.expire(now))

    def _send(self, packets: Packets) -> None:
        if self._transport is not None:
            for packet, peer in packets:
                self._transport.sendto(packet, peer)
            self._after()

    def _after(self) -> None:
        self._timer.set(self._responder.deadline)
        if self._finished is not None and not self._responder.unfinished:
            self._finished.set()
