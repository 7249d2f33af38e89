"""What to do about the workers: a pure function of what there is and what time it is.

`make_plan` takes a `PoolView` and returns actions and the next deadline. It touches no process and no clock, so a
simulated week takes a second. `master.master` does what the plan says, and tells what came of that by way of the next
view. `slot_after_exit` and `slot_after_failed_fork` decide how long a slot waits for its next worker: after the first
exit not at all, after those that follow in a row twice as long each, with jitter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from forkd.states import MasterState, WorkerState

#: A worker that served this long, in seconds, was healthy: its exit counts as the first one again.
HEALTHY = 10.0

#: Seconds before the second attempt in a row, doubled with each further one up to the longest; the first is at once.
BACKOFF = 0.25
LONGEST_BACKOFF = 30.0

#: Of several workers that end together, the first is followed at once, and the others within so many seconds, each at
#: a time of its own from the half of it on: the first has the processors to itself, and serves before the others boot.
SPREAD = 0.04

#: By which fraction, at most, a wait is longer: workers that ended together should not boot together for ever.
JITTER = 0.25

#: Seconds beyond its own deadline that a worker has to end before it is killed.
GRACE = 2.0

#: Seconds between the signal to dump its stacks and the kill: time for the writing, and for a worker that stood still
#: for a while to go on after all.
STACKS = 1.0

#: Seconds beyond `drain_timeout` after which a daemon that was told to stop is gone, whatever its workers do.
STOP_MARGIN = 2 * (GRACE + STACKS)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one worker, and its recent failures.

    Attributes:
        failures: exits in a row without a healthy worker before them.
        retry_at: no new worker before this time.
    """

    failures: int = 0
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the plan knows of a worker. Times are in seconds on one monotonic clock.

    Attributes:
        slot: its place; a helper, which serves no clients, is in slot 0.
        since: when it got into its state.
        generation: of which settings and code it is.
        heartbeat: when its loop last said that it turns.
        dumped_at: when it was last told to write its stacks.
        recycle_reason: why it should be replaced; empty when it should not.
        drain_timeout: what it was promised, where that is another than the pool's; None: the pool's.
        stall_timeout: likewise.
    """

    pid: int
    slot: int
    state: WorkerState
    since: float
    generation: int = 1
    heartbeat: float = -inf
    dumped_at: float = -inf
    recycle_reason: str = ""
    drain_timeout: float | None = None
    stall_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generation that boots beside the one that serves; none of its workers is tried twice."""

    number: int
    wanted: int
    boot_timeout: float


@dataclass(frozen=True, slots=True)
class PoolView:
    """All that a plan is made from. Times are in seconds on one monotonic clock.

    Attributes:
        state: the master's.
        wanted: how many workers there should be.
        slots: those of the generation that serves.
        stall_timeout: seconds that a loop may stand still; 0: for ever.
        give_up_after: failures in a row, in every slot and while no worker serves, that end a daemon which has served;
            0: it goes on.
        generation: the one that serves.
        candidate: the one that is to replace it.
        drain_at: when it is to begin to drain, of a daemon that is leaving.
        awake_since: since when the master has run without a gap: what it has missed is not held against workers.
    """

    state: MasterState
    wanted: int
    workers: tuple[WorkerView, ...]
    slots: Mapping[int, Slot]
    boot_timeout: float
    drain_timeout: float
    stall_timeout: float = 0.0
    give_up_after: int = 0
    generation: int = 1
    candidate: Candidate | None = None
    awake_since: float = -inf
    drain_at: float = inf


@dataclass(frozen=True, slots=True)
class Spawn:
    """Fork a worker into a slot, of the generation that serves or of the candidate."""

    slot: int
    candidate: bool = False


@dataclass(frozen=True, slots=True)
class Retire:
    """Tell a worker to drain; the reason is for people."""

    pid: int
    why: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Close:
    """Tell a worker to end at once."""

    pid: int


