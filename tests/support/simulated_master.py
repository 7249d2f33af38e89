"""A simulated master with simulated processes and a simulated clock, for the tests of the policy for workers.

`Simulation` does what `master.Master` and `reload.Changes` do with a plan, and checks each moment at which it would
wait. Beside it keeps a `Record` of each slot, made from what the rules say and not from what the plan remembers.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from math import inf

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
    slot_after_exit,
    slot_after_failed_fork,
)
from forkd.states import MasterEvent, MasterState, WorkerEvent, WorkerState, next_master_state, next_worker_state
from tests.support.simulated_workers import Fate, Place, Process, Record

BOOT, DRAIN, DELAY = 7.0, 20.3, 5.7  # seconds; no sums of the times below, so that few things happen at the same moment
ROUNDS = 5  # plans in a row that may call for something: spawn or retire, give up, close, and nothing
CROWD, SPAN = 7, 10.0  # workers that one slot may get, without the operator, in so many seconds
ALMOST = 1e-6  # seconds by which two ways to add them up may differ

HERE = (WorkerState.BOOTING, WorkerState.SERVING)
UP = (MasterState.STARTING, MasterState.RUNNING, MasterState.LEAVING)
LIMITS = {WorkerState.BOOTING: BOOT, WorkerState.DRAINING: DRAIN + GRACE, WorkerState.CLOSING: GRACE}
ENDS = {MasterState.DRAINING: DRAIN + GRACE + STACKS, MasterState.CLOSING: GRACE + STACKS}


@dataclass
class Simulation:
    """A master, its processes and their time."""

    wanted: int
    fates: Iterator[Fate] = field(default_factory=lambda: cycle([Fate()]))
    now: float = 1000.0
    master_state: MasterState = MasterState.STARTING
    stall: float = 0.0
    give_up_after: int = 0
    forks: bool = True
    generation: int = 1
    candidate: int = 0  # the generation that is to be; 0: none
    awake_since: float = -inf
    drain_at: float = inf  # when it is to drain, if it leaves
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
                default=((inf, WorkerEvent.EXIT), 0),
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
        self.awake_since = self.now
        self.end = self.now + ENDS.get(self.master_state, inf)
        self.run(self.now)

    def settle(self) -> float | None:
        """Does what the plans of this moment say until there is nothing to do; the deadline."""
        for _ in range(ROUNDS):
            if self.master_state is MasterState.STARTING and self.all_serve():
                self.event(MasterEvent.ALL_READY)
            if self.candidate and self.serves(self.candidate):
                self.generation = self.candidate
                self.end_change("done")
            if not self.workers:
                self.event(MasterEvent.EMPTY)
            plan = make_plan(self.now, self.view())
            if not plan.actions:
                return plan.deadline
            for action in plan.actions:
                self.perform(action)
        raise AssertionError(f"there is always something to do: {plan.actions}")

    def here(self, generation: int, *lives: WorkerState) -> list[Process]:
        return [one for one in self.workers.values() if one.generation == generation and one.state in (lives or HERE)]

    def serves(self, generation: int) -> bool:
        slots = sorted(one.slot for one in self.here(generation))
        return slots == list(range(1, self.wanted + 1)) and not self.here(generation, WorkerState.BOOTING)

    def all_serve(self) -> bool:
        return self.serves(self.generation)

    def beat(self, worker: Process) -> float:
        """When its loop last turned; one that was asleep has not said so yet."""
        return min(worker.stood, self.asleep if self.now == self.awake_since else self.now)

    def view(self) -> PoolView:
        views = tuple(
            WorkerView(w.pid, w.slot, w.state, w.since, w.generation, self.beat(w), w.dumped_at, w.recycle_reason)
            for w in self.workers.values()
        )
        number = self.generation
        candidate = Candidate(self.candidate, self.wanted, BOOT) if self.candidate else None
        slots, awake_since = self.slots[number], self.awake_since
        return PoolView(
            state=self.master_state,
            wanted=self.wanted,
            workers=views,
            slots=slots,
            boot_timeout=BOOT,
            drain_timeout=DRAIN,
            stall_timeout=self.stall,
            give_up_after=self.give_up_after,
            generation=number,
            candidate=candidate,
            awake_since=awake_since,
            drain_at=self.drain_at,
        )

    def event(self, event: MasterEvent) -> None:
        self.master_state, before = next_master_state(self.master_state, event), self.master_state
        if self.master_state is not before:
            if self.master_state is MasterState.LEAVING:
                self.drain_at = self.now + DELAY
            self.end = min(self.end, self.now + ENDS.get(self.master_state, inf))
            if self.master_state.ends:
                self.end_change("stopped")

    def reload(self) -> None:
        """Has the next generation boot beside the one that serves."""
        if self.master_state is MasterState.RUNNING and not self.candidate:
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
                self.change_state(self.workers[pid], WorkerEvent.RETIRE)
            case Close(pid):
                self.change_state(self.workers[pid], WorkerEvent.CLOSE)
            case Dump(pid, cause):
                assert cause
                assert self.limit(self.workers[pid]) <= self.now + ALMOST, "it is impatient"
                self.workers[pid].dumped_at = self.now
                self.dumps += 1
            case Kill(pid, cause):
                self.kill(self.workers[pid], cause)
            case Drain():
                assert self.master_state is MasterState.LEAVING
                assert self.now >= self.drain_at, "it drains too early"
                self.event(MasterEvent.DELAY_OVER)
            case GiveUp():
                assert self.hopeless(), "it gave up too early"
                self.event(MasterEvent.GAVE_UP)

    def kill(self, worker: Process, cause: str) -> None:
        assert cause
        assert self.now >= worker.dumped_at + STACKS - ALMOST, "its stacks were not asked for, or are not written yet"
        assert self.limit(worker) <= worker.dumped_at + ALMOST, "it has come round since, or is about something else"
        worker.killed_in = worker.state
        self.kills += 1
        self.change_state(worker, WorkerEvent.KILL)

    def limit(self, worker: Process) -> float:
        """When patience with it ends."""
        since = max(worker.since, self.awake_since)
        limit = since + LIMITS.get(worker.state, inf)
        if self.stall and worker.state in (WorkerState.SERVING, WorkerState.DRAINING):
            limit = min(limit, max(since, self.beat(worker)) + self.stall)
        return limit

    def check_retirement(self, worker: Process) -> None:
        """No worker goes before its replacement serves, unless the operator wants so."""
        if self.master_state in UP and worker.slot <= self.wanted:
            assert worker.generation != self.candidate, "it boots in vain"
            if worker.generation == self.generation:
                beside = [one for one in self.here(self.generation, WorkerState.SERVING) if one.slot == worker.slot]
                assert worker.state is WorkerState.SERVING
                assert worker.recycle_reason
                assert len(beside) == 2, "its place is empty now"

    def check_renewal(self, worker: Process) -> None:
        assert worker.recycle_reason, "two workers in one slot"
        assert worker.state is WorkerState.SERVING
        assert not self.candidate, "it is renewed by the candidate"
        assert self.all_serve(), "two renewals at once, or one beside a slot that is empty"

    def spawn(self, place: Place) -> None:
        record, fate, crowd, slot = self.records[place], next(self.fates), self.crowds[place], place[1]
        assert self.master_state in UP
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
            slots[slot] = slot_after_failed_fork(slots.get(slot, Slot()), self.now, fate.jitter)
            if place[0] == self.candidate:
                self.end_change("failed")

    def happen(self, worker: Process, what: WorkerEvent | str) -> None:
        match what:
            case WorkerEvent():
                self.change_state(worker, what)
            case "wears":
                worker.recycle_reason = "it is old"
            case "stands":
                worker.stood = self.now
            case "goes on":
                worker.stood, worker.rested = inf, self.now

    def change_state(self, worker: Process, event: WorkerEvent) -> None:
        if event is WorkerEvent.READY:
            worker.ready_at = self.now
        elif event is WorkerEvent.KILL and worker.state is WorkerState.BOOTING:
            self.records[worker.place].failed(self.now)
            worker.counted = True
        elif event is WorkerEvent.EXIT:
            self.remove(worker)
        state = next_worker_state(worker.state, event)
        if state is not worker.state:
            worker.state, worker.since = state, self.now

    def remove(self, worker: Process) -> None:
        del self.workers[worker.pid]
        served, state = max(0.0, self.now - worker.ready_at), worker.killed_in or worker.state
        expected = state in (WorkerState.DRAINING, WorkerState.CLOSING)
        if expected:
            self.crowds[worker.place].clear()
            if worker.generation == self.candidate:  # it was one too many
                self.tried.discard(worker.place)
        elif not worker.counted:
            self.records[worker.place].failed(self.now, healthy=served >= 10.0)
        slots = self.slots[worker.generation]
        before = slots.pop(worker.slot, Slot())
        slots[worker.slot] = slot_after_exit(before, state, self.now, served, worker.fate.jitter, others=slots.values())
        if worker.generation == self.candidate and not expected:
            self.end_change("failed")

    def hopeless(self) -> bool:
        """Whether it should give up."""
        failures = [self.records[self.generation, slot].failures for slot in range(1, self.wanted + 1)]
        if self.master_state is MasterState.STARTING:
            return any(failures)
        if self.master_state not in UP or not self.give_up_after or self.candidate:
            return False
        none_serves = all(worker.state is not WorkerState.SERVING for worker in self.workers.values())
        return none_serves and min(failures) >= self.give_up_after

    def check_while_waiting(self, deadline: float | None) -> None:
        """What must hold whenever the master would wait."""
        here = [worker for worker in self.workers.values() if worker.state in HERE]
        crowded = [place for place, number in Counter(worker.place for worker in here).items() if number > 1]
        assert len(crowded) <= 1, "two renewals at once"
        assert all(
            worker.recycle_reason or worker.state is WorkerState.BOOTING for worker in here if worker.place in crowded
        )
        assert self.master_state in UP or not here, "a worker was not told to end"
        assert {one.generation for one in here} <= {self.generation, self.candidate}, "another generation is here yet"
        assert all(one.slot <= self.wanted for one in here), "more workers than wanted"
        assert not self.hopeless(), "it does not give up"
        assert self.now <= self.end + ALMOST or not self.workers, "a worker outlives the end"
        dues = [self.due(worker) for worker in self.workers.values()]
        if self.master_state in UP:
            slots = {one.slot for one in self.here(self.generation)}
            wanting = set(range(1, self.wanted + 1)) - slots
            dues += [self.records[self.generation, slot].latest for slot in wanting]
        if self.master_state is MasterState.LEAVING:
            dues.append(self.drain_at)
        if self.candidate:
            assert {one.slot for one in self.workers.values() if one.generation == self.candidate} >= set(
                range(1, self.wanted + 1)
            ), "a candidate waits for nothing"
        elif self.master_state is MasterState.RUNNING and self.all_serve():
            dues += [self.records[one.place].latest for one in here if one.recycle_reason]
        if min(dues, default=inf) < inf:
            assert deadline is not None, "nothing would wake it"
            assert self.now < deadline <= min(dues) + ALMOST, "it waits too long, or not at all"
        else:
            assert deadline is None, "it wakes for nothing"

    def due(self, worker: Process) -> float:
        """When something has to be done about it."""
        limit = self.limit(worker)
        return limit if worker.dumped_at < limit - ALMOST else worker.dumped_at + STACKS
