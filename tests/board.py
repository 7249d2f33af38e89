"""The scoreboard of a daemon under test, as it stands in the master's memory: opened by way of proc(5)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path

from forkd.config.units import MOST_WORKERS
from forkd.system.scoreboard import Field, Scoreboard


def heartbeats(master: int, workers: Collection[int]) -> list[float]:
    """When each worker's loop last came by, in seconds on the monotonic clock."""
    descriptor = os.open(next(_scoreboards(master)), os.O_RDWR)
    try:
        rows = Scoreboard(2 * MOST_WORKERS, descriptor).rows()
        return [row[Field.HEARTBEAT] / 1e9 for row in rows if row[Field.PID] in workers]
    finally:
        os.close(descriptor)


def _scoreboards(master: int) -> Iterator[Path]:
    """The master's descriptors of it."""
    for one in Path(f"/proc/{master}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # one of another kind, closed meanwhile
            if "forkd-scoreboard" in os.readlink(one):
                yield one
