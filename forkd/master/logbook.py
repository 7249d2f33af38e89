"""The log files, which are the master's: opened here, opened anew when they were rotated, changed with the settings.

The log's descriptor keeps its number for the daemon's life; what it leads to changes. Workers get a new file by their
channels, since they may not be allowed to open it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from forkd.config.options import Settings
from forkd.errors import ForkdError
from forkd.master.crew import Crew
from forkd.master.generation import Generation
from forkd.system.logs import open_log, replace_log, start_logging

log = logging.getLogger("forkd.master")


class Logbook:
    """Knows where to log.

    Args:
        target: where these settings have the daemon log: a file, the journal, or None for where it was started.
    """

    def __init__(self, target: Callable[[Settings], Path | str | None]) -> None:
        self._target = target

    def reopen(self, generation: Generation, crew: Crew) -> None:
        """Opens the log file anew, for the master and the workers; where that can't be done the old one goes on."""
        path = self._target(generation.settings)
        if not isinstance(path, Path):
            log.info("logs to no file, so there is none to open anew")
            return
        try:
            descriptor = open_log(path)
        except ForkdError as error:
            log.error("%s; goes on with the old one", error)
            return
        crew.send_all({"order": "log"}, [descriptor])
        replace_log(descriptor)
        log.info("opened %s anew", path)

    def open_for(self, settings: Settings, present: Generation) -> int:
        """The descriptor to log to by these settings, the present one where they say the same. Raises ForkdError."""
        target = self._target(settings)
        if target == self._target(present.settings):
            return present.log
        return os.dup(2) if target is None else open_log(target)

    def turn_over(self, before: Generation, after: Generation) -> None:
        """Has the master log as the new generation does."""
        if after.log != before.log:
            # A log that went to standard error leaves it where it was: a later reload may want it back.
            replace_log(after.log, output=self._target(before.settings) is not None)
            after.log = before.log
        settings = after.settings
        start_logging(settings.name, settings.log.level, settings.log.form, after.log)

    def close(self, candidate: Generation, present: Generation) -> None:
        """Closes what was opened for a generation that is not to be."""
        if candidate.log != present.log:
            os.close(candidate.log)
