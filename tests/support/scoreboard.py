"""The scoreboard of a daemon under test, as it stands in the master's memory: opened by way of proc(5)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from pathlib import Path

from forkd import MOST_WORKERS
from forkd.system.scoreboard import Field, Scoreboard


def target(link: Path) -> str:
    """Where a link leads; nowhere when it has gone."""
    with contextlib.suppress(FileNotFoundError):
        return os.readlink(link)
    return ""


def heartbeats(master: int, workers: Collection[int]) -> list[float]:
    """When each worker's loop last came by, in seconds on the monotonic clock."""
    directory = Path(f"/proc/{master}/fd")
    descriptor = os.open(next(one for one in directory.iterdir() if "forkd-scoreboard" in target(one)), os.O_RDWR)
    board = Scoreboard(2 * MOST_WORKERS, descriptor)
    try:
        return [row[Field.HEARTBEAT] / 1e9 for row in board.rows() if row[Field.PID] in workers]
    finally:
        board.close()
