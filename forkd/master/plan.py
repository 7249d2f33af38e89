"""What to do about the workers: a pure function of what there is and what time it is.

It touches no process and no clock, so a simulated week takes a second. `master.master` does what it says, and tells it
what came of that by way of the next `Pool`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from forkd.states import Life, Mode

#: A worker that served this long, in seconds, was healthy: its death is the first one again.
HEALTHY = 10.0

#: Seconds before the second attempt in a row, doubled with each further one up to the longest; the first is at once.
BACKOFF = 0.25
LONGEST_BACKOFF = 30.0

#: By which fraction, at most, a wait is longer than that: workers that died together should not boot together for ever.
JITTER = 0.25

#: Attempts in a row, in every slot and with nobody serving, after which the master gives up.
ATTEMPTS = 10

#: Seconds beyond its own deadline that a worker has to end before it is killed.
GRACE = 2.0


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for one worker, and its recent luck.

    Attributes:
        failures: deaths in a row without a healthy life before them.
        retry_at: no new worker before this time.
    """

    failures: int = 0
    retry_at: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the plan knows of a worker: its slot, its life, and since when it leads that."""

    pid: int
    slot: int
    life: Life
    since: float


@dataclass(frozen=True, slots=True)
class Pool:
    """All that a plan is made from. Times are in seconds on one monotonic clock."""

    mode: Mode
    wanted: int
    workers: tuple[WorkerView, ...]
    slots: Mapping[int, Slot]
    boot_timeout: float
    drain_timeout: float


@dataclass(frozen=True, slots=True)
class Spawn:
    """Fork a worker into a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Tell a worker to drain."""

    pid: int


@dataclass(frozen=True, slots=True)
class Close:
    """Tell a worker to end at once."""

    pid: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a worker, for this reason."""

    pid: int
    cause: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Workers can't be had."""


Action = Spawn | Retire | Close | Kill | GiveUp


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
        # One that was killed has its slot until it is reaped: only then is it known how its successor should wait.
        taken = {worker.slot for worker in pool.workers if worker.life in (Life.BOOTING, Life.SERVING, Life.KILLED)}
        for number in range(1, pool.wanted + 1):
            if number not in taken:
                plan.at(now, pool.slots.get(number, Slot()).retry_at, Spawn(number))
    return plan


def _see_to(worker: WorkerView, now: float, pool: Pool, plan: Plan) -> None:
    pid, life, since = worker.pid, worker.life, worker.since
    if life is Life.DRAINING and pool.mode is not Mode.CLOSING:
        plan.at(now, since + pool.drain_timeout + GRACE, Kill(pid, "it did not end by its drain deadline"))
    elif life is Life.CLOSING:
        plan.at(now, since + GRACE, Kill(pid, "it did not close when told to"))
    elif life in (Life.KILLED, Life.GONE):
        return
    elif pool.mode is Mode.CLOSING:
        plan.actions.append(Close(pid))
    elif pool.mode is Mode.DRAINING or worker.slot > pool.wanted:
        plan.actions.append(Retire(pid))
    elif life is Life.BOOTING:
        plan.at(now, since + pool.boot_timeout, Kill(pid, "it was not ready by its boot_timeout"))


def _hopeless(pool: Pool) -> bool:
    """At the start the first failure decides; later the daemon goes on while anybody serves or may yet."""
    if any(worker.life is Life.SERVING for worker in pool.workers) and pool.mode is Mode.RUNNING:
        return False
    enough = 1 if pool.mode is Mode.STARTING else ATTEMPTS
    failures = [pool.slots.get(number, Slot()).failures for number in range(1, pool.wanted + 1)]
    return (max if pool.mode is Mode.STARTING else min)(failures) >= enough


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
