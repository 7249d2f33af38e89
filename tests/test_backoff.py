"""How long a slot waits for its next worker."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.master.backoff import BACKOFF, HEALTHY, JITTER, LONGEST_BACKOFF, Slot, after_death, after_fork_failed
from forkd.states import Life

NOW = 5000.0


@pytest.mark.parametrize(
    ("failures", "wait"),
    [(0, 0.0), (1, 0.25), (2, 0.5), (3, 1.0), (4, 2.0), (7, 16.0), (8, 30.0), (9, 30.0), (5000, 30.0)],
)
def test_the_wait_doubles_with_each_failure_in_a_row_up_to_the_longest(failures: int, wait: float) -> None:
    assert after_death(Slot(failures), Life.SERVING, NOW, 1.0, luck=0.0) == Slot(failures + 1, NOW + wait)
    assert after_death(Slot(failures), Life.BOOTING, NOW, 0.0, luck=1.0) == Slot(failures + 1, NOW + wait * 1.25)


@pytest.mark.parametrize(("served", "failures"), [(HEALTHY, 1), (1e6, 1), (HEALTHY - 0.001, 8), (0.0, 8)])
def test_a_healthy_life_makes_the_next_failure_the_first(served: float, failures: int) -> None:
    slot = after_death(Slot(7), Life.SERVING, NOW, served, luck=1.0)
    assert slot.failures == failures
    assert (slot.retry_at == NOW) == (failures == 1)


@pytest.mark.parametrize("life", [Life.DRAINING, Life.CLOSING])
def test_an_end_that_was_asked_for_is_no_failure(life: Life) -> None:
    assert after_death(Slot(4, 17.0), life, NOW, 0.0, luck=0.5) == Slot(4, 17.0)


@pytest.mark.parametrize(("failures", "wait"), [(0, 0.25), (1, 0.5), (6, 16.0), (7, 30.0), (5000, 30.0)])
def test_after_a_fork_that_failed_not_even_the_first_retry_is_at_once(failures: int, wait: float) -> None:
    assert after_fork_failed(Slot(failures), NOW, luck=0.0) == Slot(failures + 1, NOW + wait)
    assert after_fork_failed(Slot(failures), NOW, luck=1.0) == Slot(failures + 1, NOW + wait * 1.25)


@settings(derandomize=True, deadline=None)
@given(failures=st.integers(0, 100), luck=st.floats(0, 1), fork=st.booleans())
def test_a_wait_is_never_shorter_than_the_backoff_nor_longer_than_the_jitter_allows(
    failures: int, luck: float, fork: bool
) -> None:
    slot = (
        after_fork_failed(Slot(failures), NOW, luck)
        if fork
        else after_death(Slot(failures), Life.SERVING, NOW, 0.0, luck)
    )
    wait = 0.0 if failures + fork == 0 else min(LONGEST_BACKOFF, BACKOFF * 2 ** (failures + fork - 1))
    assert wait <= slot.retry_at - NOW <= wait * (1 + JITTER)
