"""What can go wrong, as the user sees it: classes with a sentence fit for a terminal and an exit status.

Everything that forkd raises on purpose is a `ForkdError`; `cli` is the one place that prints it and turns it into an
exit status. Bugs stay bugs: they are not wrapped.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

# C0 and C1 controls, the separators that some viewers take for ends of lines, marks that reverse the order of what is
# shown, and surrogates, which no stream takes.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class ForkdError(Exception):
    """An error with a sentence for the user and a status for the shell.

    The statuses are those of sysexits.h where it has one: EX_USAGE 64, EX_CONFIG 78.
    """

    status = 1


#: What the system says to a program that is wrong, not of what the user's machine lacks.
_BUGS = {errno.EBADF, errno.EFAULT, errno.ENOTSOCK}


def is_bug(error: OSError) -> bool:
    """Whether it shows a mistake of a program, whose traceback is wanted."""
    return error.errno in _BUGS


def system_reason(error: Exception) -> str:
    """What the system has refused, as a sentence without the bare number: with the file that it is about, if any. Of
    another error, its text.
    """
    if not isinstance(error, OSError):
        return str(error)
    why = error.strerror or (os.strerror(error.args[0]) if error.args and type(error.args[0]) is int else str(error))
    about = error.filename if isinstance(error.filename, str) else ""
    return f"{about}: {why}" if about else why


def how_to_install(extra: str) -> str:
    """The command by which the packages of an extra come to where this forkd runs."""
    return f"{sys.executable} -m pip install 'forkd-server[{extra}]'"


class UsageError(ForkdError):
    """The command line itself is wrong."""

    status = os.EX_USAGE


class AddressInUse(ForkdError):
    """Another process holds an address that was to be listened on."""


class AlreadyRunning(ForkdError):
    """The pid file's lock is held: the daemon of this name runs.

    Args:
        name: the daemon's name.
        pid: what the pid file says, or None where it says nothing; a hint, since the lock alone is the truth.
    """

    def __init__(self, name: str, pid: int | None) -> None:
        super().__init__(f"{name} is already running" + (f", pid {pid}" if pid else ""))
        self.name = name
        self.pid = pid


class NotRunning(ForkdError):
    """The daemon does not run, so it can't be asked."""


class NotAllowed(ForkdError):
    """The daemon runs, and this user may not ask it. LSB's status for what can't be known has the same number."""

    status = 4


class OtherProject(ForkdError):
    """A daemon runs that has the name which is meant, but belongs to another directory or file."""


class BootError(ForkdError):
    """The daemon could not come up.

    Args:
        reason: one sentence.
        details: text for the lines below it, such as a handler's traceback; empty where there is none.
    """

    def __init__(self, reason: str, details: str = "") -> None:
        super().__init__(reason)
        self.details = details


class HandlerError(BootError):
    """The handler named in the settings can't be imported, or is of no form that forkd hosts."""


class StoppedAtStart(KeyboardInterrupt):
    """A signal has asked for a stop before the master's loop ran. It passes where an interrupt of the terminal does."""


class Problem(NamedTuple):
    """One mistake in the settings.

    Attributes:
        where: `file:line:column`, or the command-line option that brought it.
        message: what is wrong and what was meant.
    """

    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class ConfigError(ForkdError):
    """Mistakes in the settings, all of them at once."""

    status = os.EX_CONFIG

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = tuple(problems)


# Texts on a terminal


def escaped(text: str) -> str:
    """`text` in one line: controls as Python writes them in a string."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable(text: str) -> str:
    """`text` for a terminal, which may be of lines and have tabs: no other control in it reaches that. To be used for
    all that is printed and is not ours as a whole: replies, reasons, tracebacks.
    """
    return "\n".join("\t".join(map(escaped, line.split("\t"))) for line in text.split("\n"))
