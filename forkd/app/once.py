"""Single-connection mode put together: one client, one process, in the background or in the foreground.

In the background the starting process binds and forks, and closes its copy of the listener, so that the child alone
decides when no further client is accepted; the starting process ends when the child is ready. An inherited socket is
always served by this process itself. `cli.once` calls `start_once` and `run_once`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from forkd.app.detach import FINISH_SECONDS, Launcher, fork_off
from forkd.config.address import Address
from forkd.config.settings import Settings
from forkd.config.values import UNIX
from forkd.errors import BootError, ForkdError
from forkd.messages import OnceReady
from forkd.serve.handler_forks import leave_at_fork
from forkd.serve.import_paths import assume_identity
from forkd.serve.once.server import serve_one
from forkd.serve.once.sources import AcceptedSource, ConnectionSource, FirstSenderSource, ListeningSource, client_check
from forkd.serve.stream.tls import load_certificates, load_contexts
from forkd.system.identity import find_identity
from forkd.system.inherited import address_of, check_inherited, is_connected, is_listening, take_inherited
from forkd.system.listeners import BoundListener, bind_listener
from forkd.system.logs import log_target, open_log, set_role, start_logging
from forkd.system.pidfile import PidFile
from forkd.system.proc import need_proc
from forkd.system.process import finish_interpreter, leave_terminal
from forkd.system.socket_options import option_warnings, tune
from forkd.system.tls_files import expiry_warning
from forkd.system.working_directory import enter_directory, starting_directory

if TYPE_CHECKING:
    from forkd.config.values import Network

log = logging.getLogger("forkd.once")


@dataclass(frozen=True, slots=True)
class PreparedSource:
    """A source that is not open yet, and what is known of it.

    Attributes:
        source: where the client comes from.
        target_fd: the descriptor number that the connection gets; -1: any.
        state: as of `OnceReady`; empty for a connection that is there already.
        address: as of `OnceReady`.
        release: closes what the starting process, which does not serve, has of it.
        follow_fork: called in the child that serves, which is to remove what the starting process has made.
        inherited: the address of an inherited socket, which decides what its handler is to serve.
        standard_fds: those of 0, 1 and 2 that led to the client, and lead to /dev/null now.
        lacking: what of the addresses of its host's name this machine lacks.
    """

    source: ConnectionSource
    target_fd: int
    state: str
    address: str
    release: Callable[[], None] = lambda: None
    follow_fork: Callable[[], None] = lambda: None
    inherited: Address | None = None
    standard_fds: frozenset[int] = frozenset()
    lacking: tuple[str, ...] = ()


def start_once(settings: Settings) -> OnceReady:
    """Starts a process for one client in the background; returns when the client can come.

    Raises:
        ForkdError: the process could not come up, with its own reason.
    """
    need_proc()
    starting_directory()
    settings = _with_default_timeout(settings)
    enter_directory(settings)
    file = log_target(settings, detached=True)
    assert file is not None  # noqa: S101 (a detached process has a log file)
    prepared = _prepare(settings)  # before anything else is opened, which could get the descriptor number it wants
    try:
        descriptor = open_log(file, find_identity(settings))
        child = fork_off(lambda launcher: _detached(settings, prepared, descriptor, launcher))
        prepared.release()
        return child.wait_ready(OnceReady, settings.boot_timeout)
    except ForkdError:
        prepared.source.close()  # a child that was killed could not do so
        raise


def run_once(settings: Settings, on_ready: Callable[[OnceReady], None]) -> int:
    """Serves one client in this process; the exit status.

    Args:
        settings: of mode once.
        on_ready: called when the client can come; not for a connection that was inherited.

    Raises:
        ForkdError: it could not come up.
    """
    need_proc()
    starting_directory()
    settings = _with_default_timeout(settings)
    enter_directory(settings)
    prepared = _prepare(settings)
    tells = prepared.state and 1 not in prepared.standard_fds
    try:
        # Standard error that leads to the client is no place for a log.
        file = log_target(settings, detached=2 in prepared.standard_fds)
        descriptor = 2 if file is None else open_log(file, find_identity(settings))
        start_logging(settings.name, settings.log.level, settings.log.form, descriptor)
        return _serve(settings, prepared, lambda ready: on_ready(ready) if tells else None)
    except ForkdError as error:
        prepared.source.close()
        if 2 in prepared.standard_fds:  # standard error leads nowhere
            log.error("\n".join([str(error), *getattr(error, "details", "").splitlines()]))
        raise


def is_inherited(settings: Settings) -> bool:
    """Whether this process was started with its client's connection, or with a listener; then no child can serve it."""
    return settings.listen[0].address.scheme == "fd"


def _with_default_timeout(settings: Settings) -> Settings:
    """The settings with the timeout that a rendezvous has by default."""
    if settings.once.rendezvous is None or settings.once.timeout is not None:
        return settings
    from forkd.serve.once.rendezvous import DEFAULT_TIMEOUT  # noqa: PLC0415 (loaded only where it is used)

    return replace(settings, once=replace(settings.once, timeout=DEFAULT_TIMEOUT))


# The source


def _prepare(settings: Settings) -> PreparedSource:
    """Where the client is to come from, bound but not open yet. Raises ForkdError."""
    once, listener = settings.once, settings.listen[0]
    if is_inherited(settings):
        return _inherit(settings)
    target_fd = -1
    if once.fd is not None:
        target_fd = once.fd
        _reserve(target_fd)
    if once.rendezvous is not None:
        from forkd.serve.once.rendezvous import Rendezvous  # noqa: PLC0415 (loaded only where it is used)

        rendezvous = Rendezvous(listener, once.rendezvous)
        return PreparedSource(rendezvous, target_fd, "connecting", str(rendezvous.address), rendezvous.release)
    bound = bind_listener(replace(listener, backlog=1))
    source, address = _source_of(bound, once.from_), str(bound.address)
    return PreparedSource(
        source, target_fd, "listening", address, bound.close, bound.follow_fork, lacking=bound.lacking
    )


