"""A handler with hooks, all of which write what they do, and where, into the file `journal`."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from forkd import worker
from forkd.drain import draining


def note(event: str) -> None:
    """Writes a line."""
    inside = asyncio.get_running_loop() is worker.loop
    with Path("journal").open("a") as file:
        file.write(
            f"{worker.name} {worker.generation} {worker.slot} {event}{'' if inside else ' outside of the loop'}\n"
        )


note("import")
pools: list[str] = []
ticking: list[asyncio.Task[None]] = []


async def open_daemon() -> None:
    """The daemon's."""
    await asyncio.sleep(0)
    note("open daemon")
    pools.append("daemon")


def open_listener() -> None:
    """A listener's, which needs the daemon's."""
    note(f"open listener after {pools}")
    pools.append("listener")


async def close_listener() -> None:
    """What undoes that."""
    await asyncio.sleep(0)
    pools.remove("listener")
    note(f"close listener before {pools}, draining {draining()}")


def close_daemon() -> None:
    """What undoes that."""
    pools.remove("daemon")
    note("close daemon")


def make() -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """A factory that needs both."""
    note(f"make with {pools}")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{worker.slot} {' '.join(pools)}\n".encode())
        await reader.read()
        note(f"client gone, {len(pools)} pools")

    return serve


async def fail() -> None:
    """Raises, in a function of its own."""
    await asyncio.sleep(0)
    raise ConnectionRefusedError("no database at 192.0.2.1")


def leave() -> None:
    """Wants to end the process."""
    raise SystemExit(7)


async def cancel() -> None:
    """Cancels the task that it runs in."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def wait() -> None:
    """Never returns."""
    note("wait")
    try:
        await asyncio.Event().wait()
    finally:
        note("waited enough")


async def start_ticking() -> None:
    """Leaves an eternal task."""

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.1)

    ticking.append(asyncio.create_task(tick()))


async def stop_ticking() -> None:
    """Notes whether that still runs, and ends it."""
    note(f"ticking {not ticking[0].done()}")
    ticking[0].cancel()


def block() -> None:
    """Never returns, and holds up its loop."""
    note("block")
    while True:
        signal.pause()


def block_a_while() -> None:
    """Holds up its loop for some time."""
    time.sleep(1.5)
    note("blocked a while")


async def stop_the_master() -> None:
    """Has the master stop while it waits."""
    os.kill(os.getppid(), signal.SIGTERM)
    await wait()


async def generate() -> object:
    """Both halves in one, as other servers have it."""
    yield


async def wants(argument: int) -> None:
    """Can't be called as a hook."""


number = 5
