"""A running worker: it serves its listeners until it is told to drain, and ends.

`boot` makes it, and hands it the steps of the boot that are done on its loop. It reports on its channel that it is
ready, or why it could not boot, and that it has served enough (`RecyclePolicy`: a rule alone, without clock, socket or
random number of its own). The master controls it by signals and on the channel; end of file there means that the master
is dead, and then the worker soon ends too. It only wires: accepting, serving and closing are in the packages beside
this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import signal
import socket
from collections.abc import Coroutine, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, Protocol

from forkd import drain, signals
from forkd.config.settings import Settings
from forkd.errors import BootError, ForkdError
from forkd.messages import (
    CertificatesCommand,
    CertificatesEvent,
    CloseCommand,
    DrainCommand,
    DrainingEvent,
    FailedEvent,
    InvalidMessage,
    ListenerCommand,
    LogCommand,
    ReadyEvent,
    WorkerCommand,
    WornEvent,
    decode_command,
)
from forkd.serve.accept.acceptor import Acceptor, ConnectionStats
from forkd.serve.accept.balance import Balance, Waiting
from forkd.serve.accept.limits import ConnectionLimiter, is_limited, limited_acceptors
from forkd.serve.accept.listener_stats import ListenerStats
from forkd.serve.accept.proxy_protocol import note_clients
from forkd.serve.datagram.server import DatagramServer
from forkd.serve.deadlines import Deadlines
from forkd.serve.handler_forks import leave_loop_at_fork
from forkd.serve.handlers import Handler, Hook, handler_error
from forkd.serve.hooks import Hooks, boot_deadline, keep_variables
from forkd.serve.loop import CONNECTION, IN, PollLoop, task_names
from forkd.serve.queries import Served, answer
from forkd.serve.stream.program import WaitingSocket
from forkd.serve.stream.server import CLOSE_TIMEOUT, close_connections, end_tasks, stream_server, transports_of
from forkd.serve.stream.threads import ThreadServer
from forkd.serve.stream.tls import load_contexts, renew_contexts
from forkd.serve.stream.transport import ServerContext, StreamTransport
from forkd.system.channel import Channel, ChannelClosed
from forkd.system.identity import Identity
from forkd.system.listeners import BoundListener
from forkd.system.logs import attach_log, detach_log, replace_log, write_log
from forkd.system.proc import resident_memory
from forkd.system.process import finish_interpreter, set_title
from forkd.system.scoreboard import AcceptTimes, ClientAddresses, Field, Row, Scoreboard, beat_seconds
from forkd.system.shared_counters import SharedCounters
from forkd.system.tls_files import Contents, unpack

if TYPE_CHECKING:
    from forkd.serve.stream.handed_over import HandedOver
    from forkd.serve.stream.whole_server import WholeServers

log = logging.getLogger("forkd.worker")

#: Exit statuses of a worker.
DONE = 0
COULD_NOT_BOOT = 3

#: Seconds that connections have to end when the master is dead: a new master will want the port and the memory. A loop
#: that stands still does not count them, so an alarm ends the process a little later.
ORPHAN_TIMEOUT = 1.0
_ALARM_DELAY = 0.5

#: Seconds that threads and atexit functions have at the end of a worker, though the drain's deadline is over; and of
#: one whose master is dead. With the other timeouts they are less than the master waits for a worker that closes.
LEAST_FINISH = 0.7
ORPHAN_FINISH = 0.2

#: Seconds after which a drain that has no connection left, but tasks, says in the log which.
TELL_AFTER = 1.0

#: Seconds under which jitter makes no limit of age shorter.
_LEAST_AGE = 1.0


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a worker is given at the fork.

    Attributes:
        settings: those of its generation.
        listeners: its generation's, with the sockets of all its workers.
        log: the descriptor of the log.
        board: the scoreboard of all workers.
        row: the worker's own row on it.
        slot: the worker's number.
        channel: the worker's end of its channel to the master.
        master: the master's process id.
        identity: the user and the groups that the worker gets.
        directory: where the daemon was started, which is the worker's directory where the settings name none.
        generation: the number of its generation.
        certificates: what is in the files of certificates, as far as the master has read them.
        listeners_kept: whether a service manager keeps the listeners, and the clients that wait, if the master dies.
    """

    settings: Settings
    listeners: Sequence[BoundListener]
    log: int
    board: Scoreboard
    row: Row
    slot: int
    channel: Channel
    master: int
    identity: Identity = field(default_factory=Identity)
    directory: str = ""
    generation: int = 1
    certificates: Contents = field(default_factory=dict)
    listeners_kept: bool = False


