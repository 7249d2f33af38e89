"""The daemon put together, and run in the foreground."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forkd.app.prepare import prepare, warn
from forkd.app.whereabouts import enter_directory, log_target, run_directory
from forkd.config.options import Settings
from forkd.config.units import MOST_WORKERS
from forkd.errors import BootError, HandlerError
from forkd.master.control import ControlSocket
from forkd.master.errands import Errands
from forkd.master.generation import Generation, wanted_workers
from forkd.master.heritage import Heritage, Place
from forkd.master.master import Master
from forkd.system.bound import BoundListener
from forkd.system.channel import Channel
from forkd.system.identity import find_identity
from forkd.system.logs import open_log, start_logging
from forkd.system.pidfile import RunDirectory, make_private_directory
from forkd.system.process import close_all_but
from forkd.system.scoreboard import Row, Scoreboard
from forkd.system.sockets import bind_all
from forkd.system.store import bind_stored

log = logging.getLogger("forkd")

#: Reads the settings anew, as the command line that started the daemon means them. Raises ForkdError.
Reread = Callable[[], Settings]


@dataclass(slots=True)
class Legacy:
    """What a running master lends to the one that is to succeed it.

    Attributes:
        lock: the descriptor that holds the pid file's lock.
        bound: its listeners; their settings say no more than where they listen.
        connection: to its control socket; when everybody who has it has closed it, the master looks whether it has been
            succeeded. -1 when this process has.
    """

    lock: int
    bound: Sequence[BoundListener]
    connection: int

    def hang_up(self) -> None:
        """Closes the connection in this process."""
        if self.connection >= 0:
            os.close(self.connection)
            self.connection = -1


@dataclass(slots=True)
class Held:
    """The daemon's name and addresses, held until the end."""

    run: RunDirectory
    bound: list[BoundListener]
    legacy: Legacy | None = None

    def descriptors(self) -> list[int]:
        """All that must stay open while the process detaches itself."""
        lent, connection = (self.legacy.bound, [self.legacy.connection]) if self.legacy is not None else ((), [])
        sockets = {sock.fileno() for one in (*self.bound, *lent) for sock in one.sockets}
        return [self.run.pid_file.descriptor, *connection, *sockets]

    def close_legacy(self) -> None:
        """In a forked child: closes what was lent and not taken."""
        if self.legacy is None:
            return
        self.legacy.hang_up()
        taken = {sock.fileno() for bound in self.bound for sock in bound.sockets}
        for bound in self.legacy.bound:
            if not taken & {sock.fileno() for sock in bound.sockets}:
                bound.close()


def run_foreground(settings: Settings, reread: Reread) -> None:
    """Runs the daemon in this process to its end, logging to stderr or where the settings say.

    Raises:
        ForkdError: it could not come up, or gave up.
    """
    directory = str(Path.cwd())
    enter_directory(settings)
    # Not standard error's own number: a worker's is a pipe to the master.
    descriptor = os.dup(sys.stderr.fileno()) if settings.log.to is None else open_log(settings.log.to)
    with holding(settings) as held:
        start_logging(settings.name, settings.log.level, settings.log.form, descriptor)
        place = Place(directory, detached=False, lock=held.run.pid_file.descriptor)
        daemon = Daemon(held, place, reread, on_ready=lambda: log.info("is up"))
        try:
            daemon.serve(settings, descriptor)
        except BootError as error:
            if settings.log.to is None:
                error.details = ""  # they stand in the log, a few lines above
            raise


@contextlib.contextmanager
def holding(settings: Settings, legacy: Legacy | None = None) -> Iterator[Held]:
    """The daemon's name and addresses, held until the end; as far as there is a legacy, that. Raises ForkdError."""
    run = run_directory(settings)
    if legacy is None:
        make_private_directory(run.path)
        run.pid_file.acquire()
    else:
        run.pid_file.adopt(legacy.lock, lent=True)
    try:
        bound = _bind(settings, legacy)
        try:
            yield Held(run, bound, legacy)
        finally:
            for listener in bound:
                listener.remove()
    finally:
        run.pid_file.remove()


def _bind(settings: Settings, legacy: Legacy | None) -> list[BoundListener]:
    slots = wanted_workers(settings)
    bound = bind_stored(settings.listen, slots) if legacy is None else bind_all(settings.listen, legacy.bound, slots)
    for listener in bound:  # one that was kept may have been bound for more workers, who serve yet, or for fewer
        listener.fit(slots, shrink=legacy is None)
    return bound


