"""The policy for workers that are replaced: those to be recycled, one at a time, and whole generations by a candidate.

Rows as in `test_plan`. No worker that serves goes before its successor serves. What a candidate comes to is decided by
`reload`: here it boots, and what is not wanted any more has to go.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.master.plan import (
    GRACE,
    Action,
    Candidate,
    Close,
    GiveUp,
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
    NOW,
    RUNNING,
    STALL,
    STARTING,
    planned,
    pool,
    serving,
    worker,
)

WHY = "it is old"
BOOTED = NOW - 1.0 + BOOT  # the deadline of those that boot here


def old(*slots: int) -> list[WorkerView]:
    return serving(*slots, age=500.0, recycle_reason=WHY)


def successor(slot: int, state: WorkerState = WorkerState.BOOTING, **more: Any) -> WorkerView:
    return worker(slot, state, pid=100 * slot + 50, **more)


RENEWALS = [
    ("one is old", pool(RUNNING, 2, [*serving(1), *old(2)]), [Spawn(2)], None),
    ("all are old", pool(RUNNING, 3, old(1, 2, 3)), [Spawn(1)], None),
    ("the only one is old", pool(RUNNING, 1, old(1)), [Spawn(1)], None),
    ("its successor boots", pool(RUNNING, 2, [*serving(1), *old(2), successor(2)]), [], BOOTED),
    ("its successor boots and others are old", pool(RUNNING, 2, [*old(1, 2), successor(2)]), [], BOOTED),
    ("its successor serves", pool(RUNNING, 2, [*serving(1), *old(2), successor(2, WorkerState.SERVING)]),
     [Retire(200)], None),
    ("the only one's successor serves",
     pool(RUNNING, 1, [*old(1), successor(1, WorkerState.SERVING)]), [Retire(100)], None),
    ("the order of the pool does not matter", pool(RUNNING, 1, [successor(1, WorkerState.SERVING), *old(1)]),
     [Retire(100)], None),
    ("its successor serves and is old too",
     pool(RUNNING, 1, [*old(1), successor(1, WorkerState.SERVING, recycle_reason=WHY)]),
     [Retire(100)], None),
    ("the next one's turn while the first drains",
     pool(RUNNING, 2,
          [worker(1, WorkerState.DRAINING, recycle_reason=WHY), successor(1, WorkerState.SERVING), *old(2)]),
     [Spawn(2)], NOW - 1.0 + DRAIN + GRACE),
    ("a slot is empty", pool(RUNNING, 2, old(1)), [Spawn(2)], None),
    ("a slot waits", pool(RUNNING, 2, old(1), {2: Slot(3, NOW + 5.0)}), [], NOW + 5.0),
    ("another boots", pool(RUNNING, 2, [*old(1), worker(2, WorkerState.BOOTING)]), [], BOOTED),
    ("another is killed", pool(RUNNING, 2, [*old(1), worker(2, WorkerState.KILLED)]), [], None),
    ("its successor is killed", pool(RUNNING, 1, [*old(1), successor(1, WorkerState.KILLED)]), [], None),
    ("its successor could not boot", pool(RUNNING, 1, old(1), {1: Slot(3, NOW + 4.0)}), [], NOW + 4.0),
    ("its successor can be tried again", pool(RUNNING, 1, old(1), {1: Slot(3, NOW)}), [Spawn(1)], None),
    ("no successor can boot and it serves on", pool(RUNNING, 1, old(1), {1: Slot(15, NOW + 30.0)}),
     [], NOW + 30.0),
    ("one that waits holds nobody up", pool(RUNNING, 2, old(1, 2), {1: Slot(3, NOW + 4.0)}), [Spawn(2)], None),
    ("the first of several waits", pool(RUNNING, 2, old(1, 2), {1: Slot(3, NOW + 4.0), 2: Slot(3, NOW + 2.0)}),
     [], NOW + 2.0),
    ("it died when its successor booted", pool(RUNNING, 1, [successor(1)]), [], BOOTED),
    ("it stands still when its successor boots",
     pool(RUNNING, 1, [worker(1, WorkerState.SERVING, 9.0, recycle_reason=WHY), successor(1)], stall_timeout=STALL),
     ["dump 100"], BOOTED),
    ("it is one too many", pool(RUNNING, 1, [*serving(1), *old(2)]), [Retire(200)], None),
    ("it boots", pool(RUNNING, 1, [worker(1, WorkerState.BOOTING, recycle_reason=WHY)]), [], BOOTED),
    ("it drains",
     pool(RUNNING, 1, [*serving(1), worker(2, WorkerState.DRAINING, recycle_reason=WHY)]),
     [], NOW - 1.0 + DRAIN + GRACE),
    ("the daemon starts", pool(STARTING, 2, [*old(1), worker(2, WorkerState.BOOTING)]), [], BOOTED),
    ("the daemon has just started", pool(STARTING, 1, old(1)), [], None),
    ("the daemon stops", pool(DRAINING, 1, old(1)), [Retire(100)], None),
    ("the daemon ends", pool(CLOSING, 1, old(1)), [Close(100)], None),
    ("a candidate boots", pool(RUNNING, 1, [*old(1), worker(1, WorkerState.BOOTING, generation=2)],
                               candidate=Candidate(2, 1, BOOT)), [], BOOTED),
    ("a helper is at work", pool(RUNNING, 1, [*old(1), worker(0, WorkerState.BOOTING, generation=2)],
                                 candidate=Candidate(2, 0, BOOT)), [], BOOTED),
    ("a candidate comes while the successor boots", pool(RUNNING, 1, [*old(1), successor(1)],
                                                         candidate=Candidate(2, 1, BOOT)),
     [Spawn(1, candidate=True)], BOOTED),
    ("a candidate boots when the successor serves", pool(RUNNING, 1, [*old(1), successor(1, WorkerState.SERVING),
                                                                      worker(1, WorkerState.BOOTING, generation=2)],
                                                         candidate=Candidate(2, 1, BOOT)), [Retire(100)], BOOTED),
]  # fmt: skip


def candidate(*slots: int, state: WorkerState = WorkerState.BOOTING, **more: Any) -> list[WorkerView]:
    """Workers of generation 2."""
    return [worker(slot, state, generation=2, **more) for slot in slots]


def changing(workers: list[WorkerView], wanted: int = 2, to: int = 2, **more: Any) -> PoolView:
    """A pool in which generation 2 is to be."""
    return pool(RUNNING, wanted, workers, candidate=Candidate(2, to, 20.0), **more)


SOON = NOW - 1.0 + 20.0
FAILING = Slot(failures=10, retry_at=NOW + 9.0)

CANDIDATES = [
    ("it is not known yet", changing(serving(1, 2), to=0), [], None),
    ("it begins", changing(serving(1, 2)), [Spawn(1, candidate=True), Spawn(2, candidate=True)], None),
    ("it has more workers", changing(serving(1), wanted=1, to=3), [Spawn(n, candidate=True) for n in (1, 2, 3)], None),
    ("some are there", changing([*serving(1, 2), *candidate(1)]), [Spawn(2, candidate=True)], SOON),
    ("all boot", changing([*serving(1, 2), *candidate(1, 2)]), [], SOON),
    ("some serve", changing([*serving(1, 2), *candidate(1, state=WorkerState.SERVING), *candidate(2)]), [], SOON),
    ("all serve", changing([*serving(1, 2), *candidate(1, 2, state=WorkerState.SERVING)]), [], None),
    ("fewer are wanted meanwhile", changing([*serving(1), *candidate(1, 2)], wanted=1, to=1), [Retire(201)], SOON),
    ("it has its own time to boot", changing([*serving(1, 2), *candidate(1), *candidate(2, age=20.0)]),
     ["dump 201"], SOON),
    ("one is to be killed", changing([*serving(1, 2), *candidate(1), *candidate(2, age=21.0, dumped_at=NOW - 1.0)]),
     ["kill 201"], SOON),
    ("one is killed and not tried again",
     changing([*serving(1, 2), *candidate(1), *candidate(2, state=WorkerState.KILLED)]),
     [], SOON),
    ("who serves is missed", changing([*serving(1), *candidate(1, 2)]), [Spawn(2)], SOON),
    ("who serves waits", changing([*serving(1), *candidate(1, 2)], slots={2: Slot(3, NOW + 2.0)}), [], NOW + 2.0),
    ("it does not wait for that", changing([], slots={1: Slot(3, NOW + 2.0), 2: Slot(3, NOW + 2.0)}),
     [Spawn(1, candidate=True), Spawn(2, candidate=True)], NOW + 2.0),
    ("it is the last hope", changing([], slots={1: FAILING, 2: FAILING}, to=1), [Spawn(1, candidate=True)], NOW + 9.0),
    ("the last hope boots", changing(candidate(1, 2), slots={1: FAILING, 2: FAILING}), [], NOW + 9.0),
    ("the last hope has gone",
     pool(RUNNING, 1, [worker(1, WorkerState.DRAINING, generation=2)], {1: FAILING}, give_up_after=10),
     [GiveUp()], None),
    ("it has taken over", pool(RUNNING, 2, [*serving(1, 2), *candidate(1, 2, state=WorkerState.SERVING)], generation=2),
     [Retire(100), Retire(200)], None),
    ("it has taken over from one that booted",
     pool(RUNNING, 1, [worker(1, WorkerState.BOOTING), *candidate(1, state=WorkerState.SERVING)], generation=2),
     [Retire(100)], None),
    ("it has taken over from one that drains",
     pool(RUNNING, 1, [worker(1, WorkerState.DRAINING), *candidate(1, state=WorkerState.SERVING)], generation=2),
     [], NOW - 1.0 + DRAIN + GRACE),
    ("it has taken over and one dies", pool(RUNNING, 2, candidate(1, state=WorkerState.SERVING), generation=2),
     [Spawn(2)], None),
    ("it is given up", pool(RUNNING, 2, [*serving(1, 2), *candidate(1, state=WorkerState.SERVING), *candidate(2)]),
     [Retire(101), Retire(201)], None),
    ("it is given up for another", pool(RUNNING, 1, [*serving(1), *candidate(1)], candidate=Candidate(3, 1, 20.0)),
     [Retire(101), Spawn(1, candidate=True)], None),
    ("its helper is given up", pool(RUNNING, 1, [*serving(1), *candidate(0)]), [Retire(1)], None),
    ("its helper stays", changing([*serving(1, 2), *candidate(0)], to=0), [], SOON),
]  # fmt: skip


@pytest.mark.parametrize(
    ("view", "actions", "deadline"),
    [pytest.param(*row, id=name.replace(" ", "-")) for name, *row in RENEWALS + CANDIDATES],
)
def test_pool_calls_for_these_actions_and_this_deadline(
    view: PoolView, actions: list[Action | str], deadline: float | None
) -> None:
    found, when = planned(view)
    assert found == actions
    if GiveUp() not in actions:  # then the master's state changes, and the next plan says when
        assert when == deadline


@pytest.mark.parametrize(("master_state", "order"), [(DRAINING, Retire), (CLOSING, Close)])
@pytest.mark.parametrize("given_up", [True, False])
def test_stop_in_the_middle_of_a_change_reaches_everybody(
    master_state: MasterState, order: type[Action], given_up: bool
) -> None:
    """Whether or not the candidate has been given up by then."""
    here = [*serving(1, 2), *candidate(0), *candidate(1, state=WorkerState.SERVING), *candidate(2)]
    view = pool(master_state, 2, here, candidate=None if given_up else Candidate(2, 2, 20.0))
    assert planned(view)[0] == [order(one.pid) for one in here]  # type: ignore[call-arg]


def test_everybody_who_has_to_go_is_told_why() -> None:
    pools = [
        pool(DRAINING, 1, serving(1)),
        pool(RUNNING, 1, serving(1, 2)),
        pool(RUNNING, 1, [*old(1), successor(1, WorkerState.SERVING)]),
        pool(RUNNING, 1, serving(1), generation=2),
        pool(RUNNING, 1, candidate(1)),
    ]
    told = [action.why for one in pools for action in make_plan(NOW, one).actions if isinstance(action, Retire)]
    assert len(set(told)) == 5
    assert all(told)
    assert WHY in told[2]


WORKER_STATES = st.sampled_from(
    [WorkerState.BOOTING, WorkerState.SERVING, WorkerState.SERVING, WorkerState.DRAINING, WorkerState.KILLED]
)


@given(
    wanted=st.integers(1, 4),
    drawn=st.lists(
        st.tuples(st.integers(1, 4), WORKER_STATES, st.integers(1, 2), st.sampled_from(["", WHY])), max_size=10
    ),
    candidates=st.booleans(),
)
def test_plan_keeps_the_last_serving_worker_of_each_slot(
    wanted: int, drawn: list[tuple[int, WorkerState, int, str]], candidates: bool
) -> None:
    workers = [
        worker(slot, state, 1.0 + number, pid=number, generation=generation, recycle_reason=why)
        for number, (slot, state, generation, why) in enumerate(drawn)
    ]
    view = pool(RUNNING, wanted, workers, candidate=Candidate(2, wanted, 20.0) if candidates else None)
    actions = make_plan(NOW, view).actions
    gone = {action.pid for action in actions if isinstance(action, Retire)}
    before = {
        one.slot for one in workers if one.generation == 1 and one.state is WorkerState.SERVING and one.slot <= wanted
    }
    after = {
        one.slot for one in workers if one.generation == 1 and one.state is WorkerState.SERVING and one.pid not in gone
    }
    assert before <= after
    spawned = [action.slot for action in actions if isinstance(action, Spawn) and not action.candidate]
    assert len(spawned) == len(set(spawned))
    assert len(set(spawned) & before) <= 1, "two renewals at once"
