"""The daemon put together: run in the foreground, started in the background, or resumed after an upgrade.

`run_foreground` runs it in this process. `start_daemon` forks a child that takes the lock, binds, detaches with
python-daemon (which forks twice) and reports when every worker serves, or why not; only then does it return. `resume`
is the second half of an upgrade: a new image of the master, which goes on where the former one left off, or tries
whether it could. All three make a `Daemon`, which makes the `Master`; only here does the master's side meet the serving
side. Called by `cli.lifecycle`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from forkd import MOST_WORKERS, signals
from forkd.app.check import check_addresses
from forkd.app.detach import Launcher, fork_off
from forkd.app.reload_helper import check_reloadable, prepare, resolve_statsd, warn
from forkd.config.settings import Settings
from forkd.errors import BootError, ForkdError, HandlerError
from forkd.master.admin.loading import load_extras
from forkd.master.control_socket import ControlSocket
from forkd.master.generation import Generation, wanted_workers
from forkd.master.master import Master
from forkd.master.state import EntryPoints
from forkd.master.upgrade import LaunchContext, MasterSnapshot, handed_settings, note_files
from forkd.messages import DaemonStarted
from forkd.system.channel import Channel
from forkd.system.fdstore import bind_stored
from forkd.system.identity import Identity, find_identity
from forkd.system.listeners import BoundListener, bind_all
from forkd.system.logs import go_on_with_log, log_target, log_to_stderr, open_log, start_logging
from forkd.system.notify import manager_address
from forkd.system.private_directory import hold_run_directory, make_private_directory
from forkd.system.proc import need_proc
from forkd.system.process import dump_stacks_on
from forkd.system.run_directory import RunDirectory, run_directory
from forkd.system.scoreboard import Row, Scoreboard
from forkd.system.working_directory import enter_directory, starting_directory

if TYPE_CHECKING:
    from forkd.serve.worker import WorkerContext

log = logging.getLogger("forkd")

#: Reads the settings again, as the command line that started the daemon means them. Raises ForkdError.
Reread = Callable[[], Settings]


@dataclass(slots=True)
class PredecessorResources:
    """What a running master lends to the one that is to succeed it.

    Attributes:
        run: its run directory.
        lock: the descriptor that holds the pid file's lock.
        bound: its listeners, and where it answers itself; their settings say no more than where they listen.
        connection: to its control socket; when every process that has it has closed it, the master looks whether it has
            been succeeded. -1 when this process has closed it.
    """

    run: RunDirectory
    lock: int
    bound: Sequence[BoundListener]
    connection: int

    def close_connection(self) -> None:
        """Closes the connection in this process."""
        if self.connection >= 0:
            os.close(self.connection)
            self.connection = -1


@dataclass(slots=True)
class DaemonResources:
    """The daemon's name and addresses, which it holds until its end; with what a running master has lent it."""

    run: RunDirectory
    bound: list[BoundListener]
    services: list[BoundListener] = field(default_factory=list)
    predecessor: PredecessorResources | None = None

    @property
    def all_bound(self) -> list[BoundListener]:
        """The listeners, and where the master itself answers."""
        return [*self.bound, *self.services]

    def descriptors(self) -> list[int]:
        """All that must stay open while the process detaches itself."""
        former = self.predecessor
        lent, connection = (former.bound, [former.connection]) if former is not None else ((), [])
        sockets = {sock.fileno() for one in (*self.all_bound, *lent) for sock in one.sockets}
        return [self.run.pid_file.descriptor, *connection, *sockets]

    def follow_fork(self) -> None:
        """In a forked child that goes on in the place of its parent: the files are this process's to remove."""
        self.run.pid_file.follow_fork()
        for bound in self.all_bound:
            bound.follow_fork()

    def launch(self, directory: str, source: str, *, detached: bool) -> LaunchContext:
        """How the daemon was launched."""
        return LaunchContext(directory, detached, self.run.pid_file.descriptor, source, str(self.run.path))

    def close_unused(self) -> None:
        """In a forked child: closes what was lent and not taken."""
        if self.predecessor is None:
            return
        self.predecessor.close_connection()
        for bound in _left_of(self.predecessor, self.all_bound):
            bound.close()


