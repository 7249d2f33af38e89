"""A handler that leaves a descriptor open which programs would inherit, as a library in C may."""

from __future__ import annotations

import asyncio
import os


class Leaks(asyncio.Protocol):
    """Opens one for each client, and says its number."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        descriptor = os.open("/dev/null", os.O_RDONLY)
        os.set_inheritable(descriptor, True)
        transport.write(b"%d\n" % descriptor)
