"""The scoreboard of a daemon under test, as it stands in the master's memory: opened by way of proc(5)."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from forkd.config.units import MOST_WORKERS
from forkd.system.scoreboard import Field, Scoreboard


def heartbeats(master: int, workers: Collection[int]) -> list[float]:
    """When each worker's loop last came by, in seconds on the monotonic clock."""
    directory = Path(f"/proc/{master}/fd")
    number = next(one.name for one in directory.iterdir() if "forkd-scoreboard" in os.readlink(one))
    descriptor = os.open(directory / number, os.O_RDWR)
    try:
        rows = Scoreboard(2 * MOST_WORKERS, descriptor).rows()
        return [row[Field.HEARTBEAT] / 1e9 for row in rows if row[Field.PID] in workers]
    finally:
        os.close(descriptor)