def run_foreground(settings: Settings, reread: Reread, source: str = "") -> None:
    """Runs the daemon in this process to its end, logging to stderr or where the settings say.

    Args:
        settings: the daemon's.
        reread: reads them again, for a reload.
        source: what they come from, as in `LaunchContext`.

    Raises:
        ForkdError: it could not come up, or gave up.
    """
    need_proc()
    load_extras(settings)
    directory = starting_directory()
    enter_directory(settings)
    # Not standard error's own number: a worker's is a pipe to the master.
    to, identity = settings.log.to, find_identity(settings)
    descriptor = log_to_stderr() if to is None else open_log(to, identity)
    with holding(settings) as resources:
        start_logging(settings.name, settings.log.level, settings.log.form, descriptor)
        launch = resources.launch(directory, source, detached=False)
        daemon = Daemon(resources, launch, reread, on_ready=lambda: log.info("daemon is up"))
        try:
            daemon.serve(settings, descriptor)
        except BootError as error:
            if settings.log.to is None:
                error.details = ""  # they stand in the log, a few lines above
            raise


@contextlib.contextmanager
def holding(settings: Settings, predecessor: PredecessorResources | None = None) -> Iterator[DaemonResources]:
    """The daemon's name and addresses, held until the end; a predecessor's as far as it has them. Raises ForkdError."""
    run = run_directory(settings) if predecessor is None else predecessor.run
    if predecessor is None:
        hold_run_directory(run, find_identity(settings))
    else:
        run.pid_file.adopt(predecessor.lock, borrowed=True)
    try:
        with contextlib.ExitStack() as undo:
            bound = _bind(settings, predecessor)
            undo.callback(_remove, bound)
            services = bind_all(settings.service_listeners, _left_of(predecessor, bound))
            undo.callback(_remove, services)
            yield DaemonResources(run, bound, services, predecessor)
    finally:
        run.remove(own_directory=settings.run_directory is None)


def _remove(listeners: Sequence[BoundListener]) -> None:
    for bound in listeners:
        bound.remove()


def _bind(settings: Settings, predecessor: PredecessorResources | None) -> list[BoundListener]:
    slots = wanted_workers(settings)
    if predecessor is None:
        bound = bind_stored(settings.listen, slots)
    else:
        bound = bind_all(settings.listen, predecessor.bound, slots)
    for listener in bound:  # one that was kept may have been bound for more workers, which serve yet, or for fewer
        listener.resize(slots, shrink=predecessor is None)
    return bound


def _left_of(predecessor: PredecessorResources | None, taken: Sequence[BoundListener]) -> list[BoundListener]:
    """What a predecessor has lent and is not taken yet."""
    sockets = {sock.fileno() for bound in taken for sock in bound.sockets}
    lent = predecessor.bound if predecessor is not None else ()
    return [bound for bound in lent if not sockets & {sock.fileno() for sock in bound.sockets}]


@dataclass(slots=True)
class Daemon:
    """Makes a master and runs it.

    Attributes:
        resources: the daemon's name and addresses.
        launch: what stays the same over an upgrade.
        reread: reads its settings again.
        on_ready: called once, when every worker serves.
        close_in_child: closes, in a forked child, what else is the master's alone.
    """

    resources: DaemonResources
    launch: LaunchContext
    reread: Reread
    on_ready: Callable[[], object] = lambda: None
    close_in_child: Callable[[], None] = lambda: None
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def serve(self, settings: Settings, log_descriptor: int) -> None:
        """Runs a new master to its end.

        Args:
            settings: to begin with.
            log_descriptor: where it logs.

        Raises:
            ForkdError: it could not come up, or gave up.
        """
        run, bound = self.resources.run, self.resources.bound
        identity = find_identity(settings)
        if settings.preload:
            preload(settings)
        if self.resources.predecessor is None:
            run.pid_file.write()
        control = ControlSocket(run.control, self.selector, beside=self.resources.predecessor is not None)
        try:
            warn(settings, bound)
            settings = resolve_statsd(settings)
            generation = Generation(1, settings, bound, log_descriptor, identity, self.resources.services)
            self._run_master(generation, control, Scoreboard(2 * MOST_WORKERS))
        finally:
            control.remove()

    def resume(self, snapshot: MasterSnapshot) -> None:
        """Runs a master to its end that goes on where another image of it left off. Raises as `serve`."""
        control = ControlSocket(self.resources.run.control, self.selector, descriptor=snapshot.control)
        self._run_master(snapshot.generation, control, snapshot.board, snapshot)

    def _run_master(
        self, generation: Generation, control: ControlSocket, board: Scoreboard, snapshot: MasterSnapshot | None = None
    ) -> None:
        master = Master(
            generation,
            board,
            control=control,
            selector=self.selector,
            entry_points=self._entry_points(control, board),
            launch=self.launch,
        )
        gc.collect()
        gc.freeze()  # what the workers share stays shared: the collector would write to every page of it
        try:
            master.run(snapshot)
        finally:
            _remove([*master.state.generation.bound, *master.state.generation.services])
            control.remove()
            self.resources.run.pid_file.borrowed |= master.state.superseded

    def _entry_points(self, control: ControlSocket, board: Scoreboard) -> EntryPoints:
        boot_worker, worker_context = _serving()
        pid, listeners_kept = os.getpid(), bool(manager_address(os.environ))

        def serve(generation: Generation, slot: int, row: Row, channel: Channel) -> int:
            return boot_worker(
                worker_context(
                    settings=generation.settings,
                    listeners=generation.bound,
                    log=generation.log,
                    board=board,
                    row=row,
                    slot=slot,
                    channel=channel,
                    master=pid,
                    identity=generation.identity,
                    certificates=generation.certificates.contents,
                    directory=self.launch.directory,
                    generation=generation.number,
                    listeners_kept=listeners_kept,
                )
            )

        return EntryPoints(
            serve=serve,
            prepare=lambda present, verb, channel: prepare(present, verb, channel, self.reread, self.launch.directory),
            log_target=lambda settings: log_target(settings, detached=self.launch.detached),
            close_in_child=self._close_in_child,
            on_ready=lambda: self._ready(control),
            restore_files=self._restore_files,
        )

    def _restore_files(self, identity: Identity) -> bool:
        run = self.resources.run
        if not os.path.lexists(run.path):
            make_private_directory(run.path, identity)
        return run.pid_file.restore()

    def _close_in_child(self) -> None:
        """In a forked child: closes what is the master's alone."""
        self.resources.run.pid_file.close()
        self.resources.close_unused()
        self.close_in_child()

    def _ready(self, control: ControlSocket) -> None:
        if self.resources.predecessor is not None:
            self._replace(self.resources.predecessor, control)
        self.on_ready()

    def _replace(self, predecessor: PredecessorResources, control: ControlSocket) -> None:
        """Takes the place of the master that has lent its resources: requests come to this one from now on."""
        control.take_place()
        self.resources.run.pid_file.write()
        for bound in self.resources.all_bound:
            bound.own()
        taken = {bound.address for bound in self.resources.all_bound}
        for bound in predecessor.bound:
            bound.own()
            if bound.address not in taken:
                bound.remove()
        # The process that started this one may be gone by now, and tell the other master nothing.
        predecessor.close_connection()


