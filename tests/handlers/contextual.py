"""A handler whose module, setup and factory set context variables, of which decimal's precision is one."""

from __future__ import annotations

import asyncio
import decimal
from contextvars import ContextVar

decimal.getcontext().prec = 5
of_setup: ContextVar[str] = ContextVar("of_setup", default="nothing")
of_factory: ContextVar[str] = ContextVar("of_factory", default="nothing")


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
