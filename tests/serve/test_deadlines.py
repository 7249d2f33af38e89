"""Deadlines by themselves: the heap, driven by a clock of the test's, and the rules."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.config.address import Address
from forkd.config.listener import Keepalive, Listener, Timeouts
from forkd.ended import Ended, FirstByteTimeout, HeartbeatLost, IdleTimeout, LifetimeOver, WriteTimeout
from forkd.serve import deadlines
from forkd.serve.deadlines import (
    TIMER_SLACK,
    ConnectionActivity,
    Deadlines,
    TimeoutPolicy,
    Watched,
    kernel_activity,
    timeout_error,
)
from forkd.system.socket_stats import ESTABLISHED, TcpInfo


class Clock:
    """A loop's timers and its clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.timers: list[tuple[float, int, Callable[[], None]]] = []
        self.wakes = 0
        self.count = 0

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        self.count += 1
        heapq.heappush(self.timers, (when, self.count, callback))
        number = self.count

        class Handle:
            def cancel(_) -> None:
                self.timers = [timer for timer in self.timers if timer[1] != number]

        return Handle()

    def run(self, until: float) -> None:
        """Lets time pass."""
        while self.timers and min(self.timers)[0] <= until:
            timer = min(self.timers)
            self.timers.remove(timer)
            self.now = max(self.now, timer[0])
            self.wakes += 1
            timer[2]()
        self.now = until


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(deadlines, "monotonic", lambda: clock.now)
    return clock


class One:
    """Something watched: when it was looked at, and when it wants to be looked at again."""

    def __init__(self, clock: Clock, *again: float) -> None:
        self.clock = clock
        self.due = 0.0
        self.again = list(again)
        self.checks: list[float] = []

    def check(self, now: float) -> float:
        self.checks.append(now)
        return self.again.pop(0) if self.again else 0.0

    def __lt__(self, other: object) -> bool:
        return id(self) < id(other)


def heap_of(clock: Any) -> Deadlines:
    loop: asyncio.AbstractEventLoop = clock
    return Deadlines(loop)


def test_each_is_checked_when_due_and_not_much_later(clock: Clock) -> None:
    heap, ones = heap_of(clock), [One(clock) for _ in range(20)]
    for number, one in enumerate(ones):
        heap.watch(one, 1001.0 + number * 7 % 20)
    clock.run(1030)
    for number, one in enumerate(ones):
        assert len(one.checks) == 1
        assert 0 <= one.checks[0] - (1001.0 + number * 7 % 20) <= TIMER_SLACK
    assert clock.timers == []


def test_another_check_is_made_when_wanted(clock: Clock) -> None:
    heap, one = heap_of(clock), One(clock, 1005.0, 1006.0)
    heap.watch(one, 1001.0)
    clock.run(1020)
    assert [round(look) for look in one.checks] == [1001, 1005, 1006]


def test_the_earlier_check_counts(clock: Clock) -> None:
    heap, one, other = heap_of(clock), One(clock), One(clock)
    heap.watch(one, 1010.0)
    heap.watch(one, 1002.0)
    heap.watch(other, 1003.0)
    heap.watch(other, 1012.0)
    clock.run(1030)
    assert [round(look) for look in one.checks + other.checks] == [1002, 1003]


def test_a_forgotten_one_is_not_checked(clock: Clock) -> None:
    heap, one = heap_of(clock), One(clock)
    for _ in range(3):
        heap.watch(one, 1005.0)
        heap.forget(one)
        heap.forget(one)
    clock.run(1030)
    assert one.checks == []


def test_many_of_one_moment_take_one_wake_up(clock: Clock) -> None:
    heap, ones = heap_of(clock), [One(clock) for _ in range(500)]
    for number, one in enumerate(ones):
        heap.watch(one, 1002.0 + number * TIMER_SLACK / 500)
    clock.run(1001.9)
    assert clock.wakes == 0
    clock.run(1010)
    assert all(len(one.checks) == 1 for one in ones)
    assert clock.wakes <= 2


