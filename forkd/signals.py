"""The signals that the daemon understands, in one table: the master installs it, the docs are made from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from signal import Signals


class Order(Enum):
    """What a signal, or a verb on the control socket, asks of the master."""

    STOP = "stop"
    QUIT = "quit"
    MORE = "more"
    FEWER = "fewer"
    REAP = "reap"
    RELOAD = "reload"
    UPGRADE = "upgrade"
    REOPEN = "reopen"


@dataclass(frozen=True, slots=True)
class Row:
    """One signal: its number, what it asks, and the sentence for the manual."""

    signal: Signals
    order: Order
    sentence: str


#: Signals to the master (signal(7)). One that is not listed keeps its default.
MASTER = (
    Row(Signals.SIGTERM, Order.STOP, "Stop: no new clients, the open ones may finish; a second one closes at once."),
    Row(Signals.SIGINT, Order.STOP, "The same as TERM."),
    Row(Signals.SIGQUIT, Order.QUIT, "Stop at once."),
    Row(Signals.SIGTTIN, Order.MORE, "One worker more."),
    Row(Signals.SIGTTOU, Order.FEWER, "One worker fewer."),
    Row(Signals.SIGCHLD, Order.REAP, "A worker has ended."),
    Row(Signals.SIGHUP, Order.RELOAD, "Reload: read the settings anew, boot new workers; what fails changes nothing."),
    Row(Signals.SIGUSR1, Order.REOPEN, "Open the log file anew, after it was rotated away."),
    Row(Signals.SIGUSR2, Order.UPGRADE, "Upgrade: run the code that is installed now, under the same PID."),
)

#: What the master sends to a worker. The kernel sends DRAIN too, when the master dies (`system.process`).
DRAIN = Signals.SIGTERM
CLOSE = Signals.SIGQUIT
KILL = Signals.SIGKILL
DUMP = Signals.SIGRTMIN  # write the stacks of all threads to standard error

#: Signals that are the master's business alone and that reach a worker when a terminal or an operator sends them to the
#: whole process group; and DUMP, whose default is to end the process, until the worker has its handler for it.
WORKER_IGNORES = (
    Signals.SIGINT,
    Signals.SIGHUP,
    Signals.SIGUSR1,
    Signals.SIGUSR2,
    Signals.SIGTTIN,
    Signals.SIGTTOU,
    Signals.SIGPIPE,
    DUMP,
)
