"""The daemon started in the background: the launcher returns when every worker serves, or with the reason why not.

The launcher makes a pipe and forks. The child takes the lock, binds, detaches with python-daemon (which forks twice)
and says one thing on the pipe: that it is up, or what was wrong. End of file without a word means that it died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from forkd.app.assembly import Daemon, Legacy, Reread, enter_directory, holding, log_target
from forkd.config.options import Settings
from forkd.errors import BootError, ForkdError
from forkd.master.generation import wanted_workers
from forkd.master.heritage import Place
from forkd.system.logs import open_log, start_logging

log = logging.getLogger("forkd")


@dataclass(frozen=True, slots=True)
class Started:
    """What is told of a daemon that was started."""

    pid: int
    workers: int
    addresses: list[str]
    log: str


class _Launcher:
    """Who waits at the other end of the pipe."""

    def __init__(self, writer: int) -> None:
        self.writer = writer

    def say(self, message: dict[str, Any]) -> None:
        """Tells, once."""
        if self.writer >= 0:
            with contextlib.suppress(OSError):  # the launcher may have been interrupted
                os.write(self.writer, json.dumps(message).encode())
            self.hang_up()

    def failed(self, error: ForkdError) -> None:
        """Tells why not."""
        self.say({"reason": str(error), "details": getattr(error, "details", ""), "status": error.status})

    def hang_up(self) -> None:
        """Closes the pipe without a word; for a worker, which would keep it open."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


def start_daemon(settings: Settings, reread: Reread, legacy: Legacy | None = None) -> Started:
    """Starts the daemon; returns when every worker serves.

    Args:
        settings: the daemon's.
        reread: reads them anew, for a reload.
        legacy: what the master that it is to succeed has lent it; None where there is no such one.

    Raises:
        ForkdError: it could not come up, with its own reason.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become_daemon(settings, reread, legacy, _Launcher(writer))
    os.close(writer)
    with open(reader, "rb") as pipe:
        words = pipe.read()
    os.waitpid(child, 0)
    message: dict[str, Any] = json.loads(words) if words else {"reason": "it ended without a word", "status": 1}
    if "pid" in message:
        return Started(**message)
    error = BootError(message["reason"], message.get("details", ""))
    error.status = message["status"]
    raise error


def _become_daemon(settings: Settings, reread: Reread, legacy: Legacy | None, launcher: _Launcher) -> NoReturn:
    status = 1
    try:
        _run_daemon(settings, reread, legacy, launcher)
        status = 0
    except ForkdError as error:
        launcher.failed(error)
        status = error.status
    except BaseException as error:  # (a daemon has no terminal: its launcher and its log are its border)
        log.critical("ends by an exception", exc_info=True)
        launcher.failed(BootError(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(status)


def _run_daemon(settings: Settings, reread: Reread, legacy: Legacy | None, launcher: _Launcher) -> None:
    from daemon import DaemonContext  # noqa: PLC0415 (nobody but `forkd start` pays for it)

    directory = str(Path.cwd())
    enter_directory(settings)
    target = log_target(settings, detached=True)
    assert target is not None  # noqa: S101 (a detached daemon has one)
    descriptor = open_log(target)
    # What is neither logged nor a worker's: an interpreter's own last words. It is open as long as the daemon lives.
    stream = open(descriptor if isinstance(target, Path) else os.devnull, "ab")  # noqa: SIM115
    with holding(settings, legacy) as held:
        about = {
            "workers": wanted_workers(settings),
            "addresses": [str(one.address) for one in held.bound],
            "log": str(target),
        }
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
            daemon = Daemon(
                held,
                Place(directory, detached=True, lock=held.run.pid_file.descriptor),
                reread,
                on_ready=lambda: launcher.say({**about, "pid": os.getpid()}),
                hang_up=launcher.hang_up,
            )
            daemon.serve(settings, descriptor)
            launcher.failed(BootError("it was stopped before it was ready"))
