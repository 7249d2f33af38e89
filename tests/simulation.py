"""A simulated master with simulated processes and a simulated clock, for the tests of the policy for workers.

`Simulation` does what `master.Master` does with a plan, and checks each moment at which it would wait. Beside it keeps
a `Record` of each slot, made from what the rules say and not from what the plan remembers.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from math import inf

from forkd.master.backoff import Slot, after_death, after_fork_failed
from forkd.master.plan import GRACE, Action, Close, GiveUp, Kill, Pool, Retire, Spawn, WorkerView, make_plan
from forkd.states import Event, Life, Mode, Turn, next_life, next_mode

BOOT, DRAIN = 7.0, 20.3  # seconds; no sums of the times below, so that few things happen at the same moment
WAITS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)  # seconds after so many failures, at least
LONGER = 1.25  # and by which factor longer at most
ROUNDS = 4  # plans in a row that may call for something: retire or spawn, give up, close, and nothing
CROWD, SPAN = 7, 10.0  # workers that one slot may get, without the operator, in so many seconds

HERE = (Life.BOOTING, Life.SERVING)
UP = (Mode.STARTING, Mode.RUNNING)


@dataclass(frozen=True)
class Fate:
    """What becomes of a worker, in seconds: until it is ready or fails, then serving, when told to drain, to close."""

    boots: float = 0.5
    fails: bool = False
    lives: float = inf
    drains: float = 0.1
    closes: float = 0.1
    luck: float = 0.5


@dataclass
class Record:
    """What a slot has been through: failures in a row, and between which times the next worker may come."""

    failures: int = 0
    earliest: float = -inf
    latest: float = -inf

    def failed(self, now: float, *, healthy: bool = False, fork: bool = False) -> None:
        """Another attempt has failed."""
        self.failures = 1 if healthy else self.failures + 1
        wait = WAITS[min(self.failures + fork, len(WAITS)) - 1]
        self.earliest, self.latest = now + wait, now + wait * LONGER


@dataclass
class Process:
    """A simulated worker."""

    pid: int
    slot: int
    fate: Fate
    since: float
    life: Life = Life.BOOTING
    ready_at: float = inf
    counted: bool = False  # whether its slot's record has its failure already
    killed_as: Life | None = None  # its life when it was killed

    def next_event(self) -> tuple[float, Turn]:
        """What it does next by itself, and when."""
        fate = self.fate
        delay, turn = {
            Life.BOOTING: (fate.boots, Turn.EXIT if fate.fails else Turn.READY),
            Life.SERVING: (fate.lives, Turn.EXIT),
            Life.DRAINING: (fate.drains, Turn.EXIT),
            Life.CLOSING: (fate.closes, Turn.EXIT),
            Life.KILLED: (0.0, Turn.EXIT),
        }[self.life]
        return self.since + delay, turn


@dataclass
class Simulation:
    """A master, its processes and their time."""

    wanted: int
    fates: Iterator[Fate] = field(default_factory=lambda: cycle([Fate()]))
    now: float = 1000.0
    mode: Mode = Mode.STARTING
    forks: bool = True
    slots: dict[int, Slot] = field(default_factory=dict)
    workers: dict[int, Process] = field(default_factory=dict)
    records: defaultdict[int, Record] = field(default_factory=lambda: defaultdict(Record))
    crowds: defaultdict[int, deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=CROWD + 1)))
    end: float = inf  # when everything must be gone
    forked: int = 0

    def run(self, until: float) -> None:
        """Lives on until that time."""
        while True:
            deadline = self.settle()
            (due, turn), pid = min(
                ((worker.next_event(), pid) for pid, worker in self.workers.items()),
                key=lambda event: (event[0][0], event[1]),
                default=((inf, Turn.EXIT), 0),
            )
            if due <= self.now:
                self.live(self.workers[pid], turn)
                continue
            self.check_while_waiting(deadline)
            if until <= self.now:
                return
            self.now = min(due, until, inf if deadline is None else deadline)

    def pass_time(self, seconds: float) -> None:
        self.run(self.now + seconds)

    def settle(self) -> float | None:
        """Does what the plans of this moment say until there is nothing to do; the deadline."""
        for _ in range(ROUNDS):
            if self.mode is Mode.STARTING and self.settled():
                self.event(Event.ALL_READY)
            if not self.workers:
                self.event(Event.EMPTY)
            plan = make_plan(self.now, self.pool())
            if not plan.actions:
                return plan.deadline
            for action in plan.actions:
                self.perform(action)
        raise AssertionError(f"there is always something to do: {plan.actions}")

    def settled(self) -> bool:
        lives = {worker.slot: worker.life for worker in self.workers.values() if worker.life in HERE}
        return lives == dict.fromkeys(range(1, self.wanted + 1), Life.SERVING)

    def pool(self) -> Pool:
        views = tuple(WorkerView(w.pid, w.slot, w.life, w.since) for w in self.workers.values())
        return Pool(self.mode, self.wanted, views, self.slots, BOOT, DRAIN)

    def event(self, event: Event) -> None:
        self.mode, before = next_mode(self.mode, event), self.mode
        if self.mode is not before:
            allowed = {Mode.DRAINING: DRAIN + GRACE, Mode.CLOSING: GRACE}.get(self.mode, inf)
            self.end = min(self.end, self.now + allowed)

    def perform(self, action: Action) -> None:
        match action:
            case Spawn(slot):
                self.spawn(slot)
            case Retire(pid):
                self.crowds[self.workers[pid].slot].clear()
                self.live(self.workers[pid], Turn.RETIRE)
            case Close(pid):
                self.live(self.workers[pid], Turn.CLOSE)
            case Kill(pid, cause):
                assert cause
                self.workers[pid].killed_as = self.workers[pid].life
                self.live(self.workers[pid], Turn.KILL)
            case GiveUp():
                assert self.hopeless(), "it gave up too early"
                self.event(Event.GAVE_UP)

    def spawn(self, slot: int) -> None:
        record, fate, crowd = self.records[slot], next(self.fates), self.crowds[slot]
        assert self.mode in UP
        assert 1 <= slot <= self.wanted
        assert self.now >= record.earliest, "it did not wait"
        crowd.append(self.now)
        assert len(crowd) <= CROWD or crowd[-1] - crowd[0] >= SPAN, "a busy restart"
        if self.forks:
            self.forked += 1
            self.workers[self.forked] = Process(self.forked, slot, fate, since=self.now)
        else:
            record.failed(self.now, fork=True)
            self.slots[slot] = after_fork_failed(self.slots.get(slot, Slot()), self.now, fate.luck)

    def live(self, worker: Process, turn: Turn) -> None:
        if turn is Turn.READY:
            worker.ready_at = self.now
        elif turn is Turn.KILL and worker.life is Life.BOOTING:
            self.records[worker.slot].failed(self.now)
            worker.counted = True
        elif turn is Turn.EXIT:
            self.bury(worker)
        life = next_life(worker.life, turn)
        if life is not worker.life:
            worker.life, worker.since = life, self.now

    def bury(self, worker: Process) -> None:
        del self.workers[worker.pid]
        served = max(0.0, self.now - worker.ready_at)
        if worker.life is Life.KILLED and not worker.counted:
            self.crowds[worker.slot].clear()
        if (worker.killed_as or worker.life) not in (Life.DRAINING, Life.CLOSING) and not worker.counted:
            self.records[worker.slot].failed(self.now, healthy=served >= 10.0)
        before = self.slots.get(worker.slot, Slot())
        life = worker.killed_as or worker.life
        self.slots[worker.slot] = after_death(before, life, self.now, served, worker.fate.luck)

    def hopeless(self) -> bool:
        """Whether it should give up."""
        failures = [self.records[slot].failures for slot in range(1, self.wanted + 1)]
        if self.mode is Mode.STARTING:
            return any(failures)
        nobody = all(worker.life is not Life.SERVING for worker in self.workers.values())
        return self.mode is Mode.RUNNING and nobody and min(failures) >= 10

    def check_while_waiting(self, deadline: float | None) -> None:
        """What must hold whenever the master would wait."""
        here = [worker.slot for worker in self.workers.values() if worker.life in HERE]
        assert len(here) == len(set(here)), "two workers in one slot"
        assert self.mode in UP or not here, "somebody was not told to end"
        assert all(slot <= self.wanted for slot in here), "more workers than wanted"
        assert not self.hopeless(), "it does not give up"
        assert self.now <= self.end or not self.workers, "somebody outlives the end"
        limits = {Life.BOOTING: BOOT, Life.DRAINING: DRAIN + GRACE, Life.CLOSING: GRACE, Life.KILLED: 0.0}
        dues = [worker.since + limits[worker.life] for worker in self.workers.values() if worker.life in limits]
        if self.mode in UP:
            missing = set(range(1, self.wanted + 1)) - set(here)
            dues += [self.records[slot].latest for slot in missing]
        if dues:
            assert deadline is not None, "nothing would wake it"
            assert self.now < deadline <= min(dues), "it waits too long, or not at all"
        else:
            assert deadline is None, "it wakes for nothing"
