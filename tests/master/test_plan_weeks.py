"""The policy for workers over time: a daemon lives through days of failures in a moment (`simulated_master`).

Whatever happens, the simulation's own checks must hold at each moment: the right number of workers, none too early,
none late, an end in time. The single rules are in `test_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import inf
from typing import ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from forkd.master.plan import GRACE, STACKS
from forkd.states import MasterEvent, MasterState, WorkerEvent, WorkerState
from tests.support.simulated_master import BOOT, DELAY, DRAIN, Simulation
from tests.support.simulated_workers import LONGER, Fate

STALL = 40.7  # seconds
STALLS = st.sampled_from([0.0, STALL])
BOUNDS = st.sampled_from([0, 0, 1, 3])
TIMES = st.sampled_from([0.0, 0.1, 1.0, 9.0, 11.0, 60.0])
FATES = st.builds(
    Fate,
    boots=st.sampled_from([0.0, 0.2, 3.0, 6.9, 7.1, inf]),
    fails=st.booleans(),
    lives=st.one_of(TIMES, st.sampled_from([3600.0, 90000.0, inf])),
    drains=st.sampled_from([0.0, 0.1, 20.0, 23.0, inf]),
    closes=st.sampled_from([0.0, 1.9, 2.1, inf]),
    jitter=st.sampled_from([0.0, 0.5, 1.0]),
    wears=st.sampled_from([inf, inf, 1.0, 5.0, 3600.0]),
    stalls=st.sampled_from([inf, inf, inf, 30.0, 9000.0]),
    stands=st.sampled_from([1.0, STALL - 0.2, STALL + 0.2, STALL + STACKS + 0.2, inf]),
)


class Weeks(RuleBasedStateMachine):
    """Up to a week of a daemon's state, which may be several lives."""

    simulation = Simulation(1)
    lived: ClassVar[int] = 0  # how many have come to their end

    @initialize(wanted=st.integers(1, 5), stall=STALLS, bound=BOUNDS)
    def first_start(self, wanted: int, stall: float, bound: int) -> None:
        self.simulation = Simulation(wanted, stall=stall, give_up_after=bound)
        self.simulation.pass_time(1.0)

    @precondition(lambda self: self.simulation.master_state is MasterState.OVER)
    @rule(wanted=st.integers(1, 5), fates=st.lists(FATES, max_size=3), stall=STALLS, bound=BOUNDS)
    def start(self, wanted: int, fates: Sequence[Fate], stall: float, bound: int) -> None:
        self.simulation = Simulation(wanted, cycle([*fates, Fate()]), stall=stall, give_up_after=bound)

    @rule(seconds=st.one_of(TIMES, st.floats(0, 100), st.sampled_from([600.0, 7200.0])))
    def time_passes(self, seconds: float) -> None:
        self.simulation.pass_time(seconds)

    @rule(
        victims=st.sets(st.integers(0, 5), min_size=1),
        fates=st.lists(FATES, min_size=1, max_size=6),
        seconds=st.one_of(st.floats(0, 12), st.sampled_from([60.0, 600.0])),
    )
    def workers_die(self, victims: set[int], fates: Sequence[Fate], seconds: float) -> None:
        self.simulation.fates = cycle(fates)
        workers = list(self.simulation.workers.values())
        for number in victims & set(range(len(workers))):
            self.simulation.change_state(workers[number], WorkerEvent.EXIT)
        self.simulation.pass_time(seconds)

    @rule(minutes=st.integers(0, 20))
    def forks_fail(self, minutes: int) -> None:
        self.simulation.forks = False
        self.simulation.pass_time(minutes * 60.0)
        self.simulation.forks = True

    @rule(wanted=st.integers(1, 5))
    def scale(self, wanted: int) -> None:
        self.simulation.wanted = wanted
        self.simulation.settle()

    @rule(fates=st.lists(FATES, max_size=6), seconds=st.sampled_from([0.0, 0.3, 1.0, 60.0]))
    def reload(self, fates: Sequence[Fate], seconds: float) -> None:
        if fates:
            self.simulation.fates = cycle(fates)
        self.simulation.reload()
        self.simulation.pass_time(seconds)

    @rule(seconds=st.one_of(TIMES, st.sampled_from([3600.0, 86400.0])))
    def machine_sleeps(self, seconds: float) -> None:
        kills, dumps = self.simulation.kills, self.simulation.dumps
        self.simulation.oversleep(seconds)
        assert (self.simulation.kills, self.simulation.dumps) == (kills, dumps)

    @rule(
        event=st.sampled_from([MasterEvent.STOP, MasterEvent.LEAVE, MasterEvent.LEAVE, MasterEvent.QUIT]),
        seconds=st.sampled_from([0.0, 1.0, 60.0]),
    )
    def stop(self, event: MasterEvent, seconds: float) -> None:
        self.simulation.event(event)
        self.simulation.pass_time(seconds)
        assert self.simulation.master_state is MasterState.OVER or self.simulation.now < self.simulation.end

    def teardown(self) -> None:
        simulation = self.simulation
        simulation.event(MasterEvent.STOP)
        simulation.pass_time(DRAIN + GRACE + STACKS)  # also where it was leaving
        assert simulation.master_state is MasterState.OVER
        assert not simulation.workers
        type(self).lived += 1


