"""One client and no more: what a worker is to many, with a door in the place of accept. All later steps are shared.

`serve_one` runs a handler for the one client that comes through a door, and returns its verdict as an exit status. The
doors are in `doors` and `rendezvous`; the process around it is made by `app.once`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from forkd import drain, signals
from forkd.config.options import Settings
from forkd.serve.accept import Serve, Tally
from forkd.serve.datagrams import Datagrams
from forkd.serve.deadlines import Deadlines
from forkd.serve.ending import LAST_WORDS, clean_up, transports_of
from forkd.serve.handlers.host import host
from forkd.serve.handlers.load import Handler
from forkd.serve.loop import PollLoop
from forkd.serve.vigil import Vigil
from forkd.system.process import set_title
from forkd.system.scoreboard import Row

log = logging.getLogger("forkd.once")

#: Exit statuses; the last one is that of timeout(1).
DONE = 0
FAILED = 1
NOBODY_CAME = 124

#: Takes the client's non-blocking socket and address. The third is the descriptor of a listener, which the connection
#: may take over and which is closed else; -1 where there is none.
Enter = Callable[[socket.socket, Any, int], None]


class Door(Protocol):
    """Where the client comes in."""

    def open(self, loop: PollLoop, enter: Enter) -> None:
        """Lets a client in from now on; `enter` is called once, by the loop, when the door is closed again."""

    def close(self) -> None:
        """Lets nobody in any more."""

    def why_nobody(self) -> str:
        """What stood in the way of who did not come, to be read after a colon; empty where there is nothing to say."""


def serve_one(settings: Settings, handler: Handler, door: Door, seat: int, on_ready: Callable[[], None]) -> int:
    """Serves one client.

    Args:
        settings: of mode once.
        handler: what serves the client.
        door: where it comes in.
        seat: the descriptor number that the connection gets; -1: any.
        on_ready: called when the client can come; what it raises goes to the caller.

    Returns:
        The exit status: DONE, FAILED for an exception out of the handler, NOBODY_CAME; or what the handler has given
        to sys.exit.
    """
    loop = PollLoop()
    asyncio.set_event_loop(loop)
    one = OneClient(settings, handler, door, seat, loop)
    given: int | None = None
    try:
        one.begin()
        on_ready()
        loop.run_forever()
    except SystemExit as error:
        given = _status_of(error)
        loop.set_exception_handler(partial(_unless_is, error))
    finally:
        door.close()
        one.clean_up()
    return one.status if given is None else given


def _unless_is(known: SystemExit, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """As the loop's own exception handler, but for an exit: that its task has failed by it is no news."""
    if context.get("exception") is not known:
        loop.default_exception_handler(context)


def _status_of(error: SystemExit) -> int:
    """As Python's own: what sys.exit was given, and 1 for what is no number."""
    if error.code is None or isinstance(error.code, int):
        return int(error.code or 0) & 0xFF
    log.error("%s", error.code)
    return FAILED


