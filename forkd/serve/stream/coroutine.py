"""Handlers that are `async def handle(reader, writer)`: asyncio's own streams, over forkd's transport.

The classes here are asyncio's, with the plain case of what each request does written out: what is read is there, or
comes with the next event, and what is written is sent at once. All else is left to asyncio's methods. They use its
fields, which have had these names since asyncio has streams; asyncio's own tests are run over them, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

from forkd.serve.loop import PollLoop

StreamsHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]

#: Bytes that a line may have at most: asyncio's default.
LIMIT = 64 * 1024

#: Seconds for which the task of one connection runs before one of its reads lets the others have their turn.
TURN = 0.0005


def streams_factory(
    handle: StreamsHandler, loop: PollLoop, handler_tasks: set[asyncio.Task[None]]
) -> Callable[[], asyncio.StreamReaderProtocol]:
    """A protocol factory for a streams coroutine.

    The connection lives as long as the coroutine: when that returns, what was written is sent and the connection
    closed; when it raises, the connection is aborted.

    Args:
        handle: the coroutine function.
        loop: the worker's loop.
        handler_tasks: holds the task of each coroutine that has not returned.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (for the type checker)
        handler_tasks.add(task)
        try:
            await handle(reader, writer)
        except asyncio.CancelledError:
            # The worker ends; this is the task's outermost function, so the cancellation goes no further.
            writer.transport.abort()
        except BaseException as error:  # noqa: BLE001 (the handler's border: it may call sys.exit)
            # That the client went away is no error. A connection of the handler's own may fail in the same way.
            if not (isinstance(error, ConnectionError) and writer.transport.is_closing()):
                loop.call_exception_handler(
                    {"message": "The streams handler failed.", "exception": error, "transport": writer.transport}
                )
            writer.transport.abort()
        finally:
            handler_tasks.discard(task)
            writer.close()

    def factory() -> asyncio.StreamReaderProtocol:
        return StreamsProtocol(StreamReader(loop=loop), serve, loop=loop)

    return factory


class StreamsProtocol(asyncio.StreamReaderProtocol):
    """asyncio's, whose handler is a coroutine function and gets a `StreamWriter`."""

    _loop: PollLoop

    def __init__(self, reader: StreamReader, handler: StreamsHandler, loop: PollLoop) -> None:
        super().__init__(reader, handler, loop=loop)  # type: ignore[arg-type]
        self.data_received = reader.feed_data  # type: ignore[method-assign]  # in one call

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Starts the handler."""
        mine: Any = self
        reader = mine._stream_reader
        reader.set_transport(transport)
        mine._transport = transport
        mine._over_ssl = transport.get_extra_info("sslcontext") is not None
        mine._stream_writer = writer = StreamWriter(transport, self, reader, self._loop)  # type: ignore[arg-type]
        mine._task = self._loop.create_task(mine._client_connected_cb(reader, writer))
        mine._strong_reader = None  # from now on the handler has it

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio's."""
        super().connection_lost(exc)
        del self.data_received  # which keeps the reader


class StreamReader(asyncio.StreamReader):
    """asyncio's, whose reads let the others of the loop have their turn when the task has run for some time.

    asyncio's do not wait while there is something to read, so that a client which sends thousands of short lines at
    once would be served with all of them before anyone else is.

    Args:
        limit: as of asyncio's.
        loop: the worker's.
    """

    _buffer: bytearray
    _eof: bool
    _exception: BaseException | None
    _limit: int
    _paused: bool
    _waiter: asyncio.Future[None] | None

    def __init__(self, limit: int = LIMIT, loop: PollLoop | None = None) -> None:
        super().__init__(limit, loop)
        self._poll_loop: PollLoop = self._loop  # type: ignore[attr-defined]

    def feed_data(self, data: Any) -> None:
        """See asyncio's."""
        buffer = self._buffer
        if not data or self._eof or len(buffer) + len(data) > self._limit:
            super().feed_data(data)
            return
        buffer += data
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.cancelled():
                waiter.set_result(None)

    def _wait_for_data(self, name: str) -> asyncio.Future[None]:
        """What a read awaits; asyncio's own methods call it. One that was cancelled is in nobody's way."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            raise RuntimeError(f"{name}() called while another coroutine is already waiting for incoming data")
        assert not self._eof, "_wait_for_data after EOF"  # noqa: S101 (as asyncio's)
        if self._paused:  # else what is waited for would never come
            self._paused = False
            self._transport.resume_reading()  # type: ignore[attr-defined]
        self._waiter = waiter = asyncio.Future(loop=self._poll_loop)
        return waiter

    async def read(self, n: int = -1) -> bytes:
        """See asyncio's."""
        if monotonic() - self._poll_loop.step_began >= TURN:
            await asyncio.sleep(0)
        if n <= 0 or self._exception is not None:
            return await super().read(n)
        buffer = self._buffer
        if not buffer and not self._eof:
            await self._wait_for_data("read")
        if len(buffer) > n or self._paused:
            return self._take(min(n, len(buffer)))
        data = bytes(buffer)
        buffer.clear()
        return data

    async def readexactly(self, n: int) -> bytes:
        """See asyncio's."""
        if monotonic() - self._poll_loop.step_began >= TURN:
            await asyncio.sleep(0)
        if n <= 0 or self._exception is not None:
            return await super().readexactly(n)
        buffer = self._buffer
        if not buffer and not self._eof:
            await self._wait_for_data("readexactly")
        return self._take(n) if len(buffer) >= n else await super().readexactly(n)

    async def readuntil(self, separator: Any = b"\n") -> bytes:
        """See asyncio's."""
        if monotonic() - self._poll_loop.step_began >= TURN:
            await asyncio.sleep(0)
        end = await self._find(separator, "readuntil")
        return self._take(end) if end else await super().readuntil(separator)

    async def readline(self) -> bytes:
        """See asyncio's."""
        if monotonic() - self._poll_loop.step_began >= TURN:
            await asyncio.sleep(0)
        end = await self._find(b"\n", "readline")
        return self._take(end) if end else await super().readline()

    async def _find(self, separator: Any, name: str) -> int:
        """Where the first message ends that is there, or comes at once; 0: that is not as plain as this."""
        if separator.__class__ is not bytes or not separator or self._exception is not None:
            return 0
        buffer = self._buffer
        if not buffer and not self._eof:
            await self._wait_for_data(name)
        start: int = buffer.find(separator)
        return start + len(separator) if 0 <= start <= self._limit else 0

    def _take(self, count: int) -> bytes:
        """So many bytes of what is there."""
        buffer = self._buffer
        if count == len(buffer):
            data = bytes(buffer)
            buffer.clear()
        else:
            data = bytes(memoryview(buffer)[:count])
            del buffer[:count]
        if self._paused:
            self._maybe_resume_transport()  # type: ignore[attr-defined]
        return data


class StreamWriter(asyncio.StreamWriter):
    """asyncio's, whose `drain` has nothing to wait for in the plain case."""

    async def drain(self) -> None:
        """See asyncio's."""
        mine: Any = self
        protocol = mine._protocol
        is_plain = mine._reader._exception is None and not (protocol._paused or protocol._connection_lost)
        if not is_plain or mine._transport.is_closing():
            await super().drain()
