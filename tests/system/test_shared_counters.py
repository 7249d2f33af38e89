"""Counters of several workers: never more than a limit, also when they claim at once, and nothing is left over."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from time import monotonic, monotonic_ns

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.compiled import load
from forkd.system import shared_counters
from forkd.system.scoreboard import ACCEPT_TIMES_SIZE, COUNTERS_SIZE, Row, Scoreboard
from forkd.system.shared_counters import CurrentCounts, RateCounts, SharedCounters, twins
from tests.support.forked import exit_code, start_child
from tests.support.needs import needs_compiled_twin
from tests.support.processes import DEADLINE

KEYS = st.sampled_from([1, -1, 7, 1 << 62, -(1 << 63), (1 << 63) - 1, 257, 257 << 32])
SMALL = 98  # cells of a table of six sets: more keys than it can hold are drawn soon


@pytest.fixture(params=["pure", "compiled"], scope="module", autouse=True)
def _twin(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test is of both twins."""
    if request.param == "compiled":
        needs_compiled_twin()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_counters, "FAST", load()[0]["forkd.system._fast"] if request.param == "compiled" else None)
        yield


def current(board: Scoreboard, row: int, first: int, end: int) -> CurrentCounts:
    return twins(shared_counters.FAST)[0](board, row, first, end)


def rates(board: Scoreboard, row: int, first: int, end: int, *clock: Callable[[], int]) -> RateCounts:
    return twins(shared_counters.FAST)[1](board, row, first, end, *clock)


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    made = Scoreboard(8)
    yield made
    os.close(made.descriptor)
    os.close(made.regions.descriptor)


def own(board: Scoreboard) -> int:
    """A row whose region this process can write beside those of other rows: all workers of a test are one process."""
    row = board.claim().index
    board.regions.map_writable(row)
    return row


def cells(board: Scoreboard, row: int) -> memoryview:
    """The cells of a row's shared counters."""
    return board.regions.view(row)[ACCEPT_TIMES_SIZE : ACCEPT_TIMES_SIZE + COUNTERS_SIZE].cast("q")


def in_children(board: Scoreboard, count: int, work: Callable[[int], int]) -> list[int]:
    """What as many processes return, each confined to a row of its own, which all begin at the same time."""
    rows = [board.claim() for _ in range(count)]
    gate, opened = os.pipe()

    def begin(row: Row) -> int:
        os.close(opened)
        board.confine(row)
        os.read(gate, 1)
        return work(row.index)

    children = [start_child(partial(begin, row)) for row in rows]
    os.close(gate)
    os.close(opened)  # end of file is the signal
    return [exit_code(child) for child in children]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), KEYS), max_size=150))
def test_current_counts_are_those_of_a_dictionary(steps: list[tuple[bool, int, int]]) -> None:
    board = Scoreboard(3)
    tables = [current(board, own(board), 0, SMALL) for _ in range(3)]
    held = [Counter[int]() for _ in tables]
    try:
        for takes, number, key in steps:
            there = sum(one[key] for one in held)
            if takes:
                taken = tables[number].claim(key, 4)
                assert taken == (there < 4)
                held[number][key] += taken
            elif held[number][key]:
                tables[number].release(key)
                held[number][key] -= 1
            assert {table.total(key) for table in tables} == {sum(one[key] for one in held)}
        for table, of in zip(tables, held, strict=True):
            for key in of.elements():
                table.release(key)
        assert not any(any(cells(board, row)) for row in range(len(tables)))
    finally:
        os.close(board.descriptor)
        os.close(board.regions.descriptor)


def test_full_table_claims_nothing_and_forgets_no_key(board: Scoreboard) -> None:
    table = current(board, own(board), 0, SMALL)
    keys = [random.getrandbits(63) + 1 for _ in range(400)]
    held = [key for key in keys if table.claim(key, 1)]
    assert 30 < len(held) <= 48
    assert all(table.total(key) == 1 for key in held)
    assert not any(table.claim(key, 1) for key in held)
    for key in held:
        table.release(key)
    assert len([key for key in keys if table.claim(key, 1)]) > 30


def test_table_of_addresses_holds_ten_thousand(board: Scoreboard) -> None:
    table = SharedCounters(board, own(board)).by_address
    keys = random.Random(4)
    assert all(table.claim(keys.getrandbits(63) + 1, 1) for _ in range(10_000))


def test_processes_claiming_at_once_stay_within_the_limit(board: Scoreboard) -> None:
    """Each claim that succeeds takes a token out of a pipe, which has as many as the limit: there is always one.

    The processes claim for half a second, and on until each has succeeded 50 times: one that is not scheduled while the
    others hold their tokens may need longer on a busy machine.
    """
    tokens, back = os.pipe()
    os.set_blocking(tokens, False)
    os.write(back, b"ttt")

    def work(row: int) -> int:
        table = current(board, row, 0, 1024)
        until, lacking, claims = monotonic() + 0.5, 0, 0
        while (now := monotonic()) < until or (claims < 50 and now < until + DEADLINE):
            if not table.claim(5, 3):
                os.sched_yield()  # to those that hold a token, which wait for a processor too
            else:
                claims += 1
                try:
                    token = os.read(tokens, 1)
                    os.sched_yield()  # for others to claim meanwhile
                    os.write(back, token)
                except BlockingIOError:
                    lacking += 1
                table.release(5)
        return lacking if claims >= 50 else 100

    try:
        assert in_children(board, 4, work) == [0, 0, 0, 0]
        assert current(board, board.claim().index, 0, 1024).total(5) == 0
    finally:
        os.close(tokens)
        os.close(back)


