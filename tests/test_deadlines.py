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
from forkd.serve.deadlines import GRAIN, Deadlines, Patience, Sighting, explained, sighting_of
from forkd.system.tcp_info import ESTABLISHED, TcpInfo


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
        self.looks: list[float] = []

    def look(self, now: float) -> float:
        self.looks.append(now)
        return self.again.pop(0) if self.again else 0.0

    def __lt__(self, other: object) -> bool:
        return id(self) < id(other)


def heap_of(clock: Any) -> Deadlines:
    loop: asyncio.AbstractEventLoop = clock
    return Deadlines(loop)


def test_each_is_looked_at_when_it_is_due_and_not_much_later(clock: Clock) -> None:
    heap, ones = heap_of(clock), [One(clock) for _ in range(20)]
    for number, one in enumerate(ones):
        heap.watch(one, 1001.0 + number * 7 % 20)
    clock.run(1030)
    for number, one in enumerate(ones):
        assert len(one.looks) == 1
        assert 0 <= one.looks[0] - (1001.0 + number * 7 % 20) <= GRAIN
    assert clock.timers == []


def test_who_wants_another_look_gets_it(clock: Clock) -> None:
    heap, one = heap_of(clock), One(clock, 1005.0, 1006.0)
    heap.watch(one, 1001.0)
    clock.run(1020)
    assert [round(look) for look in one.looks] == [1001, 1005, 1006]


def test_the_earlier_look_counts(clock: Clock) -> None:
    heap, one, other = heap_of(clock), One(clock), One(clock)
    heap.watch(one, 1010.0)
    heap.watch(one, 1002.0)
    heap.watch(other, 1003.0)
    heap.watch(other, 1012.0)
    clock.run(1030)
    assert [round(look) for look in one.looks + other.looks] == [1002, 1003]


def test_who_is_forgotten_is_not_looked_at_and_wakes_nobody(clock: Clock) -> None:
    heap, one = heap_of(clock), One(clock)
    for _ in range(3):
        heap.watch(one, 1005.0)
        heap.forget(one)
        heap.forget(one)
    clock.run(1030)
    assert one.looks == []


def test_many_of_one_moment_take_one_wake_up(clock: Clock) -> None:
    heap, ones = heap_of(clock), [One(clock) for _ in range(500)]
    for number, one in enumerate(ones):
        heap.watch(one, 1002.0 + number * GRAIN / 500)
    clock.run(1001.9)
    assert clock.wakes == 0
    clock.run(1010)
    assert all(len(one.looks) == 1 for one in ones)
    assert clock.wakes <= 2


def test_work_that_takes_long_is_done_in_slices(clock: Clock) -> None:
    class Slow(One):
        def look(self, now: float) -> float:
            self.clock.now += 0.004
            return super().look(now)

    heap, ones = heap_of(clock), [Slow(clock) for _ in range(30)]
    for one in ones:
        heap.watch(one, 1001.0)
    clock.run(1010)
    assert all(len(one.looks) == 1 for one in ones)
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
    assert len(heap._heap) < 1000
    clock.run(9001)
    assert all(len(one.looks) == 1 for one in stay)


@pytest.mark.parametrize("idle", [0.0, 1000.0])
def test_one_that_stalls_again_and_again_takes_no_memory_for_long(clock: Clock, idle: float) -> None:
    heap = heap_of(clock)
    one = One(clock, *(9000.0 + number * idle for number in range(2000)))
    heap.watch(one, 9000.0)
    for number in range(2000):  # a look is due sooner while it stalls
        heap.watch(one, 1001.0 + number)
        clock.run(1001.5 + number)
    assert len(one.looks) == 2000
    assert len(heap._heap) < 1000


@given(data=st.data())
def test_whatever_is_watched_and_forgotten_the_right_ones_are_looked_at(data: st.DataObject) -> None:
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
                    if due[one] + GRAIN < clock.now:
                        assert one.looks, "it was due and not looked at"
                    for look in one.looks:
                        assert look >= due[one]
                    if one.looks:
                        due[one] = inf
                    one.looks.clear()


# The rules


