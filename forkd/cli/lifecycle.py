"""The commands that start, stop and change a daemon."""

from __future__ import annotations

import argparse
import sys

from forkd.app.assembly import run_directory, run_foreground
from forkd.app.start import start_daemon
from forkd.cli.ask import PROMPTLY, Conversation
from forkd.cli.look import check_all
from forkd.cli.target import read_target, run_directory_of, settings_of
from forkd.errors import AlreadyRunning, ConfigError, NotRunning
from forkd.system.pidfile import RunDirectory


def run(command: argparse.Namespace) -> int:
    """`forkd run`."""
    run_foreground(settings_of(command))
    return 0


def start(command: argparse.Namespace) -> int:
    """`forkd start`. That it runs already is no failure, as init scripts have it."""
    settings = settings_of(command)
    held, pid = run_directory(settings).pid_file.holder()
    if held:
        print(AlreadyRunning(settings.name, pid))
        return 0
    started = start_daemon(settings)
    print(
        f"{settings.name} started, pid {started.pid}, {started.workers} worker{'s' if started.workers > 1 else ''} on "
        f"{', '.join(started.addresses)}; log: {started.log}"
    )
    return 0


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
    try:
        _stop(run_directory(loaded.settings))
    except NotRunning as error:
        print(error)
    return start(command)


def scale(command: argparse.Namespace) -> int:
    """`forkd scale`."""
    run = run_directory_of(command)
    with Conversation(run) as master:
        within = master.ask({"verb": "status"})["status"]["boot_timeout"]
        workers = master.ask({"verb": "scale", "workers": command.workers}, within + PROMPTLY)["workers"]
    print(f"{run.name} has {workers} worker{'s' if workers > 1 else ''}")
    return 0
