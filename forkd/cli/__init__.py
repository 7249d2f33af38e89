"""The command line: `main` is the `forkd` command. Errors become one message and an exit status here, and only here.

In reading order:

* `parser`: the grammar; each command names the function that runs it.
* `target`: from TARGET and options to the daemon that is meant, and its run directory.
* `settings`: from TARGET and options to the settings of one that is to be started.
* `control_client`: requests to a running master.
* `locate`: finds the master that is meant.
* `lifecycle`: run, start and restart.
* `control`: stop, reload, upgrade, scale, drain and resume.
* `once`: serve one client.
* `status`: the status.
* `check`: check settings, addresses and handlers.
* `daemons`: list all daemons.
* `develop`: init a project, and run with reloads by changed files.
* `doctor`: what is wrong on this machine, by `facts`.
* `top`: the status, live on a terminal.
* `logs`: the log, wherever it goes.
* `files`: write or print what comes with forkd: files, schema and completion.
* `clients`: list connected clients, or close some.
* `call`: one request to any server.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import select
import signal
import sys
from collections.abc import Sequence

from forkd import RESUME, signals
from forkd.cli.parser import parse
from forkd.errors import BootError, ConfigError, ForkdError, StoppedAtStart, is_bug, printable, system_reason

#: Milliseconds that an error waits for what reads it.
_PATIENCE = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; None for this process's.

    Returns:
        The exit status (sysexits.h: 64 for a wrong command line, 78 for wrong settings).
    """
    _open_standard_descriptors()  # before anything else is opened
    atexit.register(_skip_garbage)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if RESUME not in os.environ:
            _receive_signals(catch=os.getpid() == 1 or words[:1] == ["run"])
        command = parse(words)
        status = _resume(command) if RESUME in os.environ else command.run(command)
        sys.stdout.flush()
    except ConfigError as error:
        mistakes = len(error.problems)
        _print_error(f"{error}\nforkd: {mistakes} mistake{'s' if mistakes > 1 else ''} in the settings")
        return error.status
    except ForkdError as error:
        details = error.details.rstrip("\n") + "\n" if isinstance(error, BootError) and error.details else ""
        _print_error(f"{details}forkd: {error}")
        return error.status
    except StoppedAtStart:
        return 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the output has seen enough
        _discard_output()
        return 1
    except OSError as error:  # what the system refuses, as the current directory or a full disk
        if is_bug(error):
            raise
        _print_error(f"forkd: {system_reason(error)}")
        _discard_output()
        return 1
    return status


def _skip_garbage() -> None:
    """Has the interpreter's end look for no garbage in all that was imported; what handlers leave is looked at."""
    if "forkd.serve.handlers" not in sys.modules:
        gc.freeze()


def _print_error(text: str) -> None:
    """Prints to standard error, unless that is a pipe which is full and stays so: the command ends all the same. In the
    journal it is an error, too.
    """
    if "JOURNAL_STREAM" in os.environ:
        import logging  # noqa: PLC0415 (under systemd alone)

        from forkd.system.logs import is_journal_stream, prioritized  # noqa: PLC0415

        if is_journal_stream(2):
            text = prioritized(text, logging.ERROR)
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if poll.poll(_PATIENCE):
        print(printable(text), file=sys.stderr)


def _discard_output() -> None:
    """Sends what was not written yet nowhere, so that the interpreter's end does not fail by it. The number of standard
    input is used for that: there may be no other left.
    """
    os.close(0)
    os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdout.fileno())


def _receive_signals(*, catch: bool) -> None:
    """Undoes what a parent may have left, and neither this process nor a program of its handlers could know of: blocked
    signals, which would never end them, and an ignored SIGCHLD, by which nobody learns how a child has ended (wait(2)).

    Args:
        catch: whether those that ask for a stop are to be caught from now on, too.
    """
    # Handlers come first: one that waits arrives as soon as it is not blocked, and the kernel drops it for PID 1.
    signal.pthread_sigmask(signal.SIG_SETMASK, _catch_signals() if catch else ())
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _catch_signals() -> list[signal.Signals]:
    """Has a signal that asks for a stop end this process in order. The kernel drops what PID 1 has no handler for
    (kill(2)), and else the daemon would leave its files behind.

    Returns:
        Those that are to be blocked until the master's loop takes them.
    """

    def stop(*_: object) -> None:
        raise StoppedAtStart

    ends = (signals.Command.STOP, signals.Command.QUIT)
    for row in signals.MASTER:
        if row.command in ends:
            signal.signal(row.signal, stop)
    return [row.signal for row in signals.MASTER if row.command not in (*ends, signals.Command.REAP)]


def _open_standard_descriptors() -> None:
    """Opens descriptors 0 to 2 on /dev/null where they are closed, and Python's streams on them: else what is opened
    next would be standard input, output or error of this process and of its programs. To be called before that.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        os.set_inheritable(null, True)
        null = os.open(os.devnull, os.O_RDWR)
    os.close(null)
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (they stay open)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115


def _resume(command: argparse.Namespace) -> int:
    """Runs the command that started a daemon again: its master has executed it to go on after an upgrade."""
    from forkd.cli.lifecycle import resume_image  # noqa: PLC0415 (imported when it runs, as `parser` does)

    return resume_image(command, os.environ.pop(RESUME))
