"""The state of a running master, which its parts share, and what `app` hands to the master.

`DaemonState` decides nothing and waits for nothing. It shows itself to the plan as a `PoolView`, and is handed over to
the next image by an upgrade as a `MasterSnapshot`. `EntryPoints` are the functions that children run, and what else the
master can't know by itself.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import NamedTuple

from forkd.config.settings import Settings
from forkd.errors import BootError, system_reason
from forkd.master.control_socket import ControlSocket
from forkd.master.generation import Generation
from forkd.master.plan import STOP_MARGIN, Candidate, PoolView
from forkd.master.spawn import HELPER, Worker
from forkd.master.upgrade import LaunchContext, MasterSnapshot
from forkd.master.workers import WorkerPool
from forkd.states import MasterState
from forkd.system.channel import Channel
from forkd.system.identity import Identity
from forkd.system.listeners import BoundListener
from forkd.system.logs import unwritten_log
from forkd.system.notify import Notifier
from forkd.system.scoreboard import Row, Scoreboard

log = logging.getLogger("forkd.master")

#: How many moments are kept.
MOST_MOMENTS = 121


@dataclass(frozen=True, slots=True)
class EntryPoints:
    """What `app` gives the master.

    Attributes:
        serve: runs a worker of this generation, in this slot, with its row and channel; returns its exit status.
        prepare: runs a helper that reads the settings again; with the verb of the change.
        log_target: where these settings have the daemon log: a file, the journal, or None for where it was started.
        close_in_child: closes, in a forked child, what else is the master's alone (the pid file's lock).
        on_ready: called once, when every wanted worker serves.
        restore_files: makes the run directory and the pid file again, if something has removed them; whether it had. It
            gets the identity of the workers.
    """

    serve: Callable[[Generation, int, Row, Channel], int]
    prepare: Callable[[Generation, str, Channel], int]
    log_target: Callable[[Settings], Path | str | None]
    close_in_child: Callable[[], None]
    on_ready: Callable[[], None]
    restore_files: Callable[[Identity], bool] = lambda identity: False


class Moment(NamedTuple):
    """The daemon at one time.

    Attributes:
        at: when, on the monotonic clock in seconds.
        clients: connections that are open.
        counts: what has been counted since the daemon was started: `accepted`, `refused`, `ended` by forkd, `errors` of
            handlers and `deaths` of workers that nobody had told to end.
        listeners: by address: connections that are open, how many were let in so far, and how many wait in the accept
            queue.
    """

    at: float
    clients: int
    counts: dict[str, int]
    listeners: dict[str, tuple[int, int, int]]


@dataclass(slots=True)
class DaemonState:
    """One master's.

    Attributes:
        generation: the one that serves.
        wanted: how many workers it should have.
        board: the scoreboard.
        control: the control socket.
        entry_points: what its children run.
        launch: what stays the same for every image of this daemon.
        pool: its children.
        notifier: tells the service manager, where there is one.
        master_state: what the master does.
        started: since the epoch, whichever image it was that started.
        last_failure: why the last worker that never served did not.
        change_failure: why the last change has failed; empty when it has not.
        change_failed_at: when, since the epoch.
        changed_at: when the last one that succeeded has, since the epoch; 0 where none has.
        change_counts: how many reloads and upgrades have ended, by `success` or `failure`.
        kept_counts: what the kernel has counted for sockets, those that are closed by now too (`admin.metrics`).
        pushed: what counters were when statsd was last told, by name and labels (`admin.statsd`).
        expiry_warned: by file, when a certificate was last warned of, since the epoch.
        moments: the last ten minutes (`admin.history`).
        superseded: whether another master has the name and the addresses now.
        drained: whether an operator has taken it out of its balancers (`forkd drain`).
        drain_at: when it begins to drain, if it is leaving; on the monotonic clock.
        awake_since: since when the loop has run without a gap, on the monotonic clock.
        listener_faults: by address, why clients do not come by a listener, which can't be set right.
    """

    generation: Generation
    wanted: int
    board: Scoreboard
    control: ControlSocket
    entry_points: EntryPoints
    launch: LaunchContext
    pool: WorkerPool
    notifier: Notifier
    master_state: MasterState = MasterState.STARTING
    started: float = field(default_factory=time.time)
    last_failure: BootError | None = None
    change_failure: str = ""
    change_failed_at: float = 0.0
    changed_at: float = 0.0
    change_counts: Counter[str] = field(default_factory=Counter)
    kept_counts: dict[str, int] = field(default_factory=dict)
    pushed: dict[str, float] = field(default_factory=dict)
    expiry_warned: dict[str, float] = field(default_factory=dict)
    moments: deque[Moment] = field(default_factory=lambda: deque(maxlen=MOST_MOMENTS))
    superseded: bool = False
    drained: bool = False
    drain_at: float = inf
    awake_since: float = -inf
    listener_faults: dict[str, str] = field(default_factory=dict)

    @property
    def workers(self) -> Mapping[int, Worker]:
        """By pid, helpers too."""
        return self.pool.workers

    @property
    def drain_timeout(self) -> float:
        """Seconds after which, once told to drain, no worker has a client: the longest of all generations here."""
        own = (worker.drain_timeout or 0.0 for worker in self.workers.values())
        return max(self.generation.settings.drain_timeout, *own, 0.0)

    @property
    def stop_timeout(self) -> float:
        """Seconds after which, once told to stop, everything is over."""
        leaving = self.master_state is MasterState.LEAVING
        delay = max(0.0, self.drain_at - time.monotonic()) if leaving else 0.0
        return delay + self.drain_timeout + STOP_MARGIN

    def all_serve(self) -> bool:
        """Whether there are just the workers that are wanted, and all serve."""
        return self.pool.serves(self.generation.number, self.wanted)

    def switch_generation(self, candidate: Generation) -> None:
        """Makes another generation the one that serves. Workers of the one before go on by its settings."""
        before, self.generation = self.generation, candidate
        self.remember_closed_listeners(before.listeners_not_in(candidate), candidate.number)
        for worker in self.workers.values():
            if worker.generation == before.number:
                worker.drain_timeout = before.settings.drain_timeout
                worker.stall_timeout = before.settings.stall_timeout

    def share_control_socket(self) -> None:
        """Has the control socket let in the group that the settings of the generation that serves name."""
        try:
            self.control.share(self.generation.identity.control_gid)
        except OSError as error:
            log.error("control_group: the control socket can't be shared: %s", system_reason(error))

    def remember_closed_listeners(self, listeners: Iterable[BoundListener], new_generation: int = 0) -> None:
        """Notes where listeners are that are about to be closed, for those workers that may have clients of them: all
        but those of the generation that takes over.
        """
        places = [place for bound in listeners if (place := bound.endpoints())["sockets"]]
        for worker in self.workers.values():
            if worker.generation != new_generation:
                worker.closed_listeners += places

    def view(self, now: float, candidate: Candidate | None) -> PoolView:
        """All this as the plan sees it."""
        number, settings = self.generation.number, self.generation.settings
        return PoolView(
            state=self.master_state,
            wanted=self.wanted,
            workers=self.pool.views(now),
            slots=self.pool.slots[number],
            boot_timeout=settings.boot_timeout,
            drain_timeout=settings.drain_timeout,
            stall_timeout=settings.stall_timeout,
            give_up_after=settings.give_up_after,
            generation=number,
            candidate=candidate,
            awake_since=self.awake_since,
            drain_at=self.drain_at,
        )

    def snapshot(self, clients: Sequence[int] = (), idle_clients: Sequence[int] = ()) -> MasterSnapshot:
        """All this as another image goes on with it.

        Args:
            clients: descriptors of the control socket's clients that wait for the outcome.
            idle_clients: of its other clients.
        """
        return MasterSnapshot(
            launch=self.launch,
            generation=self.generation,
            wanted=self.wanted,
            drained=self.drained,
            started=self.started,
            control=self.control.fileno(),
            board=self.board,
            workers=[worker for worker in self.workers.values() if worker.slot != HELPER],
            slots=self.pool.slots[self.generation.number],
            exit_records=list(self.pool.exit_records),
            exited_totals=self.pool.exited_totals,
            exited_listeners=self.pool.exited_listeners,
            handler_metrics=self.pool.handler_metrics,
            changed_at=self.changed_at,
            change_counts=self.change_counts,
            kept_counts=self.kept_counts,
            pushed=self.pushed,
            expiry_warned=self.expiry_warned,
            moments=[one._asdict() for one in self.moments],
            exit_counts=self.pool.exit_counts,
            clients=clients,
            idle_clients=idle_clients,
            unwritten=unwritten_log(),
        )

    def restore(self, snapshot: MasterSnapshot) -> None:
        """Goes on where another image left off."""
        self.master_state, self.wanted, self.started = MasterState.RUNNING, snapshot.wanted, snapshot.started
        self.drained, self.changed_at = snapshot.drained, snapshot.changed_at
        for worker in snapshot.workers:
            self.pool.adopt(worker)
        self.pool.slots[self.generation.number].update(snapshot.slots)
        self.pool.exit_records.extend(dict(record) for record in snapshot.exit_records)
        for slot, counts in snapshot.exited_totals.items():
            self.pool.exited_totals[slot].update(counts)
        self.pool.handler_metrics = snapshot.handler_metrics
        self.pool.exited_listeners.update((name, list(counts)) for name, counts in snapshot.exited_listeners.items())
        self.change_counts.update(snapshot.change_counts)
        self.kept_counts.update(snapshot.kept_counts)
        self.pushed.update(snapshot.pushed)
        self.expiry_warned.update(snapshot.expiry_warned)
        self.moments.extend(Moment(**one) for one in snapshot.moments)
        self.pool.exit_counts.update(snapshot.exit_counts)
