"""A worker: wires listeners, handlers and the poll loop together, serves until told to drain, and ends.

`run_worker` is what a forked child runs. It reports on its channel: ready, or why it could not boot; and that it has
served enough. The master speaks to it by signals, and on the channel of what no signal can carry; end of file there
means that the master is dead, and then the worker is soon gone too.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any

from forkd import drain, signals
from forkd.config.options import Settings
from forkd.errors import ForkdError, HandlerError
from forkd.serve.accept import Acceptor, Serve, Tally
from forkd.serve.answers import Served, answer
from forkd.serve.balance import BEAT, Balance
from forkd.serve.datagrams import Datagrams
from forkd.serve.deadlines import Deadlines
from forkd.serve.ending import LAST_WORDS, clean_up, transports_of
from forkd.serve.guard import guarded, is_limited
from forkd.serve.handlers.host import host
from forkd.serve.handlers.load import Handler, import_handlers
from forkd.serve.loop import IN, PollLoop
from forkd.serve.recycling import Wear
from forkd.serve.settle import settle
from forkd.system.bound import BoundListener
from forkd.system.channel import Channel, ChannelClosed
from forkd.system.counts import Ledger
from forkd.system.identity import Identity
from forkd.system.logs import replace_log, set_role
from forkd.system.process import dump_stacks_on, resident_memory, set_title, signal_when_parent_dies
from forkd.system.roll import Roll
from forkd.system.scoreboard import Field, Row, Scoreboard

log = logging.getLogger("forkd.worker")

#: Exit statuses of a worker.
DONE = 0
COULD_NOT_BOOT = 3

#: Seconds that connections have to end when the master is dead: a new master will want the port and the memory. A loop
#: that stands still does not count them, so an alarm ends the process a little later.
ORPHANED = 1.0
_ALARM = 0.5


@dataclass(frozen=True, slots=True)
class Station:
    """A worker's place: what the master gives it at the fork."""

    slot: int
    row: Row
    channel: Channel
    master: int  # its pid
    identity: Identity = field(default_factory=Identity)  # whom it becomes


def run_worker(settings: Settings, listeners: Sequence[BoundListener], board: Scoreboard, station: Station) -> int:
    """Runs a worker to its end in a process of its own; the exit status."""
    dump_stacks_on(signals.DUMP)
    set_role(f"worker {station.slot}")
    set_title(settings.name, f"worker {station.slot} (booting)")
    try:
        settle(settings, station.identity)
    except ForkdError as error:
        station.channel.send({"event": "failed", "reason": str(error), "details": ""})
        return COULD_NOT_BOOT
    # Only now: when a process becomes another user's the kernel forgets it.
    if not signal_when_parent_dies(signals.DRAIN, station.master):
        return COULD_NOT_BOOT
    handlers = []
    for handler in import_handlers(settings, [bound.address for bound in listeners]):
        if isinstance(handler, HandlerError):
            station.channel.send({"event": "failed", "reason": str(handler), "details": handler.details})
            return COULD_NOT_BOOT
        handlers.append(handler)
    # What was imported stays; the collector need not walk it again and again, nor dirty the pages it shares.
    gc.collect()
    gc.freeze()
    loop = PollLoop()
    asyncio.set_event_loop(loop)
    worker = Worker(settings, board, station, loop)
    loop.call_soon(worker.begin, listeners, handlers)
    loop.run_forever()
    worker.clean_up()
    return worker.status