@pytest.mark.parametrize("examples", [30, pytest.param(300, marks=[pytest.mark.soak, pytest.mark.timeout(900)])])
def test_rules_hold_over_weeks_of_any_events(examples: int) -> None:
    # Without shrinking: to find the shortest of many lives takes longer than a test may.
    chosen = settings(
        max_examples=examples,
        stateful_step_count=50,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    Weeks.lived = 0
    run_state_machine_as_test(Weeks, settings=chosen)
    assert Weeks.lived >= examples


def test_workers_are_all_there_after_a_week_of_troubles() -> None:
    simulation = Simulation(4, stall=STALL)
    simulation.pass_time(1.0)
    simulation.fates = cycle(
        [
            Fate(lives=9000.0),
            Fate(lives=3.0),
            Fate(fails=True),
            Fate(lives=40000.0, jitter=1.0),
            Fate(boots=inf),
            Fate(boots=6.0, lives=11.0, jitter=0.0),
            Fate(lives=0.0, drains=inf),
            Fate(wears=7000.0),
            Fate(stalls=5000.0, stands=300.0),
            Fate(wears=3.0, stalls=1.0, stands=STALL + 0.2),
        ]
    )
    for hour in range(7 * 24):
        simulation.forks = hour % 50 != 49
        if hour % 7 == 6:
            simulation.reload()
        if hour % 20 == 19:
            simulation.oversleep(1800.0)
        simulation.wanted = 4 + (hour % 11 == 10) - (hour % 17 == 16)
        simulation.pass_time(3600.0)
    simulation.fates, simulation.forks, simulation.wanted = cycle([Fate()]), True, 4
    simulation.pass_time(40000.0)
    assert simulation.master_state is MasterState.RUNNING
    assert simulation.all_serve()
    assert len(simulation.workers) == 4
    assert set(simulation.changes) == {"done", "failed"}
    assert simulation.dumps > simulation.kills > 10


def test_quiet_week_passes_without_a_single_waking() -> None:
    simulation = Simulation(4)
    simulation.pass_time(1.0)
    assert simulation.master_state is MasterState.RUNNING
    assert simulation.settle() is None
    simulation.pass_time(7 * 86400.0)
    assert simulation.forked == 4


@pytest.mark.parametrize(
    ("trouble", "seconds"),
    [(Fate(fails=True), 0.5), (Fate(lives=0.0), 0.5), (Fate(boots=inf), BOOT + STACKS)],
    ids=["fails", "dies", "hangs"],
)
def test_first_failure_at_the_start_ends_the_daemon(trouble: Fate, seconds: float) -> None:
    simulation = Simulation(3, iter([trouble, *[Fate(boots=6.0, drains=inf, closes=inf)] * 5]))
    simulation.pass_time(seconds)
    reached = simulation.master_state
    assert (reached, simulation.forked) == (MasterState.CLOSING, 3)
    simulation.pass_time(GRACE + STACKS)
    assert simulation.master_state is MasterState.OVER


def test_failed_fork_at_the_start_ends_the_daemon() -> None:
    simulation = Simulation(3, forks=False)
    simulation.pass_time(0.0)
    assert simulation.master_state is MasterState.OVER


TROUBLES = pytest.mark.parametrize(
    "trouble", [Fate(fails=True), Fate(lives=1.0), Fate(boots=inf)], ids=["fails", "dies", "hangs"]
)


def in_trouble(trouble: Fate, give_up_after: int) -> Simulation:
    """A daemon that has served, whose workers all end; what follows them is in trouble."""
    simulation = Simulation(2, give_up_after=give_up_after)
    simulation.pass_time(20.0)
    simulation.fates = cycle([trouble])
    for worker in list(simulation.workers.values()):
        simulation.change_state(worker, WorkerEvent.EXIT)
    return simulation


@TROUBLES
def test_daemon_that_has_served_goes_on_with_backoff(trouble: Fate) -> None:
    simulation = in_trouble(trouble, 0)
    simulation.pass_time(86400.0)
    assert simulation.master_state is MasterState.RUNNING
    assert 86400 / (BOOT + STACKS + 30.0 * LONGER) < simulation.forked / 2 < 86400 / 30.0 + 10
    simulation.fates = cycle([Fate()])
    simulation.pass_time(BOOT + STACKS + 30.0 * LONGER + 0.5)
    assert simulation.all_serve()


@TROUBLES
def test_daemon_gives_up_where_its_settings_set_a_bound(trouble: Fate) -> None:
    simulation = in_trouble(trouble, 10)
    simulation.pass_time(3600.0)
    assert simulation.master_state is MasterState.OVER
    assert simulation.forked in {2 + 2 * 9, 2 + 2 * 9 + 1}  # the other slot may be one attempt ahead


def test_daemon_goes_on_for_a_day_while_one_worker_serves() -> None:
    simulation = Simulation(2)
    simulation.pass_time(20.0)
    simulation.fates = cycle([Fate(fails=True)])
    simulation.change_state(simulation.workers[1], WorkerEvent.EXIT)
    simulation.pass_time(86400.0)
    assert simulation.master_state is MasterState.RUNNING
    assert [worker.pid for worker in simulation.workers.values() if worker.state is WorkerState.SERVING] == [2]
    assert simulation.forked > 86400 / (30.0 * LONGER + 0.5)


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([MasterEvent.STOP], DRAIN + GRACE + STACKS),
        ([MasterEvent.QUIT], GRACE + STACKS),
        ([MasterEvent.STOP, MasterEvent.STOP], GRACE + STACKS),
        ([MasterEvent.STOP, MasterEvent.QUIT], GRACE + STACKS),
        ([MasterEvent.QUIT, MasterEvent.STOP], GRACE + STACKS),
    ],
    ids=lambda value: "-".join(event.name.lower() for event in value) if isinstance(value, list) else "",
)
def test_everything_that_hangs_is_gone_in_time_after_a_stop(events: list[MasterEvent], seconds: float) -> None:
    simulation = Simulation(3, cycle([Fate(drains=inf, closes=inf)]))
    simulation.pass_time(5.0)
    for event in events:
        simulation.event(event)
        simulation.settle()
    simulation.pass_time(seconds - 0.1)
    assert len(simulation.workers) == 3
    simulation.pass_time(0.1)
    assert not simulation.workers
    assert simulation.master_state is MasterState.OVER
    assert simulation.kills == simulation.dumps == 3


