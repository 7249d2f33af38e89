"""A handler whose module, setup and factory set context variables, of which decimal's precision is one."""

from __future__ import annotations

import asyncio
import decimal
import socket
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

decimal.getcontext().prec = 5
of_setup: ContextVar[str] = ContextVar("of_setup", default="nothing")
of_factory: ContextVar[str] = ContextVar("of_factory", default="nothing")
of_client: ContextVar[str] = ContextVar("of_client", default="nobody")


async def prepare() -> None:
    """A setup."""
    await asyncio.sleep(0)
    of_setup.set("setup")


def make() -> type[asyncio.Protocol]:
    """A factory."""
    of_factory.set("factory")
    return Tells


class Tells(asyncio.Protocol):
    """Tells what it sees of them."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        third = decimal.Decimal(1) / 3
        transport.write(f"{third} {of_setup.get()} {of_factory.get()}".encode())
        transport.close()


def make_blocking() -> Callable[[socket.socket, Any], None]:
    """A factory."""
    of_factory.set("factory")
    return tell


def tell(sock: socket.socket, address: Any) -> None:
    """Tells the same, and which client was noted; notes this one."""
    third = decimal.Decimal(1) / 3
    sock.sendall(f"{third} {of_setup.get()} {of_factory.get()} {of_client.get()}".encode())
    of_client.set("another client")