class Worker:
    """The state of a running worker."""

    def __init__(self, settings: Settings, board: Scoreboard, station: Station, loop: PollLoop) -> None:
        self._settings = settings
        self._station = station
        self._loop = loop
        self._tally = Tally(station.row, Roll(board.regions.of(station.row.index)))
        loop.on_error = self._tally.failed
        self._board = board
        self._balance = Balance(loop, board, self._tally)
        self._deadlines = Deadlines(loop)
        self._datagrams = Datagrams(loop, station.row, self._lost_socket)
        self.status = DONE
        self._conversations: set[asyncio.Task[None]] = set()  # streams handlers that have not returned
        self._born = loop.time()
        self._wear = Wear(settings.recycle, random.random())  # noqa: S311
        self._fit = False  # it serves, and has not told the master that it is worn
        self._draining = False
        self._orphaned = False
        self._ended = False
        # Often enough that one heartbeat which is late, or falls just behind the master's look, is no stall.
        self._beat_every = min(BEAT, settings.stall_timeout / 3) if settings.stall_timeout else BEAT
        self._next_beat = loop.time()
        self._title = ""

    def begin(self, listeners: Sequence[BoundListener], handlers: Sequence[Handler]) -> None:
        """Takes clients, and tells the master so."""
        for signum, action in ((signals.DRAIN, self.drain), (signals.CLOSE, self.close)):
            self._loop.add_signal_handler(signum, action)
        # asyncio's own handler does nothing, and its loop hears of a signal only when it comes round. This one is
        # called, between two lines of Python, in a loop that a handler holds up too.
        signal.signal(signals.DRAIN, self._check_on_master)
        channel = self._station.channel
        self._loop.selector.served[channel.fileno()] = self._channel_ready
        self._loop.selector.epoll.register(channel.fileno(), IN)
        if self._wear.memory and (warning := self._wear.begin(resident_memory())):
            log.warning("%s", warning)
        ledger = Ledger(self._board, self._station.row.index) if any(map(is_limited, listeners)) else None
        try:
            for bound, handler in zip(listeners, handlers, strict=True):
                if handler.form == "datagram":
                    self._datagrams.serve(bound, handler, ledger if is_limited(bound) else None)
        except HandlerError as error:
            channel.send({"event": "failed", "reason": str(error), "details": error.details})
            self.status = COULD_NOT_BOOT
            self._end()
            return
        self._beat()
        channel.send({"event": "ready"})
        self._balance.start(self._acceptors(listeners, handlers, ledger))
        self._fit = True
        log.debug("serves")

    def _acceptors(
        self, listeners: Sequence[BoundListener], handlers: Sequence[Handler], ledger: Ledger | None
    ) -> list[Acceptor]:
        row, found = self._station.row, list[Acceptor]()
        for bound, handler in zip(listeners, handlers, strict=True):
            if handler.form == "datagram":
                continue
            serve = self._server(bound, handler)
            if ledger is not None and is_limited(bound):
                found += guarded(bound, self._loop, serve, self._balance, ledger, row)
            else:
                found += [Acceptor(self._loop, sock, serve, self._balance) for sock in bound.sockets]
        return found

    def _server(self, bound: BoundListener, handler: Handler) -> Serve:
        return host(
            handler,
            bound.listener,
            bound.address,
            self._loop,
            self._tally,
            self._conversations,
            self._deadlines,
            access=self._settings.log.access,
        )

    def _beat(self) -> None:
        """At each heartbeat: says on the scoreboard that the loop turns, and how late it came round."""
        now, row = self._loop.time(), self._station.row
        row[Field.HEARTBEAT] = monotonic_ns()
        row[Field.LAG] = max(0, int((now - self._next_beat) * 1e9))
        self._show()
        self._balance.beat()
        self._datagrams.beat()
        if self._fit:
            self._look_for_wear(now)
        self._next_beat = now + self._beat_every
        self._loop.call_at(self._next_beat, self._beat)

    def _look_for_wear(self, now: float) -> None:
        """Tells the master, once, when this worker has served enough. It serves on: the master will have it drain."""
        memory = resident_memory() if self._wear.memory else 0
        if why := self._wear.worn(self._tally.accepted, now - self._born, memory):
            self._say_worn(why)

    def _say_worn(self, why: str) -> None:
        self._fit = False
        with contextlib.suppress(ChannelClosed):  # the master is gone, of which the channel will tell
            self._station.channel.send({"event": "worn", "why": why})

    def _lost_socket(self, listener: str) -> None:
        """A handler has closed its datagram socket: whoever sends there is for the next worker."""
        if self._fit:
            self._say_worn(f"its handler has closed {listener}")

    def _show(self) -> None:
        state = "draining, " if self._draining else ""
        active = self._tally.active
        title = f"worker {self._station.slot} ({state}{active} client{'' if active == 1 else 's'})"
        if title != self._title:
            self._title = title
            set_title(self._settings.name, title)

    # The end

    def _check_on_master(self, *_: Any) -> None:
        """On the signal to drain, which the kernel also sends when the master dies."""
        if os.getppid() != self._station.master:
            signal.setitimer(signal.ITIMER_REAL, ORPHANED + _ALARM)

    def _say_orphaned(self) -> None:
        """Once, by whichever tells first: the end of the channel, or the kernel's signal, which ends an idle worker."""
        if not self._draining and not self._orphaned:
            self._orphaned = True
            log.error("the master is gone; ends within %.0f s", ORPHANED)

    def _channel_ready(self, mask: int) -> None:
        channel = self._station.channel
        try:
            messages = channel.receive()
        except ChannelClosed:
            self._loop.selector.epoll.unregister(channel.fileno())
            self._say_orphaned()
            signal.setitimer(signal.ITIMER_REAL, ORPHANED + _ALARM)
            self.drain(ORPHANED)
            return
        for message in messages:
            if message.get("order") == "log" and channel.descriptors:
                replace_log(channel.descriptors.pop(0))
            elif (found := answer(Served(self._loop, self._datagrams), message)) is not None:
                with contextlib.suppress(ChannelClosed):  # as in `_look_for_wear`
                    channel.send(found)
            else:
                log.warning("the master says what this worker does not understand: %r", message)

    def drain(self, seconds: float | None = None) -> None:
        """Takes no more clients; ends when those that are here have gone, or when their time is up."""
        if os.getppid() != self._station.master:
            seconds = ORPHANED
            self._say_orphaned()
        if seconds is None:
            seconds = self._settings.drain_timeout
        if not self._draining:
            self._draining, self._fit = True, False
            drain.begin()
            # Those that are here; one that comes yet is asked when it is connected.
            transports = transports_of(self._loop)
            self._balance.stop()
            self._tally.on_closed = self._one_less
            for transport in transports:
                transport.ask_to_end()
            self._datagrams.drain(self._one_less)
            self._show()
        self._loop.call_later(seconds, self.close)
        self._one_less()

    def _one_less(self) -> None:
        if self._draining and self._tally.active == 0 and self._datagrams.settled():
            self._end()

    def _end(self) -> None:
        """Ends `run_forever`, once: asked again it would end what `clean_up` runs after it."""
        if not self._ended:
            self._ended = True
            self._loop.stop()

    def close(self) -> None:
        """Closes every connection, and ends."""
        if not self._draining:
            self.drain(0)
            return
        if self._tally.active:
            log.info("closes what is open: %d", self._tally.active)
        for transport in transports_of(self._loop):
            transport.close()
        self._datagrams.close()
        self._loop.call_later(LAST_WORDS, self._end)

    def clean_up(self) -> None:
        """After the loop has stopped: ends what still runs on it, within bounded time."""
        self._tally.on_closed = None
        self._datagrams.abort()
        clean_up(self._loop, self._conversations)
