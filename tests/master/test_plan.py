"""The policy for workers, rule by rule: for each a pool, and what the plan says to it.

A table's row is a state of the pool, the actions that it calls for now, and when the plan wants to be asked again. How
generations give way to each other is in `test_plan_generations`, what the rules come to when hours pass in
`test_plan_weeks`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forkd.master.plan import (
    GRACE,
    STACKS,
    Action,
    Candidate,
    Close,
    Drain,
    Dump,
    GiveUp,
    Kill,
    PoolView,
    Retire,
    Slot,
    Spawn,
    WorkerView,
    make_plan,
)
from forkd.states import MasterState, WorkerState
from tests.support.plan_builders import (
    BOOT,
    CLOSING,
    DRAIN,
    DRAINING,
    LEAVING,
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

#: Failures in a row after which a daemon gives up that has served, where its settings have it so.
BOUND = 10
FAILING = Slot(failures=BOUND, retry_at=NOW + 9.0)

NUMBERS = [
    ("the first workers", pool(STARTING, 3), [Spawn(1), Spawn(2), Spawn(3)], None),
    ("all are there", pool(RUNNING, 2, serving(1, 2)), [], None),
    ("one is missing", pool(RUNNING, 3, serving(1, 3)), [Spawn(2)], None),
    ("one boots", pool(RUNNING, 2, [*serving(1), worker(2, WorkerState.BOOTING)]), [], NOW - 1.0 + BOOT),
    ("one too many serves", pool(RUNNING, 1, serving(1, 2)), [Retire(200)], None),
    ("one too many boots", pool(RUNNING, 1, [*serving(1), worker(2, WorkerState.BOOTING)]), [Retire(200)], None),
    ("a gap below one too many", pool(RUNNING, 2, serving(1, 3)), [Retire(300), Spawn(2)], None),
    ("who drains has left", pool(RUNNING, 2, [*serving(1), worker(2, WorkerState.DRAINING)]), [Spawn(2)], NOW + 31.0),
    ("who drains does so once", pool(RUNNING, 1, [*serving(1), worker(2, WorkerState.DRAINING)]), [], NOW + 31.0),
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
    ("nobody new while draining", pool(DRAINING, 3, [worker(2, WorkerState.DRAINING)]), [], NOW + 31.0),
    ("nobody new while closing", pool(CLOSING, 3, [worker(2, WorkerState.CLOSING)]), [], NOW + 1.0),
    ("nobody new when over", pool(OVER, 3), [], None),
    ("all drain", pool(DRAINING, 2, [*serving(1), worker(2, WorkerState.BOOTING)]), [Retire(100), Retire(200)], None),
    ("all close", pool(CLOSING, 2, [*serving(1), worker(2, WorkerState.BOOTING)]), [Close(100), Close(200)], None),
    ("who drains closes too", pool(CLOSING, 2, [worker(1, WorkerState.DRAINING)]), [Close(100)], None),
    (
        "who drained too long closes first",
        pool(CLOSING, 2, [worker(1, WorkerState.DRAINING, 40.0)]),
        [Close(100)],
        None,
    ),
    (
        "who is to be killed closes first",
        pool(CLOSING, 2, serving(1, age=99.0, dumped_at=NOW - 2.0)),
        [Close(100)],
        None,
    ),
    ("killed once is enough", pool(CLOSING, 2, [worker(1, WorkerState.KILLED, 40.0)]), [], None),
    (
        "no more boot timeout",
        pool(DRAINING, 1, [worker(1, WorkerState.DRAINING, 31.9)]),
        [],
        NOW - 31.9 + DRAIN + GRACE,
    ),
]


def bounded(*args: Any, **more: Any) -> PoolView:
    """A pool whose daemon gives up after so many failures."""
    return replace(pool(*args, **more), give_up_after=BOUND)


def leaving(*args: Any, drain_in: float = 5.0, **more: Any) -> PoolView:
    """A pool whose daemon waits for its balancers before it drains."""
    return replace(pool(LEAVING, *args, **more), drain_at=NOW + drain_in)


LEAVES = [
    ("all serve on while it leaves", leaving(2, serving(1, 2)), [], NOW + 5.0),
    ("one that is missing is followed", leaving(2, serving(1)), [Spawn(2)], NOW + 5.0),
    ("its slot may wait for longer", leaving(2, serving(1), {2: Slot(3, NOW + 9.0)}), [], NOW + 5.0),
    ("no worker is recycled", leaving(1, serving(1, recycle_reason="old")), [], NOW + 5.0),
    ("a worker that was replaced goes", leaving(1, [*serving(1, recycle_reason="old"),
     worker(1, WorkerState.SERVING, 0.5, pid=101)]), [Retire(100)], NOW + 5.0),
    ("the delay is over", leaving(2, serving(1, 2), drain_in=0.0), [Drain()], None),
    ("the delay is over while one is missing", leaving(2, serving(1), drain_in=-1.0), [Drain(), Spawn(2)], None),
    ("a worker stands still", leaving(1, [worker(1, WorkerState.SERVING, 300.0, heartbeat=NOW - 4.0)],
     stall_timeout=STALL), [], NOW - 4.0 + STALL),
    ("who runs has no such moment", replace(pool(RUNNING, 1, serving(1)), drain_at=NOW), [], None),
    ("who drains has none either",
     replace(pool(DRAINING, 1, [worker(1, WorkerState.DRAINING)]), drain_at=NOW), [], NOW - 1.0 + DRAIN + GRACE),
]  # fmt: skip

HOPE = [
    ("first failure", pool(STARTING, 2, serving(1), {2: Slot(1, NOW)}), [GiveUp()], None),
    ("first failure, others boot", pool(STARTING, 2, [worker(1, WorkerState.BOOTING)], {2: Slot(1)}), [GiveUp()], None),
    ("a failure of nobody's slot", pool(STARTING, 1, [worker(1, WorkerState.BOOTING)], {2: Slot(1)}), [], NOW + 59.0),
    ("all fail, and it goes on", pool(RUNNING, 2, [], {1: FAILING, 2: FAILING}), [], NOW + 9.0),
    ("all fail", bounded(RUNNING, 2, [], {1: FAILING, 2: FAILING}), [GiveUp()], None),
    ("all fail while one boots", bounded(RUNNING, 2, [worker(1, WorkerState.BOOTING)], dict.fromkeys((1, 2), FAILING)),
     [GiveUp()], None),
    ("all fail, but one serves", bounded(RUNNING, 2, serving(1), {1: FAILING, 2: FAILING}), [], NOW + 9.0),
    ("all fail, but a candidate may not", bounded(RUNNING, 1, [], {1: FAILING}, candidate=Candidate(2, 1, BOOT)),
     [Spawn(1, candidate=True)], NOW + 9.0),
    ("one fails less", bounded(RUNNING, 2, [], {1: FAILING, 2: Slot(BOUND - 1, NOW + 4.0)}), [], NOW + 4.0),
    ("one has not failed", bounded(RUNNING, 2, [], {1: FAILING}), [Spawn(2)], NOW + 9.0),
    ("giving up is all that it does",
     bounded(RUNNING, 1, [worker(2, WorkerState.BOOTING)], {1: FAILING}), [GiveUp()], None),
    ("others than wanted failed", bounded(RUNNING, 1, [], {2: FAILING, 3: FAILING}), [Spawn(1)], None),
    ("draining is no giving up", bounded(DRAINING, 2, [], {1: FAILING, 2: FAILING}), [], None),
    ("closing is no giving up", bounded(CLOSING, 2, [], {1: FAILING, 2: FAILING}), [], None),
]  # fmt: skip


def beating(beat: float, state: WorkerState = WorkerState.SERVING, age: float = 300.0, **more: float) -> WorkerView:
    """A worker whose loop turned so many seconds ago."""
    return worker(1, state, age, heartbeat=NOW - beat, **more)


STALLS = [
    ("serves for ever", pool(RUNNING, 1, [worker(1, WorkerState.SERVING, 1e9)]), [], None),
    ("no timeout, no heartbeat", pool(RUNNING, 1, [beating(1e9)], stall_timeout=0.0), [], None),
    ("its loop turns", pool(RUNNING, 1, [beating(0.5)], stall_timeout=STALL), [], NOW - 0.5 + STALL),
    ("no heartbeat yet",
     pool(RUNNING, 1, [worker(1, WorkerState.SERVING, 1.0)], stall_timeout=STALL), [], NOW - 1.0 + STALL),
    ("who boots has no loop", pool(RUNNING, 1, [beating(40.0, WorkerState.BOOTING, 40.0)], stall_timeout=STALL), [],
     NOW - 40.0 + BOOT),
    ("who closes is about to end", pool(CLOSING, 1, [beating(9.0, WorkerState.CLOSING, 1.0)], stall_timeout=STALL), [],
     NOW - 1.0 + GRACE),
    ("who drains has a loop", pool(DRAINING, 1, [beating(1.0, WorkerState.DRAINING, 4.0)], stall_timeout=STALL), [],
     NOW - 1.0 + STALL),
    ("who drains does so by its own settings",
     pool(DRAINING, 1, [worker(1, WorkerState.DRAINING, drain_timeout=90.0)]), [],
     NOW + 91.0),
    ("who drains may stand still by its own",
     pool(DRAINING, 1, [beating(9.0, WorkerState.DRAINING, 9.0, stall_timeout=20.0)],
     stall_timeout=STALL), [], NOW + 11.0),
    ("who drains may do so for ever", pool(DRAINING, 1, [beating(9.0, WorkerState.DRAINING, 9.0, stall_timeout=0.0)],
     stall_timeout=STALL), [], NOW + DRAIN + GRACE - 9.0),
    ("its drain deadline comes first",
     pool(DRAINING, 1, [beating(0.0, WorkerState.DRAINING, 31.0)], stall_timeout=STALL), [],
     NOW + 1.0),
    ("it has come round after its dump", pool(RUNNING, 1, [beating(0.1, dumped_at=NOW - 0.5)], stall_timeout=STALL), [],
     NOW - 0.1 + STALL),
    ("it stands still again", pool(RUNNING, 1, [beating(STALL, dumped_at=NOW - 20.0)], stall_timeout=STALL),
     ["dump 100"], None),
    ("it was ready after all", pool(RUNNING, 1, [worker(1, WorkerState.SERVING, 0.5, dumped_at=NOW - 0.9)]), [], None),
    ("it retires after its dump", pool(RUNNING, 1, [worker(1, WorkerState.DRAINING, 0.5, dumped_at=NOW - 0.9)]),
     [Spawn(1)], NOW - 0.5 + DRAIN + GRACE),
]  # fmt: skip


@pytest.mark.parametrize(
    ("view", "actions", "deadline"),
    [pytest.param(*row, id=name.replace(" ", "-")) for name, *row in NUMBERS + ENDS + LEAVES + HOPE + STALLS],
)
def test_pool_calls_for_these_actions_and_this_deadline(
    view: PoolView, actions: list[Action | str], deadline: float | None
) -> None:
    found, when = planned(view)
    assert found == actions
    if GiveUp() not in actions:  # then the master's state changes, and the next plan says when
        assert when == deadline


#: The limits of patience: a master_state, what a worker is about, and for how many seconds it may be.
LIMITS = {
    "boots": (RUNNING, WorkerState.BOOTING, BOOT),
    "boots at the start": (STARTING, WorkerState.BOOTING, BOOT),
    "drains": (RUNNING, WorkerState.DRAINING, DRAIN + GRACE),
    "drains at the end": (DRAINING, WorkerState.DRAINING, DRAIN + GRACE),
    "closes": (CLOSING, WorkerState.CLOSING, GRACE),
    "stands still": (RUNNING, WorkerState.SERVING, STALL),
}


@pytest.mark.parametrize(("master_state", "state", "seconds"), LIMITS.values(), ids=LIMITS)
def test_stacks_are_asked_for_at_each_limit_before_the_kill(
    master_state: MasterState, state: WorkerState, seconds: float
) -> None:
    def at(late: float, dumped_at: float | None = None) -> tuple[list[Action | str], float | None]:
        """The plan so many seconds after the limit, when the stacks were asked for so many seconds ago."""
        late_one = (
            worker(2, state, seconds + late)
            if dumped_at is None
            else worker(2, state, seconds + late, dumped_at=dumped_at)
        )
        stall = STALL if state is WorkerState.SERVING else 0.0
        others = serving(1, heartbeat=NOW + 100.0) if master_state in (STARTING, RUNNING) else []
        wanted = 1 if state is WorkerState.DRAINING else 2
        return planned(pool(master_state, wanted, [*others, late_one], stall_timeout=stall))

    assert at(late=-0.5) == ([], NOW + 0.5)
    assert at(late=0.0)[0] == ["dump 200"]
    assert at(late=0.0, dumped_at=NOW) == ([], NOW + STACKS)
    assert at(late=STACKS - 0.25, dumped_at=NOW - STACKS + 0.25) == ([], NOW + 0.25)
    assert at(late=STACKS, dumped_at=NOW - STACKS)[0] == ["kill 200"]
    assert at(late=99.0, dumped_at=NOW - 50.0)[0] == ["kill 200"]
    assert at(late=99.0, dumped_at=NOW - 150.0)[0] == ["dump 200"], "these stacks were of another time"


@pytest.mark.parametrize(("master_state", "state", "seconds"), LIMITS.values(), ids=LIMITS)
def test_time_that_the_master_slept_counts_against_no_worker(
    master_state: MasterState, state: WorkerState, seconds: float
) -> None:
    for dumped_at in (-1e9, NOW - 60.0):  # before it fell asleep
        late = worker(1, state, 1e6, heartbeat=NOW - 1e5, dumped_at=dumped_at)
        view = pool(
            master_state, 1, [late], awake_since=NOW - 0.5, stall_timeout=STALL if state is WorkerState.SERVING else 0.0
        )
        actions, deadline = planned(view)
        assert [action for action in actions if action != Spawn(1)] == []
        assert deadline == NOW - 0.5 + seconds
    later = replace(view, awake_since=NOW - seconds)
    assert "dump 100" in planned(later)[0], "it is forgiven for ever"


@pytest.mark.parametrize(
    ("master_state", "slots"), [(STARTING, {}), (RUNNING, {2: Slot(failures=5, retry_at=NOW - 40.0)})]
)
def test_slot_of_a_killed_boot_stays_empty_until_it_is_reaped(
    master_state: MasterState, slots: dict[int, Slot]
) -> None:
    # Its failure is counted, and the wait after it begins, when it is reaped.
    assert make_plan(NOW, pool(master_state, 2, [*serving(1), worker(2, WorkerState.KILLED)], slots)).actions == []


def test_helper_is_given_the_time_that_a_worker_has_to_boot() -> None:
    helper = worker(0, WorkerState.BOOTING, BOOT + 5.0, generation=2)
    here = [*serving(1), helper]
    assert planned(pool(RUNNING, 1, here, candidate=Candidate(2, 0, BOOT + 6.0))) == ([], NOW + 1.0)
    assert planned(pool(RUNNING, 1, here, candidate=Candidate(2, 0, BOOT)))[0] == [f"dump {helper.pid}"]


def test_kill_and_stack_dump_each_say_why() -> None:
    causes = set()
    for master_state, state, _ in LIMITS.values():
        late = worker(1, state, 1e6)
        stall = STALL if state is WorkerState.SERVING else 0.0
        (dump,) = (
            one for one in make_plan(NOW, pool(master_state, 1, [late], stall_timeout=stall)).actions if one != Spawn(1)
        )
        late = replace(late, dumped_at=NOW - STACKS)
        (kill,) = (
            one for one in make_plan(NOW, pool(master_state, 1, [late], stall_timeout=stall)).actions if one != Spawn(1)
        )
        assert isinstance(dump, Dump)
        assert isinstance(kill, Kill)
        assert dump.cause == kill.cause
        causes.add(kill.cause)
    assert len(causes) == 4
    assert all(causes)


def test_plan_leaves_the_pool_that_it_is_made_from_alone() -> None:
    slots = {1: Slot(2, NOW + 1.0)}
    view = pool(RUNNING, 3, serving(2), slots)
    make_plan(NOW, view)
    assert slots == {1: Slot(2, NOW + 1.0)}
    assert view == pool(RUNNING, 3, serving(2), slots)