def test_daemon_that_leaves_serves_on_and_drains_in_time() -> None:
    simulation = Simulation(2, cycle([Fate(lives=1.0)]))
    simulation.pass_time(0.5)
    simulation.event(MasterEvent.LEAVE)
    simulation.pass_time(DELAY - 0.1)
    assert simulation.here(1)
    assert simulation.forked > 2  # those that died have been followed
    simulation.pass_time(0.1)
    assert simulation.here(1) == []
    assert simulation.now < simulation.end


def test_second_stop_ends_the_delay_alone() -> None:
    simulation = Simulation(2, cycle([Fate(drains=3.0)]))
    simulation.pass_time(0.5)
    simulation.event(MasterEvent.LEAVE)
    simulation.pass_time(1.0)
    simulation.event(MasterEvent.STOP)
    simulation.pass_time(2.9)
    assert len(simulation.workers) == 2
    simulation.pass_time(0.1)
    assert simulation.master_state is MasterState.OVER


def test_workers_are_recycled_one_by_one_and_never_fewer_serve() -> None:
    simulation = Simulation(3, cycle([Fate(boots=6.0, wears=600.0)]))
    simulation.pass_time(6.0)
    for second in range(3600):
        simulation.pass_time(1.0)
        assert len(simulation.here(1, WorkerState.SERVING)) in {3, 4}, second
        assert len(simulation.here(1)) in {3, 4}
    assert 3 * 6 <= simulation.forked <= 3 * 7
    assert simulation.kills == 0


