"""One client and no more: what a worker is to many, with a `ConnectionSource` in the place of accept.

`serve_one` serves the one client that a source hands over, and returns the exit status. The sources are in `sources`
and `rendezvous`; `app.once` makes the process around it. All that comes after the accept is shared with workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from contextvars import copy_context
from math import inf
from typing import TYPE_CHECKING, Any

from forkd import drain, signals, worker
from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.errors import BootError
from forkd.serve.accept.acceptor import ConnectionStats, Serve
from forkd.serve.accept.access import format_peer
from forkd.serve.datagram.server import DatagramServer
from forkd.serve.datagram.transport import DatagramTransport
from forkd.serve.deadlines import ConnectionActivity, Deadlines, TimeoutPolicy, timeout_error
from forkd.serve.handler_forks import leave_loop_at_fork
from forkd.serve.handlers import Handler, import_all, make_handler
from forkd.serve.hooks import Hooks, boot_deadline, keep_variables
from forkd.serve.loop import PollLoop
from forkd.serve.once.sources import ConnectionSource
from forkd.serve.stream.server import CLOSE_TIMEOUT, close_connections, end_tasks, stream_server, transports_of
from forkd.serve.stream.transport import ServerContext
from forkd.system.logs import attach_log, detach_log
from forkd.system.process import set_title
from forkd.system.scoreboard import Row

if TYPE_CHECKING:
    from forkd.serve.stream.whole_server import OneClientServer

log = logging.getLogger("forkd.once")

#: Checks of a client within the shortest of its timeouts.
_CHECKS = 4

#: Exit statuses; the last one is that of timeout(1).
DONE = 0
FAILED = 1
NO_CLIENT = 124


def serve_one(
    settings: Settings, address: Address, source: ConnectionSource, target_fd: int, on_ready: Callable[[], None]
) -> int:
    """Serves one client.

    Args:
        settings: of mode once.
        address: where the client really comes to.
        source: where the client comes from.
        target_fd: the descriptor number that the connection gets; -1: any.
        on_ready: called when the client can come; what it raises goes to the caller.

    Returns:
        The exit status: DONE, FAILED for an exception out of the handler, NO_CLIENT; or what the handler has given to
        sys.exit.
    """
    server = OnceServer(settings, address, source, target_fd)
    try:
        server.begin()
        on_ready()
        attach_log(server.loop)
        server.loop.run_forever()
    finally:
        if not server.loop.is_forked:
            source.close()
            server.clean_up()
            detach_log()
    return server.status


def _status_of(error: SystemExit) -> int:
    """As Python's own: what sys.exit was given, and 1 for what is no number."""
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0) & 0xFF
    log.error("%s", error.code)
    return FAILED


