"""The end of a process that serves: what is still open is asked to end, closed, or cut, within bounded time."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from forkd.serve.loop import PollLoop
from forkd.serve.transport import Transport

#: Seconds that closed connections have to send what is unsent, and tasks to see to their cancellation, at the very end.
LAST_WORDS = 0.5


def transports_of(loop: PollLoop) -> list[Transport]:
    """The connections that are open on a loop."""
    owners = [getattr(ready, "__self__", None) for ready in loop.selector.served.values()]
    return [owner for owner in owners if isinstance(owner, Transport)]


def clean_up(loop: PollLoop, conversations: Collection[asyncio.Task[None]]) -> None:
    """After the loop has stopped: ends what still runs on it.

    Args:
        loop: the loop.
        conversations: the tasks of the streams handlers that have not returned.
    """
    for transport in transports_of(loop):
        transport.abort()
    if conversations:
        loop.run_until_complete(asyncio.wait(list(conversations), timeout=LAST_WORDS))
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=LAST_WORDS))
    loop.run_until_complete(asyncio.wait_for(loop.shutdown_asyncgens(), LAST_WORDS))
