"""The commands that start a daemon: `run`, `start`, `restart`. `app.daemon` starts a master."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from forkd.app.daemon import PredecessorResources, run_foreground, start_daemon
from forkd.app.daemon import resume as resume_daemon
from forkd.cli.check import check_all
from forkd.cli.control import show_workers, stop_master
from forkd.cli.control_client import MasterConnection
from forkd.cli.locate import check_project, connect, find_own
from forkd.cli.settings import read_target, settings_of, starting_daemon
from forkd.cli.target import WantedDaemon, source_of
from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.errors import AlreadyRunning, BootError, ConfigError, ForkdError, NotAllowed, NotRunning, printable
from forkd.messages import (
    AcceptedReply,
    DaemonStarted,
    HandOverReply,
    HandOverRequest,
    StatusReply,
    StatusRequest,
    StopRequest,
)
from forkd.system.listeners import BoundListener


def run(command: argparse.Namespace) -> int:
    """`forkd run`."""
    if command.reload:
        from forkd.cli.develop import run_and_reload  # noqa: PLC0415 (rare, and with a package of its own)

        return run_and_reload(command)
    result = read_target(command)
    settings = result.valid_settings()
    if settings.mode == "once":
        from forkd.cli.once import serve  # noqa: PLC0415 (with all that serves, which a master does not have)

        signal.pthread_sigmask(signal.SIG_SETMASK, ())  # those that waited for a master's loop
        return serve(settings, foreground=True)
    if running := _running_already(starting_daemon(command, result)):
        raise running
    run_foreground(settings, lambda: settings_of(command), source_of(command))
    return 0


def start(command: argparse.Namespace) -> int:
    """`forkd start`. That it runs already is no failure, as init scripts have it."""
    result = read_target(command)
    settings = result.valid_settings()
    if settings.mode == "once":
        from forkd.cli.once import serve  # noqa: PLC0415 (as above)

        return serve(settings, foreground=False)
    if running := _running_already(starting_daemon(command, result)):
        print(printable(str(running)))
        return 0
    _print_started(settings, "started", start_daemon(settings, lambda: settings_of(command), source_of(command)))
    return 0


def _running_already(wanted: WantedDaemon) -> AlreadyRunning | None:
    """That this user's daemon of the name runs. Raises OtherProject where it is another one."""
    run = find_own(wanted)
    if run is None:
        return None
    try:
        with MasterConnection(run) as master:
            check_project(wanted, master.ask(StatusRequest(), StatusReply).status)
    except NotRunning:
        return None
    except (NotAllowed, BootError):
        pass
    return AlreadyRunning(wanted.name, run.pid_file.probe()[1])


def restart(command: argparse.Namespace) -> int:
    """`forkd restart`. A mistake in the new settings leaves the old daemon running."""
    result = read_target(command)
    wanted = starting_daemon(command, result)
    with contextlib.suppress(NotRunning), connect(wanted):
        pass  # one that may not be replaced is told before what is wrong with the settings
    check_all(result, wanted)
    if result.problems:
        print("the running daemon, if any, was left alone", file=sys.stderr)
        raise ConfigError(result.problems)
    settings = result.settings
    try:
        with connect(wanted) as master:
            status = master.ask(StatusRequest(), StatusReply).status
            if master.uid != os.geteuid():
                _refuse_restart(master, status)
            # One in the foreground refuses it, whatever its state.
            if status["state"] in ("running", "degraded") or status.get("foreground"):
                predecessor = _borrow_resources(master)
                source = source_of(command)
                started = start_daemon(settings, lambda: settings_of(command), source, predecessor)
                _print_started(settings, "restarted", started)
                master.ask(StopRequest(succeeded=True), AcceptedReply)
                return 0
            stop_master(master)
    except NotRunning as error:
        print(printable(str(error)))
    return start(command)


def _refuse_restart(master: MasterConnection, status: Mapping[str, Any]) -> NoReturn:
    """Another user's daemon is not taken over: files would be replaced on its word, and it would become this user's.
    Raises ForkdError.
    """
    if status.get("foreground"):
        master.ask(HandOverRequest(), HandOverReply)  # it refuses that, and says what to do
    raise ForkdError(f"{master.run.name} runs as user {master.uid}; restart it as that user, or stop it first")


def resume_image(command: argparse.Namespace, state: str) -> int:
    """The command that started a daemon, run again by the master after an upgrade's exec, to go on with its state."""
    resume_daemon(state, lambda: settings_of(command))
    return 0


def _borrow_resources(master: MasterConnection) -> PredecessorResources:
    """The lock and the listeners of a running master, which still owns them."""
    descriptions = master.ask(HandOverRequest(), HandOverReply).listeners
    listeners = [Listener(address=parse_address(one["wanted"]), handler="") for one in descriptions]
    try:
        lock, *sockets = master.take_descriptors()
        bound = [
            BoundListener.from_description(one, listener, sockets, borrowed=True)
            for one, listener in zip(descriptions, listeners, strict=True)
        ]
    except ValueError:  # the kernel leaves out what this process may not have
        raise ForkdError(
            f"can't take over the listeners of {master.run.name}: there are too few descriptors (ulimit -n)"
        ) from None
    return PredecessorResources(master.run, lock, bound, master.fileno())


def _print_started(settings: Settings, what: str, started: DaemonStarted) -> None:
    workers, addresses = show_workers(started.workers), ", ".join(started.addresses)
    print(printable(f"{settings.name} {what}, pid {started.pid}, {workers} on {addresses}; log: {started.log}"))