def _serving() -> tuple[Callable[[WorkerContext], int], type[WorkerContext]]:
    """What workers run. Imported before the fork so that they share it, and here so that the commands that start
    nothing don't pay.
    """
    from forkd.serve.boot import boot_worker, prepare_boots  # noqa: PLC0415
    from forkd.serve.worker import WorkerContext  # noqa: PLC0415

    prepare_boots()
    return boot_worker, WorkerContext


def preload(settings: Settings) -> None:
    """Imports the handlers in this process, for the workers to share.

    Raises:
        HandlerError: one can't be imported, or has left threads running: a fork(2) has none of them.
    """
    import asyncio  # noqa: PLC0415 (as in `_run_master`)

    from forkd.serve.handlers import import_all  # noqa: PLC0415

    asyncio.set_event_loop(None)  # one that a module would get here is not the workers', and never runs
    import_all(settings)
    if (count := len(os.listdir("/proc/self/task"))) > 1:
        names = ", ".join(thread.name for thread in threading.enumerate()[1:]) or f"{count - 1}, not Python's"
        raise HandlerError(
            f"preload: the handlers' modules have left threads running ({names}), which no worker would have; let them "
            "start when a client is there, or set preload: false"
        )


def start_daemon(
    settings: Settings, reread: Reread, source: str = "", predecessor: PredecessorResources | None = None
) -> DaemonStarted:
    """Starts the daemon; returns when every worker serves.

    Args:
        settings: the daemon's.
        reread: reads them again, for a reload.
        source: what they come from, as in `LaunchContext`.
        predecessor: what the master that it is to succeed has lent it; None where there is no such one.

    Raises:
        ForkdError: it could not come up, with its own reason.
    """
    need_proc()
    load_extras(settings)
    child = fork_off(lambda launcher: _run_daemon(settings, reread, source, predecessor, launcher))
    try:
        return child.wait_ready(DaemonStarted)
    finally:
        child.wait()  # python-daemon has ended it, and goes on in a child of its child


