"""Views of a pool for the tests of the plan, and the plan for one in a form that is easily compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from forkd.master.plan import Action, Dump, Kill, PoolView, Slot, WorkerView, make_plan
from forkd.states import MasterState, WorkerState

NOW = 5000.0
BOOT = 60.0
DRAIN = 30.0
STALL = 5.0
STARTING, RUNNING, LEAVING, DRAINING, CLOSING, OVER = MasterState


def worker(slot: int, state: WorkerState, age: float = 1.0, **more: Any) -> WorkerView:
    """A worker whose pid is a hundred times its slot, and those above it in later generations."""
    generation = more.get("generation", 1)
    return replace(WorkerView(100 * slot + generation - 1, slot, state, NOW - age), **more)


def serving(*slots: int, **more: Any) -> list[WorkerView]:
    return [worker(slot, WorkerState.SERVING, **more) for slot in slots]


def pool(
    state: MasterState,
    wanted: int,
    workers: Sequence[WorkerView] = (),
    slots: Mapping[int, Slot] | None = None,
    **more: Any,
) -> PoolView:
    return PoolView(state, wanted, tuple(workers), slots or {}, BOOT, DRAIN, **more)


def planned(view: PoolView) -> tuple[list[Action | str], float | None]:
    """The actions, and when the plan wants to be asked again; a cause is for people, so it is left out."""
    plan = make_plan(NOW, view)
    return [_bare(action) for action in plan.actions], plan.deadline


def _bare(action: Action) -> Action | str:
    match action:
        case Dump(pid):
            return f"dump {pid}"
        case Kill(pid):
            return f"kill {pid}"
    return action
