"""What can go wrong, as the user sees it: one class for each exit status, each with a sentence fit for a terminal.

Everything that forkd raises on purpose is a `ForkdError`; `cli` is the one place that prints it and turns it into an
exit status. Bugs stay bugs: they are not wrapped.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass


class ForkdError(Exception):
    """An error with a sentence for the user and a status for the shell.

    The statuses are those of sysexits.h where it has one: EX_USAGE 64, EX_CONFIG 78.
    """

    status = 1


class UsageError(ForkdError):
    """The command line itself is off."""

    status = os.EX_USAGE


class AddressInUse(ForkdError):
    """Somebody else holds an address that was to be listened on."""


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
    """There is nobody to talk to."""


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


@dataclass(frozen=True, slots=True)
class Problem:
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
