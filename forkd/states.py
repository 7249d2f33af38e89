"""The two state machines of the daemon, each as one total table: the master's modes and a worker's life.

Every pair of state and event is written out, `ignore` included; a pair that is missing raises KeyError, so a new event
can't be forgotten in one mode. Nothing here acts: `master.plan` decides what a state calls for, `master.master` does
it.
"""

from __future__ import annotations

from enum import Enum


class Mode(Enum):
    """What the master is about."""

    STARTING = "starting"  # the first workers boot; nobody has been told that the daemon runs
    RUNNING = "running"
    DRAINING = "draining"  # no new clients; those that are here may finish
    CLOSING = "closing"  # everything ends now
    OVER = "over"  # no worker left


class Event(Enum):
    """What can happen to the master."""

    ALL_READY = "every wanted worker serves"
    GAVE_UP = "workers can't be had"
    STOP = "asked to stop"
    QUIT = "asked to stop at once"
    EMPTY = "the last worker is gone"


class Life(Enum):
    """What a worker is about, as the master knows it."""

    BOOTING = "booting"
    SERVING = "serving"
    DRAINING = "draining"  # was told to finish; it has left its slot
    CLOSING = "closing"  # was told to end at once
    KILLED = "killed"  # got SIGKILL, is not reaped yet
    GONE = "gone"


class Turn(Enum):
    """What can happen to a worker."""

    READY = "reported ready"
    RETIRE = "told to drain"
    CLOSE = "told to close"
    KILL = "killed by the master"
    EXIT = "reaped"


ignore = None

MODES: dict[Mode, dict[Event, Mode | None]] = {
    Mode.STARTING: {
        Event.ALL_READY: Mode.RUNNING,
        Event.GAVE_UP: Mode.CLOSING,
        Event.STOP: Mode.DRAINING,
        Event.QUIT: Mode.CLOSING,
        Event.EMPTY: ignore,
    },
    Mode.RUNNING: {
        Event.ALL_READY: ignore,
        Event.GAVE_UP: Mode.CLOSING,
        Event.STOP: Mode.DRAINING,
        Event.QUIT: Mode.CLOSING,
        Event.EMPTY: ignore,
    },
    Mode.DRAINING: {
        Event.ALL_READY: ignore,
        Event.GAVE_UP: ignore,
        Event.STOP: Mode.CLOSING,  # asked twice: the operator will not wait
        Event.QUIT: Mode.CLOSING,
        Event.EMPTY: Mode.OVER,
    },
    Mode.CLOSING: {
        Event.ALL_READY: ignore,
        Event.GAVE_UP: ignore,
        Event.STOP: ignore,
        Event.QUIT: ignore,
        Event.EMPTY: Mode.OVER,
    },
    Mode.OVER: {
        Event.ALL_READY: ignore,
        Event.GAVE_UP: ignore,
        Event.STOP: ignore,
        Event.QUIT: ignore,
        Event.EMPTY: ignore,
    },
}

LIVES: dict[Life, dict[Turn, Life | None]] = {
    Life.BOOTING: {
        Turn.READY: Life.SERVING,
        Turn.RETIRE: Life.DRAINING,
        Turn.CLOSE: Life.CLOSING,
        Turn.KILL: Life.KILLED,
        Turn.EXIT: Life.GONE,
    },
    Life.SERVING: {
        Turn.READY: ignore,  # a worker may say anything, twice too
        Turn.RETIRE: Life.DRAINING,
        Turn.CLOSE: Life.CLOSING,
        Turn.KILL: Life.KILLED,
        Turn.EXIT: Life.GONE,
    },
    Life.DRAINING: {
        Turn.READY: ignore,  # its report crossed our signal
        Turn.RETIRE: ignore,
        Turn.CLOSE: Life.CLOSING,
        Turn.KILL: Life.KILLED,
        Turn.EXIT: Life.GONE,
    },
    Life.CLOSING: {
        Turn.READY: ignore,
        Turn.RETIRE: ignore,
        Turn.CLOSE: ignore,
        Turn.KILL: Life.KILLED,
        Turn.EXIT: Life.GONE,
    },
    Life.KILLED: {
        Turn.READY: ignore,
        Turn.RETIRE: ignore,
        Turn.CLOSE: ignore,
        Turn.KILL: ignore,
        Turn.EXIT: Life.GONE,
    },
    Life.GONE: {
        Turn.READY: ignore,
        Turn.RETIRE: ignore,
        Turn.CLOSE: ignore,
        Turn.KILL: ignore,
        Turn.EXIT: ignore,
    },
}


def next_mode(mode: Mode, event: Event) -> Mode:
    """The mode after `event`; the same one where the table says ignore."""
    return MODES[mode][event] or mode


def next_life(life: Life, turn: Turn) -> Life:
    """The life after `turn`; the same one where the table says ignore."""
    return LIVES[life][turn] or life