class WorkerProcess:
    """The state of a running worker.

    Args:
        context: what it was given at the fork.

    Attributes:
        loop: the worker's loop.
        status: the exit status.
    """

    def __init__(self, context: WorkerContext) -> None:
        settings, board, row = context.settings, context.board, context.row
        self._context = context
        self._settings = settings
        self._stats = ConnectionStats(row, self, AcceptTimes(board.regions.view(row.index)))
        self.loop = loop = PollLoop(self._stats.failed, on_progress=self.note_progress)
        leave_loop_at_fork(loop)
        self._balance = Balance(loop, board, self._stats)
        self._acceptors: dict[int, Sequence[Acceptor]] = {}  # by the listener's place in the settings
        self._listener_stats: list[ListenerStats] = []
        self._waiting: list[WaitingSocket] = []
        self._streams = ServerContext(loop, self._stats, Deadlines(loop), access_log=settings.log.access)
        self._datagrams = DatagramServer(loop, row, self._on_socket_lost, self._end_if_drained)
        self._hooks = Hooks(loop)
        self._boot: asyncio.Task[Sequence[Handler]] | None = None  # while it boots
        self._handlers: Sequence[Handler] | None = None  # when it has booted
        self._servers: WholeServers | None = None  # where there are such
        self.status = DONE
        self._started = loop.time()
        self._recycling = RecyclePolicy(settings.recycle, random.random())  # noqa: S311
        self._may_recycle = False  # it serves, and has not told the master that it has served enough
        self._draining = self._closing = False
        self._telling: asyncio.TimerHandle | None = None  # what a drain waits for
        self._deadline = 0.0  # of the drain
        self._orphaned = False
        self._ended = False
        # Often enough that one heartbeat which is late, or falls just behind the master's look, is no stall.
        self._beat_every = beat_seconds(settings.stall_timeout)
        self._next_beat = loop.time()
        self._title = ""

    def run(self, boot: Coroutine[Any, Any, Sequence[Handler]]) -> None:
        """Boots on the loop by these steps, which return the handlers, and serves by those until it has drained or was
        closed.
        """
        asyncio.set_event_loop(self.loop)
        context = copy_context()
        self._boot = self.loop.create_task(boot, context=context)
        self._boot.add_done_callback(self._booted)
        while self._handlers is None and not self._ended:  # code of the user's may stop the loop
            self.loop.run_forever()
        if not self._ended:
            keep_variables(context)
            self.loop.call_soon(self._serve)
            self.loop.run_forever()
        while not self._ended:
            if not self._draining:
                log.warning("the handler's code has stopped the loop; the worker drains")
                self.loop.call_soon(self.drain)
            self.loop.run_forever()
        self.clean_up()
        detach_log()
        self._finish()

    # Beginning

    async def set_up(self, hooks: Sequence[Hook]) -> None:
        """Calls the setups of these hooks, the teardowns of which are called at the end. Raises HandlerError."""
        self._hooks = Hooks(self.loop, hooks)
        await self._hooks.set_up(self._settings.boot_timeout, self._started)

    async def start_servers(self, handlers: Sequence[Handler]) -> None:
        """Starts the handlers that are whole servers; returns when they accept clients. Raises HandlerError."""
        deadline = boot_deadline(self._settings.boot_timeout, self._started)
        for place, (bound, handler) in enumerate(zip(self._context.listeners, handlers, strict=True)):
            if handler.form == "server":
                if self._servers is None:
                    from forkd.serve.stream.whole_server import WholeServers  # noqa: PLC0415 (where there is one)

                    self._servers = WholeServers(self.loop, self._on_server_lost, self._end_if_drained)
                await self._servers.serve(bound, handler, self._context_of(place), deadline)
                self._take_signals()  # some libraries' servers want to end by themselves

    def begin(self, handlers: Sequence[Handler]) -> None:
        """Takes clients by these handlers, and tells the master so. Raises HandlerError."""
        attach_log(self.loop)
        self.loop.note_background()
        if self._recycling.memory and (warning := self._recycling.check_start(resident_memory())):
            log.warning("%s", warning)
        served = list(zip(self._context.listeners, handlers, strict=True))
        for bound, handler in served:
            if handler.form == "datagram":
                self._datagrams.serve(bound, handler, self._counters if is_limited(bound) else None)
        self._next_beat = self.loop.time()
        self.beat()
        self._tell_certificates()
        self._context.channel.send(ReadyEvent())
        for place, (bound, handler) in enumerate(served):
            if bound.listener.wait:
                self._wait(bound)
            elif handler.form not in ("datagram", "server"):
                self._acceptors[place] = self._make_acceptors(place, bound, handler)
        self._balance.start([one for made in self._acceptors.values() for one in made])
        self._may_recycle = True
        log.debug("serving")

    def _booted(self, boot: asyncio.Task[Sequence[Handler]]) -> None:
        if boot.cancelled() and self._draining:
            self._boot = None
            self._end_if_drained()
        elif boot.cancelled():
            self._fail(BootError("the handler's code has cancelled its boot"))
        elif (error := boot.exception()) is not None:
            self._fail(error)
        else:
            self._handlers = boot.result()
            self.loop.stop()  # `run` goes on

    def _serve(self) -> None:
        self._boot = None
        try:
            if not self._draining:
                self.begin(self._handlers or ())
        except BaseException as error:  # noqa: BLE001 (the border of the boot)
            self._fail(error)
        self._end_if_drained()

    def _fail(self, error: BaseException) -> None:
        """Tells the master why this worker could not boot, and ends."""
        self._boot = None
        if not isinstance(error, ForkdError):
            error = handler_error("the boot failed", error)
        with contextlib.suppress(ChannelClosed):
            self._context.channel.send(FailedEvent(str(error), getattr(error, "details", "")))
        self.status = COULD_NOT_BOOT
        self._end()

    def listen_to_master(self) -> None:
        """Obeys the master's signals, and what it sends, from now on."""
        self._take_signals()
        channel = self._context.channel
        self.loop.selector.served[channel.fileno()] = self._channel_ready
        self.loop.selector.epoll.register(channel.fileno(), IN)

    def _take_signals(self) -> None:
        """Has the master's signals come here, also where a handler's code has taken them."""
        for signum, action in ((signals.DRAIN, self.drain), (signals.CLOSE, self.close)):
            self.loop.add_signal_handler(signum, action)
        # asyncio's own handler does nothing, and its loop hears of a signal only when it comes round. This one is
        # called, between two lines of Python, in a loop that a handler holds up too.
        signal.signal(signals.DRAIN, self._check_master)

    def _wait(self, bound: BoundListener) -> None:
        """Starts a program at a time for what comes to a listener, in the first worker alone."""
        for sock in bound.sockets:
            if self._context.slot == 1:
                self._waiting.append(WaitingSocket(self._streams, bound.listener, bound.address, sock))
            else:
                sock.close()

    @cached_property
    def _counters(self) -> SharedCounters:
        """What this worker counts with the others, where there is a limit."""
        return SharedCounters(self._context.board, self._context.row.index)

    def _context_of(self, place: int) -> ServerContext:
        """What the connections of a listener share."""
        context, cells = self._streams, self._context.row.listener(place)
        if self._settings.is_measured and cells is not None:
            stats = ListenerStats(self._stats, cells)
            self._listener_stats.append(stats)
            return replace(context, stats=stats)
        return context

    def _make_acceptors(self, place: int, bound: BoundListener, handler: Handler) -> Sequence[Acceptor]:
        context = self._context_of(place)
        serve = stream_server(handler, bound.listener, bound.address, context, bound.sockets)
        threads = serve if isinstance(serve, ThreadServer) else None
        if bound.listener.proxy_protocol:
            serve = note_clients(ClientAddresses(self._context.board.regions.view(self._context.row.index)), serve)
        if threads is not None or is_limited(bound):
            limiter = ConnectionLimiter(bound, self._counters, threads)
            return limited_acceptors(limiter, self.loop, serve, self._balance, self._counters, self._context.row)
        return [Acceptor(self.loop, sock, serve, self._balance) for sock in bound.sockets]

    # Heartbeat and recycling

    def beat(self) -> None:
        """At each heartbeat: says on the scoreboard that the loop turns, and how late it came round."""
        if self._ended:
            return
        now, row = self.loop.time(), self._context.row
        row[Field.HEARTBEAT] = monotonic_ns()
        row[Field.LAG] = max(0, int((now - self._next_beat) * 1e9))
        self._show_title()
        self._balance.beat()
        self._datagrams.beat()
        if self._servers is not None:
            self._servers.beat()
        for stats in self._listener_stats:
            stats.reckon()
        write_log()
        if self._may_recycle:
            memory = resident_memory() if self._recycling.memory else 0
            if reason := self._recycling.reached(self._stats.accepted, now - self._started, memory):
                self._ask_for_recycling(reason)
        self._next_beat = now + self._beat_every
        self.loop.call_at(self._next_beat, self.beat)

    def note_progress(self) -> None:
        """Says on the scoreboard that the loop turns, though the next heartbeat may be late."""
        self._context.row[Field.HEARTBEAT] = monotonic_ns()

    def _ask_for_recycling(self, reason: str) -> None:
        """Tells the master, once, that this worker has served enough. It serves on: the master will have it drain."""
        self._may_recycle = False
        with contextlib.suppress(ChannelClosed):  # the master is gone, of which the channel will tell
            self._context.channel.send(WornEvent(reason))

    def _on_socket_lost(self, listener: str) -> None:
        """A handler has closed its datagram socket: what is sent there is for the next worker."""
        if self._may_recycle:
            self._ask_for_recycling(f"its handler has closed {listener}")

    def _on_server_lost(self, why: str) -> None:
        """A whole server serves no more: clients are for the next worker."""
        if self._may_recycle:
            self._ask_for_recycling(why)

    def _show_title(self) -> None:
        state = "draining, " if self._draining else ""
        active = self._stats.active
        title = f"worker {self._context.slot} ({state}{active} client{'' if active == 1 else 's'})"
        if title != self._title:
            self._title = title
            set_title(self._settings.name, title)

    # What the master says

    def _channel_ready(self, mask: int) -> None:
        channel = self._context.channel
        try:
            messages = channel.receive()
        except ChannelClosed:
            self.loop.selector.epoll.unregister(channel.fileno())
            self._log_orphaned()
            signal.setitimer(signal.ITIMER_REAL, ORPHAN_TIMEOUT + _ALARM_DELAY)
            self.drain(ORPHAN_TIMEOUT)
            return
        for message in messages:
            try:
                self._obey(decode_command(message))
            except InvalidMessage as error:
                log.warning("invalid message from the master: %s", error)

    def _obey(self, command: WorkerCommand) -> None:
        channel = self._context.channel
        match command:
            case DrainCommand():
                self.drain()
            case CloseCommand():
                self.close()
            case LogCommand() if channel.descriptors:
                replace_log(channel.descriptors.pop(0))
            case ListenerCommand(place) if channel.descriptors:
                self._replace_listener(place, socket.socket(fileno=channel.descriptors.pop(0)))
            case CertificatesCommand(place, number) if channel.descriptors:
                self._renew_certificates(place, number, channel.descriptors.pop(0))
            case LogCommand() | ListenerCommand() | CertificatesCommand():
                log.warning("invalid message from the master: %s without its descriptor", command.KIND[1])
            case _:
                found = answer(Served(self.loop, self._datagrams), command)
                with contextlib.suppress(ChannelClosed):  # as in `_ask_for_recycling`
                    channel.send(found)

    def _tell_certificates(self) -> None:
        for place, listener in enumerate(self._settings.listen):
            if (contexts := load_contexts(listener)) is not None:
                self._context.channel.send(CertificatesEvent(place, contexts.certificates))

    def _renew_certificates(self, place: int, number: int, descriptor: int) -> None:
        """Shows new clients the certificates that are behind a descriptor, unless they are of no use."""
        refusal, told = "", list[dict[str, Any]]()
        try:
            contexts = renew_contexts(self._settings.listen[place], unpack(descriptor))
            told = contexts.certificates
        except (ForkdError, OSError, ValueError) as error:
            refusal = str(error)
        finally:
            os.close(descriptor)
        with contextlib.suppress(ChannelClosed):  # as in `_ask_for_recycling`
            self._context.channel.send(CertificatesEvent(place, told, number, refusal))

    def _replace_listener(self, place: int, sock: socket.socket) -> None:
        """Serves this socket in the place of a listener's own. The connections that are open stay."""
        if self._draining or not (self._boot or place in self._acceptors):
            sock.close()
            if self._servers is not None:
                self._on_server_lost(f"{self._context.listeners[place].address} was bound again")
            return
        sock.setblocking(False)
        if old := self._acceptors.get(place):
            self._acceptors[place] = [old[0].successor(sock)]
            self._balance.replace(old, self._acceptors[place])
        self._context.listeners[place].sockets[:] = [sock]

    def _check_master(self, *_: Any) -> None:
        """On the signal to drain, which the kernel also sends when the master dies."""
        if os.getppid() != self._context.master:
            signal.setitimer(signal.ITIMER_REAL, ORPHAN_TIMEOUT + _ALARM_DELAY)

    def _log_orphaned(self) -> None:
        """Once, by whichever tells first: the end of the channel, or the kernel's signal, which ends an idle worker."""
        if not self._draining and not self._orphaned:
            self._orphaned = True
            log.error("the master is gone; ending within %.0f s", ORPHAN_TIMEOUT)

    # Drain and end

    def drain(self, seconds: float | None = None) -> None:
        """Takes no more clients; ends when those that are here have gone, or when their time is up.

        Args:
            seconds: that time; None: `drain_timeout`. Of a worker whose master is dead it is short.
        """
        if os.getppid() != self._context.master:
            seconds = ORPHAN_TIMEOUT
            self._log_orphaned()
        spread = 0.0
        if seconds is None:
            seconds = self._settings.drain_timeout
            spread = min(self._settings.drain_spread, seconds)
        if not self._draining:
            self._may_recycle = False
            drain.begin(lambda context: spread * random.random() if CONNECTION in context else 0.0)  # noqa: S311
            # Those that are here; one that comes yet is asked when it is connected.
            transports = transports_of(self.loop)
            self._balance.stop(self._waiting_clients())
            for one in self._waiting:
                one.stop()
            self._draining = True  # only now: from here on each end of a connection may be the last one
            self._notify(transports, spread)
            self._datagrams.drain()
            if self._servers is not None:
                self._servers.drain()
            if self._boot is not None:
                self._boot.cancel()
            self._show_title()
            with contextlib.suppress(ChannelClosed):  # as in `_ask_for_recycling`
                self._context.channel.send(DrainingEvent())
        deadline = self.loop.time() + seconds
        if not self._deadline or deadline < self._deadline:
            self._deadline = deadline
            self.loop.call_at(deadline, self.close)
        self._end_if_drained()

    def _waiting_clients(self) -> Waiting:
        """Which of the clients that wait are this worker's to take when it drains."""
        if not self._orphaned:
            return Waiting.OWN
        return Waiting.NONE if self._context.listeners_kept else Waiting.ALL

    def _notify(self, transports: Sequence[StreamTransport | HandedOver], spread: float) -> None:
        """Tells connections that the worker drains, evenly over so many seconds. When the first has its turn is random,
        as other workers drain at the same time.
        """
        first = random.random()  # noqa: S311
        for number, transport in enumerate(transports):
            if spread:
                self.loop.call_later(spread * (number + first) / len(transports), transport.notify_drain)
            else:
                transport.notify_drain()
                self.note_progress()

    def close(self) -> None:
        """Closes every connection, and ends."""
        self._hooks.hurry(CLOSE_TIMEOUT)
        if not self._draining:
            self.drain(0)
            return
        if self._closing:
            return
        self._closing = True
        self._tell_tasks("ending")
        if self._stats.active:
            log.info("closing open connections: %d", self._stats.active)
        for transport in transports_of(self.loop):
            transport.close_at_exit()
        self._datagrams.close()
        self.loop.call_later(CLOSE_TIMEOUT, self._end)
        self._end_if_drained()

    def connection_closed(self) -> None:
        """Lets the balance know, or ends when this was the last; called by the connections' counters."""
        if self._draining:
            self._end_if_drained()
        else:
            self._balance.connection_closed()

    def clean_up(self) -> None:
        """After the loop has stopped: ends what still runs on it, within bounded time, and calls the teardowns."""
        self._ended = True
        self._datagrams.abort()
        close_connections(self._streams)
        if self._hooks.have_work:
            self.loop.run_until_complete(self._hooks.tear_down(self._time_left(CLOSE_TIMEOUT)))
        end_tasks(self.loop)
        for stats in self._listener_stats:
            stats.reckon()

    def _time_left(self, least: float) -> float:
        """Seconds to the drain's deadline, but at least so many. The loop may stand still for so long, and is not to be
        taken for stuck before that time is over.
        """
        seconds = max(self._deadline - self.loop.time(), least)
        self._context.row[Field.HEARTBEAT] = monotonic_ns() + int(seconds * 1e9)
        return seconds

    def _finish(self) -> None:
        """Ends as an interpreter does, by the drain's deadline; told to close meanwhile, at once."""
        signal.signal(signals.CLOSE, lambda *_: os._exit(self.status))
        seconds = self._time_left(ORPHAN_FINISH if self._orphaned else LEAST_FINISH)
        set_title(self._settings.name, f"worker {self._context.slot} (ending)")
        finish_interpreter(seconds)
        if self._orphaned and self._settings.orphans == "end" and os.getpgrp() == os.getpid():
            # There is no master that would end what the handler has left.
            signal.signal(signals.DRAIN, signal.SIG_IGN)
            os.killpg(0, signals.DRAIN)

    def _end_if_drained(self) -> None:
        if not self._draining or self._ended or self._boot is not None:
            return
        if self._stats.active or not (self._servers is None or self._servers.have_stopped):
            return
        waits = self._waits_for_tasks()
        if self._datagrams.close_if_done() and not waits:
            self._end()

    def _waits_for_tasks(self) -> bool:
        """Whether tasks that have outlived their connections have time left."""
        if self._closing or not (tasks := self.loop.client_tasks()):
            return False
        next(iter(tasks)).add_done_callback(lambda _: self._end_if_drained())
        if self._telling is None:
            self._telling = self.loop.call_later(TELL_AFTER, self._tell_tasks, "waiting for")
        return True

    def _tell_tasks(self, what: str) -> None:
        tasks = self.loop.client_tasks()
        if self._stats.active:
            tasks -= self._streams.handler_tasks  # most of which serve them
        if tasks and not self._ended:
            log.info("%s tasks that have outlived their connections: %d (%s)", what, len(tasks), task_names(tasks))

    def _end(self) -> None:
        """Ends `run_forever`, once: asked again it would end what `clean_up` runs after it."""
        if not self._ended:
            self._ended = True
            self.loop.stop()


