"""One timer of an event loop for a state machine's deadline, moved as rarely as can be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waking:
    """Calls back when a deadline has come; who puts it off pays nothing, since an early call only asks again.

    Args:
        loop: the running loop.
        expire: called with the time; afterwards `at` is to be told the next deadline.
    """

    __slots__ = ("_expire", "_handle", "_loop")

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[float], None]) -> None:
        self._loop, self._expire = loop, expire
        self._handle: asyncio.TimerHandle | None = None

    def at(self, deadline: float | None) -> None:
        """Has the callback called no later than that."""
        if deadline is None or (self._handle is not None and self._handle.when() <= deadline):
            return
        self.cancel()
        self._handle = self._loop.call_at(deadline, self._call)

    def cancel(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _call(self) -> None:
        self._handle = None
        self._expire(self._loop.time())
