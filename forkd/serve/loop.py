"""The poll loop: asyncio's own, over a selector that serves forkd's descriptors itself.

asyncio takes the selector that it is given, so timers, tasks and every asyncio library work as ever. But forkd's
listeners and connections do not go through its generic path: inside `select` their callbacks are called straight from
the list that epoll returned, again and again, until there is something that asyncio must see to: a descriptor of its
own, a callback that was scheduled, a timer. What is called there must not raise: what does ends the worker.

What a connection's handler has scheduled runs before the next event of that connection, as with asyncio.

No client holds up the others by much work of small pieces. A turn takes events for a slice of time, then runs callbacks
for another; those that are left come first in the next turn, after a poll. While there are such, the loop tells its
owner in each turn that it goes on, since the owner's timers may wait behind them.

`sys.exit()` in a handler's task or callback ends the connection that it belongs to (`CONNECTION`), not the process.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import selectors
import signal
from asyncio import Handle, TimerHandle
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from contextvars import Context, ContextVar, copy_context
from functools import cache
from heapq import heapify, heappop
from itertools import islice
from math import isnan
from time import monotonic
from typing import Any, Protocol
from weakref import WeakSet

from forkd.compiled import extension
from forkd.errors import HandlerError

#: The compiled twin of what each event and each request costs; None where it is not to be used.
FAST = extension("forkd.serve._fast")

IN = select.EPOLLIN
OUT = select.EPOLLOUT
ERR = select.EPOLLERR
HUP = select.EPOLLHUP
RDHUP = select.EPOLLRDHUP
#: Each change reported once, not for as long as it lasts: a hang-up lasts for ever (epoll(7)).
EDGE = select.EPOLLET
#: What may be reported so.
ONCE = OUT | RDHUP | HUP | ERR
#: Readable, for one waiter alone of those that wait on the same listener (epoll_ctl(2), EPOLLEXCLUSIVE).
IN_EXCLUSIVE = select.EPOLLIN | select.EPOLLEXCLUSIVE

#: Seconds of work after which the rest waits for the next turn.
SLICE = 0.01

#: Events that are served without a look at the clock between them, which would cost each of them a hundredth.
AT_ONCE = 4

#: Seconds that a turn waits at most: epoll_wait(2) takes milliseconds as a C integer.
_LONGEST_WAIT = 86_400.0

#: Timers beyond which those that were cancelled are thrown away when they are the most.
_MANY_TIMERS = 100

#: Tasks that a line of the log names, at most.
_NAMED = 5

_EXITED = "A task or callback of the handler has called sys.exit()."

#: Called with epoll's event mask when a descriptor is ready.
Ready = Callable[[int], object]


class Connection(Protocol):
    """What a handler's tasks and callbacks belong to."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more comes of it."""

    def handler_failed(self, error: BaseException, message: str) -> None:
        """Reports what the handler has raised, and ends the connection."""


#: In whose context a task or callback of a handler runs; called, it gives None when that is gone.
CONNECTION: ContextVar[Callable[[], Connection | None]] = ContextVar("CONNECTION")


class _ConnectionFields(logging.Filter):
    """Adds to asyncio's own records of failures which connection they are about."""

    fields: dict[str, str] = {}  # noqa: RUF012 (replaced, never changed)

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__.update(self.fields)
        return True


_CONNECTION_FIELDS = _ConnectionFields()
logging.getLogger("asyncio").addFilter(_CONNECTION_FIELDS)


