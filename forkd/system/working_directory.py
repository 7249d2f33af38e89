"""The directory that a daemon is started from, and the one that it works in."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import TYPE_CHECKING

from forkd.config.values import current_directory
from forkd.errors import ForkdError

if TYPE_CHECKING:
    from forkd.config.settings import Settings


def starting_directory() -> str:
    """Where the daemon is started. Raises ForkdError where that has been removed, or can't be found out."""
    try:
        return str(current_directory())
    except OSError as error:
        raise ForkdError(f"there is no current directory: {error.strerror}; start from another one") from None


def probe_directory(settings: Settings) -> None:
    """Checks that `enter_directory` can. Raises ForkdError."""
    where = settings.working_directory
    if where is None or (os.path.isdir(where) and os.access(where, os.X_OK)):
        return
    try:
        number: int | None = errno.EACCES if stat.S_ISDIR(where.stat().st_mode) else errno.ENOTDIR
    except OSError as error:
        number = error.errno
    why = os.strerror(number or errno.EACCES)
    raise ForkdError(f"can't change to working_directory {where}: {why}")


def enter_directory(settings: Settings, default: str = "") -> None:
    """Changes to the working directory that the settings name, else to the default, where its path leads now. One that
    is not there any more is an error only where the settings name it.

    Raises:
        ForkdError: the process can't change to the settings' directory.
    """
    if settings.working_directory is not None:
        try:
            change_directory(str(settings.working_directory))
        except OSError as error:
            where = settings.working_directory
            raise ForkdError(f"can't change to working_directory {where}: {error.strerror}") from None
    elif default:
        with contextlib.suppress(OSError):
            change_directory(default)


def change_directory(path: str) -> None:
    """Changes to a directory and keeps its path in $PWD, as a shell does: it may have links in it. Raises OSError."""
    os.chdir(path)
    os.environ["PWD"] = path