class OnceServer:
    """The state of a process that serves one client: before it comes, with it, and after.

    Args:
        settings, address, source, target_fd: as of `serve_one`.

    Attributes:
        loop: the process's loop.
    """

    def __init__(self, settings: Settings, address: Address, source: ConnectionSource, target_fd: int) -> None:
        self._settings = settings
        self._address = address
        self._source = source
        self._target_fd = target_fd
        row = Row.unshared()
        self._stats = ConnectionStats(row, self)
        self.loop = loop = PollLoop(self._stats.failed, self._exit)
        leave_loop_at_fork(loop)
        asyncio.set_event_loop(loop)
        self._context = ServerContext(loop, self._stats, Deadlines(loop), access_log=settings.log.access)
        self._datagrams = DatagramServer(loop, row, lambda _: self._stats.closed(), self._datagrams_progress)
        self._hooks = Hooks(loop)
        self._boot: asyncio.Task[Handler] | None = None  # until the client can come
        self._serve: Serve = self._serve_datagrams
        self._server: OneClientServer | None = None  # where the handler is a whole server
        self._expiry: asyncio.TimerHandle | None = None
        self._expired = False
        self._exit_status: int | None = None  # as the handler has given it to sys.exit
        self._draining = False
        self._deadline: float | None = None  # of the drain
        self._ended = False

    @property
    def status(self) -> int:
        """The exit status."""
        if self._exit_status is not None:
            return self._exit_status
        if self._expired:
            return NO_CLIENT
        return FAILED if self._stats.errors else DONE

    def begin(self) -> None:
        """Boots on the loop, and opens the source. Raises ForkdError."""
        listener = self._settings.listen[0]
        context = copy_context()
        self._boot = self.loop.create_task(self._boot_on_loop(), context=context)
        try:
            self._handler = self.loop.run_until_complete(self._boot)
        except asyncio.CancelledError:
            raise BootError("it was told to end before it was ready") from None
        finally:
            self._boot = None
        keep_variables(context)
        if self._server is not None:
            self._serve = self._server
        elif self._handler.form != "datagram":
            self._serve = stream_server(self._handler, listener, listener.address, self._context)
        self.loop.note_background()
        set_title(self._settings.name, "once (waiting)")
        if self._settings.once.timeout:
            self._expiry = self.loop.call_later(self._settings.once.timeout, self._expire)
        self._source.open(self.loop, self._on_connection)

    async def _boot_on_loop(self) -> Handler:
        """The steps that are done inside the running loop, as of `boot`; the handler."""
        settings, since = self._settings, self.loop.time()
        worker.begin(slot=1, name=settings.name, generation=1, loop=self.loop)
        (handler, *_), hooks = import_all(settings, [self._address])
        self._take_signals()
        self._hooks = Hooks(self.loop, hooks)
        await self._hooks.set_up(settings.boot_timeout, since)
        handler = make_handler(handler, settings.listen[0], self._address)
        if handler.form == "server":
            from forkd.serve.stream.whole_server import OneClientServer  # noqa: PLC0415 (where there is one)

            self._server = OneClientServer(self._context, settings.listen[0], self._address, handler, self._end_later)
            await self._server.start(boot_deadline(settings.boot_timeout, since))
            self._take_signals()  # some libraries' servers want to end by themselves
        return handler

    def _take_signals(self) -> None:
        """Has the signals to end come here, also where a handler's code has taken them."""
        for signum in (signals.DRAIN, signal.SIGINT):
            self.loop.add_signal_handler(signum, self._drain)
        self.loop.add_signal_handler(signals.CLOSE, self._close)

    def clean_up(self) -> None:
        """After the loop has stopped: ends what still runs on it, calls the teardowns, and gives the signals back."""
        self._ended = True
        self._datagrams.abort()
        close_connections(self._context)
        if self._hooks.have_work:
            seconds = self._settings.drain_timeout if self._deadline is None else self._deadline - self.loop.time()
            self.loop.run_until_complete(self._hooks.tear_down(max(seconds, CLOSE_TIMEOUT)))
        end_tasks(self.loop)
        for signum in (signals.DRAIN, signal.SIGINT, signals.CLOSE):
            with contextlib.suppress(ValueError):
                self.loop.remove_signal_handler(signum)

    def _on_connection(self, sock: socket.socket, peer: Any, listener_fd: int) -> None:
        self._cancel_expiry()
        target_fd = self._target_fd
        if target_fd < 0 and self._settings.once.adopt:
            target_fd = listener_fd
        if target_fd >= 0:
            sock = _move_to(sock, target_fd)
        if listener_fd not in (-1, target_fd):
            os.close(listener_fd)
        log.info("serving client %s", format_peer(peer))
        set_title(self._settings.name, "once (serving)")
        self._stats.opened()
        self._serve(sock, peer)

    def _serve_datagrams(self, sock: socket.socket, peer: Any) -> None:
        listener = self._settings.listen[0]
        try:
            transport = self._datagrams.serve_client(sock, peer, self._handler, listener)
        except BaseException as error:  # noqa: BLE001 (the handler's border)
            sock.close()
            self.loop.call_exception_handler({"message": "The handler could not begin.", "exception": error})
            self._stats.closed()
        else:
            ClientDeadlines(transport, listener, self.loop)

    def _expire(self) -> None:
        self._expired = True
        reason = self._source.last_error()
        log.warning("no client came within %g s%s", self._settings.once.timeout, f": {reason}" if reason else "")
        self._end()

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    # The end

    def connection_closed(self) -> None:
        """Ends soon, if that was all; called by the connections' counters."""
        if not self._ended:
            self._end_later()

    def _end_later(self) -> None:
        # A streams handler whose client is gone at once has its first turn yet to come, and is then to be waited for.
        self.loop.call_soon(self._end_if_done)

    def _end_if_done(self) -> None:
        """Ends when the client has gone and its streams handler has returned, or its server has stopped."""
        if self._stats.active:
            return
        self._stop_server()
        if self._context.handler_tasks:
            next(iter(self._context.handler_tasks)).add_done_callback(lambda _: self._end_later())
        else:
            self._end()

    def _stop_server(self) -> None:
        if self._server is not None:
            drain.begin()
            self._server.stop()

    def _end(self) -> None:
        """Ends `run_forever`, once: a second call would end what `clean_up` runs after it."""
        if not self._ended:
            self._ended = True
            self.loop.stop()

    def _exit(self, error: SystemExit) -> None:
        """Ends, since the handler has called sys.exit; the first call decides."""
        if self._exit_status is None:
            self._exit_status = _status_of(error)
        self._end()

    def _drain(self) -> None:
        """On TERM and INT: takes no client; ends when the one that is here has gone, or after `drain_timeout`. The
        second signal closes the client at once.
        """
        if self._boot is not None:
            drain.begin()
            self._boot.cancel()
            return
        if self._draining:
            self._close()
            return
        self._draining = True
        self._deadline = self.loop.time() + self._settings.drain_timeout
        self._source.close()
        self._cancel_expiry()
        drain.begin()
        for transport in transports_of(self.loop):
            transport.notify_drain()
        self._datagrams.drain()
        self._stop_server()
        self.loop.call_later(self._settings.drain_timeout, self._close)
        self._end_later()

    def _datagrams_progress(self) -> None:
        if self._datagrams.close_if_done() and self._stats.active:
            self._stats.closed()

    def _close(self) -> None:
        if self._boot is not None:
            self._drain()
            return
        self._hooks.hurry(CLOSE_TIMEOUT)
        self._source.close()
        for transport in transports_of(self.loop):
            transport.close_at_exit()
        self._datagrams.close()
        self.loop.call_later(CLOSE_TIMEOUT if self._stats.active else 0, self._end)


