"""What the master tells of itself: the answer to `forkd status`, and the certificate of a worker's death."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from forkd import __version__
from forkd.config.options import Settings
from forkd.master.spawn import Exit, Worker
from forkd.states import Life, Mode
from forkd.system.scoreboard import Field
from forkd.system.sockets import BoundListener


class Reported(Protocol):
    """What of a master is reported."""

    settings: Settings
    mode: Mode
    wanted: int
    started: float

    @property
    def workers(self) -> Mapping[int, Worker]:
        """By pid."""

    @property
    def listeners(self) -> Sequence[BoundListener]:
        """Bound."""

    @property
    def deaths(self) -> Iterable[dict[str, Any]]:
        """The latest certificates."""


def status(master: Reported) -> dict[str, Any]:
    """The state of the daemon, fit for JSON; ages are in seconds, times since the epoch."""
    now = time.monotonic()
    serving = sum(worker.life is Life.SERVING for worker in master.workers.values())
    return {
        "name": master.settings.name,
        "pid": os.getpid(),
        "version": __version__,
        "state": _state(master, serving),
        "started": master.started,
        "wanted": master.wanted,
        "boot_timeout": master.settings.boot_timeout,
        "serving": serving,
        "workers": [_worker(worker, now) for worker in sorted(master.workers.values(), key=lambda w: (w.slot, w.pid))],
        "listeners": [
            {"address": str(bound.address), "handler": bound.listener.handler, "backlog": bound.listener.backlog}
            for bound in master.listeners
        ],
        "deaths": list(master.deaths),
    }


def _state(master: Reported, serving: int) -> str:
    if master.mode is Mode.RUNNING and serving < master.wanted:
        return "degraded"
    return master.mode.value


def _worker(worker: Worker, now: float) -> dict[str, Any]:
    row = worker.row
    return {
        "slot": worker.slot,
        "pid": worker.pid,
        "state": worker.life.value,
        "age": round(now - worker.born, 3),
        # A worker writes its row itself, so what stands there is what it claims.
        "clients": max(0, row.active),
        "accepted": row[Field.ACCEPTED],
        "errors": row[Field.ERRORS],
        "lag": round(row[Field.LAG] / 1e9, 6),
    }


def certificate(worker: Worker, ended: Exit, now: float, *, expected: bool) -> dict[str, Any]:
    """What is kept of a worker that has ended."""
    return {
        "time": time.time(),
        "slot": worker.slot,
        "pid": worker.pid,
        "expected": expected,
        "exit": str(ended),
        "cause": worker.cause,
        "age": round(now - worker.born, 3),
        "clients": max(0, worker.row.active),
        "peak_memory": ended.peak_memory,
    }


def obituary(worker: Worker, ended: Exit) -> str:
    """What the log says of a worker that has ended; the traceback that it could not boot for stands below it."""
    words = f"worker {worker.slot} (pid {worker.pid}) has ended: {ended}"
    words += f", {worker.cause}" if worker.cause else ""
    return words + (f"\n{worker.details.rstrip()}" if worker.details else "")
