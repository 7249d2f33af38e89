"""The two state machines of the daemon, each as one total table: the master's states and a worker's.

Every pair of state and event is written out, `ignore` included; a pair that is missing raises KeyError, so a new event
can't be forgotten in one state. Nothing here acts: `master.plan` decides what a state calls for, `master.master` does
it. docs/architecture.md shows the tables as `as_markdown` makes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any


class MasterState(Enum):
    """What the master does."""

    STARTING = "starting"  # the first workers boot; the daemon has not been reported as running
    RUNNING = "running"
    LEAVING = "leaving"  # serves on, but balancers are told to send no more clients: it will drain soon
    DRAINING = "draining"  # no new clients; connected ones may finish
    CLOSING = "closing"  # everything ends now
    OVER = "over"  # no worker left

    @property
    def serves(self) -> bool:
        """Whether the daemon takes clients, and is to have the workers that are wanted."""
        return self in (MasterState.STARTING, MasterState.RUNNING, MasterState.LEAVING)

    @property
    def ends(self) -> bool:
        """Whether it has been told to stop."""
        return self not in (MasterState.STARTING, MasterState.RUNNING)


class MasterEvent(Enum):
    """What can happen to the master."""

    ALL_READY = "every wanted worker serves"
    GAVE_UP = "workers can't be started"
    LEAVE = "asked to stop after stop_delay"
    DELAY_OVER = "stop_delay is over"
    STOP = "asked to stop"
    QUIT = "asked to stop at once"
    EMPTY = "the last worker is gone"


class WorkerState(Enum):
    """What a worker does, as the master knows it."""

    BOOTING = "booting"
    SERVING = "serving"
    DRAINING = "draining"  # was told to finish; its slot is free for another
    CLOSING = "closing"  # was told to end at once
    KILLED = "killed"  # got SIGKILL, is not reaped yet
    GONE = "gone"


class WorkerEvent(Enum):
    """What can happen to a worker."""

    READY = "reported ready"
    RETIRE = "told to drain"
    CLOSE = "told to close"
    KILL = "killed by the master"
    EXIT = "reaped"


ignore = None

MASTER_STATES: dict[MasterState, dict[MasterEvent, MasterState | None]] = {
    MasterState.STARTING: {
        MasterEvent.ALL_READY: MasterState.RUNNING,
        MasterEvent.GAVE_UP: MasterState.CLOSING,
        MasterEvent.LEAVE: ignore,
        MasterEvent.DELAY_OVER: ignore,
        MasterEvent.STOP: MasterState.DRAINING,
        MasterEvent.QUIT: MasterState.CLOSING,
        MasterEvent.EMPTY: ignore,
    },
    MasterState.RUNNING: {
        MasterEvent.ALL_READY: ignore,
        MasterEvent.GAVE_UP: MasterState.CLOSING,
        MasterEvent.LEAVE: MasterState.LEAVING,
        MasterEvent.DELAY_OVER: ignore,
        MasterEvent.STOP: MasterState.DRAINING,
        MasterEvent.QUIT: MasterState.CLOSING,
        MasterEvent.EMPTY: ignore,
    },
    MasterState.LEAVING: {
        MasterEvent.ALL_READY: ignore,
        MasterEvent.GAVE_UP: MasterState.CLOSING,
        MasterEvent.LEAVE: ignore,
        MasterEvent.DELAY_OVER: MasterState.DRAINING,
        MasterEvent.STOP: MasterState.DRAINING,  # asked twice: the operator does not wait for balancers
        MasterEvent.QUIT: MasterState.CLOSING,
        MasterEvent.EMPTY: ignore,
    },
    MasterState.DRAINING: {
        MasterEvent.ALL_READY: ignore,
        MasterEvent.GAVE_UP: ignore,
        MasterEvent.LEAVE: ignore,
        MasterEvent.DELAY_OVER: ignore,
        MasterEvent.STOP: MasterState.CLOSING,  # asked twice: the operator does not wait for clients
        MasterEvent.QUIT: MasterState.CLOSING,
        MasterEvent.EMPTY: MasterState.OVER,
    },
    MasterState.CLOSING: {
        MasterEvent.ALL_READY: ignore,
        MasterEvent.GAVE_UP: ignore,
        MasterEvent.LEAVE: ignore,
        MasterEvent.DELAY_OVER: ignore,
        MasterEvent.STOP: ignore,
        MasterEvent.QUIT: ignore,
        MasterEvent.EMPTY: MasterState.OVER,
    },
    MasterState.OVER: {
        MasterEvent.ALL_READY: ignore,
        MasterEvent.GAVE_UP: ignore,
        MasterEvent.LEAVE: ignore,
        MasterEvent.DELAY_OVER: ignore,
        MasterEvent.STOP: ignore,
        MasterEvent.QUIT: ignore,
        MasterEvent.EMPTY: ignore,
    },
}

WORKER_STATES: dict[WorkerState, dict[WorkerEvent, WorkerState | None]] = {
    WorkerState.BOOTING: {
        WorkerEvent.READY: WorkerState.SERVING,
        WorkerEvent.RETIRE: WorkerState.DRAINING,
        WorkerEvent.CLOSE: WorkerState.CLOSING,
        WorkerEvent.KILL: WorkerState.KILLED,
        WorkerEvent.EXIT: WorkerState.GONE,
    },
    WorkerState.SERVING: {
        WorkerEvent.READY: ignore,  # a worker may say anything, twice too
        WorkerEvent.RETIRE: WorkerState.DRAINING,
        WorkerEvent.CLOSE: WorkerState.CLOSING,
        WorkerEvent.KILL: WorkerState.KILLED,
        WorkerEvent.EXIT: WorkerState.GONE,
    },
    WorkerState.DRAINING: {
        WorkerEvent.READY: ignore,  # its report crossed the signal
        WorkerEvent.RETIRE: ignore,
        WorkerEvent.CLOSE: WorkerState.CLOSING,
        WorkerEvent.KILL: WorkerState.KILLED,
        WorkerEvent.EXIT: WorkerState.GONE,
    },
    WorkerState.CLOSING: {
        WorkerEvent.READY: ignore,
        WorkerEvent.RETIRE: ignore,
        WorkerEvent.CLOSE: ignore,
        WorkerEvent.KILL: WorkerState.KILLED,
        WorkerEvent.EXIT: WorkerState.GONE,
    },
    WorkerState.KILLED: {
        WorkerEvent.READY: ignore,
        WorkerEvent.RETIRE: ignore,
        WorkerEvent.CLOSE: ignore,
        WorkerEvent.KILL: ignore,
        WorkerEvent.EXIT: WorkerState.GONE,
    },
    WorkerState.GONE: {
        WorkerEvent.READY: ignore,
        WorkerEvent.RETIRE: ignore,
        WorkerEvent.CLOSE: ignore,
        WorkerEvent.KILL: ignore,
        WorkerEvent.EXIT: ignore,
    },
}


def next_master_state(state: MasterState, event: MasterEvent) -> MasterState:
    """The state after `event`; the same one where the table says ignore."""
    return MASTER_STATES[state][event] or state


def next_worker_state(state: WorkerState, event: WorkerEvent) -> WorkerState:
    """The state after `event`; the same one where the table says ignore."""
    return WORKER_STATES[state][event] or state


def as_markdown() -> str:
    """Both tables as Markdown: a row for each state, a column for each event, in a cell the next state."""
    return f"{_table('Master', MASTER_STATES)}\n\n{_table('Worker', WORKER_STATES)}\n"


def _table(title: str, table: Mapping[Any, Mapping[Any, Enum | None]]) -> str:
    rows = [[title, *(event.value for event in next(iter(table.values())))]]
    rows.append(["---"] * len(rows[0]))
    rows += [
        [state.value, *(after.value if after else "ignore" for after in row.values())] for state, row in table.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
