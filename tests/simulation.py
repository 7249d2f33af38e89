"""A simulated master with simulated processes and a simulated clock, for the tests of the policy for workers.

`Simulation` does what `master.Master` and `master.change` do with a plan, and checks each moment at which it would
wait. Beside it keeps a `Record` of each slot, made from what the rules say and not from what the plan remembers.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from math import inf

from fates import Fate, Place, Process, Record

from forkd.master.backoff import Slot, after_death, after_fork_failed
from forkd.master.plan import (
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
from forkd.states import Event, Life, Mode, Turn, next_life, next_mode

BOOT, DRAIN = 7.0, 20.3  # seconds; no sums of the times below, so that few things happen at the same moment
ROUNDS = 5  # plans in a row that may call for something: spawn or retire, give up, close, and nothing
CROWD, SPAN = 7, 10.0  # workers that one slot may get, without the operator, in so many seconds
ALMOST = 1e-6  # seconds by which two ways to add them up may differ

HERE = (Life.BOOTING, Life.SERVING)
UP = (Mode.STARTING, Mode.RUNNING)
LIMITS = {Life.BOOTING: BOOT, Life.DRAINING: DRAIN + GRACE, Life.CLOSING: GRACE}
ENDS = {Mode.DRAINING: DRAIN + GRACE + STACKS, Mode.CLOSING: GRACE + STACKS}


@dataclass
class Simulation:
    """A master, its processes and their time."""

    wanted: int
    fates: Iterator[Fate] = field(default_factory=lambda: cycle([Fate()]))
    now: float = 1000.0
    mode: Mode = Mode.STARTING
    stall: float = 0.0
    forks: bool = True
    generation: int = 1
    candidate: int = 0  # the generation that is to be; 0: none
    awake: float = -inf
    asleep: float = -inf  # when it last fell asleep
    slots: defaultdict[int, dict[int, Slot]] = field(default_factory=lambda: defaultdict(dict))
    workers: dict[int, Process] = field(default_factory=dict)
    records: defaultdict[Place, Record] = field(default_factory=lambda: defaultdict(Record))
    crowds: defaultdict[Place, deque[float]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=CROWD + 1))
    )
    tried: set[Place] = field(default_factory=set)  # what the candidate has been given
    changes: Counter[str] = field(default_factory=Counter)  # how they ended
    end: float = inf  # when everything must be gone
    forked: int = 0
    dumps: int = 0
    kills: int = 0

    def run(self, until: float) -> None:
        """Lives on until that time."""
        while True:
            deadline = self.settle()
            (due, what), pid = min(
                ((worker.next_event(), pid) for pid, worker in self.workers.items()),
                key=lambda event: (event[0][0], event[1]),
                default=((inf, Turn.EXIT), 0),
            )
            if due <= self.now:
                self.happen(self.workers[pid], what)
                continue
            self.check_while_waiting(deadline)
            if until <= self.now:
                return
            self.now = min(due, until, inf if deadline is None else deadline)

    def pass_time(self, seconds: float) -> None:
        self.run(self.now + seconds)

    def oversleep(self, seconds: float) -> None:
        """Time passes in which neither the master nor a worker comes round; what was due meanwhile comes after it."""
        self.asleep, self.now = self.now, self.now + seconds
        self.awake = self.now
        self.end = self.now + ENDS.get(self.mode, inf)
        self.run(self.now)

    def settle(self) -> float | None:
        """Does what the plans of this moment say until there is nothing to do; the deadline."""
        for _ in range(ROUNDS):
            if self.mode is Mode.STARTING and self.settled():
                self.event(Event.ALL_READY)
            if self.candidate and self.serves(self.candidate):
                self.generation = self.candidate
                self.end_change("done")
            if not self.workers:
                self.event(Event.EMPTY)
            plan = make_plan(self.now, self.pool())
            if not plan.actions:
                return plan.deadline
            for action in plan.actions:
                self.perform(action)
        raise AssertionError(f"there is always something to do: {plan.actions}")

    def here(self, generation: int, *lives: Life) -> list[Process]:
        return [one for one in self.workers.values() if one.generation == generation and one.life in (lives or HERE)]

    def serves(self, generation: int) -> bool:
        slots = sorted(one.slot for one in self.here(generation))
        return slots == list(range(1, self.wanted + 1)) and not self.here(generation, Life.BOOTING)

    def settled(self) -> bool:
        return self.serves(self.generation)

    def beat(self, worker: Process) -> float:
        """When its loop last turned; one that was asleep has not said so yet."""
        return min(worker.stood, self.asleep if self.now == self.awake else self.now)

    def pool(self) -> Pool:
        views = tuple(
            WorkerView(w.pid, w.slot, w.life, w.since, w.generation, self.beat(w), w.dumped, w.worn)
            for w in self.workers.values()
        )
        number = self.generation
        candidate = Candidate(self.candidate, self.wanted, BOOT) if self.candidate else None
        slots, awake = self.slots[number], self.awake
        return Pool(self.mode, self.wanted, views, slots, BOOT, DRAIN, self.stall, number, candidate, awake)

    def event(self, event: Event) -> None:
        self.mode, before = next_mode(self.mode, event), self.mode
        if self.mode is not before:
            self.end = min(self.end, self.now + ENDS.get(self.mode, inf))
            if self.mode not in UP:
                self.end_change("stopped")

    def reload(self) -> None:
        """Has the next generation boot beside the one that serves."""
        if self.mode is Mode.RUNNING and not self.candidate:
            self.candidate = 1 + max(self.generation, *(one.generation for one in self.workers.values()), 0)
            self.tried.clear()
            self.slots.pop(self.candidate, None)
            for slot in range(1, 6):
                self.records.pop((self.candidate, slot), None)
        self.settle()

    def end_change(self, how: str) -> None:
        if self.candidate:
            self.candidate = 0
            self.changes[how] += 1

    def perform(self, action: Action) -> None:
        match action:
            case Spawn(slot, candidate):
                if not candidate or self.candidate:  # it may have failed by an action before this one
                    self.spawn((self.candidate if candidate else self.generation, slot))
            case Retire(pid, why):
                assert why
                self.check_retirement(self.workers[pid])
                self.crowds[self.workers[pid].place].clear()
                self.live(self.workers[pid], Turn.RETIRE)
            case Close(pid):
                self.live(self.workers[pid], Turn.CLOSE)
            case Dump(pid, cause):
                assert cause
                assert self.limit(self.workers[pid]) <= self.now + ALMOST, "it is impatient"
                self.workers[pid].dumped = self.now
                self.dumps += 1
            case Kill(pid, cause):
                self.kill(self.workers[pid], cause)
            case GiveUp():
                assert self.hopeless(), "it gave up too early"
                self.event(Event.GAVE_UP)

    def kill(self, worker: Process, cause: str) -> None:
        assert cause
        assert self.now >= worker.dumped + STACKS - ALMOST, "its stacks were not asked for, or are not written yet"
        assert self.limit(worker) <= worker.dumped + ALMOST, "it has come round since, or is about something else"
        worker.killed_as = worker.life
        self.kills += 1
        self.live(worker, Turn.KILL)

    def limit(self, worker: Process) -> float:
        """When patience with it ends."""
        since = max(worker.since, self.awake)
        limit = since + LIMITS.get(worker.life, inf)
        if self.stall and worker.life in (Life.SERVING, Life.DRAINING):
            limit = min(limit, max(since, self.beat(worker)) + self.stall)
        return limit

    def check_retirement(self, worker: Process) -> None:
        """Nobody goes before who takes his place serves, unless the operator wants so."""
        if self.mode in UP and worker.slot <= self.wanted:
            assert worker.generation != self.candidate, "it boots in vain"
            if worker.generation == self.generation:
                beside = [one for one in self.here(self.generation, Life.SERVING) if one.slot == worker.slot]
                assert worker.life is Life.SERVING
                assert worker.worn
                assert len(beside) == 2, "its place is empty now"

    def check_renewal(self, worker: Process) -> None:
        assert worker.worn, "two workers in one slot"
        assert worker.life is Life.SERVING
        assert not self.candidate, "it is renewed by the candidate"
        assert self.settled(), "two renewals at once, or one beside a slot that is empty"

    def spawn(self, place: Place) -> None:
        record, fate, crowd, slot = self.records[place], next(self.fates), self.crowds[place], place[1]
        assert self.mode in UP
        assert 1 <= slot <= self.wanted
        if place[0] == self.candidate:
            assert place not in self.tried, "a candidate's worker is tried again"
            self.tried.add(place)
        else:
            assert self.now >= record.earliest, "it did not wait"
            for worker in self.here(self.generation):
                if worker.slot == slot:
                    self.check_renewal(worker)
                    crowd.clear()
        crowd.append(self.now)
        assert len(crowd) <= CROWD or crowd[-1] - crowd[0] >= SPAN, "a busy restart"
        if self.forks:
            self.forked += 1
            self.workers[self.forked] = Process(self.forked, place, fate, since=self.now)
        else:
            record.failed(self.now, fork=True)
            slots = self.slots[place[0]]
            slots[slot] = after_fork_failed(slots.get(slot, Slot()), self.now, fate.luck)
            if place[0] == self.candidate:
                self.end_change("failed")

    def happen(self, worker: Process, what: Turn | str) -> None:
        match what:
            case Turn():
                self.live(worker, what)
            case "wears":
                worker.worn = "it is old"
            case "stands":
                worker.stood = self.now
            case "goes on":
                worker.stood, worker.rested = inf, self.now

    def live(self, worker: Process, turn: Turn) -> None:
        if turn is Turn.READY:
            worker.ready_at = self.now
        elif turn is Turn.KILL and worker.life is Life.BOOTING:
            self.records[worker.place].failed(self.now)
            worker.counted = True
        elif turn is Turn.EXIT:
            self.bury(worker)
        life = next_life(worker.life, turn)
        if life is not worker.life:
            worker.life, worker.since = life, self.now

    def bury(self, worker: Process) -> None:
        del self.workers[worker.pid]
        served, life = max(0.0, self.now - worker.ready_at), worker.killed_as or worker.life
        expected = life in (Life.DRAINING, Life.CLOSING)
        if expected:
            self.crowds[worker.place].clear()
            if worker.generation == self.candidate:  # it was one too many
                self.tried.discard(worker.place)
        elif not worker.counted:
            self.records[worker.place].failed(self.now, healthy=served >= 10.0)
        slots = self.slots[worker.generation]
        slots[worker.slot] = after_death(slots.get(worker.slot, Slot()), life, self.now, served, worker.fate.luck)
        if worker.generation == self.candidate and not expected:
            self.end_change("failed")

    def hopeless(self) -> bool:
        """Whether it should give up."""
        failures = [self.records[self.generation, slot].failures for slot in range(1, self.wanted + 1)]
        if self.mode is Mode.STARTING:
            return any(failures)
        nobody = all(worker.life is not Life.SERVING for worker in self.workers.values())
        return self.mode is Mode.RUNNING and not self.candidate and nobody and min(failures) >= 10

    def check_while_waiting(self, deadline: float | None) -> None:
        """What must hold whenever the master would wait."""
        here = [worker for worker in self.workers.values() if worker.life in HERE]
        crowded = [place for place, number in Counter(worker.place for worker in here).items() if number > 1]
        assert len(crowded) <= 1, "two renewals at once"
        assert all(worker.worn or worker.life is Life.BOOTING for worker in here if worker.place in crowded)
        assert self.mode in UP or not here, "somebody was not told to end"
        assert {one.generation for one in here} <= {self.generation, self.candidate}, "another generation is here yet"
        assert all(one.slot <= self.wanted for one in here), "more workers than wanted"
        assert not self.hopeless(), "it does not give up"
        assert self.now <= self.end + ALMOST or not self.workers, "somebody outlives the end"
        dues = [self.due(worker) for worker in self.workers.values()]
        if self.mode in UP:
            slots = {one.slot for one in self.here(self.generation)}
            wanting = set(range(1, self.wanted + 1)) - slots
            dues += [self.records[self.generation, slot].latest for slot in wanting]
        if self.candidate:
            assert {one.slot for one in self.workers.values() if one.generation == self.candidate} >= set(
                range(1, self.wanted + 1)
            ), "a candidate waits for nothing"
        elif self.mode is Mode.RUNNING and self.settled():
            dues += [self.records[one.place].latest for one in here if one.worn]
        if min(dues, default=inf) < inf:
            assert deadline is not None, "nothing would wake it"
            assert self.now < deadline <= min(dues) + ALMOST, "it waits too long, or not at all"
        else:
            assert deadline is None, "it wakes for nothing"

    def due(self, worker: Process) -> float:
        """When something has to be done about it."""
        limit = self.limit(worker)
        return limit if worker.dumped < limit - ALMOST else worker.dumped + STACKS
