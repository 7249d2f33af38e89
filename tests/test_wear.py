"""When a worker has served enough: the rule, for any limits and any luck."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.serve.recycling import Wear

MIB = 1 << 20
MUCH = 10**12


@dataclass(frozen=True)
class Limits:
    """As the settings have them."""

    connections: int = 0
    age: float = 0.0
    memory: int = 0
    jitter: float = 0.0


def wear(luck: float = 0.0, **limits: Any) -> Wear:
    return Wear(Limits(**limits), luck)


FRACTIONS = st.floats(0, 1)
COUNTS = st.integers(0, MUCH)
TIMES = st.floats(0, MUCH)


@pytest.mark.parametrize(
    ("limits", "accepted", "age", "memory", "why"),
    [
        ({"connections": 100_000}, 99_999, 1.0, MIB, ""),
        ({"connections": 100_000}, 100_000, 1.0, MIB, "100000 connections, of 100000"),
        ({"connections": 100_000}, 100_003, 1.0, MIB, "100003 connections, of 100000"),
        ({"age": 86400.0}, 5, 86399.9, MIB, ""),
        ({"age": 86400.0}, 5, 86400.7, MIB, "24h old"),
        ({"age": 5000.0}, 5, 5000.0, MIB, "1h23m old"),
        ({"age": 300.0}, 5, 301.0, MIB, "5m1s old"),
        ({"age": 0.2}, 5, 0.3, MIB, "0s old"),
        ({"memory": 500 * MIB}, 5, 1.0, 500 * MIB, ""),
        ({"memory": 500 * MIB}, 5, 1.0, 512 * MIB + 7, "512 MiB of memory"),
        ({"connections": 10, "age": 60.0, "memory": MIB}, 10, 60.0, 2 * MIB, "10 connections, of 10"),
        ({"connections": 10, "age": 60.0, "memory": MIB}, 9, 60.0, 2 * MIB, "1m old"),
        ({"connections": 10, "age": 60.0, "memory": MIB}, 9, 59.0, 2 * MIB, "2 MiB of memory"),
    ],
)
def test_a_worker_is_worn_when_it_has_come_to_a_limit_and_says_which(
    limits: dict[str, Any], accepted: int, age: float, memory: int, why: str
) -> None:
    assert wear(**limits).worn(accepted, age, memory) == why


@given(luck=FRACTIONS, jitter=FRACTIONS, accepted=COUNTS, age=TIMES, memory=COUNTS)
def test_without_limits_nothing_wears(luck: float, jitter: float, accepted: int, age: float, memory: int) -> None:
    boundless = wear(luck, jitter=jitter)
    assert boundless.begin(memory) == ""
    assert boundless.worn(accepted, age, memory) == ""


@given(luck=FRACTIONS, jitter=FRACTIONS, connections=st.integers(1, MUCH), age=st.floats(0.001, MUCH), memory=COUNTS)
def test_luck_lowers_a_limit_by_the_jitter_at_most_and_never_to_none(
    luck: float, jitter: float, connections: int, age: float, memory: int
) -> None:
    found = wear(luck, jitter=jitter, connections=connections, age=age, memory=memory)
    least = 1 - jitter
    assert max(1, int(connections * least)) <= found.connections <= connections
    assert max(age * least, min(age, 1.0)) <= found.age <= age
    assert max(int(memory * least), min(memory, 1)) <= found.memory <= memory


@given(jitter=FRACTIONS, luck=FRACTIONS, more=FRACTIONS, connections=COUNTS, age=TIMES, memory=COUNTS)
def test_with_less_luck_a_worker_goes_no_later(
    jitter: float, luck: float, more: float, connections: int, age: float, memory: int
) -> None:
    limits = {"jitter": jitter, "connections": connections, "age": age, "memory": memory}
    later, sooner = wear(min(luck, more), **limits), wear(max(luck, more), **limits)
    assert sooner.connections <= later.connections
    assert sooner.age <= later.age
    assert sooner.memory <= later.memory


def test_workers_that_are_born_together_go_at_different_times() -> None:
    assert [wear(luck, jitter=0.1, connections=1000).connections for luck in (0.0, 0.5, 1.0)] == [1000, 950, 900]


@given(
    limits=st.builds(Limits, COUNTS, TIMES, COUNTS, FRACTIONS),
    luck=FRACTIONS,
    first=st.tuples(COUNTS, TIMES, COUNTS),
    more=st.tuples(COUNTS, TIMES, COUNTS),
)
def test_who_is_worn_stays_so(
    limits: Limits, luck: float, first: tuple[int, float, int], more: tuple[int, float, int]
) -> None:
    worn = Wear(limits, luck)
    accepted, age, memory = (one + other for one, other in zip(first, more, strict=True))
    if worn.worn(*first):
        assert worn.worn(int(accepted), age, int(memory))


@given(limit=st.integers(1, MUCH), luck=FRACTIONS, jitter=FRACTIONS, memory=COUNTS)
def test_a_limit_of_memory_that_a_fresh_worker_is_over_recycles_nobody(
    limit: int, luck: float, jitter: float, memory: int
) -> None:
    fresh = wear(luck, jitter=jitter, memory=limit)
    over = memory > fresh.memory
    assert bool(fresh.begin(memory)) == over
    assert fresh.worn(0, 0.0, memory) == ""
    assert bool(fresh.worn(0, 0.0, limit + memory + 1)) != over


def test_whoever_has_set_the_limit_too_low_learns_both_numbers_once() -> None:
    fresh = wear(memory=50 * MIB, connections=10)
    assert fresh.begin(61 * MIB) == (
        "recycle.memory is ignored: a worker that has served nobody has 61 MiB of memory, and the limit is 50 MiB"
    )
    assert fresh.begin(61 * MIB) == ""
    assert fresh.worn(10, 0.0, 61 * MIB) == "10 connections, of 10"
