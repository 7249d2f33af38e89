"""The policy for workers, rule by rule: for each a pool, and what the plan says to it.

A table's row is a state of the pool, the actions that it calls for now, and when the plan wants to be asked again. How
generations give way to each other is in `test_plan_generations`, what the rules come to when hours pass in
`test_plan_weeks`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from pools import (
    BOOT,
    CLOSING,
    DRAIN,
    DRAINING,
    NOW,
    OVER,
    RUNNING,
    STALL,
    STARTING,
    planned,
    pool,
    serving,
    worker,
)

from forkd.master.backoff import Slot
from forkd.master.plan import (
    ATTEMPTS,
    GRACE,
    STACKS,
    Action,
    Candidate,
    Close,
    Dump,
    GiveUp,
    Kill,
    Pool,
    Retire,
    Spawn,
    WorkerView,
    make_plan,
)
from forkd.states import Life, Mode

FAILING = Slot(failures=ATTEMPTS, retry_at=NOW + 9.0)

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
    ("who is to be killed closes first", pool(CLOSING, 2, serving(1, age=99.0, dumped=NOW - 2.0)), [Close(100)], None),
    ("killed once is enough", pool(CLOSING, 2, [worker(1, Life.KILLED, 40.0)]), [], None),
    ("no more boot timeout", pool(DRAINING, 1, [worker(1, Life.DRAINING, 31.9)]), [], NOW - 31.9 + DRAIN + GRACE),
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


def beating(beat: float, life: Life = Life.SERVING, age: float = 300.0, **more: float) -> WorkerView:
    """A worker whose loop turned so many seconds ago."""
    return worker(1, life, age, beat=NOW - beat, **more)


STALLS = [
    ("serves for ever", pool(RUNNING, 1, [worker(1, Life.SERVING, 1e9)]), [], None),
    ("no timeout, no heartbeat", pool(RUNNING, 1, [beating(1e9)], stall_timeout=0.0), [], None),
    ("its loop turns", pool(RUNNING, 1, [beating(0.5)], stall_timeout=STALL), [], NOW - 0.5 + STALL),
    ("no heartbeat yet", pool(RUNNING, 1, [worker(1, Life.SERVING, 1.0)], stall_timeout=STALL), [], NOW - 1.0 + STALL),
    ("who boots has no loop", pool(RUNNING, 1, [beating(40.0, Life.BOOTING, 40.0)], stall_timeout=STALL), [],
     NOW - 40.0 + BOOT),
    ("who closes is about to end", pool(CLOSING, 1, [beating(9.0, Life.CLOSING, 1.0)], stall_timeout=STALL), [],
     NOW - 1.0 + GRACE),
    ("who drains has a loop", pool(DRAINING, 1, [beating(1.0, Life.DRAINING, 4.0)], stall_timeout=STALL), [],
     NOW - 1.0 + STALL),
    ("who drains does so by its own settings", pool(DRAINING, 1, [worker(1, Life.DRAINING, drain_timeout=90.0)]), [],
     NOW + 91.0),
    ("who drains may stand still by its own", pool(DRAINING, 1, [beating(9.0, Life.DRAINING, 9.0, stall_timeout=20.0)],
     stall_timeout=STALL), [], NOW + 11.0),
    ("who drains may do so for ever", pool(DRAINING, 1, [beating(9.0, Life.DRAINING, 9.0, stall_timeout=0.0)],
     stall_timeout=STALL), [], NOW + DRAIN + GRACE - 9.0),
    ("its drain deadline comes first", pool(DRAINING, 1, [beating(0.0, Life.DRAINING, 31.0)], stall_timeout=STALL), [],
     NOW + 1.0),
    ("it has come round after its dump", pool(RUNNING, 1, [beating(0.1, dumped=NOW - 0.5)], stall_timeout=STALL), [],
     NOW - 0.1 + STALL),
    ("it stands still again", pool(RUNNING, 1, [beating(STALL, dumped=NOW - 20.0)], stall_timeout=STALL),
     ["dump 100"], None),
    ("it was ready after all", pool(RUNNING, 1, [worker(1, Life.SERVING, 0.5, dumped=NOW - 0.9)]), [], None),
    ("it retires after its dump", pool(RUNNING, 1, [worker(1, Life.DRAINING, 0.5, dumped=NOW - 0.9)]),
     [Spawn(1)], NOW - 0.5 + DRAIN + GRACE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "actions", "deadline"),
    [pytest.param(*row, id=name.replace(" ", "-")) for name, *row in NUMBERS + ENDS + HOPE + STALLS],
)
def test_a_pool_calls_for_these_actions_and_this_deadline(
    state: Pool, actions: list[Action | str], deadline: float | None
) -> None:
    found, when = planned(state)
    assert found == actions
    if GiveUp() not in actions:  # then the mode changes, and the next plan says when
        assert when == deadline


#: The limits of patience: a mode, what a worker is about, and for how many seconds it may be.
LIMITS = {
    "boots": (RUNNING, Life.BOOTING, BOOT),
    "boots at the start": (STARTING, Life.BOOTING, BOOT),
    "drains": (RUNNING, Life.DRAINING, DRAIN + GRACE),
    "drains at the end": (DRAINING, Life.DRAINING, DRAIN + GRACE),
    "closes": (CLOSING, Life.CLOSING, GRACE),
    "stands still": (RUNNING, Life.SERVING, STALL),
}


@pytest.mark.parametrize(("mode", "life", "seconds"), LIMITS.values(), ids=LIMITS)
def test_at_each_limit_the_stacks_are_asked_for_and_a_moment_later_the_kill_follows(
    mode: Mode, life: Life, seconds: float
) -> None:
    def at(late: float, dumped: float | None = None) -> tuple[list[Action | str], float | None]:
        """The plan so many seconds after the limit, when the stacks were asked for so many seconds ago."""
        late_one = worker(2, life, seconds + late) if dumped is None else worker(2, life, seconds + late, dumped=dumped)
        stall = STALL if life is Life.SERVING else 0.0
        others = serving(1, beat=NOW + 100.0) if mode in (STARTING, RUNNING) else []
        wanted = 1 if life is Life.DRAINING else 2
        return planned(pool(mode, wanted, [*others, late_one], stall_timeout=stall))

    assert at(late=-0.5) == ([], NOW + 0.5)
    assert at(late=0.0)[0] == ["dump 200"]
    assert at(late=0.0, dumped=NOW) == ([], NOW + STACKS)
    assert at(late=STACKS - 0.25, dumped=NOW - STACKS + 0.25) == ([], NOW + 0.25)
    assert at(late=STACKS, dumped=NOW - STACKS)[0] == ["kill 200"]
    assert at(late=99.0, dumped=NOW - 50.0)[0] == ["kill 200"]
    assert at(late=99.0, dumped=NOW - 150.0)[0] == ["dump 200"], "these stacks were of another time"


@pytest.mark.parametrize(("mode", "life", "seconds"), LIMITS.values(), ids=LIMITS)
def test_what_the_master_slept_through_counts_for_nobody(mode: Mode, life: Life, seconds: float) -> None:
    for dumped in (-1e9, NOW - 60.0):  # before it fell asleep
        late = worker(1, life, 1e6, beat=NOW - 1e5, dumped=dumped)
        state = pool(mode, 1, [late], awake=NOW - 0.5, stall_timeout=STALL if life is Life.SERVING else 0.0)
        actions, deadline = planned(state)
        assert [action for action in actions if action != Spawn(1)] == []
        assert deadline == NOW - 0.5 + seconds
    later = replace(state, awake=NOW - seconds)
    assert "dump 100" in planned(later)[0], "it is forgiven for ever"


@pytest.mark.parametrize(("mode", "slots"), [(STARTING, {}), (RUNNING, {2: Slot(failures=5, retry_at=NOW - 40.0)})])
def test_where_one_was_killed_while_it_booted_no_other_comes_before_it_is_reaped(
    mode: Mode, slots: dict[int, Slot]
) -> None:
    # Its failure is counted, and the wait after it begins, when it is reaped.
    assert make_plan(NOW, pool(mode, 2, [*serving(1), worker(2, Life.KILLED)], slots)).actions == []


def test_a_helper_is_given_the_time_that_a_worker_has_to_boot() -> None:
    helper = worker(0, Life.BOOTING, BOOT + 5.0, generation=2)
    here = [*serving(1), helper]
    assert planned(pool(RUNNING, 1, here, candidate=Candidate(2, 0, BOOT + 6.0))) == ([], NOW + 1.0)
    assert planned(pool(RUNNING, 1, here, candidate=Candidate(2, 0, BOOT)))[0] == [f"dump {helper.pid}"]


def test_every_kill_says_why_in_words_of_its_own_as_does_the_order_for_the_stacks_before_it() -> None:
    causes = set()
    for mode, life, _ in LIMITS.values():
        late = worker(1, life, 1e6)
        stall = STALL if life is Life.SERVING else 0.0
        (dump,) = (one for one in make_plan(NOW, pool(mode, 1, [late], stall_timeout=stall)).actions if one != Spawn(1))
        late = replace(late, dumped=NOW - STACKS)
        (kill,) = (one for one in make_plan(NOW, pool(mode, 1, [late], stall_timeout=stall)).actions if one != Spawn(1))
        assert isinstance(dump, Dump)
        assert isinstance(kill, Kill)
        assert dump.cause == kill.cause
        causes.add(kill.cause)
    assert len(causes) == 4
    assert all(causes)


def test_a_plan_leaves_the_pool_that_it_is_made_from_alone() -> None:
    slots = {1: Slot(2, NOW + 1.0)}
    state = pool(RUNNING, 3, serving(2), slots)
    make_plan(NOW, state)
    assert slots == {1: Slot(2, NOW + 1.0)}
    assert state == pool(RUNNING, 3, serving(2), slots)
