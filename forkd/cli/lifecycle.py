"""The commands that start, stop and change a daemon: `run`, `start`, `stop`, `restart`, `reload`, `upgrade`,
`scale`, `drain`, `resume`.

`app.daemon` starts a master; a running one is asked by `MasterConnection`, which also waits for it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from forkd.app.daemon import PredecessorResources, run_foreground, start_daemon
from forkd.app.daemon import resume as resume_daemon
from forkd.cli.control_client import REPLY_SECONDS, MasterConnection
from forkd.cli.locate import check_project, connect, find_own
from forkd.cli.once import serve
from forkd.cli.status import check_all
from forkd.cli.target import WantedDaemon, read_target, settings_of, source_of, starting_daemon, wanted_daemon
from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.errors import AlreadyRunning, BootError, ConfigError, ForkdError, NotAllowed, NotRunning, printable
from forkd.messages import (
    AcceptedReply,
    ChangedReply,
    DaemonStarted,
    DifferencesReply,
    DiffRequest,
    DoneReply,
    DrainRequest,
    HandOverReply,
    HandOverRequest,
    ReloadRequest,
    Request,
    ResumeRequest,
    ScaledReply,
    ScaleRequest,
    StatusReply,
    StatusRequest,
    StopRequest,
    UpgradeRequest,
)
from forkd.system.listeners import BoundListener

R = TypeVar("R")


def run(command: argparse.Namespace) -> int:
    """`forkd run`."""
    if command.reload:
        from forkd.cli.develop import run_and_reload  # noqa: PLC0415 (rare, and with a package of its own)

        return run_and_reload(command)
    result = read_target(command)
    settings = result.valid_settings()
    if settings.mode == "once":
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


def stop(command: argparse.Namespace) -> int:
    """`forkd stop`. That it does not run is no failure."""
    try:
        with connect(wanted_daemon(command)) as master:
            pid = _stop(master, now=command.now)
    except NotRunning as error:
        print(printable(str(error)))
        return 0
    print(printable(f"{master.run.name} stopped{f', pid {pid}' if pid else ''}"))
    return 0


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
            _stop(master)
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


def reload(command: argparse.Namespace) -> int:
    """`forkd reload`."""
    with connect(wanted_daemon(command)) as master:
        if command.diff:
            lines = _change(master, "diff", DiffRequest(), DifferencesReply).differences
            unchanged = "a reload would change no setting; the handlers are imported again"
            print(printable("\n".join(lines) or unchanged))
            return 0
        found = _change(master, "reload", ReloadRequest(), ChangedReply)
    print(printable(f"{master.run.name} reloaded: {_show_workers(found.workers)} of generation {found.generation}"))
    return 0


def upgrade(command: argparse.Namespace) -> int:
    """`forkd upgrade`."""
    with connect(wanted_daemon(command)) as master:
        found = _change(master, "upgrade", UpgradeRequest(), ChangedReply)
    print(printable(f"{master.run.name} upgraded: {_show_workers(found.workers)} of generation {found.generation}"))
    return 0


def scale(command: argparse.Namespace) -> int:
    """`forkd scale`."""
    with connect(wanted_daemon(command)) as master:
        within = master.ask(StatusRequest(), StatusReply).status["boot_timeout"]
        workers = master.ask(ScaleRequest(command.workers), ScaledReply, within + REPLY_SECONDS).workers
    print(printable(f"{master.run.name} has {_show_workers(workers)}"))
    return 0


def drain(command: argparse.Namespace) -> int:
    """`forkd drain`."""
    with connect(wanted_daemon(command)) as master:
        master.ask(DrainRequest(), DoneReply)
        found = master.ask(StatusRequest(), StatusReply).status
    clients = sum(worker["clients"] for worker in found["workers"])
    told = f"balancers are told to send no more clients; {clients} client{'' if clients == 1 else 's'} here may stay"
    print(printable(f"{master.run.name} drained: {told}"))
    if not found.get("services"):
        print(printable(f"warning: {master.run.name} has neither admin.address nor agent to tell it"), file=sys.stderr)
    return 0


def resume(command: argparse.Namespace) -> int:
    """`forkd resume`."""
    with connect(wanted_daemon(command)) as master:
        master.ask(ResumeRequest(), DoneReply)
        not_ready = master.ask(StatusRequest(), StatusReply).status["not_ready"]
    print(printable(f"{master.run.name} resumed{f', but it is not ready: {not_ready}' if not_ready else ''}"))
    return 0


def resume_image(command: argparse.Namespace, state: str) -> int:
    """The command that started a daemon, run again by the master after an upgrade's exec, to go on with its state."""
    resume_daemon(state, lambda: settings_of(command))
    return 0


def _stop(master: MasterConnection, *, now: bool = False) -> int | None:
    pid = master.run.pid_file.probe()[1]  # to stop it needs no status
    within = master.ask(StopRequest(now=now), AcceptedReply).within
    master.receive_reply(DoneReply, within + REPLY_SECONDS)
    master.wait_for_exit(REPLY_SECONDS)
    return pid


def _change(master: MasterConnection, verb: str, request: Request, expected: type[R]) -> R:
    within = master.ask(request, AcceptedReply).within
    try:
        return master.receive_reply(expected, within + REPLY_SECONDS)
    except BootError as error:
        name = master.run.name
        raise BootError(f"the {verb} failed, and {name} goes on as before: {error}", error.details) from None


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
    workers, addresses = _show_workers(started.workers), ", ".join(started.addresses)
    print(printable(f"{settings.name} {what}, pid {started.pid}, {workers} on {addresses}; log: {started.log}"))


def _show_workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"
