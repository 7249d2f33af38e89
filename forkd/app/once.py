"""Single-connection mode put together: one client, one process, in the background or in the foreground.

In the background the starter binds and forks, and gives its copy of the listener up, so that the child alone decides
when nobody is let in any more; it ends when the child is ready. What was inherited is served by the process itself.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forkd.app.launcher import Launcher, fork_off
from forkd.app.whereabouts import enter_directory, log_target
from forkd.config.address import Address
from forkd.config.options import Settings
from forkd.errors import BootError, ForkdError, HandlerError
from forkd.serve.doors import Connected, FirstSender, Listening, welcoming
from forkd.serve.handlers.load import Handler, import_handlers
from forkd.serve.once import Door, serve_one
from forkd.serve.settle import settle
from forkd.system.bound import BoundListener
from forkd.system.identity import find_identity
from forkd.system.inherited import address_of, is_connected, is_listening, take_inherited
from forkd.system.logs import open_log, set_role, start_logging
from forkd.system.pidfile import PidFile
from forkd.system.sockets import bind_listener
from forkd.system.tuning import shortcomings, tune

if TYPE_CHECKING:
    from forkd.config.units import Network

log = logging.getLogger("forkd.once")


@dataclass(frozen=True, slots=True)
class Ready:
    """What is told when the client can come.

    Attributes:
        doing: what the process does at the address: `listening`, or `connecting` from there.
        address: where.
        pid: the process.
    """

    doing: str
    address: str
    pid: int


@dataclass(frozen=True, slots=True)
class Entrance:
    """A door, and what is known of it before it is opened.

    Attributes:
        door: the door.
        seat: the descriptor number that the connection is to get; -1: any.
        doing: as of `Ready`; empty for a connection that is there already.
        address: as of `Ready`.
        leave: closes what a process has of it that is not to serve.
        where: the address of an inherited socket, by which it is told what is served there.
        standard: those of 0, 1 and 2 that led to the client, and lead nowhere now.
    """

    door: Door
    seat: int
    doing: str
    address: str
    leave: Callable[[], None] = lambda: None
    where: Address | None = None
    standard: frozenset[int] = frozenset()


def start_once(settings: Settings) -> Ready:
    """Starts a process for one client in the background; returns when it could come.

    Raises:
        ForkdError: it could not come up, with its own reason.
    """
    settings = _completed(settings)
    enter_directory(settings)
    file = log_target(settings, detached=True)
    assert file is not None  # noqa: S101 (what is detached has one)
    entrance = _entrance(settings)  # before anything else is opened, which could get the descriptor number it wants
    try:
        descriptor = open_log(file)
        child = fork_off(lambda launcher: _detached(settings, entrance, descriptor, launcher))
        entrance.leave()
        return Ready(**child.hear(settings.boot_timeout))
    except ForkdError:
        entrance.door.close()  # a child that was killed could not do so
        raise


def run_once(settings: Settings, on_ready: Callable[[Ready], None]) -> int:
    """Serves one client in this process; the exit status.

    Args:
        settings: of mode once.
        on_ready: told when the client can come; not for a connection that was inherited.

    Raises:
        ForkdError: it could not come up.
    """
    settings = _completed(settings)
    enter_directory(settings)
    entrance = _entrance(settings)
    told = entrance.doing and 1 not in entrance.standard
    try:
        # Standard error that leads to the client is no place for a log.
        file = log_target(settings, detached=2 in entrance.standard)
        start_logging(settings.name, settings.log.level, settings.log.form, 2 if file is None else open_log(file))
        return _serve(settings, entrance, lambda ready: on_ready(ready) if told else None)
    except ForkdError as error:
        entrance.door.close()
        if 2 in entrance.standard:  # there is nobody who could see it otherwise
            log.error("\n".join([str(error), *getattr(error, "details", "").splitlines()]))
        raise


def is_inherited(settings: Settings) -> bool:
    """Whether this process was started with its client, or with where to wait for it: it can't then send a child."""
    return settings.listen[0].address.scheme == "fd"


def _completed(settings: Settings) -> Settings:
    """The settings with those defaults that depend on others."""
    if settings.once.rendezvous is None or settings.once.timeout is not None:
        return settings
    from forkd.serve.rendezvous import PATIENCE  # noqa: PLC0415 (who goes to none does not pay for it)

    return replace(settings, once=replace(settings.once, timeout=PATIENCE))


def _reserve(number: int) -> None:
    """Holds the descriptor number that the connection is to get, so that nothing else is opened there."""
    if number > 2:
        with contextlib.suppress(OSError):
            os.fstat(number)
            raise ForkdError(f"once.fd: descriptor {number} is open already; take another one")
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if nowhere == number:
        return
    try:
        os.dup2(nowhere, number, inheritable=False)
    except OSError as error:
        raise ForkdError(f"once.fd: {number} can't be had: {error.strerror} (ulimit -n)") from None
    finally:
        os.close(nowhere)


