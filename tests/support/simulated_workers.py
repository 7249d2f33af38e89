"""Simulated processes for `simulated_master`: what becomes of each, and what a slot has been through."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from forkd.states import WorkerEvent, WorkerState

WAITS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds after so many failures, at least
LONGER = 1.25  # and by which factor longer at most
TOGETHER = 0.04  # seconds that a first wait may take where another worker has just ended

Place = tuple[int, int]  # generation and slot


@dataclass(frozen=True)
class Fate:
    """What becomes of a worker, in seconds: until it is ready or fails, then serving, when told to drain, to close.

    While it serves it may wear out, and its loop may stand still now and again, for a while or for ever.
    """

    boots: float = 0.5
    fails: bool = False
    lives: float = inf
    drains: float = 0.1
    closes: float = 0.1
    jitter: float = 0.5
    wears: float = inf
    stalls: float = inf
    stands: float = inf


@dataclass
class Record:
    """What a slot has been through: failures in a row, and between which times the next worker may come."""

    failures: int = 0
    earliest: float = -inf
    latest: float = -inf

    def failed(self, now: float, *, healthy: bool = False, fork: bool = False) -> None:
        """Another attempt has failed."""
        self.failures = 1 if healthy else self.failures + 1
        wait = WAITS[min(self.failures + fork, len(WAITS)) - 1]
        self.earliest, self.latest = now + wait, now + max(wait * LONGER, TOGETHER)


@dataclass
class Process:
    """A simulated worker."""

    pid: int
    place: Place
    fate: Fate
    since: float
    state: WorkerState = WorkerState.BOOTING
    ready_at: float = inf
    counted: bool = False  # whether its slot's record has its failure already
    killed_in: WorkerState | None = None  # its state when it was killed
    dumped_at: float = -inf
    recycle_reason: str = ""
    stood: float = inf  # since when its loop stands still
    rested: float = -inf  # until when it last did

    @property
    def generation(self) -> int:
        return self.place[0]

    @property
    def slot(self) -> int:
        return self.place[1]

    def next_event(self) -> tuple[float, WorkerEvent | str]:
        """What it does next by itself, and when."""
        fate, since = self.fate, self.since
        if self.stood < inf and self.state is not WorkerState.KILLED:
            return self.stood + fate.stands, "goes on"
        events: list[tuple[float, WorkerEvent | str]] = {
            WorkerState.BOOTING: [(since + fate.boots, WorkerEvent.EXIT if fate.fails else WorkerEvent.READY)],
            WorkerState.SERVING: [
                (since + fate.lives, WorkerEvent.EXIT),
                (inf if self.recycle_reason else since + fate.wears, "wears"),
                (max(since, self.rested) + fate.stalls, "stands"),
            ],
            WorkerState.DRAINING: [(since + fate.drains, WorkerEvent.EXIT)],
            WorkerState.CLOSING: [(since + fate.closes, WorkerEvent.EXIT)],
            WorkerState.KILLED: [(since, WorkerEvent.EXIT)],
        }[self.state]  # type: ignore[assignment]
        return min(events, key=lambda event: event[0])