@dataclass(frozen=True, slots=True)
class Dump:
    """Tell a worker to write its stacks: it is about to be killed, for this reason."""

    pid: int
    cause: str


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a worker, for this reason."""

    pid: int
    cause: str


@dataclass(frozen=True, slots=True)
class Drain:
    """Have the daemon drain: the time in which balancers were to learn that it leaves is over."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the daemon: its workers can't be started, at the start or as often as the settings bear it."""


Action = Spawn | Retire | Close | Dump | Kill | Drain | GiveUp


@dataclass(slots=True)
class Plan:
    """What to do now, and when to look again if nothing happens before (None: no need)."""

    actions: list[Action] = field(default_factory=list)
    deadline: float | None = None

    def at(self, now: float, when: float, action: Action) -> None:
        """`action` when its time has come; else the deadline is no later than that."""
        if when <= now:
            self.actions.append(action)
        elif self.deadline is None or when < self.deadline:
            self.deadline = when


def make_plan(now: float, pool: PoolView) -> Plan:
    """The plan for this moment."""
    plan = Plan()
    for worker in pool.workers:
        _check_worker(worker, now, pool, plan)
    if pool.state.serves:
        if _must_give_up(pool):
            plan.actions = [GiveUp()]
            return plan
        if pool.state is MasterState.LEAVING:
            plan.at(now, pool.drain_at, Drain())
        _fill_slots(now, pool, plan)
        _recycle(now, pool, plan)
        _boot_candidate(pool, plan)
    return plan


def slot_after_exit(
    slot: Slot, state: WorkerState, now: float, served: float, jitter: float, *, others: Iterable[Slot] = ()
) -> Slot:
    """A slot after its worker has ended.

    Args:
        slot: before.
        state: the worker's when it ended, or when it was killed.
        now: the time.
        served: seconds for which it had served.
        jitter: a random number from 0 to 1.
        others: the other slots of its generation.
    """
    if state in (WorkerState.DRAINING, WorkerState.CLOSING):
        return slot  # it had left the slot, which another one may have by now
    failures = 1 if served >= HEALTHY else slot.failures + 1
    wait = _backoff(failures) * (1 + JITTER * jitter)
    if any(other.retry_at > now - SPREAD for other in others):
        wait = max(wait, SPREAD * (1 + jitter) / 2)
    return Slot(failures, now + wait)


def slot_after_failed_fork(slot: Slot, now: float, jitter: float) -> Slot:
    """A slot after fork(2) has failed: the machine is short of something, so not even the first retry is at once."""
    failures = slot.failures + 1
    return Slot(failures, now + _backoff(failures + 1) * (1 + JITTER * jitter))


def _backoff(failures: int) -> float:
    return 0.0 if failures == 1 else min(LONGEST_BACKOFF, BACKOFF * 2.0 ** min(failures - 2, 60))


def _check_worker(worker: WorkerView, now: float, pool: PoolView, plan: Plan) -> None:
    """Tells one worker to go, if it should, or kills it when its time is up."""
    pid, state = worker.pid, worker.state
    if state in (WorkerState.KILLED, WorkerState.GONE):
        return
    if pool.state is MasterState.CLOSING and state is not WorkerState.CLOSING:
        plan.actions.append(Close(pid))
    elif state in (WorkerState.BOOTING, WorkerState.SERVING) and (why := _why_retire(worker, pool)):
        plan.actions.append(Retire(pid, why))
    elif limits := _limits(worker, pool):
        when, cause = min(limits)
        if worker.dumped_at < when:
            plan.at(now, when, Dump(pid, cause))
        else:
            plan.at(now, worker.dumped_at + STACKS, Kill(pid, cause))


def _why_retire(worker: WorkerView, pool: PoolView) -> str:
    """Why a worker should go; empty where it should stay."""
    if pool.state is MasterState.DRAINING:
        return "the daemon stops"
    wanted = pool.wanted
    if pool.candidate is not None and worker.generation == pool.candidate.number:
        wanted = pool.candidate.wanted
    elif worker.generation != pool.generation:
        return "another generation serves" if worker.state is WorkerState.SERVING else "its generation was given up"
    return "more workers than wanted" if worker.slot > wanted else ""