def patience(heartbeat: float = 0.0, **timeouts: float) -> Patience:
    times = Timeouts(**{"first_byte": 0.0, "idle": 0.0, "write": 0.0, "lifetime": 0.0, **timeouts})
    address = Address("tcp", host="::", port=1)
    listener = Listener(address=address, handler="a:b", timeouts=times, keepalive=Keepalive(heartbeat=heartbeat))
    return Patience(listener, heap_of(Clock()))


SEEN = Sighting(opened=100.0, spoke=True, heard=130.0, told=140.0)


@pytest.mark.parametrize(
    ("rules", "seen", "end"),
    [
        (patience(), SEEN, (inf, Ended)),
        (patience(first_byte=10), SEEN._replace(spoke=False), (150, FirstByteTimeout)),
        (patience(first_byte=10), SEEN, (inf, Ended)),
        (patience(idle=20), SEEN, (160, IdleTimeout)),
        (patience(idle=20), SEEN._replace(heard=150.0), (170, IdleTimeout)),
        (patience(idle=20, first_byte=90), SEEN._replace(spoke=False, told=100.0), (190, FirstByteTimeout)),
        (patience(idle=20), SEEN._replace(spoke=False, heard=100.0, told=100.0), (120, IdleTimeout)),
        (patience(lifetime=70, idle=900), SEEN, (170, LifetimeOver)),
        (patience(write=5), SEEN, (inf, Ended)),
        (patience(write=5), SEEN._replace(stuck=141.0), (146, WriteTimeout)),
        (patience(heartbeat=10), SEEN, (inf, Ended)),
        (patience(heartbeat=10), SEEN._replace(asked=141.0), (151, HeartbeatLost)),
        (patience(heartbeat=10), SEEN._replace(asked=120.0), (inf, Ended)),
        (patience(heartbeat=10), SEEN._replace(asked=inf), (inf, Ended)),
    ],
)
def test_the_earliest_deadline_counts(rules: Patience, seen: Sighting, end: tuple[float, type[Ended]]) -> None:
    assert rules.end(seen) == end


def test_a_client_is_asked_after_a_silence_and_once_for_each() -> None:
    rules = patience(heartbeat=10)
    assert rules.heartbeat(SEEN) == 140
    assert rules.heartbeat(SEEN._replace(asked=141.0)) == inf
    assert rules.heartbeat(SEEN._replace(asked=125.0)) == 140
    assert patience().heartbeat(SEEN) == inf


def test_the_first_look_is_at_the_earliest_that_can_end_it() -> None:
    assert patience().first == 0
    assert patience(write=1).first == 0
    assert patience(first_byte=10, idle=5, lifetime=20).first == 5
    assert patience(heartbeat=3, lifetime=20).first == 3


def test_the_kernels_times_make_a_sighting() -> None:
    info = TcpInfo(ESTABLISHED, 0, 0, 2500, 1000, 7, 30, 5, 6, 0, 5, 0)
    assert sighting_of(info, 90.0, 100.0) == Sighting(90.0, True, 99.0, 97.5)
    # It waited in the backlog longer than it has been here, and has said nothing.
    waited = info._replace(bytes_received=0, last_data_sent=60_000, last_data_received=60_000)
    assert sighting_of(waited, 90.0, 100.0, stuck=95.0) == Sighting(90.0, False, 90.0, 90.0, 95.0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (LifetimeOver, "it is 80.0 s old"),
        (WriteTimeout, "it has taken nothing of what waits for it for 40.0 s"),
        (FirstByteTimeout, "it has never said anything, and was told nothing for 40.0 s"),
        (HeartbeatLost, "it has said nothing for 50.0 s, nor to its heartbeat"),
        (IdleTimeout, "it was idle for 40.0 s"),
    ],
)
def test_an_end_says_what_it_was_for(kind: type[Ended], words: str) -> None:
    error = explained(kind, SEEN._replace(stuck=140.0), 180.0)
    assert (type(error), str(error)) == (kind, words)
    assert isinstance(error, ConnectionAbortedError)


def test_the_rules_are_those_of_the_settings() -> None:
    listener = Listener(address=Address("tcp", host="::", port=1), handler="a:b")
    assert Patience(listener, heap_of(Clock())).first == 60
    assert Patience(replace(listener, timeouts=Timeouts(first_byte=0)), heap_of(Clock())).first == 600
