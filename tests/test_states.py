"""The state machines and the signals: the tables are total, and say what they are to say at the turns that matter."""

from __future__ import annotations

import signal
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd import signals
from forkd.signals import MASTER, Command
from forkd.states import (
    MASTER_STATES,
    WORKER_STATES,
    MasterEvent,
    MasterState,
    WorkerEvent,
    WorkerState,
    as_markdown,
    next_master_state,
    next_worker_state,
)


@pytest.mark.parametrize(
    ("table", "states", "events"),
    [(MASTER_STATES, MasterState, MasterEvent), (WORKER_STATES, WorkerState, WorkerEvent)],
)
def test_table_has_every_pair_and_no_other(table: dict[Any, Any], states: type[Enum], events: type[Enum]) -> None:
    assert set(table) == set(states)
    assert [state for state, row in table.items() if set(row) != set(events)] == []
    assert {found for row in table.values() for found in row.values()} - {None} <= set(states)


@pytest.mark.parametrize(
    ("events", "mode"),
    [
        ([], MasterState.STARTING),
        ([MasterEvent.ALL_READY], MasterState.RUNNING),
        ([MasterEvent.STOP], MasterState.DRAINING),
        ([MasterEvent.GAVE_UP], MasterState.CLOSING),
        ([MasterEvent.EMPTY], MasterState.STARTING),
        ([MasterEvent.ALL_READY, MasterEvent.EMPTY], MasterState.RUNNING),
        ([MasterEvent.ALL_READY, MasterEvent.STOP], MasterState.DRAINING),
        ([MasterEvent.ALL_READY, MasterEvent.STOP, MasterEvent.STOP], MasterState.CLOSING),
        ([MasterEvent.ALL_READY, MasterEvent.STOP, MasterEvent.QUIT], MasterState.CLOSING),
        ([MasterEvent.ALL_READY, MasterEvent.QUIT, MasterEvent.STOP], MasterState.CLOSING),
        ([MasterEvent.ALL_READY, MasterEvent.STOP, MasterEvent.ALL_READY], MasterState.DRAINING),
        ([MasterEvent.ALL_READY, MasterEvent.STOP, MasterEvent.EMPTY], MasterState.OVER),
        ([MasterEvent.QUIT, MasterEvent.EMPTY], MasterState.OVER),
        ([MasterEvent.ALL_READY, MasterEvent.LEAVE], MasterState.LEAVING),
        ([MasterEvent.ALL_READY, MasterEvent.LEAVE, MasterEvent.EMPTY], MasterState.LEAVING),
        ([MasterEvent.ALL_READY, MasterEvent.LEAVE, MasterEvent.DELAY_OVER], MasterState.DRAINING),
        ([MasterEvent.ALL_READY, MasterEvent.LEAVE, MasterEvent.STOP], MasterState.DRAINING),
        ([MasterEvent.ALL_READY, MasterEvent.LEAVE, MasterEvent.STOP, MasterEvent.STOP], MasterState.CLOSING),
        ([MasterEvent.ALL_READY, MasterEvent.LEAVE, MasterEvent.QUIT], MasterState.CLOSING),
        ([MasterEvent.ALL_READY, MasterEvent.LEAVE, MasterEvent.GAVE_UP], MasterState.CLOSING),
    ],
)
def test_master_gets_where_its_events_lead(events: list[MasterEvent], mode: MasterState) -> None:
    now = MasterState.STARTING
    for event in events:
        now = next_master_state(now, event)
    assert now is mode


@pytest.mark.parametrize(
    ("turns", "life"),
    [
        ([WorkerEvent.READY], WorkerState.SERVING),
        ([WorkerEvent.READY, WorkerEvent.READY], WorkerState.SERVING),
        ([WorkerEvent.RETIRE], WorkerState.DRAINING),
        ([WorkerEvent.RETIRE, WorkerEvent.READY], WorkerState.DRAINING),
        ([WorkerEvent.READY, WorkerEvent.RETIRE, WorkerEvent.CLOSE], WorkerState.CLOSING),
        ([WorkerEvent.READY, WorkerEvent.CLOSE, WorkerEvent.RETIRE], WorkerState.CLOSING),
        ([WorkerEvent.READY, WorkerEvent.KILL, WorkerEvent.READY], WorkerState.KILLED),
        ([WorkerEvent.READY, WorkerEvent.KILL, WorkerEvent.EXIT], WorkerState.GONE),
        ([WorkerEvent.RETIRE, WorkerEvent.KILL, WorkerEvent.CLOSE, WorkerEvent.RETIRE], WorkerState.KILLED),
        ([WorkerEvent.EXIT], WorkerState.GONE),
        ([WorkerEvent.EXIT, WorkerEvent.READY], WorkerState.GONE),
    ],
)
def test_worker_gets_where_its_turns_lead(turns: list[WorkerEvent], life: WorkerState) -> None:
    now = WorkerState.BOOTING
    for turn in turns:
        now = next_worker_state(now, turn)
    assert now is life


