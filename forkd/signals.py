"""The signals between operator, master and workers.

`MASTER` lists those that the master handles, each with the command that it stands for. The others are what the master
sends to its workers, and what workers ignore.
"""

from __future__ import annotations

from enum import Enum
from signal import Signals
from typing import NamedTuple


class Command(Enum):
    """What a signal, or a verb on the control socket, asks of the master."""

    STOP = "stop"
    QUIT = "quit"
    MORE = "more"
    FEWER = "fewer"
    REAP = "reap"
    RELOAD = "reload"
    UPGRADE = "upgrade"
    REOPEN = "reopen"


class SignalEntry(NamedTuple):
    """One signal: its number, what it asks for, and the sentence for the manual."""

    signal: Signals
    command: Command
    sentence: str


#: Signals to the master (signal(7)). One that is not listed keeps its default.
MASTER = (
    SignalEntry(
        Signals.SIGTERM,
        Command.STOP,
        "Stop: no new clients, the open ones may finish; a second one closes at once, or ends stop_delay.",
    ),
    SignalEntry(Signals.SIGINT, Command.STOP, "The same as TERM."),
    SignalEntry(Signals.SIGQUIT, Command.QUIT, "Stop at once."),
    SignalEntry(Signals.SIGTTIN, Command.MORE, "One worker more."),
    SignalEntry(Signals.SIGTTOU, Command.FEWER, "One worker fewer."),
    SignalEntry(Signals.SIGCHLD, Command.REAP, "A worker has ended."),
    SignalEntry(
        Signals.SIGHUP, Command.RELOAD, "Reload: read the settings again, boot new workers; what fails changes nothing."
    ),
    SignalEntry(Signals.SIGUSR1, Command.REOPEN, "Reopen the log file, after it was rotated away."),
    SignalEntry(Signals.SIGUSR2, Command.UPGRADE, "Upgrade: run the code that is installed now, under the same PID."),
)

#: What the master sends to a worker. The kernel sends DRAIN too, when the master dies (`system.process`).
DRAIN = Signals.SIGTERM
CLOSE = Signals.SIGQUIT
KILL = Signals.SIGKILL
DUMP = Signals.SIGRTMIN  # write the stacks of all threads to standard error
NUDGE = Signals.SIGHUP  # nothing, but that a system call which waits begins again

#: Signals that are the master's business alone and that may reach a worker when an operator sends them to every process
#: of the daemon. A worker has handlers for them that do nothing: what is ignored stays so in programs that it starts,
#: what is handled does not (execve(2)).
WORKER_IGNORES = (
    Signals.SIGINT,
    Signals.SIGHUP,
    Signals.SIGUSR1,
    Signals.SIGUSR2,
    Signals.SIGTTIN,
    Signals.SIGTTOU,
)

#: Signals that a worker really ignores: PIPE as every Python program, and DUMP, whose default is to end the process,
#: until the worker has its handler for it.
WORKER_REALLY_IGNORES = (Signals.SIGPIPE, DUMP)


def ignore(*_: object) -> None:
    """The handler that does nothing."""
