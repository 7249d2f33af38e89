"""The poll loop: asyncio's own, over a selector that serves forkd's descriptors itself.

asyncio takes the selector that it is given, so timers, tasks and every asyncio library work as ever. But forkd's
listeners and connections do not go through its generic path: inside `select` their callbacks are called straight from
the list that epoll returned, again and again, until there is something that asyncio must see to: a descriptor of its
own, a callback that was scheduled, a timer. What is called there must not raise: what does ends the worker.
"""

from __future__ import annotations

import asyncio
import logging
import select
import selectors
from asyncio import Handle, TimerHandle
from collections.abc import Callable, Collection
from contextvars import Context
from time import monotonic
from typing import Any

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ERR = select.EPOLLERR
HUP = select.EPOLLHUP
RDHUP = select.EPOLLRDHUP
#: Each change reported once, not for as long as it lasts: a hang-up lasts for ever (epoll(7)).
EDGE = select.EPOLLET
#: Readable, for one waiter alone of those that wait on the same listener (epoll_ctl(2), EPOLLEXCLUSIVE).
IN_EXCLUSIVE = select.EPOLLIN | select.EPOLLEXCLUSIVE

#: Called with epoll's event mask when a descriptor is ready.
Ready = Callable[[int], object]


class PollSelector(selectors.EpollSelector):
    """A selector for asyncio, with descriptors beside asyncio's that it serves itself.

    Attributes:
        served: what to call for each of forkd's descriptors; it may be there while epoll does not watch it.
        listeners: as `served`, but called before all of those: the client that woke this worker alone should not wait
            for its work for others.
        epoll: the epoll object (epoll(7)); `register`, `modify` and `unregister` it for what is in `served` only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.served: dict[int, Ready] = {}
        self.listeners: dict[int, Ready] = {}
        self.epoll: select.epoll = self._selector  # type: ignore[attr-defined]
        self._scheduled: Collection[Handle] = ()
        self._woken = False

    def bind(self, scheduled: Collection[Handle]) -> None:
        """Tells what asyncio calls next: while it is not empty, `select` returns after each round."""
        self._scheduled = scheduled

    def wake(self) -> None:
        """Has `select` return after this round: the time that it was given is out of date."""
        self._woken = True

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Serves forkd's descriptors until asyncio is wanted, or `timeout` seconds are over; asyncio's ready ones."""
        poll, served, scheduled = self.epoll.poll, self.served, self._scheduled
        get_served, get_key = served.get, self._fd_to_key.get  # type: ignore[attr-defined]
        for_asyncio: list[tuple[selectors.SelectorKey, int]] = []
        wait = -1.0 if timeout is None else max(timeout, 0.0)
        until = monotonic() + wait
        while True:
            events = poll(wait)
            if others := [event for event in events if event[0] not in served]:
                for fd, mask in others:
                    if (key := get_key(fd)) is not None:
                        for_asyncio.append((key, _asyncio_mask(mask) & key.events))
                for fd, mask in others:
                    if (ready := self.listeners.get(fd)) is not None:
                        ready(mask)
            for fd, mask in events:
                if (ready := get_served(fd)) is not None:
                    ready(mask)
            if for_asyncio or scheduled or self._woken or not events or wait == 0:
                self._woken = False
                # What was served in between may have changed what asyncio watches. A descriptor that it watches anew
                # and that is ready will be reported again.
                return [(key, mask) for key, mask in for_asyncio if get_key(key.fd) is key]
            if timeout is not None:
                wait = until - monotonic()
                if wait <= 0:
                    return []


def _asyncio_mask(mask: int) -> int:
    """epoll's mask as `selectors` has it: what is neither plain reading nor plain writing (HUP, ERR) is both."""
    return (selectors.EVENT_WRITE if mask & ~IN else 0) | (selectors.EVENT_READ if mask & ~OUT else 0)


class _About(logging.Filter):
    """Says in asyncio's own records of failures which connection they are about."""

    fields: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.update(self.fields)
        return True


_ABOUT = _About()
logging.getLogger("asyncio").addFilter(_ABOUT)


class PollLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop over a `PollSelector`.

    Attributes:
        on_error: called for each exception that is reported to the loop: those that came out of handlers.
    """

    def __init__(self) -> None:
        self.on_error: Callable[[], None] = lambda: None
        self.selector = PollSelector()
        super().__init__(self.selector)
        # asyncio keeps one deque of callbacks for the loop's life. Looking whether it is empty costs nothing;
        # overriding call_soon to be told would cost every task and future a call.
        self.selector.bind(self._ready)  # type: ignore[attr-defined]

    def call_at(  # type: ignore[override]  # the stub's variadic generic is no wider
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        """As asyncio's; also ends the selector's wait, which was reckoned without this timer."""
        self.selector.wake()
        return super().call_at(when, callback, *args, context=context)

    def stop(self) -> None:
        """As asyncio's; also ends the selector's wait."""
        self.selector.wake()
        super().stop()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """As asyncio's; also counts."""
        if "exception" in context:
            self.on_error()
        about = getattr(context.get("transport"), "about", dict)
        _ABOUT.fields = about()
        try:
            super().call_exception_handler(context)
        finally:
            _ABOUT.fields = {}
