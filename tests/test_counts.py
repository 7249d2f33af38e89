"""What workers count together: never more than a limit, whoever claims at the same time, and nothing is left over."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from time import monotonic, monotonic_ns

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.system import counts
from forkd.system.counts import Counts, Ledger, Windows
from forkd.system.memory import WRITE
from forkd.system.scoreboard import Scoreboard

KEYS = st.sampled_from([1, -1, 7, 1 << 62, -(1 << 63), (1 << 63) - 1, 257, 257 << 32])
SMALL = 98  # cells of a table of six sets: more keys than it can hold are drawn soon


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    made = Scoreboard(8)
    yield made
    os.close(made.descriptor)
    os.close(made.regions.descriptor)


def own(board: Scoreboard) -> int:
    """A row whose region this process can write, though it is the one of others too: all workers of a test in one."""
    row = board.claim().index
    board.regions._views[row] = board.regions._map(row, WRITE)
    return row


def in_children(board: Scoreboard, count: int, work: Callable[[int], int]) -> list[int]:
    """What as many processes return, each confined to a row of its own, which all begin at the same time."""
    rows = [board.claim() for _ in range(count)]
    gate, opened = os.pipe()
    children = []
    for row in rows:
        child = os.fork()
        if child == 0:
            status = 255
            try:
                os.close(opened)
                board.confine(row)
                os.read(gate, 1)
                status = work(row.index)
            finally:
                os._exit(status)
        children.append(child)
    os.close(gate)
    os.close(opened)  # end of file is the signal
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 2), KEYS), max_size=150))
def test_counts_are_those_of_a_dictionary(steps: list[tuple[bool, int, int]]) -> None:
    board = Scoreboard(3)
    tables = [Counts(board, own(board), 0, SMALL) for _ in range(3)]
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
        assert all(not any(table._own[at] for at in range(SMALL)) for table in tables)
    finally:
        os.close(board.descriptor)
        os.close(board.regions.descriptor)


def test_a_full_table_gives_no_place_and_forgets_nobody_who_has_one(board: Scoreboard) -> None:
    table = Counts(board, own(board), 0, SMALL)
    keys = [random.getrandbits(63) + 1 for _ in range(400)]
    held = [key for key in keys if table.claim(key, 1)]
    assert 30 < len(held) <= 48
    assert all(table.total(key) == 1 for key in held)
    assert not any(table.claim(key, 1) for key in held)
    for key in held:
        table.release(key)
    assert len([key for key in keys if table.claim(key, 1)]) > 30


def test_a_ledgers_table_of_addresses_holds_as_many_as_it_says(board: Scoreboard) -> None:
    table = Ledger(board, own(board)).addresses
    keys = random.Random(4)
    assert all(table.claim(keys.getrandbits(63) + 1, 1) for _ in range(10_000))


def test_processes_that_claim_at_once_never_have_more_than_the_limit_and_leave_nothing(board: Scoreboard) -> None:
    """Whoever has a place takes a token out of a pipe, which has as many as there are places: there is always one."""
    tokens, back = os.pipe()
    os.set_blocking(tokens, False)
    os.write(back, b"ttt")

    def work(row: int) -> int:
        table = Counts(board, row, 0, 1024)
        until, lacking, claims = monotonic() + 0.5, 0, 0
        while monotonic() < until:
            if table.claim(5, 3):
                claims += 1
                try:
                    token = os.read(tokens, 1)
                    os.sched_yield()  # for others to claim meanwhile
                    os.write(back, token)
                except BlockingIOError:
                    lacking += 1
                table.release(5)
        return lacking if claims > 50 else 100

    try:
        assert in_children(board, 4, work) == [0, 0, 0, 0]
        assert Counts(board, board.claim().index, 0, 1024).total(5) == 0
    finally:
        os.close(tokens)
        os.close(back)


def test_of_processes_that_want_more_than_there_is_just_as_many_have_it(board: Scoreboard) -> None:
    """The claims of one round collide, as all begin together; in the end there is no place that nobody has."""

    def work(row: int) -> int:
        table = Counts(board, row, 0, 1024)
        return sum(table.claim(9, 10) for _ in range(40))

    assert sum(in_children(board, 4, work)) == 10


def test_what_a_dead_worker_had_is_free_when_its_row_is_cleared(board: Scoreboard) -> None:
    assert in_children(board, 1, lambda row: Ledger(board, row).places.claim(3, 1)) == [1]
    places = Ledger(board, own(board)).places
    assert not places.claim(3, 1)
    board.row(0).clear()
    assert places.claim(3, 1)


def test_a_row_of_nonsense_makes_no_places_and_harms_nobody(board: Scoreboard) -> None:
    liar, table = Counts(board, own(board), 0, SMALL), Counts(board, own(board), 0, SMALL)
    for cell in range(SMALL):
        liar._own[cell] = -(1 << 60)
    assert table.claim(5, 1)
    assert not table.claim(5, 1)


class Clock:
    """A clock that the test moves, in nanoseconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = monotonic_ns()
        monkeypatch.setattr(counts, "monotonic_ns", lambda: self.now)


@pytest.mark.parametrize("seconds", [1, 60, 86400])
def test_no_more_come_in_any_time_than_a_window_allows_and_nearly_as_many_do(
    board: Scoreboard, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    clock, length = Clock(monkeypatch), seconds * 10**9
    tables = [Windows(board, own(board), 0, 1024) for _ in range(3)]
    came: list[int] = []
    start = clock.now
    for _ in range(2000):
        clock.now += random.randrange(length // 50)
        if random.choice(tables).claim(8, 10, seconds):
            came.append(clock.now)
    assert all(later - first > length for first, later in zip(came, came[10:], strict=False))
    assert len(came) > 10 * 5 / 7 * (clock.now - start) / length


def test_a_window_is_shared_by_processes_that_come_at_once(board: Scoreboard) -> None:
    def work(row: int) -> int:
        table = Windows(board, row, 0, 4096)
        return sum(table.claim(4, 25, 86400) for _ in range(100))

    assert sum(in_children(board, 4, work)) == 25


def test_a_full_table_of_windows_lets_strangers_in_and_knows_who_it_knew(
    board: Scoreboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    table = Windows(board, own(board), 0, 129)
    assert table.claim(1, 1, 60)
    assert all(table.claim(random.getrandbits(63), 1, 60) for _ in range(200))
    assert not table.claim(1, 1, 60)
    clock.now += 121 * 10**9
    assert table.claim(2, 1, 60)
    assert not table.claim(2, 1, 60)


def test_keys_are_hashed_with_a_secret_that_is_part_of_the_scoreboard(board: Scoreboard) -> None:
    again = Scoreboard(8, os.dup(board.descriptor), os.dup(board.regions.descriptor))
    other = Scoreboard(8)
    assert board.secret == again.secret != other.secret
    assert len(board.secret) == 16
    for one in (again, other):
        os.close(one.descriptor)
        os.close(one.regions.descriptor)
