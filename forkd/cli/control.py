"""The commands that have a running daemon stop or change: `stop`, `reload`, `upgrade`, `scale`, `drain`, `resume`.

`MasterConnection` asks it, and waits for it. What starts one is in `lifecycle`, with all that a master imports.
"""

from __future__ import annotations

import argparse
import sys
from typing import TypeVar

from forkd.cli.control_client import REPLY_SECONDS, MasterConnection
from forkd.cli.locate import connect
from forkd.cli.target import wanted_daemon
from forkd.errors import BootError, NotRunning, printable
from forkd.messages import (
    AcceptedReply,
    ChangedReply,
    DifferencesReply,
    DiffRequest,
    DoneReply,
    DrainRequest,
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

R = TypeVar("R")


def stop(command: argparse.Namespace) -> int:
    """`forkd stop`. That it does not run is no failure."""
    try:
        with connect(wanted_daemon(command)) as master:
            pid = stop_master(master, now=command.now)
    except NotRunning as error:
        print(printable(str(error)))
        return 0
    print(printable(f"{master.run.name} stopped{f', pid {pid}' if pid else ''}"))
    return 0


def reload(command: argparse.Namespace) -> int:
    """`forkd reload`."""
    with connect(wanted_daemon(command)) as master:
        if command.diff:
            lines = _change(master, "diff", DiffRequest(), DifferencesReply).differences
            unchanged = "a reload would change no setting; the handlers are imported again"
            print(printable("\n".join(lines) or unchanged))
            return 0
        found = _change(master, "reload", ReloadRequest(), ChangedReply)
    print(printable(f"{master.run.name} reloaded: {show_workers(found.workers)} of generation {found.generation}"))
    return 0


def upgrade(command: argparse.Namespace) -> int:
    """`forkd upgrade`."""
    with connect(wanted_daemon(command)) as master:
        found = _change(master, "upgrade", UpgradeRequest(), ChangedReply)
    print(printable(f"{master.run.name} upgraded: {show_workers(found.workers)} of generation {found.generation}"))
    return 0


def scale(command: argparse.Namespace) -> int:
    """`forkd scale`."""
    with connect(wanted_daemon(command)) as master:
        within = master.ask(StatusRequest(), StatusReply).status["boot_timeout"]
        workers = master.ask(ScaleRequest(command.workers), ScaledReply, within + REPLY_SECONDS).workers
    print(printable(f"{master.run.name} has {show_workers(workers)}"))
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


def stop_master(master: MasterConnection, *, now: bool = False) -> int | None:
    """Has a master stop, and waits until it has ended; its pid. Raises ForkdError."""
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


def show_workers(count: int) -> str:
    """A number of workers in words."""
    return f"{count} worker{'s' if count > 1 else ''}"
