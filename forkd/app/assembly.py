"""The daemon put together, and run in the foreground."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import selectors
import sys
from collections.abc import Callable, Iterator

from forkd.config.options import Settings
from forkd.config.units import MOST_WORKERS
from forkd.errors import BootError, ForkdError
from forkd.master.control import ControlSocket
from forkd.master.master import Master
from forkd.master.spawn import ChildMain
from forkd.system.logs import open_log, start_logging
from forkd.system.pidfile import RunDirectory, make_private_directory
from forkd.system.process import processors
from forkd.system.scoreboard import Scoreboard
from forkd.system.sockets import BoundListener, bind_all

log = logging.getLogger("forkd")


def run_directory(settings: Settings) -> RunDirectory:
    """The run directory that the settings mean."""
    return RunDirectory(settings.name, settings.run_directory)


def wanted_workers(settings: Settings) -> int:
    """The number of workers that the settings mean."""
    return settings.workers or processors()


def run_foreground(settings: Settings) -> None:
    """Runs the daemon in this process to its end, logging to stderr or where the settings say.

    Raises:
        ForkdError: it could not come up, or gave up.
    """
    enter_directory(settings)
    descriptor = sys.stderr.fileno() if settings.log.to is None else open_log(settings.log.to)
    with holding(settings) as (run, bound):
        start_logging(settings.name, settings.log.level, settings.log.format, descriptor)
        try:
            serve(settings, run, bound, on_ready=lambda: log.info("is up"), abandon=run.pid_file.close)
        except BootError as error:
            if settings.log.to is None:
                error.details = ""  # they stand in the log, a few lines above
            raise


def enter_directory(settings: Settings) -> None:
    """Changes to the working directory that the settings name, if they do. Raises ForkdError."""
    if settings.working_directory is not None:
        try:
            os.chdir(settings.working_directory)
        except OSError as error:
            where = settings.working_directory
            raise ForkdError(f"can't change to working_directory {where}: {error.strerror}") from None


@contextlib.contextmanager
def holding(settings: Settings) -> Iterator[tuple[RunDirectory, list[BoundListener]]]:
    """The daemon's name and addresses, held until the end. Raises ForkdError."""
    run = run_directory(settings)
    make_private_directory(run.path)
    run.pid_file.acquire()
    try:
        bound = bind_all(settings.listen)
        try:
            yield run, bound
        finally:
            for listener in bound:
                listener.remove()
    finally:
        run.pid_file.remove()


def serve(
    settings: Settings,
    run: RunDirectory,
    bound: list[BoundListener],
    *,
    on_ready: Callable[[], None],
    abandon: Callable[[], None],
) -> None:
    """Runs the master to its end, with what `holding` gave.

    Args:
        on_ready: called once, when every worker serves.
        abandon: closes, in a worker, what is the master's alone.

    Raises:
        BootError: it gave up.
    """
    run.pid_file.write()
    selector = selectors.DefaultSelector()
    control = ControlSocket(run.control, selector)
    board = Scoreboard(2 * MOST_WORKERS)
    master = Master(
        settings,
        bound,
        board,
        wanted=wanted_workers(settings),
        control=control,
        selector=selector,
        child_main=_child_main(settings, bound, board),
        abandon=abandon,
        on_ready=on_ready,
    )
    gc.collect()
    gc.freeze()  # what the workers share stays shared: the collector would write to every page of it
    try:
        master.run()
    finally:
        control.remove()


def _child_main(settings: Settings, bound: list[BoundListener], board: Scoreboard) -> ChildMain:
    """What a forked child of this process runs."""
    # Imported before the fork so that the workers share it, and here so that the commands that start nothing don't pay.
    from forkd.serve.worker import Station, run_worker  # noqa: PLC0415

    master = os.getpid()
    return lambda slot, row, channel: run_worker(settings, bound, board, Station(slot, row, channel, master))
