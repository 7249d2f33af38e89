"""How long a slot waits for its next worker: rules alone, with no clock of their own.

The first death is answered at once; those that follow in a row wait twice as long each, with jitter.
"""

from __future__ import annotations

from dataclasses import dataclass

from forkd.states import Life

#: A worker that served this long, in seconds, was healthy: its death is the first one again.
HEALTHY = 10.0

#: Seconds before the second attempt in a row, doubled with each further one up to the longest; the first is at once.
BACKOFF = 0.25
LONGEST_BACKOFF = 30.0

#: By which fraction, at most, a wait is longer than that: workers that died together should not boot together for ever.
JITTER = 0.25


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one worker, and its recent luck.

    Attributes:
        failures: deaths in a row without a healthy life before them.
        retry_at: no new worker before this time.
    """

    failures: int = 0
    retry_at: float = 0.0


def after_death(slot: Slot, life: Life, now: float, served: float, luck: float) -> Slot:
    """A slot after its worker has ended.

    Args:
        slot: before.
        life: what the worker was about when it ended, or when it was killed.
        now: the time.
        served: seconds for which it had served.
        luck: a random number from 0 to 1, for the jitter.
    """
    if life in (Life.DRAINING, Life.CLOSING):
        return slot  # it had left the slot, which may be another's by now
    failures = 1 if served >= HEALTHY else slot.failures + 1
    return Slot(failures, now + _backoff(failures) * (1 + JITTER * luck))


def after_fork_failed(slot: Slot, now: float, luck: float) -> Slot:
    """A slot after fork(2) has failed: the machine is short of something, so not even the first retry is at once."""
    failures = slot.failures + 1
    return Slot(failures, now + _backoff(failures + 1) * (1 + JITTER * luck))


def _backoff(failures: int) -> float:
    return 0.0 if failures == 1 else min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(failures - 2, 60))
