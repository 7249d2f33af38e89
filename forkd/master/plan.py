"""What to do about the workers: a pure function of what there is and what time it is.

It touches no process and no clock, so a simulated week takes a second. `master.master` does what it says, and tells it
what came of that by way of the next `Pool`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

from forkd.master.backoff import Slot
from forkd.states import Life, Mode

#: Attempts in a row, in every slot and with nobody serving, after which the master gives up.
ATTEMPTS = 10

#: Seconds beyond its own deadline that a worker has to end before it is killed.
GRACE = 2.0

#: Seconds between the order to write its stacks and the kill: time for the writing, and for a worker that stood still
#: for a while to come round after all.
STACKS = 1.0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the plan knows of a worker. Times are in seconds on one monotonic clock.

    Attributes:
        slot: its place; a helper, which serves nobody, is in slot 0.
        life: what it is about, and
        since: from when on.
        generation: of which settings and code it is.
        beat: when its loop last said that it turns.
        dumped: when it was last told to write its stacks.
        worn: why it should be replaced; empty when it should not.
        drain_timeout: what it was promised, where that is another than the pool's; None: the pool's.
        stall_timeout: likewise.
    """

    pid: int
    slot: int
    life: Life
    since: float
    generation: int = 1
    beat: float = -inf
    dumped: float = -inf
    worn: str = ""
    drain_timeout: float | None = None
    stall_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """A generation that boots beside the one that serves; it has no second try."""

    number: int
    wanted: int
    boot_timeout: float


@dataclass(frozen=True, slots=True)
class Pool:
    """All that a plan is made from. Times are in seconds on one monotonic clock.

    Attributes:
        stall_timeout: seconds that a loop may stand still; 0: for ever.
        generation: the one that serves.
        awake: since when the master has been there without a gap: what it has missed is nobody's fault.
    """

    mode: Mode
    wanted: int
    workers: tuple[WorkerView, ...]
    slots: Mapping[int, Slot]
    boot_timeout: float
    drain_timeout: float
    stall_timeout: float = 0.0
    generation: int = 1
    candidate: Candidate | None = None
    awake: float = -inf


@dataclass(frozen=True, slots=True)
class Spawn:
    """Fork a worker into a slot, of the generation that serves or of the candidate."""

    slot: int
    candidate: bool = False


@dataclass(frozen=True, slots=True)
class Retire:
    """Tell a worker to drain; why is for people."""

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
class GiveUp:
    """Workers can't be had."""


Action = Spawn | Retire | Close | Dump | Kill | GiveUp


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


def make_plan(now: float, pool: Pool) -> Plan:
    """The plan for this moment."""
    plan = Plan()
    for worker in pool.workers:
        _see_to(worker, now, pool, plan)
    if pool.mode in (Mode.STARTING, Mode.RUNNING):
        if _hopeless(pool):
            plan.actions = [GiveUp()]
            return plan
        _fill(now, pool, plan)
        _renew(now, pool, plan)
        _try_candidate(pool, plan)
    return plan


def _see_to(worker: WorkerView, now: float, pool: Pool, plan: Plan) -> None:
    pid, life = worker.pid, worker.life
    if life in (Life.KILLED, Life.GONE):
        return
    if pool.mode is Mode.CLOSING and life is not Life.CLOSING:
        plan.actions.append(Close(pid))
    elif life in (Life.BOOTING, Life.SERVING) and (why := _superfluous(worker, pool)):
        plan.actions.append(Retire(pid, why))
    elif limits := _limits(worker, pool):
        when, cause = min(limits)
        if worker.dumped < when:
            plan.at(now, when, Dump(pid, cause))
        else:
            plan.at(now, worker.dumped + STACKS, Kill(pid, cause))


def _superfluous(worker: WorkerView, pool: Pool) -> str:
    """Why a worker should go, if it should."""
    if pool.mode is Mode.DRAINING:
        return "the daemon stops"
    wanted = pool.wanted
    if pool.candidate is not None and worker.generation == pool.candidate.number:
        wanted = pool.candidate.wanted
    elif worker.generation != pool.generation:
        return "another generation serves" if worker.life is Life.SERVING else "its generation is not to be"
    return "more workers than wanted" if worker.slot > wanted else ""