def _inherit(settings: Settings) -> PreparedSource:
    once, listener = settings.once, settings.listen[0]
    found = take_inherited(listener.address)
    first, standard_fds = found[0], frozenset[int]().union(*(one.standard for one in found))
    # One that stood at a standard descriptor was moved; `once.adopt` wants the connection there again.
    target_fd = once.fd if once.fd is not None else first.number if once.adopt and first.number < 3 else -1
    if target_fd >= 0 and target_fd not in {one.number for one in found}:
        _reserve(target_fd)
    for one in found:
        tune(one.sock, listener)
    if once.from_ and first.sock.family == socket.AF_UNIX and UNIX not in listener.proxy_protocol:
        raise ForkdError(f"once.from: means where a tcp client comes from, and {listener.address} is a unix socket")
    if listener.proxy_protocol and not is_listening(first.sock):
        why = "a header is read from connections that this process accepts, and this socket does not listen"
        raise ForkdError(f"{listener.address}: proxy_protocol: {why}")
    address = address_of(first.sock)
    if is_listening(first.sock) or (first.sock.type == socket.SOCK_DGRAM and not is_connected(first.sock)):
        bound = BoundListener(listener, address, [one.sock for one in found])
        check_inherited(listener, bound.sockets)
        source, state, text = _source_of(bound, once.from_), "listening", str(address)
    else:
        _check_peer(settings, first.sock)
        source, state, text = AcceptedSource(first.sock), "", ""
    return PreparedSource(source, target_fd, state, text, inherited=address, standard_fds=standard_fds)


def _source_of(bound: BoundListener, networks: Sequence[Network]) -> ConnectionSource:
    return FirstSenderSource(bound, networks) if bound.address.takes_datagrams else ListeningSource(bound, networks)


def _check_peer(settings: Settings, sock: socket.socket) -> None:
    """Checks the client of an inherited connection. Raises ForkdError for one that may not come."""
    once, listener = settings.once, settings.listen[0]
    if once.from_ or listener.allow or listener.deny:
        peer = sock.getpeername()
        if not client_check(listener, once.from_)(peer):
            text = peer[0] if isinstance(peer, tuple) else "without an address"
            raise ForkdError(f"refused client {text}: it is not in once.from, or not in the listener's networks")


def _reserve(number: int) -> None:
    """Holds the descriptor number that the connection is to get, so that nothing else is opened there."""
    if number > 2:
        with contextlib.suppress(OSError):
            os.fstat(number)
            raise ForkdError(f"once.fd: descriptor {number} is open already; take another one")
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if null == number:
        return
    try:
        os.dup2(null, number, inheritable=False)
    except OSError as error:
        raise ForkdError(f"once.fd: {number} can't be had: {error.strerror} (ulimit -n)") from None
    finally:
        os.close(null)


# The process


def _detached(settings: Settings, prepared: PreparedSource, descriptor: int, launcher: Launcher) -> int:
    """The child: leaves the session, terminal and descriptors of the starting process, and serves."""
    os.setsid()
    prepared.follow_fork()
    kept = {launcher.writer, descriptor}
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for number, to in ((0, null), (1, descriptor), (2, descriptor)):
        os.dup2(to, number)
    os.close(null)
    for number in map(int, os.listdir("/dev/fd")):
        # What the starting process got by its exec. What Python opens is not inheritable.
        with contextlib.suppress(OSError):
            if number > 2 and number not in kept and os.get_inheritable(number):
                os.close(number)
    start_logging(settings.name, settings.log.level, settings.log.form, descriptor)

    def tell(ready: OnceReady) -> None:
        if not launcher.tell(ready):
            raise BootError("the starting process did not wait for it")

    status = _serve(settings, prepared, tell)
    finish_interpreter(max(settings.drain_timeout, FINISH_SECONDS))
    return status


def _load_certificates(settings: Settings) -> None:
    """Reads the certificates as long as this process may, and warns of those that end soon. Raises ForkdError."""
    load_certificates(settings)
    for listener in settings.listen:
        contexts = load_contexts(listener)
        for one in contexts.certificates if contexts is not None else ():
            if warning := expiry_warning(one["file"], one["expires"] - time.time()):
                log.warning("listener %s: %s", listener.address, warning)


def _serve(settings: Settings, prepared: PreparedSource, on_ready: Callable[[OnceReady], None]) -> int:
    set_role("once")
    for lacking in (*option_warnings(settings), *prepared.lacking):
        log.warning("%s", lacking)
    try:
        identity = find_identity(settings)
        with _pid_file(settings) as write_pid:
            leave_at_fork(settings.name, "once", prepared.release)
            _load_certificates(settings)
            if identity.uid not in (None, os.geteuid()):
                leave_terminal()
            assume_identity(settings, identity)  # as a worker does: no code of the handler runs as the starting user
            address = prepared.inherited or settings.listen[0].address

            def ready() -> None:
                write_pid()
                on_ready(OnceReady(prepared.state, prepared.address, os.getpid()))

            return serve_one(settings, address, prepared.source, prepared.target_fd, ready)
    finally:
        prepared.source.close()


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
        except PermissionError:  # the process is another user's by now; without its lock the file says nothing
            log.warning("can't remove the pid file %s as this user", settings.once.pid_file)