class OneClient:
    """The process's state, before its client, with it, and after."""

    def __init__(self, settings: Settings, handler: Handler, door: Door, seat: int, loop: PollLoop) -> None:
        self._settings = settings
        self._door = door
        self._seat = seat
        self._loop = loop
        row = Row.of_nobody()
        self._tally = Tally(row)
        self._tally.on_closed = self._look_later
        loop.on_error = self._tally.failed
        self._conversations: set[asyncio.Task[None]] = set()  # streams handlers that have not returned
        self._datagrams = Datagrams(loop, row, lambda _: self._tally.closed())
        if handler.form == "datagram":
            self._serve: Serve = partial(self._serve_datagrams, handler)
        else:
            self._serve = host(
                handler,
                settings.listen[0],
                settings.listen[0].address,
                loop,
                self._tally,
                self._conversations,
                Deadlines(loop),
                access=settings.log.access,
            )
        self._expiry: asyncio.TimerHandle | None = None
        self._late = False
        self._draining = False
        self._ended = False

    @property
    def status(self) -> int:
        """The verdict."""
        if self._late:
            return NOBODY_CAME
        return FAILED if self._tally.errors else DONE

    def begin(self) -> None:
        """Opens the door."""
        for signum in (signals.DRAIN, signal.SIGINT):
            self._loop.add_signal_handler(signum, self._drain)
        self._loop.add_signal_handler(signals.CLOSE, self._close)
        set_title(self._settings.name, "once (waiting)")
        if self._settings.once.timeout:
            self._expiry = self._loop.call_later(self._settings.once.timeout, self._expired)
        self._door.open(self._loop, self._enter)

    def _enter(self, sock: socket.socket, peer: Any, vacant: int) -> None:
        self._cancel_expiry()
        taken = self._seat if self._seat >= 0 else vacant if self._settings.once.adopt else -1
        if taken >= 0:
            sock = _seated(sock, taken)
        if vacant not in (-1, taken):
            os.close(vacant)
        log.info("serves %s", peer or "its client")
        set_title(self._settings.name, "once (serving)")
        self._tally.opened()
        self._serve(sock, peer)

    def _serve_datagrams(self, handler: Handler, sock: socket.socket, peer: Any) -> None:
        listener = self._settings.listen[0]
        try:
            transport = self._datagrams.serve_socket(sock, listener, handler, str(listener.address), peer=peer)
        except Exception as error:  # noqa: BLE001 (the handler's border)
            sock.close()
            self._loop.call_exception_handler({"message": "The handler could not begin.", "exception": error})
            self._tally.closed()
        else:
            Vigil(transport, listener, self._loop)

    def _expired(self) -> None:
        self._late = True
        reason = self._door.why_nobody()
        log.warning("nobody came within %g s%s", self._settings.once.timeout, f": {reason}" if reason else "")
        self._end()

    def _cancel_expiry(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()

    # The end

    def _look_later(self) -> None:
        # A streams handler whose client is gone at once has its first turn yet to come, and is then to be waited for.
        self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Ends when the client has gone and its handler has said its last."""
        if self._tally.active:
            return
        if self._conversations:
            next(iter(self._conversations)).add_done_callback(lambda _: self._look_later())
        else:
            self._end()

    def _end(self) -> None:
        """Ends `run_forever`, once: asked again it would end what `clean_up` runs after it."""
        if not self._ended:
            self._ended = True
            self._loop.stop()

    def _drain(self) -> None:
        """On TERM and INT: lets in nobody; ends when the client has gone, or when its time is up. At once the second
        time.
        """
        if self._draining:
            self._close()
            return
        self._draining = True
        self._door.close()
        self._cancel_expiry()
        drain.begin()
        for transport in transports_of(self._loop):
            transport.ask_to_end()
        self._datagrams.drain(self._datagrams_end)
        self._loop.call_later(self._settings.drain_timeout, self._close)
        self._look_later()

    def _datagrams_end(self) -> None:
        if self._datagrams.settled() and self._tally.active:
            self._tally.closed()

    def _close(self) -> None:
        self._door.close()
        for transport in transports_of(self._loop):
            transport.close()
        self._datagrams.close()
        self._loop.call_later(LAST_WORDS if self._tally.active else 0, self._end)

    def clean_up(self) -> None:
        """After the loop has stopped: ends what still runs on it, and gives the signals back."""
        self._ended = True
        self._tally.on_closed = None
        self._datagrams.abort()
        clean_up(self._loop, self._conversations)
        for signum in (signals.DRAIN, signal.SIGINT, signals.CLOSE):
            with contextlib.suppress(ValueError):
                self._loop.remove_signal_handler(signum)


def _seated(sock: socket.socket, number: int) -> socket.socket:
    """The same socket under another descriptor number, which programs that the handler starts inherit (dup2(2))."""
    if sock.fileno() == number:
        os.set_inheritable(number, True)
        return sock
    family, kind, protocol = sock.family, sock.type, sock.proto
    os.dup2(sock.fileno(), number)
    sock.close()
    seated = socket.socket(family, kind, protocol, number)
    seated.setblocking(False)
    return seated
