"""The daemon started in the background: its starter returns when every worker serves, or with the reason why not.

The child of the starter takes the lock, binds, detaches with python-daemon (which forks twice), and says that it is up.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from forkd.app.assembly import Daemon, Legacy, Reread, holding
from forkd.app.launcher import Launcher, fork_off
from forkd.app.whereabouts import enter_directory, log_target
from forkd.config.options import Settings
from forkd.errors import BootError
from forkd.master.generation import wanted_workers
from forkd.master.heritage import Place
from forkd.system.logs import open_log, start_logging


@dataclass(frozen=True, slots=True)
class Started:
    """What is told of a daemon that was started."""

    pid: int
    workers: int
    addresses: list[str]
    log: str


def start_daemon(settings: Settings, reread: Reread, legacy: Legacy | None = None) -> Started:
    """Starts the daemon; returns when every worker serves.

    Args:
        settings: the daemon's.
        reread: reads them anew, for a reload.
        legacy: what the master that it is to succeed has lent it; None where there is no such one.

    Raises:
        ForkdError: it could not come up, with its own reason.
    """
    child = fork_off(lambda launcher: _run_daemon(settings, reread, legacy, launcher))
    try:
        return Started(**child.hear())
    finally:
        child.wait()  # python-daemon has ended it, and goes on in a child of its child


def _run_daemon(settings: Settings, reread: Reread, legacy: Legacy | None, launcher: Launcher) -> int:
    from daemon import DaemonContext  # noqa: PLC0415 (nobody but `forkd start` pays for it)

    directory = str(Path.cwd())
    enter_directory(settings)
    target = log_target(settings, detached=True)
    assert target is not None  # noqa: S101 (a detached daemon has one)
    descriptor = open_log(target)
    # What is neither logged nor a worker's: an interpreter's own last words. It is open as long as the daemon lives.
    stream = open(descriptor if isinstance(target, Path) else os.devnull, "ab")  # noqa: SIM115
    with holding(settings, legacy) as held:
        addresses = [str(one.address) for one in held.bound]
        about = {"workers": wanted_workers(settings), "addresses": addresses, "log": str(target)}
        # Each of these undoes a default that bites: it would close all descriptors, open the umask, stay attached under
        # a PID 1, forbid core files and take the terminal's signals.
        with DaemonContext(
            files_preserve=[launcher.writer, descriptor, *held.descriptors()],
            umask=0o027,
            working_directory=str(Path.cwd()),
            pidfile=None,
            detach_process=True,
            prevent_core=False,
            signal_map={},
            stdout=stream,
            stderr=stream,
        ):
            # It has opened standard input anew, which Python then keeps from every program that is run, and so from the
            # next image of the master: there the first descriptor opened, whatever it is, would stand in for it.
            os.set_inheritable(0, True)
            start_logging(settings.name, settings.log.level, settings.log.form, descriptor)
            place = Place(directory, detached=True, lock=held.run.pid_file.descriptor)
            daemon = Daemon(held, place, reread, hang_up=launcher.hang_up)
            daemon.on_ready = lambda: launcher.say({**about, "pid": os.getpid()})
            daemon.serve(settings, descriptor)
            launcher.failed(BootError("it was stopped before it was ready"))
    return 0
