"""What is counted and measured of the daemon, for machines: names, kinds, labels and values.

`FAMILIES` is the table of all of it; `Metrics.collect` reads the values off the scoreboard, the master's state and the
kernel. How they are written is the concern of `exposition` and `statsd`.

A counter never goes back. What workers had counted is kept when they end, and over an upgrade; where a worker takes
something back that it has told, or a listener's socket is replaced, the difference is made up for here.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf

from forkd import __version__
from forkd.master.spawn import HELPER
from forkd.master.state import DaemonState
from forkd.master.status import heartbeat_age, is_leaving, listener_status, shown_state, totals_by_slot, why_not_ready
from forkd.master.workers import CAUSES, EXPECTED
from forkd.states import WorkerState
from forkd.system.logs import log_lines_lost
from forkd.system.proc import memory_of
from forkd.system.scoreboard import COUNTERS, DURATION_BOUNDS, SIZE_BOUNDS, Field, ListenerField

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

#: Seconds for which a worker's memory is told as it was, and that may be spent on asking at a time: the kernel walks
#: through all of it.
_MEMORY_SECONDS = 10.0
_MEMORY_BUDGET = 0.005

#: Sockets that are closed by now whose counts are kept.
_MOST_KEPT = 1000

#: States of a worker as they are shown.
STATES = (*(one.value for one in WorkerState if one is not WorkerState.GONE), "stuck")


@dataclass(frozen=True, slots=True)
class Family:
    """One metric.

    Attributes:
        name: without the `_total` of a counter.
        kind: `COUNTER`, `GAUGE` or `HISTOGRAM`.
        doc: a line about it.
        labels: their names.
    """

    name: str
    kind: str
    doc: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """As Prometheus has it."""
        return f"{self.name}_total" if self.kind == COUNTER else self.name


@dataclass(frozen=True, slots=True)
class Sample:
    """A value of a metric, and those of its labels.

    Attributes:
        value: of a histogram the sum of all that was observed.
        buckets: of a histogram, how many there were up to each bound; the last bound is infinity.
        handlers: what metric it is of, where that is not in `FAMILIES` but a handler's (`forkd.metrics`).
    """

    name: str
    labels: tuple[str, ...]
    value: float
    buckets: tuple[tuple[float, float], ...] = ()
    handlers: Family | None = None

    @property
    def family(self) -> Family:
        """What metric it is of."""
        return self.handlers or FAMILIES[self.name]


FAMILIES = {
    one.name: one
    for one in (
        Family("forkd_build_info", GAUGE, "Always 1; the version that runs.", ("version",)),
        Family("forkd_start_time_seconds", GAUGE, "When the daemon was started, in seconds since 1970."),
        Family("forkd_ready", GAUGE, "Whether the daemon should get clients, as /ready says."),
        Family("forkd_draining", GAUGE, "Whether the daemon stops, or is told to leave its balancers."),
        Family("forkd_generation", GAUGE, "The number of the generation that serves."),
        Family("forkd_reloads", COUNTER, "Reloads and upgrades that have ended.", ("result",)),
        Family("forkd_last_reload_successful", GAUGE, "Whether the last reload or upgrade has not failed."),
        Family("forkd_log_lines_lost", COUNTER, "Lines of the master that could not be written to the log."),
        Family("forkd_workers", GAUGE, "Workers in each state; stuck: the loop stands still.", ("state",)),
        Family("forkd_workers_wanted", GAUGE, "Workers that there should be."),
        Family("forkd_worker_deaths", COUNTER, "Workers that have ended; expected: they had been told to.", ("cause",)),
        Family("forkd_worker_heartbeat_age_seconds", GAUGE, "Time since a worker's loop last ran.", ("worker",)),
        Family("forkd_worker_lag_seconds", GAUGE, "How late a loop's last heartbeat was.", ("worker",)),
        Family("forkd_worker_pss_bytes", GAUGE, "Memory of a worker, with its part of what is shared.", ("worker",)),
        Family("forkd_connections", GAUGE, "Connections that are open.", ("worker",)),
        Family("forkd_connections_accepted", COUNTER, "Connections that were accepted.", ("worker",)),
        Family("forkd_connections_closed", COUNTER, "Connections that have ended.", ("worker",)),
        Family("forkd_connections_ended", COUNTER, "Connections that forkd has ended.", ("worker", "reason")),
        Family("forkd_refusals", COUNTER, "Clients and datagrams that were refused.", ("worker", "reason")),
        Family("forkd_handler_errors", COUNTER, "Exceptions out of handlers.", ("worker",)),
        Family("forkd_datagrams_received", COUNTER, "Datagrams that have come.", ("worker",)),
        Family("forkd_datagrams_sent", COUNTER, "Datagrams that were sent.", ("worker",)),
        Family("forkd_datagrams_dropped", COUNTER, "Datagrams that could not be sent.", ("worker",)),
        Family("forkd_listener_connections", GAUGE, "Connections that are open.", ("listener",)),
        Family("forkd_listener_connections_served", COUNTER, "Connections that were let in.", ("listener",)),
        Family("forkd_received_bytes", COUNTER, "Bytes that came by connections that have ended.", ("listener",)),
        Family("forkd_sent_bytes", COUNTER, "Bytes sent by connections that have ended.", ("listener",)),
        Family("forkd_connection_duration_seconds", HISTOGRAM, "How long connections lasted.", ("listener",)),
        Family("forkd_connection_size_bytes", HISTOGRAM, "Bytes of a connection in both directions.", ("listener",)),
        Family("forkd_listener_queue", GAUGE, "Connections that wait to be accepted.", ("listener",)),
        Family("forkd_listener_queue_limit", GAUGE, "How many of them may wait.", ("listener",)),
        Family("forkd_listener_connections_limit", GAUGE, "Connections that all workers may have.", ("listener",)),
        Family("forkd_listener_drops", COUNTER, "Connections or datagrams that found the queue full.", ("listener",)),
        Family("forkd_listener_resets", COUNTER, "Connections reset before they were made.", ("listener",)),
        Family(
            "forkd_certificate_expiry_timestamp_seconds",
            GAUGE,
            "When a certificate ends, in seconds since 1970.",
            ("listener", "file"),
        ),
    )
}

#: The metric of each counter of the scoreboard that has no reason.
_PLAIN = {
    Field.ACCEPTED: "forkd_connections_accepted",
    Field.CLOSED: "forkd_connections_closed",
    Field.ERRORS: "forkd_handler_errors",
    Field.DATAGRAMS_RECEIVED: "forkd_datagrams_received",
    Field.DATAGRAMS_SENT: "forkd_datagrams_sent",
    Field.DATAGRAMS_DROPPED: "forkd_datagrams_dropped",
}
_BY_REASON = {"ENDED": "forkd_connections_ended", "REFUSED": "forkd_refusals"}


def _cumulated(bounds: Sequence[float], counts: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Bounds, the last of which is infinity, and how many there were up to each."""
    return tuple(zip((*bounds, inf), accumulate(counts), strict=True))


