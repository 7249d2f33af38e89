"""What `app` hands the master: the functions that its children run, and what else it can't know by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from forkd.config.options import Settings
from forkd.master.generation import Generation
from forkd.system.channel import Channel
from forkd.system.scoreboard import Row


@dataclass(frozen=True, slots=True)
class Errands:
    """The errands of one master.

    Attributes:
        serve: a worker of this generation, in this slot, with its row and channel; returns its exit status.
        prepare: a helper that reads the settings anew; with the verb of the change.
        log_target: where these settings have the daemon log: a file, the journal, or None for where it was started.
        abandon: closes, in a forked child, what else is the master's alone (the pid file's lock).
        on_ready: called once, when every wanted worker serves.
    """

    serve: Callable[[Generation, int, Row, Channel], int]
    prepare: Callable[[Generation, str, Channel], int]
    log_target: Callable[[Settings], Path | str | None]
    abandon: Callable[[], None]
    on_ready: Callable[[], None]