class ClientDeadlines:
    """The deadlines of a client that sends datagrams: `timeouts.idle` and `timeouts.lifetime` close its transport.

    A worker's datagram sockets have no deadlines: without a beginning and an end nothing can be too late.

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
        self._timeouts = TimeoutPolicy(listener, deadlines)
        if self._timeouts.first_check:
            deadlines.watch(self, self._opened + self._timeouts.first_check / _CHECKS)

    def check(self, now: float) -> float:
        """As `deadlines.Watched`."""
        if self._transport.is_closing():
            return 0.0
        # A datagram's time is when it was counted, which asking for the peers does. So this looks several times before
        # the deadline.
        last = max((one.last for one in self._transport.recent()), default=self._opened)
        activity = ConnectionActivity(self._opened, has_received=True, last_received=last, last_sent=last)
        when, kind = self._timeouts.deadline(activity)
        if now >= when:
            self._transport.end(timeout_error(kind, activity, now))
            return 0.0
        return 0.0 if when == inf else min(when, now + self._timeouts.first_check / _CHECKS)

    def __lt__(self, other: object) -> bool:
        return id(self) < id(other)


def _move_to(sock: socket.socket, number: int) -> socket.socket:
    """The same socket at another descriptor number, which programs that the handler starts inherit (dup2(2))."""
    if sock.fileno() == number:
        os.set_inheritable(number, True)
        return sock
    family, kind, protocol = sock.family, sock.type, sock.proto
    os.dup2(sock.fileno(), number)
    sock.close()
    moved = socket.socket(family, kind, protocol, number)
    moved.setblocking(False)
    return moved