class Metrics:
    """The values of all metrics.

    Args:
        state: the master's.
    """

    def __init__(self, state: DaemonState) -> None:
        self._state = state
        self._told: dict[tuple[str, tuple[str, ...]], float] = {}  # what counters have been told to be
        self._memory: dict[int, tuple[float, tuple[int | None, int | None]]] = {}  # by pid: when asked, the answer

    def collect(self) -> list[Sample]:
        """The values as they are now."""
        samples = [*self._daemon(), *self._workers(), *self._counts(), *self._served(), *self._listeners()]
        samples += self._handlers()
        return [self._never_less(one) if one.family.kind == COUNTER else one for one in samples]

    def _never_less(self, sample: Sample) -> Sample:
        """A counter as it is, or as it has been told to be where that is more."""
        key = sample.name, sample.labels
        told = self._told[key] = max(self._told.get(key, 0), sample.value)
        return sample if told == sample.value else replace(sample, value=told)

    def _handlers(self) -> Iterator[Sample]:
        """What handlers count. Of a metric that two generations declare differently, as the later one has it."""
        state = self._state
        workers = sorted((one for one in state.workers.values() if one.slot != HELPER), key=lambda one: one.forked_at)
        totals = state.pool.handler_metrics
        found = totals.read(state.board.regions.descriptor, {one.pid: one.row.index for one in workers})
        shapes = {series.name: series.shape for series in found}
        families: dict[str, Family] = {}
        for series, values in sorted(found.items(), key=lambda one: (one[0].name, one[0].labels)):
            if series.shape != shapes[series.name]:
                continue
            if (family := families.get(series.name)) is None:
                names = tuple(name for name, _ in series.labels)
                family = families[series.name] = Family(
                    series.name, series.kind, totals.docs.get(series.name, ""), names
                )
            buckets = _cumulated(series.buckets, values[:-1]) if series.kind == HISTOGRAM else ()
            yield Sample(series.name, tuple(value for _, value in series.labels), values[-1], buckets, family)

    def _daemon(self) -> Iterator[Sample]:
        state = self._state
        yield Sample("forkd_build_info", (__version__,), 1)
        yield Sample("forkd_start_time_seconds", (), state.started)
        yield Sample("forkd_ready", (), not why_not_ready(state))
        yield Sample("forkd_draining", (), is_leaving(state))
        yield Sample("forkd_generation", (), state.generation.number)
        for result in ("success", "failure"):
            yield Sample("forkd_reloads", (result,), state.change_counts[result])
        yield Sample("forkd_last_reload_successful", (), not state.change_failure)
        yield Sample("forkd_log_lines_lost", (), log_lines_lost())
        yield Sample("forkd_workers_wanted", (), state.wanted)
        for cause in (EXPECTED, *CAUSES):
            yield Sample("forkd_worker_deaths", (cause,), state.pool.exit_counts[cause])

    def _workers(self) -> Iterator[Sample]:
        """Of a slot's workers, one of which may drain while the other serves, the latest one."""
        state, now = self._state, time.monotonic()
        settings = state.generation.settings
        workers = sorted((one for one in state.workers.values() if one.slot != HELPER), key=lambda one: one.forked_at)
        states = Counter(shown_state(one, settings, now) for one in workers)
        for name in STATES:
            yield Sample("forkd_workers", (name,), states[name])
        memory = self.memory_of(one.pid for one in workers)
        clients: Counter[int] = Counter()
        for worker in workers:
            clients[worker.slot] += max(0, worker.row.active)
        for slot, worker in sorted({one.slot: one for one in workers}.items()):
            labels = (str(slot),)
            yield Sample("forkd_connections", labels, clients[slot])
            if (age := heartbeat_age(worker, now)) is not None:
                yield Sample("forkd_worker_heartbeat_age_seconds", labels, age)
            yield Sample("forkd_worker_lag_seconds", labels, worker.row[Field.LAG] / 1e9)
            if (pss := memory[worker.pid][1]) is not None:
                yield Sample("forkd_worker_pss_bytes", labels, pss)

    def memory_of(self, workers: Iterable[int]) -> dict[int, tuple[int | None, int | None]]:
        """RSS and PSS of all workers, by pid, as `process.memory_of` has them. Those are asked again first that were
        asked for longest ago, as far as there is time; the others have what they had then.
        """
        known, now = self._memory, time.monotonic()
        self._memory = {pid: known.get(pid, (-_MEMORY_SECONDS, (None, None))) for pid in workers}
        for pid, (asked_at, _) in sorted(self._memory.items(), key=lambda one: one[1][0]):
            if now - asked_at < _MEMORY_SECONDS or time.monotonic() - now > _MEMORY_BUDGET:
                break
            self._memory[pid] = now, memory_of(pid)
        return {pid: memory for pid, (_, memory) in self._memory.items()}

    def _counts(self) -> Iterator[Sample]:
        """What workers have counted."""
        for slot, counts in sorted(totals_by_slot(self._state).items()):
            for field in COUNTERS:
                value = counts[field.name.lower()]
                if field in _PLAIN:
                    yield Sample(_PLAIN[field], (str(slot),), value)
                else:
                    group, _, reason = field.name.partition("_")
                    yield Sample(_BY_REASON[group], (str(slot), reason.lower()), value)

    def _served(self) -> Iterator[Sample]:
        """What workers have counted for each listener."""
        for name, counts in sorted(self._state.pool.listener_counts().items()):
            where = (name,)
            opened, closed, came, went, microseconds = counts[: ListenerField.FIRST_DURATION]
            durations = counts[ListenerField.FIRST_DURATION : ListenerField.FIRST_SIZE]
            yield Sample("forkd_listener_connections", where, max(0, opened - closed))
            yield Sample("forkd_listener_connections_served", where, opened)
            yield Sample("forkd_received_bytes", where, came)
            yield Sample("forkd_sent_bytes", where, went)
            lasted = _cumulated(DURATION_BOUNDS, durations)
            yield Sample("forkd_connection_duration_seconds", where, microseconds / 1e6, lasted)
            sizes = _cumulated(SIZE_BOUNDS, counts[ListenerField.FIRST_SIZE :])
            yield Sample("forkd_connection_size_bytes", where, came + went, sizes)

    def _listeners(self) -> Iterator[Sample]:
        generation = self._state.generation
        for place, bound in enumerate(generation.bound):
            if any(sock.fileno() < 0 for sock in bound.sockets):  # the daemon stops
                continue
            where, found = (str(bound.address),), listener_status(bound)
            for key, name in (("queue", "forkd_listener_queue"), ("queue_limit", "forkd_listener_queue_limit")):
                if (value := found[key]) is not None:
                    yield Sample(name, where, value)
            sockets = sum(os.fstat(sock.fileno()).st_ino for sock in bound.sockets)
            for key in ("drops", "resets"):
                if (value := found[key]) is not None:
                    value = self._with_former(f"{key} {where[0]}", value, sockets)
                    yield Sample(f"forkd_listener_{key}", where, value)
            if (most := bound.listener.limits.most(self._state.wanted)) < inf:
                yield Sample("forkd_listener_connections_limit", where, most)
            expiries = {str(one["file"]): one["expires"] for one in generation.certificates.told_of(place)}
            for file, expires in expiries.items():
                yield Sample("forkd_certificate_expiry_timestamp_seconds", (*where, file), expires)

    def _with_former(self, key: str, value: int, sockets: int) -> int:
        """What sockets have counted, with what those had that were there before them and began at 0.

        Args:
            key: what is counted, and where.
            value: what the sockets have counted.
            sockets: a number that is another one for other sockets.
        """
        kept = self._state.kept_counts
        last, before = kept.get(f"last {key}", 0), kept.get(f"before {key}", 0)
        if value < last and kept[f"sockets {key}"] != sockets:
            before += last
        if len(kept) < _MOST_KEPT or f"last {key}" in kept:
            kept.update({f"last {key}": value, f"before {key}": before, f"sockets {key}": sockets})
        return before + value