class RecycleLimits(Protocol):
    """What one worker may come to, as the settings have it; 0: no limit."""

    @property
    def connections(self) -> int:
        """Connections accepted."""

    @property
    def age(self) -> float:
        """Seconds since its start."""

    @property
    def memory(self) -> int:
        """Bytes of resident memory."""

    @property
    def jitter(self) -> float:
        """The fraction by which chance may lower each of these."""


class RecyclePolicy:
    """What one worker may come to, and whether it has.

    Args:
        limits: what is allowed at most.
        chance: from 0 to 1, drawn for each worker, so that those that were started together do not end together.

    Attributes:
        connections, age, memory: the worker's own limits; 0: none.
    """

    __slots__ = ("age", "connections", "memory")

    def __init__(self, limits: RecycleLimits, chance: float) -> None:
        part = 1 - limits.jitter * chance
        self.connections = max(int(limits.connections * part), min(limits.connections, 1))
        self.age = max(limits.age * part, min(limits.age, _LEAST_AGE))
        self.memory = max(int(limits.memory * part), min(limits.memory, 1))

    def check_start(self, memory: int) -> str:
        """Takes note of the memory of a worker that has served no client yet.

        If that is over the limit already, so will be that of the worker that replaces it, and there would be no end to
        it: then the limit is dropped.

        Returns:
            The sentence that says so; empty when all is well.
        """
        if not 0 < self.memory < memory:
            return ""
        limit, self.memory = self.memory, 0
        return (
            f"recycle.memory is ignored: a worker without clients has {_mebibytes(memory)} of memory, "
            f"and the limit is {_mebibytes(limit)}"
        )

    def reached(self, accepted: int, age: float, memory: int) -> str:
        """Which limit this worker has reached, in words; empty when none."""
        if 0 < self.connections <= accepted:
            return f"served {accepted} connections (limit {self.connections})"
        if 0 < self.age <= age:
            return f"{_duration(age)} old"
        if 0 < self.memory < memory:
            return f"{_mebibytes(memory)} of memory"
        return ""


def _mebibytes(size: int) -> str:
    return f"{size >> 20} MiB"


def _duration(seconds: float) -> str:
    """In hours and minutes, or below an hour in minutes and seconds; what is 0 is left out."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    parts = [(hour, "h"), (minute, "m")] if hour else [(minute, "m"), (second, "s")]
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"
