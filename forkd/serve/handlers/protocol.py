"""Hosts handlers that are an `asyncio.Protocol` class or factory: one protocol and one transport a connection."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

from forkd.serve.accept import Tally
from forkd.serve.deadlines import Patience
from forkd.serve.loop import PollLoop
from forkd.serve.transport import Transport

ProtocolFactory = Callable[[], asyncio.BaseProtocol]


class ProtocolServer:
    """Serves accepted connections, each by a new protocol; what `accept` calls for each.

    Args:
        loop: the worker's loop.
        factory: makes a protocol, an `asyncio.Protocol` or `asyncio.BufferedProtocol`.
        tally: the worker's count of connections, told when one ends.
        write_limit: unsent bytes above which a connection whose handler writes again is closed; 0: none.
        listener: what the log calls where the connections come from.
        patience: their deadlines; None where there are none.
        access: whether the end of each is recorded.
    """

    def __init__(
        self,
        loop: PollLoop,
        factory: ProtocolFactory,
        tally: Tally,
        write_limit: int,
        listener: str = "",
        patience: Patience | None = None,
        *,
        access: bool = False,
    ) -> None:
        self._loop = loop
        self._factory = factory
        self.write_limit = write_limit
        self.listener = listener
        self.patience = patience
        self.access = access
        self.closed, self.cut = tally.closed, tally.cut
        self._began = tally.began

    def __call__(self, sock: socket.socket, peer: Any) -> None:
        """Serves one connection and owns its socket."""
        self._began(sock.fileno())
        try:
            transport = Transport(self._loop, sock, self._factory(), peer, self)
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            sock.close()
            self.closed()
            self._loop.call_exception_handler({"message": "The protocol factory failed.", "exception": error})
        else:
            transport.start()