@dataclass(slots=True)
class Daemon:
    """What a master needs to be one.

    Attributes:
        held: its name and addresses.
        place: what outlasts an upgrade.
        reread: reads its settings anew.
        on_ready: called once, when every worker serves.
        hang_up: closes, in a forked child, what else is the master's alone.
    """

    held: Held
    place: Place
    reread: Reread
    on_ready: Callable[[], object] = lambda: None
    hang_up: Callable[[], None] = lambda: None
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def serve(self, settings: Settings, log_descriptor: int) -> None:
        """Runs a new master to its end.

        Args:
            settings: to begin with.
            log_descriptor: where it logs.

        Raises:
            ForkdError: it could not come up, or gave up.
        """
        run, bound = self.held.run, self.held.bound
        identity = find_identity(settings)
        if settings.preload:
            preload(settings)
        if self.held.legacy is None:
            run.pid_file.write()
        control = ControlSocket(run.control, self.selector, beside=self.held.legacy is not None)
        warn(settings)
        generation = Generation(1, settings, bound, log_descriptor, identity)
        self._conduct(generation, control, Scoreboard(2 * MOST_WORKERS))

    def resume(self, heritage: Heritage) -> None:
        """Runs a master to its end that goes on where another image of it left off. Raises as `serve`."""
        control = ControlSocket(self.held.run.control, self.selector, descriptor=heritage.control)
        self._conduct(heritage.generation, control, heritage.board, heritage)

    def _conduct(
        self, generation: Generation, control: ControlSocket, board: Scoreboard, heritage: Heritage | None = None
    ) -> None:
        # Imported before the fork so that the workers share it, and here so that the commands that start nothing don't
        # pay.
        from forkd.serve.worker import Station, run_worker  # noqa: PLC0415

        pid = os.getpid()

        def work(generation: Generation, slot: int, row: Row, channel: Channel) -> int:
            settings = generation.settings
            start_logging(settings.name, settings.log.level, settings.log.form, generation.log)
            board.confine(row)
            for bound in generation.bound:
                bound.confine(slot)
            if not settings.preload:  # else a module may own some of those that are not known here
                listeners = [sock.fileno() for bound in generation.bound for sock in bound.sockets]
                kept = {0, 1, 2, generation.log, channel.fileno(), board.regions.descriptor}
                close_all_but(kept.union(listeners))
            return run_worker(settings, generation.bound, board, Station(slot, row, channel, pid, generation.identity))

        errands = Errands(
            serve=work,
            prepare=lambda present, verb, channel: prepare(present, verb, channel, self.reread, self.place.directory),
            log_target=lambda settings: log_target(settings, detached=self.place.detached),
            abandon=self._abandon,
            on_ready=lambda: self._ready(control),
        )
        master = Master(generation, board, control=control, selector=self.selector, errands=errands, place=self.place)
        gc.collect()
        gc.freeze()  # what the workers share stays shared: the collector would write to every page of it
        try:
            master.run(heritage)
        finally:
            for bound in master.state.generation.bound:
                bound.remove()
            control.remove()
            self.held.run.pid_file.lent |= master.state.succeeded

    def _abandon(self) -> None:
        """In a forked child: closes what is the master's alone."""
        self.held.run.pid_file.close()
        self.held.close_legacy()
        self.hang_up()

    def _ready(self, control: ControlSocket) -> None:
        legacy = self.held.legacy
        if legacy is not None:
            self._succeed(legacy, control)
        self.on_ready()

    def _succeed(self, legacy: Legacy, control: ControlSocket) -> None:
        """Takes the place of the master that has lent its own: from now on it is this one that is asked."""
        control.take_place()
        self.held.run.pid_file.write()
        for bound in self.held.bound:
            bound.lent = False
        taken = {bound.address for bound in self.held.bound}
        for bound in legacy.bound:
            bound.lent = False
            if bound.address not in taken:
                bound.remove()
        legacy.hang_up()  # whoever started this process may be gone, and tell the other master nothing


def preload(settings: Settings) -> None:
    """Imports the handlers in this process, for the workers to share.

    Raises:
        HandlerError: one can't be imported, or has left threads running: a fork(2) has none of them.
    """
    from forkd.serve.handlers.load import import_handlers  # noqa: PLC0415 (as in `_conduct`)

    for handler in import_handlers(settings):
        if isinstance(handler, HandlerError):
            raise handler
    if (count := len(os.listdir("/proc/self/task"))) > 1:
        names = ", ".join(thread.name for thread in threading.enumerate()[1:]) or f"{count - 1}, not Python's"
        raise HandlerError(
            f"preload: the handlers' modules have left threads running ({names}), which no worker would have; let them "
            "start when a client is there, or set preload: false"
        )