def _limits(worker: WorkerView, pool: Pool) -> list[tuple[float, str]]:
    """When patience with a worker ends, and why. What the master slept through counts for nobody."""
    since, candidate = max(worker.since, pool.awake), pool.candidate
    limits = []
    if worker.life is Life.BOOTING:
        of_candidate = candidate is not None and worker.generation == candidate.number
        timeout = candidate.boot_timeout if candidate is not None and of_candidate else pool.boot_timeout
        limits.append((since + timeout, "it was not ready by its boot_timeout"))
    elif worker.life is Life.CLOSING:
        limits.append((since + GRACE, "it did not close when told to"))
    elif stall_timeout := pool.stall_timeout if worker.stall_timeout is None else worker.stall_timeout:
        limits.append((max(since, worker.beat) + stall_timeout, "its loop stood still for stall_timeout"))
    if worker.life is Life.DRAINING:
        drain_timeout = pool.drain_timeout if worker.drain_timeout is None else worker.drain_timeout
        limits.append((since + drain_timeout + GRACE, "it did not end by its drain deadline"))
    return limits


def _inhabitants(pool: Pool) -> dict[int, list[WorkerView]]:
    """The workers of the generation that serves, by slot. One that was killed has its slot until it is reaped: only
    then is it known how its successor should wait.
    """
    found: dict[int, list[WorkerView]] = {number: [] for number in range(1, pool.wanted + 1)}
    for worker in pool.workers:
        here = worker.life in (Life.BOOTING, Life.SERVING, Life.KILLED)
        if here and worker.generation == pool.generation and worker.slot in found:
            found[worker.slot].append(worker)
    return found


def _fill(now: float, pool: Pool, plan: Plan) -> None:
    """Somebody into every slot that is empty."""
    for number, inhabitants in _inhabitants(pool).items():
        if not inhabitants:
            plan.at(now, pool.slots.get(number, Slot()).retry_at, Spawn(number))


def _renew(now: float, pool: Pool, plan: Plan) -> None:
    """Replaces those that are worn, one at a time, the successor ready before its predecessor goes."""
    if pool.mode is not Mode.RUNNING:
        return
    slots = _inhabitants(pool)
    for inhabitants in slots.values():
        serving = sorted((one for one in inhabitants if one.life is Life.SERVING), key=lambda one: one.since)
        plan.actions += [Retire(one.pid, f"worn: {one.worn}") for one in serving[:-1]]
    complete = all(len(one) == 1 and one[0].life is Life.SERVING for one in slots.values())
    worn = [number for number, inhabitants in slots.items() if inhabitants and inhabitants[0].worn]
    if worn and complete and pool.candidate is None:
        first = min(worn, key=lambda number: pool.slots.get(number, Slot()).retry_at)
        plan.at(now, pool.slots.get(first, Slot()).retry_at, Spawn(first))


def _try_candidate(pool: Pool, plan: Plan) -> None:
    """One worker into each slot of the generation that is to be. None is tried twice: the first that fails ends it."""
    if pool.candidate is not None:
        taken = {worker.slot for worker in pool.workers if worker.generation == pool.candidate.number}
        missing = [number for number in range(1, pool.candidate.wanted + 1) if number not in taken]
        plan.actions += [Spawn(number, candidate=True) for number in missing]


def _hopeless(pool: Pool) -> bool:
    """At the start the first failure decides; later the daemon goes on while anybody serves or may yet."""
    if pool.candidate is not None:
        return False
    if any(worker.life is Life.SERVING for worker in pool.workers) and pool.mode is Mode.RUNNING:
        return False
    enough = 1 if pool.mode is Mode.STARTING else ATTEMPTS
    failures = [pool.slots.get(number, Slot()).failures for number in range(1, pool.wanted + 1)]
    return (max if pool.mode is Mode.STARTING else min)(failures) >= enough
