"""Where a daemon has its files and its working directory, by its settings: for whatever way it is started in."""

from __future__ import annotations

import os
from pathlib import Path

from forkd.config.options import Settings
from forkd.errors import ForkdError
from forkd.system.logs import default_log_file
from forkd.system.pidfile import RunDirectory


def run_directory(settings: Settings) -> RunDirectory:
    """The run directory that the settings mean."""
    return RunDirectory(settings.name, settings.run_directory)


def log_target(settings: Settings, *, detached: bool) -> Path | str | None:
    """Where the daemon logs: a file, the journal, or None for the standard error that it was started with."""
    return settings.log.to or (default_log_file(settings.name) if detached else None)


def enter_directory(settings: Settings) -> None:
    """Changes to the working directory that the settings name, if they do. Raises ForkdError."""
    if settings.working_directory is not None:
        try:
            os.chdir(settings.working_directory)
        except OSError as error:
            where = settings.working_directory
            raise ForkdError(f"can't change to working_directory {where}: {error.strerror}") from None
