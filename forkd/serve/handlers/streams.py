"""Hosts handlers that are `async def handle(reader, writer)`: asyncio's own streams, over forkd's transport."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from forkd.serve.handlers.protocol import ProtocolFactory

StreamsHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


def streams_factory(
    handle: StreamsHandler, loop: asyncio.AbstractEventLoop, running: set[asyncio.Task[None]]
) -> ProtocolFactory:
    """A protocol factory for a streams coroutine.

    The connection lives as long as the coroutine: when that returns, what was written is sent and the connection
    closed; when it raises, the connection is aborted.

    Args:
        handle: the coroutine function.
        loop: the worker's loop.
        running: holds the task of each coroutine that has not returned.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 (for the type checker)
        running.add(task)
        try:
            await handle(reader, writer)
        except asyncio.CancelledError:
            # The worker ends; this is the task's outermost function, so there is nobody to pass the cancellation on to.
            writer.transport.abort()
        except Exception as error:  # noqa: BLE001 (the handler's border)
            # That the client went away is no error. A connection of the handler's own may fail in the same way.
            if not (isinstance(error, ConnectionError) and writer.transport.is_closing()):
                loop.call_exception_handler(
                    {"message": "The streams handler failed.", "exception": error, "transport": writer.transport}
                )
            writer.transport.abort()
        finally:
            running.discard(task)
            writer.close()

    def factory() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(loop=loop), serve, loop=loop)

    return factory