def _limits(worker: WorkerView, pool: PoolView) -> list[tuple[float, str]]:
    """When a worker is to be killed, and why. Time for which the master did not run does not count."""
    since, candidate = max(worker.since, pool.awake_since), pool.candidate
    limits = []
    if worker.state is WorkerState.BOOTING:
        of_candidate = candidate is not None and worker.generation == candidate.number
        timeout = candidate.boot_timeout if candidate is not None and of_candidate else pool.boot_timeout
        limits.append((since + timeout, "it was not ready by its boot_timeout"))
    elif worker.state is WorkerState.CLOSING:
        limits.append((since + GRACE, "it did not close when told to"))
    elif stall_timeout := pool.stall_timeout if worker.stall_timeout is None else worker.stall_timeout:
        limits.append((max(since, worker.heartbeat) + stall_timeout, "its loop stood still for stall_timeout"))
    if worker.state is WorkerState.DRAINING:
        drain_timeout = pool.drain_timeout if worker.drain_timeout is None else worker.drain_timeout
        limits.append((since + drain_timeout + GRACE, "it did not end by its drain deadline"))
    return limits


def _workers_by_slot(pool: PoolView) -> dict[int, list[WorkerView]]:
    """The workers of the generation that serves, by slot. One that was killed keeps its slot until it is reaped: only
    then is it known how long the slot should wait.
    """
    found: dict[int, list[WorkerView]] = {number: [] for number in range(1, pool.wanted + 1)}
    for worker in pool.workers:
        here = worker.state in (WorkerState.BOOTING, WorkerState.SERVING, WorkerState.KILLED)
        if here and worker.generation == pool.generation and worker.slot in found:
            found[worker.slot].append(worker)
    return found


def _fill_slots(now: float, pool: PoolView, plan: Plan) -> None:
    """Spawns a worker into every slot that is empty."""
    for number, workers in _workers_by_slot(pool).items():
        if not workers:
            plan.at(now, pool.slots.get(number, Slot()).retry_at, Spawn(number))


def _recycle(now: float, pool: PoolView, plan: Plan) -> None:
    """Replaces workers that have served enough, one at a time, the next one ready before the former goes. A daemon that
    is leaving begins no more of them.
    """
    slots = _workers_by_slot(pool)
    for workers in slots.values():
        serving = sorted((one for one in workers if one.state is WorkerState.SERVING), key=lambda one: one.since)
        plan.actions += [Retire(one.pid, f"recycled: {one.recycle_reason}") for one in serving[:-1]]
    complete = all(len(one) == 1 and one[0].state is WorkerState.SERVING for one in slots.values())
    due = [number for number, workers in slots.items() if workers and workers[0].recycle_reason]
    if due and complete and pool.candidate is None and pool.state is MasterState.RUNNING:
        first = min(due, key=lambda number: pool.slots.get(number, Slot()).retry_at)
        plan.at(now, pool.slots.get(first, Slot()).retry_at, Spawn(first))


def _boot_candidate(pool: PoolView, plan: Plan) -> None:
    """Spawns one worker into each slot of the candidate. None is tried twice: the first that fails ends it."""
    if pool.candidate is not None:
        taken = {worker.slot for worker in pool.workers if worker.generation == pool.candidate.number}
        missing = [number for number in range(1, pool.candidate.wanted + 1) if number not in taken]
        plan.actions += [Spawn(number, candidate=True) for number in missing]


def _must_give_up(pool: PoolView) -> bool:
    """At the start the first failure decides. A daemon that has served goes on until it is told otherwise, unless its
    settings set a bound for the time in which no worker serves, or may yet.
    """
    failures = [pool.slots.get(number, Slot()).failures for number in range(1, pool.wanted + 1)]
    if pool.state is MasterState.STARTING:
        return any(failures)
    if not pool.give_up_after or pool.candidate is not None:
        return False
    if any(worker.state is WorkerState.SERVING for worker in pool.workers):
        return False
    return min(failures) >= pool.give_up_after
