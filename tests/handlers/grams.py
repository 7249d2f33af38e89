"""Datagram handlers: each answers with what a test wants to know of who answers."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Any


class Who(asyncio.DatagramProtocol):
    """Answers with its worker's pid and what it was sent."""

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(b"%d %s" % (os.getpid(), data), addr)


class Trouble(Who):
    """Raises on `raise`, closes its socket on `close`; stands still on `sleep SECONDS`; tells of `shutdown`."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        word, _, rest = data.partition(b" ")
        if word == b"raise":
            raise ValueError("as asked")
        if word == b"close":
            self.transport.close()
            return
        if word == b"sleep":
            time.sleep(float(rest))
        super().datagram_received(data, addr)


class Late(Who):
    """Answers from a task that waits until the worker drains, and a moment more."""

    def __init__(self) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.drains = asyncio.Event()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        task = asyncio.ensure_future(self.answer(data, addr))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        super().datagram_received(b"taken", addr)

    async def answer(self, data: bytes, addr: Any) -> None:
        await self.drains.wait()
        await asyncio.sleep(0.05)
        super().datagram_received(b"late " + data, addr)

    def shutdown(self) -> None:
        self.drains.set()


class Talk(asyncio.DatagramProtocol):
    """For one client: answers, raises on `raise`, and ends on `bye`."""

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self.transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        if data == b"raise":
            raise ValueError("as asked")
        self.transport.sendto(b"heard " + data)
        if data == b"bye":
            self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        logging.getLogger("grams").info("lost by %s", type(error).__name__)


class Unmade(asyncio.DatagramProtocol):
    """Can't begin."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        raise RuntimeError("no database")


def factory() -> Who:
    return Who()


class From(Who):
    """Answers with the address that the datagram came from, and what it was."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.transport.sendto(f"{addr[0]}:{addr[1]} ".encode() + data, addr)


class Push(Who):
    """Sends as many datagrams of 1,200 bytes to each of some hosts as it is told: `COUNT HOST...`; then answers."""

    def datagram_received(self, data: bytes, addr: Any) -> None:
        count, *hosts = data.split()
        for host in hosts:
            for _ in range(int(count)):
                self.transport.sendto(bytes(1200), (host.decode(), 9))
        super().datagram_received(data, addr)
