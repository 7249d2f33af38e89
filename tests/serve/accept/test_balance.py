"""Which worker takes the next client: the rules one by one, and what they come to among several workers.

The simulated workers are as stubborn as they may be: of those that may take a client, any may be the one that does.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.serve.accept.balance import FRACTION, SLACK, is_fair, least_load, next_try

BEAT = 1_000_000_000
NOW = 50 * BEAT
NOBODY_ALIVE = 1 << 62


EDGE = SLACK << FRACTION  # from this load on the fraction counts


@pytest.mark.parametrize(
    ("least", "ahead"),
    [
        (0, SLACK),
        (5, SLACK),
        (EDGE - 1, SLACK),
        (EDGE, SLACK),
        (EDGE + (1 << FRACTION) - 1, SLACK),
        (EDGE + (1 << FRACTION), SLACK + 1),
        (10 * EDGE, 10 * SLACK),
    ],
)
def test_is_fair_up_to_the_slack_or_the_fraction(least: int, ahead: int) -> None:
    assert is_fair(0, least)
    assert is_fair(least, least)
    assert is_fair(least + ahead, least)
    assert not is_fair(least + ahead + 1, least)


def test_is_fair_to_a_twentieth_at_a_hundred_clients() -> None:
    assert not is_fair(107, 100)


@pytest.mark.parametrize(
    ("rows", "least"),
    [
        ([(4, NOW)], 4),
        ([(4, NOW), (2, NOW), (9, NOW)], 2),
        ([(4, NOW), (0, NOW - 3 * BEAT)], 4),
        ([(4, NOW), (0, NOW - 2 * BEAT)], 0),  # its heartbeat is late, and may yet come
        ([(4, NOW), (0, NOW - 5 * BEAT // 2)], 4),
        ([(4, NOW), (0, NOW - 5 * BEAT // 2 + 1)], 0),
        ([(4, NOW), (0, 0)], 4),  # has not beaten yet
        ([(4, NOW), (NOBODY_ALIVE, NOW)], 4),
    ],
)
def test_the_least_load_is_that_of_the_living(rows: list[tuple[int, int]], least: int) -> None:
    assert least_load(iter(rows), NOW, BEAT) == least


@pytest.mark.parametrize("rows", [[], [(0, 0)], [(3, NOW - 9 * BEAT), (0, 1)]])
@pytest.mark.parametrize("mine", [0, 1, 100_000])
def test_is_fair_where_no_worker_is_alive(rows: list[tuple[int, int]], mine: int) -> None:
    assert is_fair(mine, least_load(rows, NOW, BEAT))


def test_next_try_grows_from_milliseconds_to_a_heartbeat() -> None:
    waits = [next_try(0.0, 1.0)]
    while waits[-1] < 1.0:
        waits.append(next_try(waits[-1], 1.0))
    assert waits[:3] == [0.005, 0.010, 0.020]
    assert len(waits) == 9
    assert next_try(waits[-1], 1.0) == 1.0


@settings(derandomize=True, deadline=None)
@given(waited=st.floats(0, 100), beat=st.floats(0.01, 10))
def test_next_try_is_no_sooner_and_within_a_heartbeat(waited: float, beat: float) -> None:
    wait = next_try(waited, beat)
    assert 0.005 <= wait <= beat
    assert wait >= min(waited, beat)


def ahead(least: int) -> int:
    """By how many connections a worker may at most be ahead when it takes one more."""
    return max(SLACK, least // (1 << FRACTION))


class Workers:
    """Workers as their rows show them: loads, and since when each has not beaten."""

    def __init__(self, loads: Sequence[int]) -> None:
        self.loads = list(loads)
        self.seen = [NOW] * len(self.loads)

    def least(self) -> int:
        return least_load(zip(self.loads, self.seen, strict=True), NOW, BEAT)

    def willing(self) -> list[int]:
        """Those that live and may take one more, the fullest first."""
        least = self.least()
        alive = [number for number, seen in enumerate(self.seen) if seen == NOW]
        return sorted((n for n in alive if is_fair(self.loads[n], least)), key=lambda n: -self.loads[n])

    def stop(self, number: int) -> None:
        """This one stands still from now on."""
        self.seen[number] = NOW - 3 * BEAT


LOADS = st.lists(st.integers(0, 400), min_size=1, max_size=8)


@settings(derandomize=True, deadline=None)
@given(loads=LOADS, choices=st.lists(st.integers(0, 7), min_size=1, max_size=300), fullest=st.booleans())
def test_fullest_worker_stays_near_the_least_loaded(loads: list[int], choices: list[int], fullest: bool) -> None:
    workers = Workers(loads)
    for choice in choices:
        before = list(workers.loads)
        willing = workers.willing()
        taker = willing[0 if fullest else choice % len(willing)]
        workers.loads[taker] += 1
        assert workers.loads[taker] - 1 - min(before) <= ahead(min(before))
        assert max(workers.loads) <= max(*before, min(before) + ahead(min(before)) + 1)


@pytest.mark.parametrize("count", [2, 4, 7])
def test_uneven_loads_are_made_even_by_new_clients(count: int) -> None:
    workers = Workers([200] + [0] * (count - 1))
    for _ in range(400 * count):
        workers.loads[workers.willing()[0]] += 1
    least = min(workers.loads)
    assert max(workers.loads) <= least + ahead(least) + 1


@settings(derandomize=True, deadline=None)
@given(
    loads=LOADS,
    steps=st.lists(st.tuples(st.sampled_from(["come", "go", "stop", "return"]), st.integers(0, 7)), max_size=100),
)
def test_some_live_worker_may_always_take_a_client(loads: list[int], steps: list[tuple[str, int]]) -> None:
    workers = Workers(loads)
    for step, choice in steps:
        number = choice % len(loads)
        match step:
            case "come" if willing := workers.willing():
                workers.loads[willing[choice % len(willing)]] += 1
            case "go":
                workers.loads[number] = max(0, workers.loads[number] - 1)
            case "stop":
                workers.stop(number)
            case "return":
                workers.seen[number] = NOW
        alive = [n for n, seen in enumerate(workers.seen) if seen == NOW]
        if alive:
            emptiest = min(alive, key=workers.loads.__getitem__)
            assert emptiest in workers.willing()
        else:  # the first that wakes up sees no one else, and takes what there is
            assert is_fair(max(workers.loads), workers.least())


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_stalled_worker_does_not_hold_up_the_others(count: int) -> None:
    workers = Workers([0] * count)
    workers.stop(0)
    for _ in range(100 * count):
        willing = workers.willing()
        assert willing
        workers.loads[willing[0]] += 1
    assert workers.loads[0] == 0
    assert max(workers.loads) - min(workers.loads[1:]) <= ahead(min(workers.loads[1:])) + 1
