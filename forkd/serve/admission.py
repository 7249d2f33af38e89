"""Who should take the next client: rules alone, with no clock, socket or memory of their own."""

from __future__ import annotations

from collections.abc import Iterable

#: Connections by which a worker may be ahead of the least loaded one whatever the numbers, and the fraction, as a
#: shift, by which it may be ahead when they are large. The workers' turns spread clients evenly by themselves; this is
#: for lifetimes that differ, and with less of it clients that come and go would have workers step out all the time.
SLACK = 6
FRACTION = 5

#: A worker whose last heartbeat is this many heartbeats old does not count as one that could take a client.
STALE_BEATS = 2.5


def is_fair(mine: int, least: int) -> bool:
    """Whether a worker with `mine` connections may take one more while the least loaded one has `least`."""
    return mine <= least + max(SLACK, least >> FRACTION)


def least_load(rows: Iterable[tuple[int, int]], now: int, beat: int) -> int:
    """The least load among workers that are alive.

    Args:
        rows: each worker's load and the time of its last heartbeat.
        now: the time, on the heartbeats' clock.
        beat: the time between two heartbeats.

    Returns:
        The least load, and 0 for one that claims less; when nobody is alive, more than any load, so that whoever asks
        takes the client.
    """
    loads = (load for load, seen in rows if now - seen < STALE_BEATS * beat)
    return max(0, min(loads, default=1 << 62))


def next_try(waited: float, beat: float) -> float:
    """How long a worker that is ahead waits before it looks again, from how long it waited last: from milliseconds,
    twice as long each time, to a heartbeat. All in seconds.
    """
    return min(beat, max(0.005, waited * 2))