def test_work_that_takes_long_is_done_in_slices(clock: Clock) -> None:
    class Slow(One):
        def check(self, now: float) -> float:
            self.clock.now += 0.004
            return super().check(now)

    heap, ones = heap_of(clock), [Slow(clock) for _ in range(30)]
    for one in ones:
        heap.watch(one, 1001.0)
    clock.run(1010)
    assert all(len(one.checks) == 1 for one in ones)
    assert clock.wakes == 10  # three fit into each slice of 10 ms


def test_those_that_are_gone_take_no_memory_for_long(clock: Clock) -> None:
    heap = heap_of(clock)
    stay = [One(clock) for _ in range(10)]
    for one in stay:
        heap.watch(one, 9000.0)
    for _ in range(10_000):
        one = One(clock)
        heap.watch(one, 5000.0)
        heap.forget(one)
    assert heap.size < 1000
    clock.run(9001)
    assert all(len(one.checks) == 1 for one in stay)


def test_first_checks_are_made_in_their_order_and_then_repeated(clock: Clock) -> None:
    heap = heap_of(clock)
    queues: list[dict[Watched, float]] = [{}, {}]
    made: list[tuple[One, float]] = []
    for firsts, seconds in zip(queues, (30.0, 5.0), strict=True):
        heap.add_firsts(firsts)
        for number in range(10):
            one, when = One(clock, clock.now + 100), clock.now + seconds + number
            one.due = firsts[one] = when
            made.append((one, when))
            if when < heap.timer_at:
                heap.wake_at(when)
    gone, early = made.pop(3)[0], made[4][0]
    assert queues[0].pop(gone)
    heap.watch(early, clock.now + 1)
    made[4] = early, clock.now + 1
    clock.run(1200)
    assert clock.timers == []
    assert queues == [{}, {}]
    assert gone.checks == []
    for one, when in made:
        first, second = one.checks
        assert 0 <= first - when <= TIMER_SLACK
        assert 0 <= second - 1100 <= TIMER_SLACK


@pytest.mark.parametrize("idle", [0.0, 1000.0])
def test_repeated_stalls_take_no_memory_for_long(clock: Clock, idle: float) -> None:
    heap = heap_of(clock)
    one = One(clock, *(9000.0 + number * idle for number in range(2000)))
    heap.watch(one, 9000.0)
    for number in range(2000):  # a look is due sooner while it stalls
        heap.watch(one, 1001.0 + number)
        clock.run(1001.5 + number)
    assert len(one.checks) == 2000
    assert heap.size < 1000


