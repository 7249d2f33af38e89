"""The policy for workers, rule by rule: for each a pool, and what the plan says to it.

A table's row is a state of the pool, the actions that it calls for now, and when the plan wants to be asked again. What
the rules come to when hours pass is in `test_plan_weeks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.master.backoff import BACKOFF, HEALTHY, JITTER, LONGEST_BACKOFF, Slot, after_death, after_fork_failed
from forkd.master.plan import ATTEMPTS, GRACE, Action, Close, GiveUp, Kill, Pool, Retire, Spawn, WorkerView, make_plan
from forkd.states import Life, Mode

NOW = 5000.0
BOOT = 60.0
DRAIN = 30.0
STARTING, RUNNING, DRAINING, CLOSING, OVER = Mode
FAILING = Slot(failures=ATTEMPTS, retry_at=NOW + 9.0)


def worker(slot: int, life: Life, age: float = 1.0) -> WorkerView:
    """A worker whose pid is a hundred times its slot."""
    return WorkerView(100 * slot, slot, life, NOW - age)


def pool(mode: Mode, wanted: int, workers: Sequence[WorkerView] = (), slots: Mapping[int, Slot] | None = None) -> Pool:
    return Pool(mode, wanted, tuple(workers), slots or {}, BOOT, DRAIN)


def bare(actions: Sequence[Action]) -> list[Action | int]:
    """The actions; of a kill the pid alone, since its cause is for people."""
    return [action.pid if isinstance(action, Kill) else action for action in actions]


def serving(*slots: int) -> list[WorkerView]:
    return [worker(slot, Life.SERVING) for slot in slots]


NUMBERS = [
    ("the first workers", pool(STARTING, 3), [Spawn(1), Spawn(2), Spawn(3)], None),
    ("all are there", pool(RUNNING, 2, serving(1, 2)), [], None),
    ("one is missing", pool(RUNNING, 3, serving(1, 3)), [Spawn(2)], None),
    ("one boots", pool(RUNNING, 2, [*serving(1), worker(2, Life.BOOTING)]), [], NOW - 1.0 + BOOT),
    ("one too many serves", pool(RUNNING, 1, serving(1, 2)), [Retire(200)], None),
    ("one too many boots", pool(RUNNING, 1, [*serving(1), worker(2, Life.BOOTING)]), [Retire(200)], None),
    ("a gap below one too many", pool(RUNNING, 2, serving(1, 3)), [Retire(300), Spawn(2)], None),
    ("who drains has left", pool(RUNNING, 2, [*serving(1), worker(2, Life.DRAINING)]), [Spawn(2)], NOW + 31.0),
    ("who drains does so once", pool(RUNNING, 1, [*serving(1), worker(2, Life.DRAINING)]), [], NOW + 31.0),
    ("the wait is not over", pool(RUNNING, 2, serving(1), {2: Slot(3, NOW + 0.5)}), [], NOW + 0.5),
    ("the wait is over", pool(RUNNING, 2, serving(1), {2: Slot(3, NOW)}), [Spawn(2)], None),
    ("a wait for nobody", pool(RUNNING, 1, serving(1), {2: Slot(3, NOW + 0.5)}), [], None),
    (
        "the first of several waits",
        pool(RUNNING, 3, serving(1), {2: Slot(3, NOW + 4.0), 3: Slot(3, NOW + 2.0)}),
        [],
        NOW + 2.0,
    ),
]

ENDS = [
    ("nobody new while draining", pool(DRAINING, 3, [worker(2, Life.DRAINING)]), [], NOW + 31.0),
    ("nobody new while closing", pool(CLOSING, 3, [worker(2, Life.CLOSING)]), [], NOW + 1.0),
    ("nobody new when over", pool(OVER, 3), [], None),
    ("all drain", pool(DRAINING, 2, [*serving(1), worker(2, Life.BOOTING)]), [Retire(100), Retire(200)], None),
    ("all close", pool(CLOSING, 2, [*serving(1), worker(2, Life.BOOTING)]), [Close(100), Close(200)], None),
    ("who drains closes too", pool(CLOSING, 2, [worker(1, Life.DRAINING)]), [Close(100)], None),
    ("who drained too long closes first", pool(CLOSING, 2, [worker(1, Life.DRAINING, 40.0)]), [Close(100)], None),
    ("killed once is enough", pool(CLOSING, 2, [worker(1, Life.KILLED, 40.0)]), [], None),
    ("no more boot timeout", pool(DRAINING, 1, [worker(1, Life.DRAINING, 31.9)]), [], NOW - 31.9 + DRAIN + GRACE),
]

KILLS = [
    ("boots too long", pool(RUNNING, 2, [*serving(1), worker(2, Life.BOOTING, BOOT)]), [200], None),
    ("boots as long as it may", pool(RUNNING, 2, [*serving(1), worker(2, Life.BOOTING, 59.5)]), [], NOW + 0.5),
    ("the other is too slow", pool(STARTING, 1, [worker(1, Life.BOOTING, BOOT)]), [100], None),
    ("drains too long", pool(RUNNING, 1, [*serving(1), worker(2, Life.DRAINING, 32.0)]), [200], None),
    ("drains as long as it may", pool(RUNNING, 1, [*serving(1), worker(2, Life.DRAINING, 31.5)]), [], NOW + 0.5),
    ("drains too long at the end", pool(DRAINING, 1, [worker(1, Life.DRAINING, 32.0)]), [100], None),
    ("closes too long", pool(CLOSING, 1, [worker(1, Life.CLOSING, GRACE)]), [100], None),
    ("closes as long as it may", pool(CLOSING, 1, [worker(1, Life.CLOSING, 1.5)]), [], NOW + 0.5),
    ("serves for ever", pool(RUNNING, 1, [worker(1, Life.SERVING, 1e9)]), [], None),
]

HOPE = [
    ("first failure", pool(STARTING, 2, serving(1), {2: Slot(1, NOW)}), [GiveUp()], None),
    ("first failure, others boot", pool(STARTING, 2, [worker(1, Life.BOOTING)], {2: Slot(1)}), [GiveUp()], None),
    ("a failure of nobody's slot", pool(STARTING, 1, [worker(1, Life.BOOTING)], {2: Slot(1)}), [], NOW + 59.0),
    ("all fail", pool(RUNNING, 2, [], {1: FAILING, 2: FAILING}), [GiveUp()], None),
    ("all fail while one boots", pool(RUNNING, 2, [worker(1, Life.BOOTING)], dict.fromkeys((1, 2), FAILING)),
     [GiveUp()], None),
    ("all fail, but one serves", pool(RUNNING, 2, serving(1), {1: FAILING, 2: FAILING}), [], NOW + 9.0),
    ("one fails less", pool(RUNNING, 2, [], {1: FAILING, 2: Slot(ATTEMPTS - 1, NOW + 4.0)}), [], NOW + 4.0),
    ("one has not failed", pool(RUNNING, 2, [], {1: FAILING}), [Spawn(2)], NOW + 9.0),
    ("giving up is all that it does", pool(RUNNING, 1, [worker(2, Life.BOOTING)], {1: FAILING}), [GiveUp()], None),
    ("others than wanted failed", pool(RUNNING, 1, [], {2: FAILING, 3: FAILING}), [Spawn(1)], None),
    ("draining is no giving up", pool(DRAINING, 2, [], {1: FAILING, 2: FAILING}), [], None),
    ("closing is no giving up", pool(CLOSING, 2, [], {1: FAILING, 2: FAILING}), [], None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "actions", "deadline"),
    [pytest.param(*row, id=name.replace(" ", "-")) for name, *row in NUMBERS + ENDS + KILLS + HOPE],
)
def test_a_pool_calls_for_these_actions_and_this_deadline(
    state: Pool, actions: list[Action | int], deadline: float | None
) -> None:
    plan = make_plan(NOW, state)
    assert bare(plan.actions) == actions
    if GiveUp() not in actions:  # then the mode changes, and the next plan says when
        assert plan.deadline == deadline


@pytest.mark.parametrize(("mode", "slots"), [(STARTING, {}), (RUNNING, {2: Slot(failures=5, retry_at=NOW - 40.0)})])
def test_where_one_was_killed_while_it_booted_no_other_comes_before_it_is_reaped(
    mode: Mode, slots: dict[int, Slot]
) -> None:
    # Its failure is counted, and the wait after it begins, when it is reaped.
    assert make_plan(NOW, pool(mode, 2, [*serving(1), worker(2, Life.KILLED)], slots)).actions == []


def test_every_kill_says_why_in_words_of_its_own() -> None:
    lives = {Life.BOOTING: RUNNING, Life.DRAINING: RUNNING, Life.CLOSING: CLOSING}
    plans = [make_plan(NOW, pool(mode, 1, [worker(1, life, 1e6)])) for life, mode in lives.items()]
    causes = {action.cause for plan in plans for action in plan.actions if isinstance(action, Kill)}
    assert len(causes) == 3
    assert all(causes)


def test_a_plan_leaves_the_pool_that_it_is_made_from_alone() -> None:
    slots = {1: Slot(2, NOW + 1.0)}
    state = pool(RUNNING, 3, serving(2), slots)
    make_plan(NOW, state)
    assert slots == {1: Slot(2, NOW + 1.0)}
    assert state == pool(RUNNING, 3, serving(2), slots)


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