class PollSelector(selectors.EpollSelector):
    """A selector for asyncio, with descriptors beside asyncio's that it serves itself.

    Attributes:
        served: what to call for each of forkd's descriptors; it may be there while epoll does not watch it.
        listeners: as `served`, but called before all of those: the client that woke this worker alone should not wait
            for its work for others.
        left: events of a round that was cut short, which are first in the next.
        epoll: the epoll object (epoll(7)); `register`, `modify` and `unregister` it for what is in `served` only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.served = self._new_table()
        self.listeners: dict[int, Ready] = {}
        self.epoll: select.epoll = self._selector  # type: ignore[attr-defined]
        self._scheduled: deque[Handle] = deque()
        self.left: list[tuple[int, int]] = []
        self._woken = False
        #: By its descriptor: the callback that a connection's event waits for.
        self._awaited: dict[int, Handle] = {}

    def _new_table(self) -> MutableMapping[int, Ready]:
        return {}

    def close_in_child(self) -> None:
        """In a forked process: closes what it shares with its parent."""
        self.served.clear()
        self.listeners.clear()
        self.epoll.close()

    def bind(self, scheduled: deque[Handle]) -> None:
        """Tells what asyncio calls next: while it is not empty, `select` returns after each round."""
        self._scheduled = scheduled

    def wake(self) -> None:
        """Has `select` return after this round: the time that it was given is out of date."""
        self._woken = True

    def requeue(self, fd: int) -> None:
        """Has a listener leave its wait queue, and join it again at the end."""
        self.epoll.unregister(fd)
        self.epoll.register(fd, IN_EXCLUSIVE)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Serves forkd's descriptors until asyncio is wanted, or `timeout` seconds are over; asyncio's ready ones."""
        poll, get_served, scheduled = self.epoll.poll, self.served.get, self._scheduled
        get_key = self._fd_to_key.get  # type: ignore[attr-defined]
        for_asyncio: list[tuple[selectors.SelectorKey, int]] = []
        wait = 0.0 if self.left else -1.0 if timeout is None else max(timeout, 0.0)
        until = monotonic() + wait
        while True:
            events = poll(wait)
            if self.left:
                events = self._in_turn(events)
            if events and (scheduled or self._awaited):
                events = self._callbacks_first(events)
            if len(events) == 1 and (ready := get_served(events[0][0])) is not None:  # as most polls find
                ready(events[0][1])
            elif events:
                for_asyncio += self._serve(events)
            if for_asyncio or scheduled or self._woken or not events or wait == 0 or self.left:
                self._woken = False
                # What was served in between may have changed what asyncio watches. A descriptor that it watches
                # again and that is ready will be reported again.
                return [(key, mask) for key, mask in for_asyncio if get_key(key.fd) is key]
            if timeout is not None:
                wait = until - monotonic()
                if wait <= 0:
                    return []

    def _serve(self, events: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        """Serves what is ready, for a slice of time; what is ready of asyncio's."""
        served, get_served = self.served, self.served.get
        for_asyncio = []
        late = monotonic() + SLICE if len(events) > AT_ONCE else 0.0
        for event in events:
            if event[0] not in served:
                for_asyncio = self._serve_others(events)
                break
        for start in range(0, len(events), AT_ONCE):
            for fd, mask in events[start : start + AT_ONCE]:
                if (ready := get_served(fd)) is not None:
                    ready(mask)
            if late and monotonic() > late:
                self.left += events[start + AT_ONCE :]
                break
        return for_asyncio

    def _in_turn(self, events: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The events with those first that were left. What is still readable epoll has reported again; the rest it may
        have reported for the last time.
        """
        left, self.left = self.left, []
        now, served = dict(events), self.served
        first = [(fd, now.pop(fd, 0) | mask & ONCE) for fd, mask in left if fd in served and (fd in now or mask & ONCE)]
        return first + list(now.items())

    def _callbacks_first(self, events: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The events but for those of connections that have scheduled something which the last turn has left over: they
        come behind it, as with asyncio. What that schedules in turn they do not wait for.
        """
        awaited, self._awaited = self._awaited, {}
        pending: dict[Any, Handle] = {}
        handles = self._scheduled.copy()  # in one piece: another thread may schedule something meanwhile
        for handle in handles:
            owner = handle._context.get(CONNECTION)  # type: ignore[attr-defined]
            if owner is not None and (connection := owner()) is not None and not connection.is_over:
                pending[connection] = handle
        if not pending:
            return events
        scheduled, now = set(map(id, handles)), []
        for event in events:
            fd = event[0]
            waits_for = awaited.get(fd) or pending.get(getattr(self.served.get(fd), "__self__", None))
            if waits_for is not None and id(waits_for) in scheduled:
                self._awaited[fd] = waits_for
                self.left.append(event)
            else:
                now.append(event)
        return now

    def _serve_others(self, events: list[tuple[int, int]]) -> list[tuple[selectors.SelectorKey, int]]:
        """Serves the listeners that are ready; what is ready of asyncio's."""
        served, listeners, get_key = self.served, self.listeners, self._fd_to_key.get  # type: ignore[attr-defined]
        found, waiting = [], []
        for event in events:
            fd, mask = event
            if fd in served:
                continue
            if fd in listeners:
                waiting.append(event)
            elif (key := get_key(fd)) is not None:
                found.append((key, _asyncio_mask(mask) & key.events))
        for fd, mask in waiting:  # one may take another away
            if (ready := listeners.get(fd)) is not None:
                ready(mask)
        return found


@cache
def compiled_selector(fast: Any) -> type[PollSelector]:
    """The compiled twin of `PollSelector`.

    Args:
        fast: the extension `serve._fast`.
    """

    class Table(fast.Table, MutableMapping[int, Ready]):  # type: ignore[misc]  # its module has no types
        """What `served` is there."""

    class CompiledSelector(fast.Rounds, PollSelector):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.descriptor = self.epoll.fileno()

        def _new_table(self) -> MutableMapping[int, Ready]:
            return Table()

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            found: list[tuple[selectors.SelectorKey, int]] = self.rounds(timeout, SLICE, AT_ONCE)
            return found

        def close(self) -> None:
            self.descriptor = -1
            super().close()

        def close_in_child(self) -> None:
            self.descriptor = -1
            super().close_in_child()

    return CompiledSelector


#: The selector of this process's loops.
Selector = PollSelector if FAST is None else compiled_selector(FAST)


def _asyncio_mask(mask: int) -> int:
    """epoll's mask as `selectors` has it: what is neither plain reading nor plain writing (HUP, ERR) is both."""
    return (selectors.EVENT_WRITE if mask & ~IN else 0) | (selectors.EVENT_READ if mask & ~OUT else 0)


def _handle_of(error: BaseException) -> Handle | None:
    """The callback of asyncio's that an exception came out of."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is Handle._run.__code__:
            found = traceback.tb_frame.f_locals.get("self")
            return found if isinstance(found, Handle) else None
        traceback = traceback.tb_next
    return None


def task_names(tasks: Iterable[asyncio.Task[Any]]) -> str:
    """What tasks run, and where they are, for the log; of many the first ones."""
    names = []
    for task in islice(tasks, _NAMED):
        coroutine: Any = task.get_coro()
        frame = getattr(coroutine, "cr_frame", None)
        where = "" if frame is None else f" at {frame.f_code.co_filename}:{frame.f_lineno}"
        names.append(getattr(coroutine, "__qualname__", repr(coroutine)) + where)
    return ", ".join(names)


class _PlainHandle(Handle):
    """asyncio's, of a loop that is known not to debug."""

    __slots__ = ()

    def __init__(self, callback: Callable[..., Any], args: Any, loop: PollLoop, context: Context | None) -> None:
        mine: Any = self
        mine._context = copy_context() if context is None else context
        mine._loop = loop
        mine._callback = callback
        mine._args = args
        mine._cancelled = False
        mine._repr = mine._source_traceback = None


class PollLoop(asyncio.SelectorEventLoop):
    """asyncio's event loop over a `PollSelector`.

    Args:
        on_error: called for each exception that is reported to the loop: those that came out of handlers.
        on_exit: called for a handler's sys.exit() instead of a report; None: it is an exception like any other.
        on_progress: called where a turn leaves work for the next: the loop does not stand still.
        selector: the class of its selector; None: that of this process.

    Attributes:
        selector: what serves forkd's own descriptors.
        step_began: when the callback that runs now was called, on the monotonic clock.
        outside: connections that threads or programs serve.
        background: tasks that were there before the first client, as `note_background` has found them.
        scheduled: what asyncio calls next.
    """

    scheduled: deque[Handle]

    def __init__(
        self,
        on_error: Callable[[], None] = lambda: None,
        on_exit: Callable[[SystemExit], None] | None = None,
        on_progress: Callable[[], None] = lambda: None,
        selector: type[PollSelector] | None = None,
    ) -> None:
        self._on_error = on_error
        self._on_exit = on_exit
        self._on_progress = on_progress
        self.step_began = 0.0
        self._process = os.getpid()
        self._stop_asked = False
        self._closed = True  # until asyncio's own is made
        self.selector = (selector or Selector)()
        self.outside: set[Any] = set()
        self._hook_tasks: set[asyncio.Task[object]] = set()  # which nothing else may know
        self.background: WeakSet[asyncio.Task[Any]] = WeakSet()
        try:
            super().__init__(self.selector)
        except OSError:  # no descriptor left; asyncio would close what it has not made yet
            self._closed = True
            self.selector.close()
            raise
        # asyncio keeps one deque of callbacks for the loop's life. Looking whether it is empty costs nothing.
        self.scheduled = self._ready  # type: ignore[attr-defined]
        self.selector.bind(self.scheduled)

    def call_soon(  # type: ignore[override]  # as of call_at
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Handle:
        """As asyncio's, which takes four calls more for it."""
        loop: Any = self
        if loop._debug or loop._closed:
            return super().call_soon(callback, *args, context=context)
        handle = _PlainHandle(callback, args, self, context)
        loop._ready.append(handle)
        return handle

    def call_at(  # type: ignore[override]  # the stub's variadic generic is no wider
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> TimerHandle:
        """As asyncio's; also ends the selector's wait, which was reckoned without this timer. A time that is none (NaN)
        has come, as by asyncio: kept, it would be before no other time and after none.
        """
        if isnan(when):
            when = self.time()
        self.selector.wake()
        timer = super().call_at(when, callback, *args, context=context)
        if traceback := timer._source_traceback:  # type: ignore[attr-defined]
            del traceback[-1]  # what is called here; asyncio's debug mode tells who has called this
        return timer

    def note_background(self) -> None:
        """At the end of the boot: the tasks that run now are no client's. No drain waits for them."""
        self.background = WeakSet(asyncio.all_tasks(self))

    def client_tasks(self) -> set[asyncio.Task[Any]]:
        """The tasks that run, but for those in the background."""
        return asyncio.all_tasks(self).difference(self.background)

    def close_in_child(self) -> None:
        """In a forked process: closes what it shares with its parent; the loop is of no use there."""
        self.selector.close_in_child()
        for sock in (self._ssock, self._csock):  # type: ignore[attr-defined]
            sock.close()

    @property
    def is_forked(self) -> bool:
        """Whether this is not the process that made the loop, but one that a handler has forked."""
        return os.getpid() != self._process

    def run_forever(self) -> None:
        """As asyncio's, but a sys.exit() out of a task or callback, which ends asyncio's, is reported; it goes on."""
        self._stop_asked = False
        while True:
            try:
                super().run_forever()
            except (SystemExit, KeyboardInterrupt) as error:
                self._report_exit(error)
                if not self._stop_asked:
                    continue
            return

    def _run_once(self) -> None:
        """One turn, as asyncio's, but callbacks run for a slice of time alone; those that are left come first in the
        next turn, after a poll.
        """
        loop: Any = self
        if loop._debug:
            loop.step_began = 0.0
            super()._run_once()  # type: ignore[misc]
            return
        ready, timers = loop._ready, self._live_timers()
        timeout: float | None = 0.0
        if not ready and not loop._stopping:
            timeout = min(timers[0]._when - monotonic(), _LONGEST_WAIT) if timers else None
        if events := self.selector.select(timeout):
            loop._process_events(events)
        if self.selector.left:
            self._on_progress()
        self.step_began = now = monotonic()
        timers, due = loop._scheduled, now + loop._clock_resolution
        while timers and timers[0]._when < due:
            timer = heappop(timers)
            timer._scheduled = False
            ready.append(timer)
        late = now + SLICE
        for left in range(len(ready) - 1, -1, -1):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            handle._run()
            if left:
                self.step_began = now = monotonic()
                if now > late and not loop._stopping:
                    self._on_progress()
                    break
        handle = timer = None  # else they, and what they hold, would live on until the next ones

    def _live_timers(self) -> list[Any]:
        """asyncio's heap of timers, without cancelled ones at its head, and without all of them where they are many."""
        loop: Any = self
        timers: list[Any] = loop._scheduled
        if loop._timer_cancelled_count * 2 > len(timers) > _MANY_TIMERS:
            for timer in timers:
                timer._scheduled = not timer._cancelled
            loop._scheduled = timers = [timer for timer in timers if timer._scheduled]
            heapify(timers)
            loop._timer_cancelled_count = 0
        while timers and timers[0]._cancelled:
            loop._timer_cancelled_count -= 1
            heappop(timers)._scheduled = False
        return timers

    def _report_exit(self, error: BaseException) -> None:
        handle = _handle_of(error)
        callback = getattr(getattr(handle, "_callback", None), "__self__", None)
        if isinstance(callback, asyncio.Future) and callback.done() and not callback.cancelled():
            callback.exception()  # else it is reported once more, as never retrieved
        connection = None
        if handle is not None and (owner := handle._context.get(CONNECTION)) is not None:  # type: ignore[attr-defined]
            connection = owner()
        if connection is not None:
            connection.handler_failed(error, _EXITED)
        else:
            self.call_exception_handler({"message": _EXITED, "exception": error})

    async def _sendfile_native(self, transp: Any, file: Any, offset: int, count: int | None) -> int:
        """As asyncio's, which knows its own transports alone."""
        send_file = getattr(transp, "send_file", None)
        if send_file is None:
            sent: int = await super()._sendfile_native(transp, file, offset, count)  # type: ignore[misc]
        else:
            sent = await send_file(file, offset, count)
        return sent

    def call_hook(self, context: Context, hook: Callable[[], object], failed: Callable[[BaseException], None]) -> None:
        """Calls what a protocol has for forkd, such as `shutdown()`; one that is `async def` runs as a task.

        Args:
            context: the connection's.
            hook: its method.
            failed: called with what it raises.
        """

        def ended(task: asyncio.Task[object]) -> None:
            self._hook_tasks.discard(task)
            if not task.cancelled() and isinstance(error := task.exception(), Exception):
                failed(error)

        try:
            made = context.run(hook)
            if asyncio.iscoroutine(made):
                task = context.run(self.create_task, made)
                self._hook_tasks.add(task)
                task.add_done_callback(ended)
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            failed(error)

    def program_failed(self, status: int) -> None:
        """Counts a client's program that has ended with such a status, other than 0, or ends this process with it."""
        if self._on_exit is not None:
            self._on_exit(SystemExit(status))
        else:
            self._on_error()

    def stop(self) -> None:
        """As asyncio's; also ends the selector's wait."""
        self._stop_asked = True
        self.selector.wake()
        super().stop()

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """As asyncio's; also counts. What is not for the loop it raises again: an interrupt of this program, and
        anything in a process that a handler has forked, which is not to go on with its parent's loop.
        """
        error = context.get("exception")
        if error is not None:
            interrupted = isinstance(error, KeyboardInterrupt)
            if self.is_forked or (interrupted and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
                raise error
            if isinstance(error, SystemExit) and self._on_exit is not None:
                self._on_exit(error)
                return
            self._on_error()
            if isinstance(error, HandlerError):  # a sentence says it all
                context = {"message": str(error)}
        about = getattr(context.get("transport"), "about", dict)
        _CONNECTION_FIELDS.fields = about()
        try:
            super().call_exception_handler(context)
        finally:
            _CONNECTION_FIELDS.fields = {}