@given(data=st.data())
def test_the_right_ones_are_checked_in_any_order(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock()
        patch.setattr(deadlines, "monotonic", lambda: clock.now)
        heap, ones = heap_of(clock), [One(clock) for _ in range(4)]
        due = dict.fromkeys(ones, inf)
        for _ in range(data.draw(st.integers(1, 30))):
            one = data.draw(st.sampled_from(ones))
            move = data.draw(st.sampled_from(["watch", "forget", "wait"]))
            if move == "watch":
                when = clock.now + data.draw(st.integers(0, 50)) / 10
                heap.watch(one, when)
                due[one] = min(due[one], when)
            elif move == "forget":
                heap.forget(one)
                due[one] = inf
            else:
                clock.run(clock.now + data.draw(st.integers(0, 30)) / 10)
                for one in ones:
                    if due[one] + TIMER_SLACK < clock.now:
                        assert one.checks, "it was due and not looked at"
                    for look in one.checks:
                        assert look >= due[one]
                    if one.checks:
                        due[one] = inf
                    one.checks.clear()


# The rules


def policy(heartbeat: float = 0.0, **timeouts: float) -> TimeoutPolicy:
    times = Timeouts(**{"first_byte": 0.0, "idle": 0.0, "write": 0.0, "lifetime": 0.0, **timeouts})
    address = Address("tcp", host="::", port=1)
    listener = Listener(address=address, handler="a:b", timeouts=times, keepalive=Keepalive(heartbeat=heartbeat))
    return TimeoutPolicy(listener, heap_of(Clock()))


SEEN = ConnectionActivity(opened=100.0, has_received=True, last_received=130.0, last_sent=140.0)


@pytest.mark.parametrize(
    ("rules", "seen", "end"),
    [
        (policy(), SEEN, (inf, Ended)),
        (policy(first_byte=10), SEEN._replace(has_received=False), (150, FirstByteTimeout)),
        (policy(first_byte=10), SEEN, (inf, Ended)),
        (policy(idle=20), SEEN, (160, IdleTimeout)),
        (policy(idle=20), SEEN._replace(last_received=150.0), (170, IdleTimeout)),
        (policy(idle=20, first_byte=90), SEEN._replace(has_received=False, last_sent=100.0), (190, FirstByteTimeout)),
        (policy(idle=20), SEEN._replace(has_received=False, last_received=100.0, last_sent=100.0), (120, IdleTimeout)),
        (policy(lifetime=70, idle=900), SEEN, (170, LifetimeOver)),
        (policy(write=5), SEEN, (inf, Ended)),
        (policy(write=5), SEEN._replace(stalled_since=141.0), (146, WriteTimeout)),
        (policy(heartbeat=10), SEEN, (inf, Ended)),
        (policy(heartbeat=10), SEEN._replace(heartbeat_at=141.0), (151, HeartbeatLost)),
        (policy(heartbeat=10), SEEN._replace(heartbeat_at=120.0), (inf, Ended)),
        (policy(heartbeat=10), SEEN._replace(heartbeat_at=inf), (inf, Ended)),
    ],
)
def test_the_earliest_deadline_counts(
    rules: TimeoutPolicy, seen: ConnectionActivity, end: tuple[float, type[Ended]]
) -> None:
    assert rules.deadline(seen) == end


def test_a_heartbeat_comes_once_after_each_silence() -> None:
    rules = policy(heartbeat=10)
    assert rules.next_heartbeat(SEEN) == 140
    assert rules.next_heartbeat(SEEN._replace(heartbeat_at=141.0)) == inf
    assert rules.next_heartbeat(SEEN._replace(heartbeat_at=125.0)) == 140
    assert policy().next_heartbeat(SEEN) == inf


def test_the_first_check_is_at_the_earliest_deadline() -> None:
    assert policy().first_check == 0
    assert policy(write=1).first_check == 0
    assert policy(first_byte=10, idle=5, lifetime=20).first_check == 5
    assert policy(heartbeat=3, lifetime=20).first_check == 3


def test_kernel_activity_has_the_kernels_times() -> None:
    info = TcpInfo(ESTABLISHED, 0, 0, 2500, 1000, 7, 30, 5, 6, 0, 5, 0)
    assert kernel_activity(info, 90.0, 100.0) == ConnectionActivity(90.0, True, 99.0, 97.5)
    # It waited in the backlog longer than it has been here, and has said nothing.
    waited = info._replace(bytes_received=0, last_data_sent=60_000, last_data_received=60_000)
    assert kernel_activity(waited, 90.0, 100.0, stalled_since=95.0) == ConnectionActivity(90.0, False, 90.0, 90.0, 95.0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (LifetimeOver, "it is 80.0 s old"),
        (WriteTimeout, "it has taken nothing of what is unsent for 40.0 s"),
        (FirstByteTimeout, "it has never sent anything, and was sent nothing for 40.0 s"),
        (HeartbeatLost, "it has sent nothing for 50.0 s, also not after its heartbeat"),
        (IdleTimeout, "it was idle for 40.0 s"),
    ],
)
def test_timeout_error_says_why(kind: type[Ended], words: str) -> None:
    error = timeout_error(kind, SEEN._replace(stalled_since=140.0), 180.0)
    assert (type(error), str(error)) == (kind, words)
    assert isinstance(error, ConnectionAbortedError)


def test_the_rules_are_those_of_the_settings() -> None:
    listener = Listener(address=Address("tcp", host="::", port=1), handler="a:b")
    assert TimeoutPolicy(listener, heap_of(Clock())).first_check == 60
    assert TimeoutPolicy(replace(listener, timeouts=Timeouts(first_byte=0)), heap_of(Clock())).first_check == 600