def test_processes_wanting_more_than_the_limit_get_all_of_it(board: Scoreboard) -> None:
    """The claims of one round collide, as all begin together; in the end every slot is in use."""

    def work(row: int) -> int:
        table = current(board, row, 0, 1024)
        return sum(table.claim(9, 10) for _ in range(40))

    assert sum(in_children(board, 4, work)) == 10


def test_workers_of_both_twins_count_together(board: Scoreboard) -> None:
    """As while an upgrade replaces those of the one by those of the other."""
    needs_compiled_twin()
    both = [twins(None), twins(load()[0]["forkd.system._fast"])]
    tables = [kind[0](board, own(board), 0, SMALL) for kind in both]
    rings = [kind[1](board, own(board), 0, 1024) for kind in both]
    for key in (5, -5, 1 << 40, -(1 << 40)):
        assert [tables[number].claim(key, 3) for number in (0, 1, 0, 1, 0)] == [True, True, True, False, False]
        assert [rings[number].claim(key, 3, 86400) for number in (0, 1, 1, 0, 1)] == [True, True, True, False, False]
        tables[0].release(key)
        assert tables[1].claim(key, 3)


def test_row_that_is_cleared_frees_what_its_worker_had(board: Scoreboard) -> None:
    assert in_children(board, 1, lambda row: SharedCounters(board, row).by_listener.claim(3, 1)) == [1]
    places = SharedCounters(board, own(board)).by_listener
    assert not places.claim(3, 1)
    board.row(0).clear()
    assert places.claim(3, 1)


def test_row_of_nonsense_neither_adds_nor_takes_counts(board: Scoreboard) -> None:
    liar, table = own(board), current(board, own(board), 0, SMALL)
    for cell in range(SMALL):
        cells(board, liar)[cell] = -(1 << 60)
    assert table.claim(5, 1)
    assert not table.claim(5, 1)


class Clock:
    """A clock that the test moves, in nanoseconds."""

    def __init__(self) -> None:
        self.now = monotonic_ns()

    def __call__(self) -> int:
        return self.now


@pytest.mark.parametrize("seconds", [1, 60, 86400])
def test_rate_allows_no_more_in_any_time_and_nearly_as_many(board: Scoreboard, seconds: int) -> None:
    clock, length = Clock(), seconds * 10**9
    tables = [rates(board, own(board), 0, 1024, clock) for _ in range(3)]
    came: list[int] = []
    start = clock.now
    for _ in range(2000):
        clock.now += random.randrange(length // 50)
        if random.choice(tables).claim(8, 10, seconds):
            came.append(clock.now)
    assert all(later - first > length for first, later in zip(came, came[10:], strict=False))
    assert len(came) > 10 * 5 / 7 * (clock.now - start) / length


def test_rate_is_shared_by_processes_that_claim_at_once(board: Scoreboard) -> None:
    def work(row: int) -> int:
        table = rates(board, row, 0, 4096)
        return sum(table.claim(4, 25, 86400) for _ in range(100))

    assert sum(in_children(board, 4, work)) == 25


def test_full_table_of_rates_lets_new_keys_in_and_keeps_known(board: Scoreboard) -> None:
    clock = Clock()
    table = rates(board, own(board), 0, 129, clock)
    assert table.claim(1, 1, 60)
    assert all(table.claim(random.getrandbits(63), 1, 60) for _ in range(200))
    assert not table.claim(1, 1, 60)
    assert sum(table.claim(random.getrandbits(63), 1, 60) for _ in range(1000)) < 200  # together as of so many keys
    clock.now += 121 * 10**9
    assert table.claim(2, 1, 60)
    assert not table.claim(2, 1, 60)


def test_secret_is_part_of_the_scoreboards_memory(board: Scoreboard) -> None:
    again = Scoreboard(8, os.dup(board.descriptor), os.dup(board.regions.descriptor))
    other = Scoreboard(8)
    assert board.secret == again.secret != other.secret
    assert len(board.secret) == 16
    for one in (again, other):
        os.close(one.descriptor)
        os.close(one.regions.descriptor)


@pytest.mark.parametrize("value", [0, -1, 1, -(1 << 63), (1 << 63) - 1])
def test_counters_survive_any_content_of_the_memory(board: Scoreboard, value: int) -> None:
    counters = SharedCounters(board, own(board))
    other = own(board)
    for _ in range(3):
        taken = [key for key in range(20) if counters.by_address.claim(key, 5)]
        for row in (0, other):
            cells(board, row)[:] = memoryview(bytearray(value.to_bytes(8, "little", signed=True) * (1 << 16))).cast("q")
        for key in range(20):
            assert isinstance(counters.by_address.total(key), int)
            counters.rates.claim(key, 3, 60)
            counters.by_listener.claim(key, 3)
        for key in taken:
            counters.by_address.release(key)


def test_scoreboard_has_no_more_rows_than_there_are(board: Scoreboard) -> None:
    for value in (-1, 1 << 62):
        board._header[0] = value
        assert len(board.rows()) in (0, board.capacity)
        assert board.used in (0, board.capacity)
