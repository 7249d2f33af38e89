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

A handler that heeds none of it loses nothing: its connections are served until the time is up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import asyncio


class _Worker:
    """This process."""

    drains = False
    waiters: ClassVar[set[asyncio.Future[None]]] = set()


def draining() -> bool:
    """Whether this worker drains; from any thread."""
    return _Worker.drains


async def wait_draining() -> None:
    """Returns when this worker has begun to drain, at once if it has already; on any loop of the process."""
    from asyncio import get_running_loop  # noqa: PLC0415 (who awaits has imported it; who merely asks need not)

    waiter = get_running_loop().create_future()
    _Worker.waiters.add(waiter)
    try:
        if not _Worker.drains:  # looked at after the waiter can be seen: `begin` may be called by another thread
            await waiter
    finally:
        _Worker.waiters.discard(waiter)


def begin() -> None:
    """For the worker: it drains from now on. Wakes all who wait for that."""
    _Worker.drains = True
    for loop in {waiter.get_loop() for waiter in list(_Worker.waiters)}:
        loop.call_soon_threadsafe(_wake, loop)


def _wake(loop: asyncio.AbstractEventLoop) -> None:
    for waiter in list(_Worker.waiters):
        if waiter.get_loop() is loop and not waiter.done():
            waiter.set_result(None)
