"""The deadlines of the one client that a process serves by datagrams (`forkd once`): idle and lifetime.

A pool's datagram sockets have none: what has neither beginning nor end is never late.
"""

from __future__ import annotations

from math import inf

from forkd.config.listener import Listener
from forkd.serve.datagram import DatagramTransport
from forkd.serve.deadlines import LOOKS, Deadlines, Patience, Sighting, explained
from forkd.serve.loop import PollLoop


class Vigil:
    """Ends a transport when its client's time is over.

    Args:
        transport: connected to the client.
        listener: its settings.
        loop: the process's loop.
    """

    def __init__(self, transport: DatagramTransport, listener: Listener, loop: PollLoop) -> None:
        self.due = 0.0
        self._transport = transport
        self._opened = loop.time()
        deadlines = Deadlines(loop)
        self._patience = Patience(listener, deadlines)
        if self._patience.first:
            deadlines.watch(self, self._opened + self._patience.first / LOOKS)

    def look(self, now: float) -> float:
        """As `deadlines.Watched`."""
        if self._transport.is_closing():
            return 0.0
        # Datagrams are counted when somebody asks, and are as old as that; so it is asked more often than need be.
        last = max((one.last for one in self._transport.recent()), default=self._opened)
        seen = Sighting(self._opened, spoke=True, heard=last, told=last)
        when, kind = self._patience.end(seen)
        if now >= when:
            self._transport.end(explained(kind, seen, now))
            return 0.0
        return 0.0 if when == inf else min(when, now + self._patience.first / LOOKS)

    def __lt__(self, other: object) -> bool:
        return id(self) < id(other)