def _run_daemon(
    settings: Settings, reread: Reread, source: str, predecessor: PredecessorResources | None, launcher: Launcher
) -> int:
    from daemon import DaemonContext  # noqa: PLC0415 (only `forkd start` pays for it)

    directory = starting_directory()
    enter_directory(settings)
    target = log_target(settings, detached=True)
    assert target is not None  # noqa: S101 (a detached daemon has one)
    descriptor = open_log(target, find_identity(settings))
    # For what is neither logged nor a worker's: the interpreter's own output. It is open as long as the daemon runs.
    stream = open(descriptor if isinstance(target, Path) else os.devnull, "ab")  # noqa: SIM115
    with holding(settings, predecessor) as resources:
        addresses = [str(one.address) for one in resources.bound]
        workers, log_to = wanted_workers(settings), str(target)
        # Each of these undoes a default that bites: it would close all descriptors, open the umask, stay attached under
        # a PID 1, forbid core files and take the terminal's signals.
        with DaemonContext(
            files_preserve=[launcher.writer, descriptor, *resources.descriptors()],
            umask=0o027,
            working_directory=str(Path.cwd()),
            pidfile=None,
            detach_process=True,
            prevent_core=False,
            signal_map={},
            stdout=stream,
            stderr=stream,
        ):
            resources.follow_fork()
            # It has opened standard input, which Python then keeps from every program that is run, and so from the next
            # image of the master: there the first descriptor that is opened would become standard input.
            os.set_inheritable(0, True)
            start_logging(settings.name, settings.log.level, settings.log.form, descriptor)
            launch = resources.launch(directory, source, detached=True)
            started = DaemonStarted(os.getpid(), workers, addresses, log_to)
            daemon = Daemon(resources, launch, reread, lambda: launcher.tell(started), launcher.close_pipe)
            daemon.serve(settings, descriptor)
            launcher.failed(BootError("it was stopped before it was ready"))
    return 0


def resume(state: str, reread: Reread) -> None:
    """Goes on with a running daemon to its end, or tries whether that could be.

    Args:
        state: the value of the environment variable `forkd.RESUME`.
        reread: reads the settings, as the command line of the start means them.

    Raises:
        ForkdError: it can't; or the daemon gave up.
    """
    _, trying, number = state.rpartition("check:")
    descriptor = int(number)
    if trying:
        _try(handed_settings(descriptor), reread, descriptor)
    else:
        snapshot = MasterSnapshot.read(descriptor)
        os.close(descriptor)
        _go_on(snapshot, reread)


def _try(present: Settings, reread: Reread, state: int) -> None:
    """All that could go wrong later, changing nothing; says in the state's file which files it has tried."""
    from forkd.serve.handlers import call_as_worker, import_all  # noqa: PLC0415 (only this child pays for it here)
    from forkd.serve.import_paths import assume_identity  # noqa: PLC0415
    from forkd.serve.stream.tls import load_certificates  # noqa: PLC0415

    dump_stacks_on(signals.DUMP)
    _serving()  # the next image could not go back
    note_files(state)
    os.close(state)  # before any code of the user's runs
    settings = reread()
    check_reloadable(_as_started(present, settings), settings)
    load_extras(settings)
    ours = {str(listener.address) for listener in (*present.listen, *present.service_listeners)}
    for _, error in check_addresses((*settings.listen, *settings.service_listeners), settings, ours):
        raise error
    enter_directory(settings)
    if settings.preload:
        preload(settings)
    load_certificates(settings)
    assume_identity(settings, find_identity(settings))
    call_as_worker(settings, lambda: import_all(settings))


def _go_on(snapshot: MasterSnapshot, reread: Reread) -> None:
    for descriptor in snapshot.descriptors():
        os.set_inheritable(descriptor, False)
    generation, launch = snapshot.generation, snapshot.launch
    settings = generation.settings
    start_logging(settings.name, settings.log.level, settings.log.form, generation.log)
    go_on_with_log(snapshot.unwritten)
    fresh = settings
    with _errors_logged():
        fresh = reread()  # before the directory is another: what the command line says is relative to this one
    with _errors_logged():
        enter_directory(settings, launch.directory)
    with _errors_logged():
        load_extras(settings)
    with _errors_logged():
        if fresh.preload:
            preload(fresh)
        generation.settings = _as_started(settings, fresh)
    run = RunDirectory(settings.name, Path(launch.run_directory)) if launch.run_directory else run_directory(settings)
    run.pid_file.adopt(launch.lock, borrowed=False)
    try:
        Daemon(DaemonResources(run, generation.bound, generation.services), launch, reread).resume(snapshot)
    finally:
        run.remove(own_directory=settings.run_directory is None)


@contextlib.contextmanager
def _errors_logged() -> Iterator[None]:
    """For what was tried and has changed since: the old workers serve on, and the reload reports what is wrong, too."""
    try:
        yield
    except ForkdError as error:
        log.error("%s", error)


def _as_started(present: Settings, fresh: Settings) -> Settings:
    """The settings of the generation that serves; only what an image decides at its start is of the fresh ones."""
    return replace(present, preload=fresh.preload)
