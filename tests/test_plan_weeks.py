"""The policy for workers over time: a daemon lives through days of bad luck in a moment, by the simulation beside this.

Whatever happens, the simulation's own checks must hold at each moment: the right number of workers, none too early,
none late, an end in time. The single rules are in `test_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from math import inf

import pytest
from fates import LONGER, Fate
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from simulation import BOOT, DRAIN, Simulation

from forkd.master.plan import GRACE, STACKS
from forkd.states import Event, Life, Mode, Turn

STALL = 40.7  # seconds
STALLS = st.sampled_from([0.0, STALL])
TIMES = st.sampled_from([0.0, 0.1, 1.0, 9.0, 11.0, 60.0])
FATES = st.builds(
    Fate,
    boots=st.sampled_from([0.0, 0.2, 3.0, 6.9, 7.1, inf]),
    fails=st.booleans(),
    lives=st.one_of(TIMES, st.sampled_from([3600.0, 90000.0, inf])),
    drains=st.sampled_from([0.0, 0.1, 20.0, 23.0, inf]),
    closes=st.sampled_from([0.0, 1.9, 2.1, inf]),
    luck=st.sampled_from([0.0, 0.5, 1.0]),
    wears=st.sampled_from([inf, inf, 0.0, 5.0, 3600.0]),
    stalls=st.sampled_from([inf, inf, inf, 30.0, 9000.0]),
    stands=st.sampled_from([1.0, STALL - 0.2, STALL + 0.2, STALL + STACKS + 0.2, inf]),
)


class Weeks(RuleBasedStateMachine):
    """Up to a week of a daemon's life, which may be several lives."""

    simulation = Simulation(1)

    @initialize(wanted=st.integers(1, 5), stall=STALLS)
    def first_start(self, wanted: int, stall: float) -> None:
        self.simulation = Simulation(wanted, stall=stall)
        self.simulation.pass_time(1.0)

    @precondition(lambda self: self.simulation.mode is Mode.OVER)
    @rule(wanted=st.integers(1, 5), fates=st.lists(FATES, max_size=3), stall=STALLS)
    def start(self, wanted: int, fates: Sequence[Fate], stall: float) -> None:
        self.simulation = Simulation(wanted, cycle([*fates, Fate()]), stall=stall)

    @rule(seconds=st.one_of(TIMES, st.floats(0, 100), st.sampled_from([600.0, 21600.0])))
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
            self.simulation.live(workers[number], Turn.EXIT)
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

    @rule(event=st.sampled_from([Event.STOP, Event.STOP, Event.QUIT]), seconds=st.sampled_from([0.0, 1.0, 60.0]))
    def stop(self, event: Event, seconds: float) -> None:
        self.simulation.event(event)
        self.simulation.pass_time(seconds)
        assert self.simulation.mode is Mode.OVER or self.simulation.now < self.simulation.end

    def teardown(self) -> None:
        simulation = self.simulation
        simulation.event(Event.STOP)
        simulation.pass_time(DRAIN + GRACE + STACKS)
        assert simulation.mode is Mode.OVER
        assert not simulation.workers


# Without shrinking: to find the shortest of many lives takes longer than a test may.
Weeks.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    report_multiple_bugs=False,
)
TestWeeks = Weeks.TestCase