def _entrance(settings: Settings) -> Entrance:
    """Where the client is to come in, bound but not open yet. Raises ForkdError."""
    once, listener = settings.once, settings.listen[0]
    if is_inherited(settings):
        return _inherited(settings)
    seat = -1
    if once.fd is not None:
        seat = once.fd
        _reserve(seat)
    if once.rendezvous is not None:
        from forkd.serve.rendezvous import Rendezvous  # noqa: PLC0415 (as above)

        meeting = Rendezvous(listener, once.rendezvous)
        return Entrance(meeting, seat, "connecting", str(meeting.address), meeting.leave)
    bound = bind_listener(replace(listener, backlog=1))
    return Entrance(_door(bound, once.from_), seat, "listening", str(bound.address), bound.close)


def _door(bound: BoundListener, networks: Sequence[Network]) -> Door:
    return FirstSender(bound, networks) if bound.address.takes_datagrams else Listening(bound, networks)


def _inherited(settings: Settings) -> Entrance:
    once, listener = settings.once, settings.listen[0]
    found = take_inherited(listener.address)
    first, standard = found[0], frozenset[int]().union(*(one.standard for one in found))
    # One that stood at a standard descriptor was moved; whoever wants to adopt it wants it there.
    seat = once.fd if once.fd is not None else first.number if once.adopt and first.number < 3 else -1
    if seat >= 0 and seat not in {one.number for one in found}:
        _reserve(seat)
    for one in found:
        tune(one.sock, listener)
    if once.from_ and first.sock.family == socket.AF_UNIX:
        raise ForkdError(f"once.from: means where a tcp client comes from, and {listener.address} is a unix socket")
    if is_listening(first.sock) or (first.sock.type == socket.SOCK_DGRAM and not is_connected(first.sock)):
        bound = BoundListener(listener, address_of(first.sock), [one.sock for one in found])
        return Entrance(
            _door(bound, once.from_), seat, "listening", str(bound.address), where=bound.address, standard=standard
        )
    if once.from_ or listener.allow or listener.deny:
        peer = first.sock.getpeername()
        if not welcoming(listener, once.from_)(peer):
            who = peer[0] if isinstance(peer, tuple) else "a client without an address"
            raise ForkdError(f"turned away {who}, which is not of once.from, or not of the listener's networks")
    return Entrance(Connected(first.sock), seat, "", "", where=address_of(first.sock), standard=standard)


def _detached(settings: Settings, entrance: Entrance, descriptor: int, launcher: Launcher) -> int:
    """The child: leaves its starter's session, terminal and descriptors, and serves."""
    os.setsid()
    kept = {launcher.writer, descriptor}
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number, to in ((0, nowhere), (1, descriptor), (2, descriptor)):
        os.dup2(to, number)
    os.close(nowhere)
    for number in map(int, os.listdir("/dev/fd")):
        # What came to the starter by its exec. What Python opens is not inheritable.
        with contextlib.suppress(OSError):
            if number > 2 and number not in kept and os.get_inheritable(number):
                os.close(number)
    start_logging(settings.name, settings.log.level, settings.log.form, descriptor)

    def tell(ready: Ready) -> None:
        if not launcher.say({"doing": ready.doing, "address": ready.address, "pid": ready.pid}):
            raise BootError("whoever started it did not wait for it")

    status = _serve(settings, entrance, tell)
    sys.stdout.flush()
    return status


def _serve(settings: Settings, entrance: Entrance, on_ready: Callable[[Ready], None]) -> int:
    set_role("once")
    for short in shortcomings(settings):
        log.warning("%s", short)
    try:
        identity = find_identity(settings)
        with _pid_file(settings) as write_pid:
            settle(settings, identity)  # as a worker does: nothing of the user's runs as who started it
            handler = _handler(settings, entrance.where)

            def ready() -> None:
                write_pid()
                on_ready(Ready(entrance.doing, entrance.address, os.getpid()))

            return serve_one(settings, handler, entrance.door, entrance.seat, ready)
    finally:
        entrance.door.close()


def _handler(settings: Settings, where: Address | None) -> Handler:
    handler = next(import_handlers(settings, [] if where is None else [where]))
    if isinstance(handler, HandlerError):
        raise handler
    return handler


@contextlib.contextmanager
def _pid_file(settings: Settings) -> Iterator[Callable[[], None]]:
    """Makes the pid file, if there is to be one; yields what writes it; removes it at the end. Raises ForkdError."""
    if settings.once.pid_file is None:
        yield lambda: None
        return
    file = PidFile(settings.once.pid_file, settings.name)
    file.acquire()
    try:
        yield file.write
    finally:
        try:
            file.remove()
        except PermissionError:  # the process has become another user since; without its lock the file says nothing
            log.warning("can't remove the pid file %s as this user", settings.once.pid_file)
