"""The last ten minutes of the daemon, for the status page: a sample each five seconds, in a ring that the master keeps.

An upgrade hands it on; another daemon, by a restart, begins a new one.
"""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

from forkd.master.state import DaemonState, Moment
from forkd.master.status import client_count, totals_by_slot
from forkd.master.workers import EXPECTED
from forkd.system.socket_stats import accept_queue_of

#: Seconds between two samples.
STEP = 5.0

#: Listeners that are sampled: a page of more can't be read.
_MOST_LISTENERS = 50


class History:
    """The ring.

    Args:
        state: the master's.
    """

    def __init__(self, state: DaemonState) -> None:
        self._state = state
        self._due = 0.0

    def advance(self, now: float) -> float:
        """Takes a sample if it is time to; when to look again."""
        if now >= self._due:
            self._state.moments.append(self._sample(now))
            # On one grid, however late the master is; a machine that was suspended leaves a gap.
            self._due += STEP * max(1.0, (now - self._due) // STEP + 1)
        return self._due

    def tell(self) -> dict[str, Any]:
        """All of it, fit for JSON: one list for each line, oldest first, whose last value is that of now.

        `ages` are the samples' ages in seconds. What is counted is told as a rate a second since the sample before, so
        a list of these has one value less.
        """
        now = time.monotonic()
        samples = [*self._state.moments, self._sample(now)]
        listeners = samples[-1].listeners
        return {
            "ages": [round(now - one.at, 1) for one in samples],
            "clients": [one.clients for one in samples],
            "rates": {
                name: [_rate(earlier, later, earlier.counts[name], later.counts[name])
                       for earlier, later in pairwise(samples)]
                for name in samples[-1].counts
            },
            "listeners": [{"address": name, **_lines_of(name, samples)} for name in listeners],
        }  # fmt: skip

    def _sample(self, now: float) -> Moment:
        state = self._state
        totals: dict[str, int] = {}
        for counts in totals_by_slot(state).values():
            for name, count in counts.items():
                group = name.partition("_")[0]
                totals[group] = totals.get(group, 0) + count
        unexpected = sum(count for cause, count in state.pool.exit_counts.items() if cause != EXPECTED)
        served = state.pool.listener_counts()
        listeners = {}
        for bound in state.generation.bound[:_MOST_LISTENERS]:
            name = str(bound.address)
            opened, closed = served[name][:2] if name in served else (0, 0)
            waiting = sum(accept_queue_of(sock).waiting or 0 for sock in bound.sockets)
            listeners[name] = max(0, opened - closed), opened, waiting
        return Moment(
            at=now,
            clients=client_count(state),
            counts={**{name: totals.get(name, 0) for name in ("accepted", "refused", "ended", "errors")},
                    "deaths": unexpected},
            listeners=listeners,
        )  # fmt: skip


def _lines_of(name: str, samples: list[Moment]) -> dict[str, list[float]]:
    """What is told of a listener; before it was there it had nothing."""
    found = [(one, one.listeners.get(name, (0, 0, 0))) for one in samples]
    return {
        "connections": [one[0] for _, one in found],
        "queue": [one[2] for _, one in found],
        "rate": [_rate(earlier, later, before[1], after[1]) for (earlier, before), (later, after) in pairwise(found)],
    }


def _rate(earlier: Moment, later: Moment, before: int, after: int) -> float:
    """How much a second, of a count; never less than nothing, as where a listener was removed and came again."""
    return round(max(0, after - before) / max(0.001, later.at - earlier.at), 2)
