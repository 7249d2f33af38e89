"""The commands that start, stop and change a daemon."""

from __future__ import annotations

import argparse
import sys

from forkd.app.assembly import Legacy, run_foreground
from forkd.app.resume import resume as resume_daemon
from forkd.app.start import Started, start_daemon
from forkd.app.whereabouts import run_directory
from forkd.cli.ask import PROMPTLY, Conversation
from forkd.cli.look import check_all
from forkd.cli.single import serve
from forkd.cli.target import read_target, run_directory_of, settings_of
from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.options import Settings
from forkd.errors import AlreadyRunning, BootError, ConfigError, NotRunning
from forkd.system.bound import BoundListener
from forkd.system.pidfile import RunDirectory
from forkd.wire import Message


def run(command: argparse.Namespace) -> int:
    """`forkd run`."""
    settings = settings_of(command)
    if settings.mode == "once":
        return serve(settings, foreground=True)
    run_foreground(settings, lambda: settings_of(command))
    return 0


def resume(command: argparse.Namespace, state: str) -> int:
    """A command that started a daemon, run again by the master to go on as another image of itself."""
    resume_daemon(state, lambda: settings_of(command))
    return 0


def start(command: argparse.Namespace) -> int:
    """`forkd start`. That it runs already is no failure, as init scripts have it."""
    settings = settings_of(command)
    if settings.mode == "once":
        return serve(settings, foreground=False)
    held, pid = run_directory(settings).pid_file.holder()
    if held:
        print(AlreadyRunning(settings.name, pid))
        return 0
    _tell(settings, "started", start_daemon(settings, lambda: settings_of(command)))
    return 0


def _tell(settings: Settings, what: str, started: Started) -> None:
    print(
        f"{settings.name} {what}, pid {started.pid}, {_workers(started.workers)} on {', '.join(started.addresses)}; "
        f"log: {started.log}"
    )


def _workers(count: int) -> str:
    return f"{count} worker{'s' if count > 1 else ''}"


def stop(command: argparse.Namespace) -> int:
    """`forkd stop`. That it does not run is no failure."""
    run = run_directory_of(command)
    try:
        pid = _stop(run, now=command.now)
    except NotRunning as error:
        print(error)
        return 0
    print(f"{run.name} stopped, pid {pid}")
    return 0


def _stop(run: RunDirectory, *, now: bool = False) -> int:
    with Conversation(run) as master:
        pid: int = master.ask({"verb": "status"})["status"]["pid"]
        within = master.ask({"verb": "stop", "now": now})["within"]
        master.hear(within + PROMPTLY)
        master.hear_the_end(PROMPTLY)
    return pid


def restart(command: argparse.Namespace) -> int:
    """`forkd restart`. Whatever is wrong with the new settings leaves the old daemon running."""
    loaded = read_target(command)
    check_all(loaded)
    if loaded.problems:
        print("the running daemon, if any, was left alone", file=sys.stderr)
        raise ConfigError(loaded.problems)
    settings = loaded.settings
    try:
        with Conversation(run_directory(settings)) as master:
            status = master.ask({"verb": "status"})["status"]
            if status["state"] in ("running", "degraded"):
                legacy = _borrow(master)
                _tell(settings, "restarted", start_daemon(settings, lambda: settings_of(command), legacy))
                master.ask({"verb": "stop", "succeeded": True})
                return 0
        _stop(run_directory(settings))
    except NotRunning as error:
        print(error)
    return start(command)


def _borrow(master: Conversation) -> Legacy:
    """The lock and the listeners of a running master."""
    described = master.ask({"verb": "hand over"})["listeners"]
    lock, *sockets = master.take_descriptors()
    listeners = [Listener(address=parse_address(one["wanted"]), handler="") for one in described]
    bound = [
        BoundListener.taken(one, listener, sockets, lent=True)
        for one, listener in zip(described, listeners, strict=True)
    ]
    return Legacy(lock, bound, master.fileno())


def reload(command: argparse.Namespace) -> int:
    """`forkd reload`."""
    run = run_directory_of(command)
    if command.diff:
        lines = _change(run, "diff")["differences"]
        print("\n".join(lines) if lines else "a reload would change no setting; the handlers are imported anew")
        return 0
    found = _change(run, "reload")
    print(f"{run.name} reloaded: {_workers(found['workers'])} of generation {found['generation']}")
    return 0


def upgrade(command: argparse.Namespace) -> int:
    """`forkd upgrade`."""
    run = run_directory_of(command)
    found = _change(run, "upgrade")
    print(f"{run.name} upgraded: {_workers(found['workers'])} of generation {found['generation']}")
    return 0


def _change(run: RunDirectory, verb: str) -> Message:
    with Conversation(run) as master:
        within = master.ask({"verb": verb})["within"]
        try:
            return master.hear(within + PROMPTLY)
        except BootError as error:
            raise BootError(f"the {verb} failed, and {run.name} goes on as before: {error}", error.details) from None


def scale(command: argparse.Namespace) -> int:
    """`forkd scale`."""
    run = run_directory_of(command)
    with Conversation(run) as master:
        within = master.ask({"verb": "status"})["status"]["boot_timeout"]
        workers = master.ask({"verb": "scale", "workers": command.workers}, within + PROMPTLY)["workers"]
    print(f"{run.name} has {_workers(workers)}")
    return 0