@given(st.lists(st.sampled_from(MasterEvent), max_size=30))
def test_master_never_goes_back_and_a_stop_always_ends_it(events: list[MasterEvent]) -> None:
    order = list(MasterState)
    mode = MasterState.STARTING
    for event in events:
        following = next_master_state(mode, event)
        assert order.index(following) >= order.index(mode)
        mode = following
    for event in (MasterEvent.STOP, MasterEvent.EMPTY):
        mode = next_master_state(mode, event)
    assert mode is MasterState.OVER


@given(st.lists(st.sampled_from(WorkerEvent), max_size=30))
def test_worker_never_goes_back_and_its_exit_is_always_its_end(turns: list[WorkerEvent]) -> None:
    order = list(WorkerState)
    life = WorkerState.BOOTING
    for turn in turns:
        following = next_worker_state(life, turn)
        assert order.index(following) >= order.index(life)
        life = following
    assert next_worker_state(life, WorkerEvent.EXIT) is WorkerState.GONE


def test_no_event_of_another_machine_is_swallowed() -> None:
    with pytest.raises(KeyError):
        next_master_state(MasterState.RUNNING, WorkerEvent.READY)  # type: ignore[arg-type]
    with pytest.raises(KeyError):
        next_worker_state(WorkerState.SERVING, MasterEvent.STOP)  # type: ignore[arg-type]


def test_markdown_has_a_row_a_state_and_a_column_an_event() -> None:
    master, worker = as_markdown().rstrip("\n").split("\n\n")
    for text, states, events in ((master, MasterState, MasterEvent), (worker, WorkerState, WorkerEvent)):
        head, _, *rows = (line.strip("| ").split(" | ") for line in text.split("\n"))
        assert head[1:] == [event.value for event in events]
        assert [row[0] for row in rows] == [state.value for state in states]
        assert {len(row) for row in rows} == {len(head)}
    assert "| running | ignore | closing | leaving | ignore | draining | closing | ignore |" in master


def test_signal_has_one_row_with_a_sentence() -> None:
    numbers = [row.signal for row in MASTER]
    assert len(numbers) == len(set(numbers))
    assert [row for row in MASTER if not row.sentence.endswith(".")] == []
    assert not {signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV} & set(numbers)


@pytest.mark.parametrize(
    ("number", "order"),
    [
        (signal.SIGTERM, Command.STOP),
        (signal.SIGINT, Command.STOP),
        (signal.SIGQUIT, Command.QUIT),
        (signal.SIGTTIN, Command.MORE),
        (signal.SIGTTOU, Command.FEWER),
        (signal.SIGCHLD, Command.REAP),
        (signal.SIGHUP, Command.RELOAD),
        (signal.SIGUSR1, Command.REOPEN),
        (signal.SIGUSR2, Command.UPGRADE),
    ],
)
def test_signal_asks_for_what_operators_expect(number: signal.Signals, order: Command) -> None:
    assert [row.command for row in MASTER if row.signal == number] == [order]


def test_every_order_can_be_given_by_a_signal() -> None:
    assert {row.command for row in MASTER} == set(Command)


def test_worker_ignores_none_of_the_signals_that_end_it() -> None:
    ends = {signals.DRAIN, signals.CLOSE, signals.KILL}
    assert not ends & set(signals.WORKER_IGNORES)
    assert len(ends) == 3


def test_dump_signal_is_of_its_own_and_ignored_at_first() -> None:
    assert signals.DUMP not in {signals.DRAIN, signals.CLOSE, signals.KILL, *(row.signal for row in MASTER)}
    assert signals.DUMP in signals.WORKER_REALLY_IGNORES


def test_dump_signal_is_ignored_until_there_is_a_handler() -> None:
    assert signals.DUMP in signals.WORKER_REALLY_IGNORES
    assert signals.DUMP not in {row.signal for row in MASTER}


def test_terminal_signals_leave_workers_to_the_master() -> None:
    of_the_group = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU}
    assert of_the_group <= set(signals.WORKER_IGNORES)
