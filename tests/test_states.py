"""The state machines and the signals: the tables are total, and say what they are to say at the turns that matter."""

from __future__ import annotations

import signal
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd import signals
from forkd.signals import MASTER, Order
from forkd.states import LIVES, MODES, Event, Life, Mode, Turn, next_life, next_mode


@pytest.mark.parametrize(("table", "states", "events"), [(MODES, Mode, Event), (LIVES, Life, Turn)])
def test_a_table_has_every_pair_and_no_other(table: dict[Any, Any], states: type[Enum], events: type[Enum]) -> None:
    assert set(table) == set(states)
    assert [state for state, row in table.items() if set(row) != set(events)] == []
    assert {found for row in table.values() for found in row.values()} - {None} <= set(states)


@pytest.mark.parametrize(
    ("events", "mode"),
    [
        ([], Mode.STARTING),
        ([Event.ALL_READY], Mode.RUNNING),
        ([Event.STOP], Mode.DRAINING),
        ([Event.GAVE_UP], Mode.CLOSING),
        ([Event.EMPTY], Mode.STARTING),
        ([Event.ALL_READY, Event.EMPTY], Mode.RUNNING),
        ([Event.ALL_READY, Event.STOP], Mode.DRAINING),
        ([Event.ALL_READY, Event.STOP, Event.STOP], Mode.CLOSING),
        ([Event.ALL_READY, Event.STOP, Event.QUIT], Mode.CLOSING),
        ([Event.ALL_READY, Event.QUIT, Event.STOP], Mode.CLOSING),
        ([Event.ALL_READY, Event.STOP, Event.ALL_READY], Mode.DRAINING),
        ([Event.ALL_READY, Event.STOP, Event.EMPTY], Mode.OVER),
        ([Event.QUIT, Event.EMPTY], Mode.OVER),
    ],
)
def test_the_master_gets_where_its_events_lead(events: list[Event], mode: Mode) -> None:
    now = Mode.STARTING
    for event in events:
        now = next_mode(now, event)
    assert now is mode


@pytest.mark.parametrize(
    ("turns", "life"),
    [
        ([Turn.READY], Life.SERVING),
        ([Turn.READY, Turn.READY], Life.SERVING),
        ([Turn.RETIRE], Life.DRAINING),
        ([Turn.RETIRE, Turn.READY], Life.DRAINING),
        ([Turn.READY, Turn.RETIRE, Turn.CLOSE], Life.CLOSING),
        ([Turn.READY, Turn.CLOSE, Turn.RETIRE], Life.CLOSING),
        ([Turn.READY, Turn.KILL, Turn.READY], Life.KILLED),
        ([Turn.READY, Turn.KILL, Turn.EXIT], Life.GONE),
        ([Turn.RETIRE, Turn.KILL, Turn.CLOSE, Turn.RETIRE], Life.KILLED),
        ([Turn.EXIT], Life.GONE),
        ([Turn.EXIT, Turn.READY], Life.GONE),
    ],
)
def test_a_worker_gets_where_its_turns_lead(turns: list[Turn], life: Life) -> None:
    now = Life.BOOTING
    for turn in turns:
        now = next_life(now, turn)
    assert now is life


@given(st.lists(st.sampled_from(Event), max_size=30))
def test_the_master_never_goes_back_and_a_stop_always_ends_it(events: list[Event]) -> None:
    order = list(Mode)
    mode = Mode.STARTING
    for event in events:
        following = next_mode(mode, event)
        assert order.index(following) >= order.index(mode)
        mode = following
    for event in (Event.STOP, Event.EMPTY):
        mode = next_mode(mode, event)
    assert mode is Mode.OVER


@given(st.lists(st.sampled_from(Turn), max_size=30))
def test_a_worker_never_goes_back_and_its_exit_is_always_its_end(turns: list[Turn]) -> None:
    order = list(Life)
    life = Life.BOOTING
    for turn in turns:
        following = next_life(life, turn)
        assert order.index(following) >= order.index(life)
        life = following
    assert next_life(life, Turn.EXIT) is Life.GONE


def test_no_event_of_another_machine_is_swallowed() -> None:
    with pytest.raises(KeyError):
        next_mode(Mode.RUNNING, Turn.READY)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        next_life(Life.SERVING, Event.STOP)  # type: ignore[arg-type]


def test_a_signal_has_one_row_with_a_sentence() -> None:
    numbers = [row.signal for row in MASTER]
    assert len(numbers) == len(set(numbers))
    assert [row for row in MASTER if not row.sentence.endswith(".")] == []
    assert not {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV} & set(numbers)


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (signal.SIGTERM, Order.STOP),
        (signal.SIGINT, Order.STOP),
        (signal.SIGQUIT, Order.QUIT),
        (signal.SIGTTIN, Order.MORE),
        (signal.SIGTTOU, Order.FEWER),
        (signal.SIGCHLD, Order.REAP),
        (signal.SIGHUP, Order.RELOAD),
        (signal.SIGUSR1, Order.REOPEN),
        (signal.SIGUSR2, Order.UPGRADE),
    ],
)
def test_a_signal_asks_for_what_operators_expect(number: signal.Signals, order: Order) -> None:
    assert [row.order for row in MASTER if row.signal == number] == [order]


def test_every_order_can_be_given_by_a_signal() -> None:
    assert {row.order for row in MASTER} == set(Order)


def test_a_worker_ignores_none_of_the_signals_that_end_it() -> None:
    ends = {signals.DRAIN, signals.CLOSE, signals.KILL}
    assert not ends & set(signals.WORKER_IGNORES)
    assert len(ends) == 3


def test_the_order_to_write_stacks_is_a_signal_of_its_own_and_harms_nobody_who_is_not_ready_for_it() -> None:
    assert signals.DUMP not in {signals.DRAIN, signals.CLOSE, signals.KILL, *(row.signal for row in MASTER)}
    assert signals.DUMP in signals.WORKER_IGNORES


def test_a_worker_that_can_not_tell_its_stacks_yet_is_not_hurt_when_it_is_asked() -> None:
    assert signals.DUMP in signals.WORKER_IGNORES
    assert signals.DUMP not in {row.signal for row in MASTER}


def test_what_the_masters_keyboard_and_terminal_send_leaves_workers_to_the_master() -> None:
    of_the_group = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU}
    assert of_the_group <= set(signals.WORKER_IGNORES)
