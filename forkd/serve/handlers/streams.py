"""Hosts handlers that are `async def handle(reader, writer)`: asyncio's own streams, over forkd's transport."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from forkd.serve.handlers.protocol import ProtocolFactory

StreamsHandler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[object]]


def streams_factory(handle: StreamsHandler, loop: asyncio.AbstractEventLoop) -> ProtocolFactory:
    """A protocol factory for a streams coroutine.

    The connection lives as long as the coroutine: when that returns, what was written is sent and the connection
    closed; when it raises, the connection is aborted.
    """

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            # The client went away, which a handler need not care about; or the worker ends, and this being the task's
            # outermost function there is nobody to pass the cancellation on to.
            writer.transport.abort()
        except Exception as error:  # noqa: BLE001 (the handler's border)
            loop.call_exception_handler(
                {"message": "The streams handler failed.", "exception": error, "transport": writer.transport}
            )
            writer.transport.abort()
        finally:
            writer.close()

    def factory() -> asyncio.StreamReaderProtocol:
        return asyncio.StreamReaderProtocol(asyncio.StreamReader(loop=loop), serve, loop=loop)

    return factory