def test_worker_serves_on_while_its_replacement_cannot_boot() -> None:
    simulation = Simulation(1, iter([Fate(wears=20.0), *[Fate(fails=True)] * 10_000]))
    simulation.pass_time(86400.0)
    assert simulation.master_state is MasterState.RUNNING
    assert [worker.pid for worker in simulation.workers.values() if worker.state is WorkerState.SERVING] == [1]
    assert 86400 / (30.0 * LONGER + 0.5) < simulation.forked < 86400 / 30.0 + 10


@pytest.mark.parametrize(("stands", "killed"), [(STALL - 0.1, False), (STALL + 0.9, False), (STALL + 1.1, True)])
def test_stalled_loop_is_killed_unless_it_goes_on_in_time(stands: float, killed: bool) -> None:
    simulation = Simulation(1, iter([Fate(stalls=20.0, stands=stands), Fate()]), stall=STALL)
    simulation.pass_time(20.5 + STALL + STACKS)
    assert simulation.dumps == (stands > STALL)
    assert simulation.kills == killed
    simulation.pass_time(1.0)
    assert simulation.all_serve()
    assert list(simulation.workers) == [1 + killed]


@pytest.mark.parametrize(
    ("fates", "how"),
    [
        ([Fate()] * 3, "done"),
        ([Fate(boots=6.9), Fate(), Fate(boots=3.0)], "done"),
        ([Fate(), Fate(fails=True), Fate()], "failed"),
        ([Fate(), Fate(boots=inf), Fate()], "failed"),
        ([Fate(boots=6.0), Fate(lives=1.0), Fate()], "failed"),
    ],
)
def test_change_is_done_or_has_never_been(fates: list[Fate], how: str) -> None:
    simulation = Simulation(3, iter([*[Fate()] * 3, *fates]))
    simulation.pass_time(20.0)
    simulation.reload()
    for _ in range(100):
        simulation.pass_time(0.1)
        assert len(simulation.here(simulation.generation, WorkerState.SERVING)) == 3
    assert simulation.changes == {how: 1}
    assert list(simulation.workers) == ([4, 5, 6] if how == "done" else [1, 2, 3])


def test_candidate_is_tried_though_no_worker_serves() -> None:
    simulation = Simulation(2)
    simulation.pass_time(20.0)
    simulation.fates = cycle([Fate(fails=True)])
    for worker in list(simulation.workers.values()):
        simulation.change_state(worker, WorkerEvent.EXIT)
    simulation.pass_time(60.0)
    simulation.fates = cycle([Fate(boots=6.0)])
    assert simulation.master_state is MasterState.RUNNING
    simulation.reload()
    simulation.fates = cycle([Fate(fails=True)])
    simulation.pass_time(6.0)
    assert simulation.all_serve()
    assert simulation.generation == 2


def test_reload_goes_on_when_the_number_of_workers_changes() -> None:
    simulation = Simulation(3, cycle([Fate(boots=3.0)]))
    simulation.pass_time(20.0)
    for wanted in (2, 4, 3, 1, 2):
        simulation.reload()
        simulation.pass_time(1.0)
        simulation.wanted = wanted
        simulation.pass_time(6.0)
        assert simulation.all_serve()
    assert simulation.changes == {"done": 5}
