"""How long a slot waits for its next worker."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.master.plan import (
    BACKOFF,
    HEALTHY,
    JITTER,
    LONGEST_BACKOFF,
    SPREAD,
    Slot,
    slot_after_exit,
    slot_after_failed_fork,
)
from forkd.states import WorkerState

NOW = 5000.0


@pytest.mark.parametrize(
    ("failures", "wait"),
    [(0, 0.0), (1, 0.25), (2, 0.5), (3, 1.0), (4, 2.0), (7, 16.0), (8, 30.0), (9, 30.0), (5000, 30.0)],
)
def test_wait_doubles_with_each_failure_in_a_row(failures: int, wait: float) -> None:
    assert slot_after_exit(Slot(failures), WorkerState.SERVING, NOW, 1.0, jitter=0.0) == Slot(failures + 1, NOW + wait)
    assert slot_after_exit(Slot(failures), WorkerState.BOOTING, NOW, 0.0, jitter=1.0) == Slot(
        failures + 1, NOW + wait * 1.25
    )


@pytest.mark.parametrize(("served", "failures"), [(HEALTHY, 1), (1e6, 1), (HEALTHY - 0.001, 8), (0.0, 8)])
def test_failure_after_healthy_service_is_the_first_again(served: float, failures: int) -> None:
    slot = slot_after_exit(Slot(7), WorkerState.SERVING, NOW, served, jitter=1.0)
    assert slot.failures == failures
    assert (slot.retry_at == NOW) == (failures == 1)


def test_workers_that_end_together_are_followed_by_one_first() -> None:
    slots: dict[int, Slot] = {}
    for slot, jitter in enumerate((0.5, 0.0, 1.0)):
        slots[slot] = slot_after_exit(
            Slot(), WorkerState.SERVING, NOW + slot / 1000, HEALTHY, jitter, others=slots.values()
        )
    assert [slots[slot].retry_at - NOW for slot in slots] == pytest.approx([0.0, 0.001 + SPREAD / 2, 0.002 + SPREAD])
    assert SPREAD < 0.05, "clients wait for that long where the first fails"


@pytest.mark.parametrize(
    ("others", "wait"), [([], 0.0), ([Slot(1, NOW - 5.0), Slot()], 0.0), ([Slot(3, NOW + 9.0)], SPREAD / 2)]
)
def test_first_retry_is_at_once_where_no_other_slot_waits(others: list[Slot], wait: float) -> None:
    slot = slot_after_exit(Slot(), WorkerState.SERVING, NOW, HEALTHY, jitter=0.0, others=others)
    assert slot == Slot(1, NOW + wait)


def test_later_retry_is_not_put_off_where_others_wait() -> None:
    slot = slot_after_exit(Slot(1), WorkerState.SERVING, NOW, 0.0, jitter=0.0, others=[Slot(1, NOW)])
    assert slot == Slot(2, NOW + BACKOFF)


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.CLOSING])
def test_end_that_was_asked_for_is_no_failure(state: WorkerState) -> None:
    assert slot_after_exit(Slot(4, 17.0), state, NOW, 0.0, jitter=0.5) == Slot(4, 17.0)


@pytest.mark.parametrize(("failures", "wait"), [(0, 0.25), (1, 0.5), (6, 16.0), (7, 30.0), (5000, 30.0)])
def test_first_retry_after_a_failed_fork_is_not_at_once(failures: int, wait: float) -> None:
    assert slot_after_failed_fork(Slot(failures), NOW, jitter=0.0) == Slot(failures + 1, NOW + wait)
    assert slot_after_failed_fork(Slot(failures), NOW, jitter=1.0) == Slot(failures + 1, NOW + wait * 1.25)


@settings(derandomize=True, deadline=None)
@given(failures=st.integers(0, 100), jitter=st.floats(0, 1), fork=st.booleans())
def test_wait_is_between_the_backoff_and_its_jitter(failures: int, jitter: float, fork: bool) -> None:
    slot = (
        slot_after_failed_fork(Slot(failures), NOW, jitter)
        if fork
        else slot_after_exit(Slot(failures), WorkerState.SERVING, NOW, 0.0, jitter)
    )
    wait = 0.0 if failures + fork == 0 else min(LONGEST_BACKOFF, BACKOFF * 2 ** (failures + fork - 1))
    assert wait <= slot.retry_at - NOW <= wait * (1 + JITTER)
