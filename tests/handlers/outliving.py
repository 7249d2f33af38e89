"""Handlers with code that goes its own way: tasks that outlive their connections, signals that are taken from forkd."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable

from forkd.builtin import Echo
from forkd.drain import wait_draining

log = logging.getLogger("outliving")

tasks: set[asyncio.Task[None]] = set()


class Storing(asyncio.Protocol):
    """Has work to do when its client has gone, until the worker drains and a moment longer; after `ever` for ever."""

    said = b""

    def data_received(self, data: bytes) -> None:
        self.said += data

    def connection_lost(self, error: Exception | None) -> None:
        tasks.add(asyncio.get_running_loop().create_task(self.store()))

    async def store(self) -> None:
        log.info("begun")
        await wait_draining()
        await asyncio.sleep(3600 if self.said == b"ever" else 0.1)
        log.info("stored %s", self.said.decode())


def ignore() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def default() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def own() -> None:
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, log.info, "the handler's own")


def stop() -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, loop.stop)


class Taking(Echo):
    """Takes the signal to drain away, as its client says, then echoes."""

    def data_received(self, data: bytes) -> None:
        take: Callable[[], None] | None = globals().get(data.decode())
        if take is not None:
            take()
        super().data_received(data)