def test_a_week_of_troubles_passes_and_every_worker_is_there_afterwards() -> None:
    simulation = Simulation(4, stall=STALL)
    simulation.pass_time(1.0)
    simulation.fates = cycle(
        [
            Fate(lives=9000.0),
            Fate(lives=3.0),
            Fate(fails=True),
            Fate(lives=40000.0, luck=1.0),
            Fate(boots=inf),
            Fate(boots=6.0, lives=11.0, luck=0.0),
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
    assert simulation.mode is Mode.RUNNING
    assert simulation.settled()
    assert len(simulation.workers) == 4
    assert set(simulation.changes) == {"done", "failed"}
    assert simulation.dumps > simulation.kills > 10


def test_a_quiet_week_passes_without_a_single_waking() -> None:
    simulation = Simulation(4)
    simulation.pass_time(1.0)
    assert simulation.mode is Mode.RUNNING
    assert simulation.settle() is None
    simulation.pass_time(7 * 86400.0)
    assert simulation.forked == 4


@pytest.mark.parametrize(
    ("trouble", "seconds"),
    [(Fate(fails=True), 0.5), (Fate(lives=0.0), 0.5), (Fate(boots=inf), BOOT + STACKS)],
    ids=["fails", "dies", "hangs"],
)
def test_at_the_start_the_first_failure_ends_the_daemon_and_nobody_more_is_forked(
    trouble: Fate, seconds: float
) -> None:
    simulation = Simulation(3, iter([trouble, *[Fate(boots=6.0, drains=inf, closes=inf)] * 5]))
    simulation.pass_time(seconds)
    assert simulation.mode is Mode.CLOSING
    assert simulation.forked == 3
    simulation.pass_time(GRACE + STACKS)
    assert simulation.mode is Mode.OVER


def test_at_the_start_a_fork_that_fails_ends_the_daemon() -> None:
    simulation = Simulation(3, forks=False)
    simulation.pass_time(0.0)
    assert simulation.mode is Mode.OVER


@pytest.mark.parametrize(
    "trouble", [Fate(fails=True), Fate(lives=1.0), Fate(boots=inf)], ids=["fails", "dies", "hangs"]
)
def test_a_running_daemon_gives_up_after_ten_attempts_in_every_slot(trouble: Fate) -> None:
    simulation = Simulation(2)
    simulation.pass_time(20.0)
    simulation.fates = cycle([trouble])
    for worker in list(simulation.workers.values()):
        simulation.live(worker, Turn.EXIT)
    simulation.pass_time(3600.0)
    assert simulation.mode is Mode.OVER
    assert simulation.forked in {2 + 2 * 9, 2 + 2 * 9 + 1}  # the other slot may be one attempt ahead


def test_a_running_daemon_goes_on_for_a_day_while_one_worker_serves() -> None:
    simulation = Simulation(2)
    simulation.pass_time(20.0)
    simulation.fates = cycle([Fate(fails=True)])
    simulation.live(simulation.workers[1], Turn.EXIT)
    simulation.pass_time(86400.0)
    assert simulation.mode is Mode.RUNNING
    assert [worker.pid for worker in simulation.workers.values() if worker.life is Life.SERVING] == [2]
    assert simulation.forked > 86400 / (30.0 * LONGER + 0.5)


@pytest.mark.parametrize(
    ("events", "seconds"),
    [
        ([Event.STOP], DRAIN + GRACE + STACKS),
        ([Event.QUIT], GRACE + STACKS),
        ([Event.STOP, Event.STOP], GRACE + STACKS),
        ([Event.STOP, Event.QUIT], GRACE + STACKS),
        ([Event.QUIT, Event.STOP], GRACE + STACKS),
    ],
    ids=lambda value: "-".join(event.name.lower() for event in value) if isinstance(value, list) else "",
)
def test_everything_that_hangs_is_gone_in_time_after_a_stop(events: list[Event], seconds: float) -> None:
    simulation = Simulation(3, cycle([Fate(drains=inf, closes=inf)]))
    simulation.pass_time(5.0)
    for event in events:
        simulation.event(event)
        simulation.settle()
    simulation.pass_time(seconds - 0.1)
    assert len(simulation.workers) == 3
    simulation.pass_time(0.1)
    assert not simulation.workers
    assert simulation.mode is Mode.OVER
    assert simulation.kills == simulation.dumps == 3


def test_a_worn_daemon_is_renewed_one_by_one_and_never_serves_with_fewer() -> None:
    simulation = Simulation(3, cycle([Fate(boots=6.0, wears=600.0)]))
    simulation.pass_time(6.0)
    for second in range(3600):
        simulation.pass_time(1.0)
        assert len(simulation.here(1, Life.SERVING)) in {3, 4}, second
        assert len(simulation.here(1)) in {3, 4}
    assert 3 * 6 <= simulation.forked <= 3 * 7
    assert simulation.kills == 0


def test_a_worn_worker_whose_successors_cannot_boot_serves_on_and_they_are_tried_ever_more_rarely() -> None:
    simulation = Simulation(1, iter([Fate(wears=20.0), *[Fate(fails=True)] * 10_000]))
    simulation.pass_time(86400.0)
    assert simulation.mode is Mode.RUNNING
    assert [worker.pid for worker in simulation.workers.values() if worker.life is Life.SERVING] == [1]
    assert 86400 / (30.0 * LONGER + 0.5) < simulation.forked < 86400 / 30.0 + 10


@pytest.mark.parametrize(("stands", "killed"), [(STALL - 0.1, False), (STALL + 0.9, False), (STALL + 1.1, True)])
def test_a_loop_that_stands_still_is_killed_unless_it_comes_round_in_time(stands: float, killed: bool) -> None:
    simulation = Simulation(1, iter([Fate(stalls=20.0, stands=stands), Fate()]), stall=STALL)
    simulation.pass_time(20.5 + STALL + STACKS)
    assert simulation.dumps == (stands > STALL)
    assert simulation.kills == killed
    simulation.pass_time(1.0)
    assert simulation.settled()
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
def test_a_change_is_done_or_has_never_been(fates: list[Fate], how: str) -> None:
    simulation = Simulation(3, iter([*[Fate()] * 3, *fates]))
    simulation.pass_time(20.0)
    simulation.reload()
    for _ in range(100):
        simulation.pass_time(0.1)
        assert len(simulation.here(simulation.generation, Life.SERVING)) == 3
    assert simulation.changes == {how: 1}
    assert list(simulation.workers) == ([4, 5, 6] if how == "done" else [1, 2, 3])


def test_a_change_of_a_daemon_where_nobody_serves_is_its_last_hope() -> None:
    simulation = Simulation(2)
    simulation.pass_time(20.0)
    simulation.fates = cycle([Fate(fails=True)])
    for worker in list(simulation.workers.values()):
        simulation.live(worker, Turn.EXIT)
    simulation.pass_time(60.0)
    simulation.fates = cycle([Fate(boots=6.0)])
    assert simulation.mode is Mode.RUNNING
    simulation.reload()
    simulation.fates = cycle([Fate(fails=True)])
    simulation.pass_time(6.0)
    assert simulation.settled()
    assert simulation.generation == 2


def test_a_reload_goes_on_when_the_number_of_workers_changes_meanwhile() -> None:
    simulation = Simulation(3, cycle([Fate(boots=3.0)]))
    simulation.pass_time(20.0)
    for wanted in (2, 4, 3, 1, 2):
        simulation.reload()
        simulation.pass_time(1.0)
        simulation.wanted = wanted
        simulation.pass_time(6.0)
        assert simulation.settled()
    assert simulation.changes == {"done": 5}
