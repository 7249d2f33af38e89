"""When a worker has served enough: the rule, for any limits and any jitter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.serve.worker import RecyclePolicy

MIB = 1 << 20
MUCH = 10**12


@dataclass(frozen=True)
class Limits:
    """As the settings have them."""

    connections: int = 0
    age: float = 0.0
    memory: int = 0
    jitter: float = 0.0


def policy(chance: float = 0.0, **limits: Any) -> RecyclePolicy:
    return RecyclePolicy(Limits(**limits), chance)


FRACTIONS = st.floats(0, 1)
COUNTS = st.integers(0, MUCH)
TIMES = st.floats(0, MUCH)


@pytest.mark.parametrize(
    ("limits", "accepted", "age", "memory", "why"),
    [
        ({"connections": 100_000}, 99_999, 1.0, MIB, ""),
        ({"connections": 100_000}, 100_000, 1.0, MIB, "served 100000 connections (limit 100000)"),
        ({"connections": 100_000}, 100_003, 1.0, MIB, "served 100003 connections (limit 100000)"),
        ({"age": 86400.0}, 5, 86399.9, MIB, ""),
        ({"age": 86400.0}, 5, 86400.7, MIB, "24h old"),
        ({"age": 5000.0}, 5, 5000.0, MIB, "1h23m old"),
        ({"age": 300.0}, 5, 301.0, MIB, "5m1s old"),
        ({"age": 0.2}, 5, 0.3, MIB, "0s old"),
        ({"memory": 500 * MIB}, 5, 1.0, 500 * MIB, ""),
        ({"memory": 500 * MIB}, 5, 1.0, 512 * MIB + 7, "512 MiB of memory"),
        ({"connections": 10, "age": 60.0, "memory": MIB}, 10, 60.0, 2 * MIB, "served 10 connections (limit 10)"),
        ({"connections": 10, "age": 60.0, "memory": MIB}, 9, 60.0, 2 * MIB, "1m old"),
        ({"connections": 10, "age": 60.0, "memory": MIB}, 9, 59.0, 2 * MIB, "2 MiB of memory"),
    ],
)
def test_a_limit_that_is_reached_is_named(
    limits: dict[str, Any], accepted: int, age: float, memory: int, why: str
) -> None:
    assert policy(**limits).reached(accepted, age, memory) == why


@given(chance=FRACTIONS, jitter=FRACTIONS, accepted=COUNTS, age=TIMES, memory=COUNTS)
def test_without_limits_none_is_reached(chance: float, jitter: float, accepted: int, age: float, memory: int) -> None:
    boundless = policy(chance, jitter=jitter)
    assert boundless.check_start(memory) == ""
    assert boundless.reached(accepted, age, memory) == ""


@given(chance=FRACTIONS, jitter=FRACTIONS, connections=st.integers(1, MUCH), age=st.floats(0.001, MUCH), memory=COUNTS)
def test_jitter_lowers_a_limit_by_its_fraction_at_most(
    chance: float, jitter: float, connections: int, age: float, memory: int
) -> None:
    found = policy(chance, jitter=jitter, connections=connections, age=age, memory=memory)
    least = 1 - jitter
    assert max(1, int(connections * least)) <= found.connections <= connections
    assert max(age * least, min(age, 1.0)) <= found.age <= age
    assert max(int(memory * least), min(memory, 1)) <= found.memory <= memory


@given(jitter=FRACTIONS, chance=FRACTIONS, more=FRACTIONS, connections=COUNTS, age=TIMES, memory=COUNTS)
def test_a_greater_chance_recycles_no_later(
    jitter: float, chance: float, more: float, connections: int, age: float, memory: int
) -> None:
    limits = {"jitter": jitter, "connections": connections, "age": age, "memory": memory}
    later, sooner = policy(min(chance, more), **limits), policy(max(chance, more), **limits)
    assert sooner.connections <= later.connections
    assert sooner.age <= later.age
    assert sooner.memory <= later.memory


def test_workers_started_together_are_recycled_apart() -> None:
    assert [policy(chance, jitter=0.1, connections=1000).connections for chance in (0.0, 0.5, 1.0)] == [1000, 950, 900]


@given(
    limits=st.builds(Limits, COUNTS, TIMES, COUNTS, FRACTIONS),
    chance=FRACTIONS,
    first=st.tuples(COUNTS, TIMES, COUNTS),
    more=st.tuples(COUNTS, TIMES, COUNTS),
)
def test_a_limit_that_is_reached_stays_so(
    limits: Limits, chance: float, first: tuple[int, float, int], more: tuple[int, float, int]
) -> None:
    recycling = RecyclePolicy(limits, chance)
    accepted, age, memory = (one + other for one, other in zip(first, more, strict=True))
    if recycling.reached(*first):
        assert recycling.reached(int(accepted), age, int(memory))


@given(limit=st.integers(1, MUCH), chance=FRACTIONS, jitter=FRACTIONS, memory=COUNTS)
def test_a_memory_limit_below_a_new_workers_is_dropped(limit: int, chance: float, jitter: float, memory: int) -> None:
    fresh = policy(chance, jitter=jitter, memory=limit)
    over = memory > fresh.memory
    assert bool(fresh.check_start(memory)) == over
    assert fresh.reached(0, 0.0, memory) == ""
    assert bool(fresh.reached(0, 0.0, limit + memory + 1)) != over


def test_a_memory_limit_that_is_too_low_is_told_once() -> None:
    fresh = policy(memory=50 * MIB, connections=10)
    assert fresh.check_start(61 * MIB) == (
        "recycle.memory is ignored: a worker without clients has 61 MiB of memory, and the limit is 50 MiB"
    )
    assert fresh.check_start(61 * MIB) == ""
    assert fresh.reached(10, 0.0, 61 * MIB) == "served 10 connections (limit 10)"
