"""The datagram sockets of a process: served from its beginning, and brought to their end when it drains.

Datagrams are no connections, so nothing says when a handler is done with one. Its tasks do: a process that drains reads
what lies in its queues, tells its protocols (`shutdown()`), and lingers while tasks run on its loop, its sockets open
for what they send. Whoever ends it sets the bound.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import traceback
from collections.abc import Callable
from typing import Any

from forkd.config.listener import Listener
from forkd.errors import HandlerError
from forkd.serve.datagram import DatagramTransport
from forkd.serve.datagram_admission import DatagramAdmission
from forkd.serve.handlers.datagram import DatagramServer
from forkd.serve.handlers.load import Handler
from forkd.serve.loop import IN, IN_EXCLUSIVE, PollLoop
from forkd.serve.recent import Recent
from forkd.system.bound import BoundListener
from forkd.system.counts import Ledger
from forkd.system.scoreboard import Row

log = logging.getLogger("forkd.datagram")


class Datagrams:
    """All of them.

    Args:
        loop: the process's loop.
        row: where datagrams are counted.
        on_lost: told when the handler has closed a socket of its own accord, with the listener's name.
    """

    def __init__(self, loop: PollLoop, row: Row, on_lost: Callable[[str], None]) -> None:
        self._loop = loop
        self._row = row
        self._on_lost = on_lost
        self._transports: list[DatagramTransport] = []
        self._reading = 0  # how many have not read their queue to its end yet, of a process that drains
        self._ending = False
        self._again: Callable[[], None] = lambda: None

    def serve(self, bound: BoundListener, handler: Handler, ledger: Ledger | None = None) -> None:
        """Serves all sockets of a listener.

        Args:
            bound: the listener.
            handler: what serves it.
            ledger: what this worker counts with the others; None: nothing is asked of who sends.

        Raises:
            HandlerError: the protocol's factory or its `connection_made` has raised.
        """
        # Of a socket that workers share, one alone is woken for a datagram.
        more: dict[str, Any] = {"watch": IN if bound.listener.address.scheme == "udp" else IN_EXCLUSIVE}
        if ledger is not None:
            admission = DatagramAdmission(bound, self._loop, ledger, self._row)
            more |= {"admit": admission.admit, "unwrap": admission.unwrap}
        try:
            for sock in bound.sockets:
                self.serve_socket(sock, bound.listener, handler, str(bound.address), **more)
        except Exception as error:  # noqa: BLE001 (the handler's border)
            reason = f"{bound.listener.handler}: {traceback.format_exception_only(error)[-1].strip()}"
            raise HandlerError(f"{reason}, when it was to serve {bound.address}", traceback.format_exc()) from None

    def serve_socket(
        self, sock: socket.socket, listener: Listener, handler: Handler, name: str, **more: Any
    ) -> DatagramTransport:
        """Serves one socket; `more` as of `DatagramTransport`. Raises what the handler raises."""
        limit = listener.limits.write_buffer
        server = DatagramServer(self._loop, handler.target, self._row.cells, limit, name, self._lost)
        self._transports.append(server.serve(sock, **more))
        return self._transports[-1]

    def beat(self) -> None:
        """At each heartbeat."""
        for transport in self._transports:
            transport.beat()

    def recent(self) -> list[tuple[str, list[Recent]]]:
        """The latest peers of each socket, with the listener's name."""
        return [(transport.about()["listener"], transport.recent()) for transport in self._transports]

    def _lost(self, transport: DatagramTransport) -> None:
        if transport not in self._transports:  # in its very beginning
            return
        self._transports.remove(transport)
        if self._ending:
            self._again()
        else:
            self._on_lost(transport.about()["listener"])

    # The end

    def drain(self, again: Callable[[], None]) -> None:
        """Reads what lies in the queues, and no more; `again` is called whenever `settled` may have come true."""
        self._ending, self._again = True, again
        self._reading = len(self._transports)
        for transport in self._transports:
            transport.finish(self._finished)

    def _finished(self) -> None:
        self._reading -= 1
        self._again()

    def settled(self) -> bool:
        """Whether everything is done: the queues read, no task left, all sent, the sockets closed."""
        if not self._transports:
            return True
        open_ones = [transport for transport in self._transports if not transport.is_closing()]
        if open_ones and self._reading > len(self._transports) - len(open_ones):
            return False
        if tasks := asyncio.all_tasks(self._loop):
            next(iter(tasks)).add_done_callback(lambda _: self._again())
            return False
        self.close()
        return False

    def close(self) -> None:
        """Closes the sockets when all is sent."""
        self._ending = True
        for transport in list(self._transports):
            transport.close()

    def abort(self) -> None:
        """Closes them."""
        self._ending, self._again = True, lambda: None
        for transport in list(self._transports):
            transport.abort()
