"""Whether this worker drains, for handlers that want to know: it takes no more clients, and ends when those that are
here have gone, or when `drain_timeout` is over.

A protocol need not ask. When the worker begins to drain, each open connection's protocol that has a method `shutdown()`
has it called, in its connection's context; it should end the connection as soon as it suits. For all else there is
`draining()`, and `transport.get_extra_info("draining")`, which says the same. A streams handler waits for its client or
for the drain, whichever comes first:

    drain = asyncio.ensure_future(wait_draining())
    try:
        while not drain.done():
            read = asyncio.ensure_future(reader.readline())
            await asyncio.wait({read, drain}, return_when=asyncio.FIRST_COMPLETED)
            if not read.done():  # the client has nothing to say, and the worker wants to end
                read.cancel()
                writer.write(b"goodbye")
            elif line := read.result():
                writer.write(line)
            else:
                break
    finally:
        drain.cancel()

A handler that uses none of this loses nothing: its connections are served until the time is up.
"""

from __future__ import annotations

from contextvars import copy_context
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from contextvars import Context


class _Waiter:
    """What waits for the drain.

    Args:
        future: gets its result then.
        context: in which it waits.
    """

    def __init__(self, future: asyncio.Future[None], context: Context) -> None:
        self.future = future
        self.context = context

    def wake(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


class _Worker:
    """This process."""

    drains = False
    waiters: ClassVar[set[_Waiter]] = set()


def draining() -> bool:
    """Whether this worker drains; from any thread."""
    return _Worker.drains


async def wait_draining() -> None:
    """Returns when this worker has begun to drain, at once if it has already; on any loop of the process. What serves a
    connection has its turn within `drain_spread`.
    """
    from asyncio import get_running_loop  # noqa: PLC0415 (a caller that awaits has imported it; one that merely asks need not)

    waiter = _Waiter(get_running_loop().create_future(), copy_context())
    _Worker.waiters.add(waiter)
    try:
        if not _Worker.drains:  # looked at after the waiter can be seen: `begin` may be called by another thread
            await waiter.future
    finally:
        _Worker.waiters.discard(waiter)


def is_awaited() -> bool:
    """For the worker: whether anything waits for its drain."""
    return bool(_Worker.waiters)


def begin(delay_of: Callable[[Context], float] = lambda context: 0.0) -> None:
    """For the worker: it drains from now on. Wakes all that wait for it.

    Args:
        delay_of: for how many seconds what waits in a context is to wait on.
    """
    _Worker.drains = True
    for loop in {waiter.future.get_loop() for waiter in list(_Worker.waiters)}:
        loop.call_soon_threadsafe(_wake_all, loop, delay_of)


def _wake_all(loop: asyncio.AbstractEventLoop, delay_of: Callable[[Context], float]) -> None:
    for waiter in list(_Worker.waiters):
        if waiter.future.get_loop() is not loop:
            continue
        if delay := delay_of(waiter.context):
            loop.call_later(delay, waiter.wake)
        else:
            waiter.wake()
