"""What the master reports of itself: `forkd status`, the service manager's status line, where clients are to be found.

Every function takes the `DaemonState` and returns data fit for JSON; nothing here changes anything. Keys of what is
returned are part of `forkd status --json`, and stay.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import inf
from typing import Any

from forkd import __version__
from forkd.compiled import hot_path
from forkd.config.settings import Settings
from forkd.errors import escaped
from forkd.master.spawn import HELPER, Worker
from forkd.master.state import DaemonState
from forkd.master.workers import CAUSES, EXPECTED
from forkd.messages import ClientsReply, shorten
from forkd.states import MasterState, WorkerState
from forkd.system.listeners import BoundListener
from forkd.system.logs import log_lines_lost, log_target
from forkd.system.scoreboard import COUNTERS, REGION_SIZE, Field, beat_seconds, counters_of
from forkd.system.socket_stats import accept_queue_of, listen_counters, split_drops

#: Heartbeats that a worker may miss before it is shown as stuck; it is killed only after `stall_timeout`.
STUCK_BEATS = 3

_MOST_REASON = 20_000  # bytes: there may be one for each worker

_MOST_CLAIMED = 1 << 63  # of a worker's number, which has to be less

#: The states in which a worker's loop is to run.
_BEATING = (WorkerState.SERVING, WorkerState.DRAINING, WorkerState.CLOSING)


def status(state: DaemonState, change: str) -> dict[str, Any]:
    """The state of the daemon, fit for JSON; ages are in seconds, times since the epoch.

    Args:
        state: the master's.
        change: the verb of the change that is under way.
    """
    certificates = state.generation.certificates
    listeners = [
        {**listener_status(bound), "certificates": certificates.told_of(place)}
        for place, bound in enumerate(state.generation.bound)
    ]
    services = [{"address": str(one.address), "role": one.listener.handler} for one in state.generation.services]
    told = {"listeners": listeners, "services": services, "deaths": list(state.pool.exit_records)}
    return {**_summary(state, change), **told}


def why_not_ready(state: DaemonState) -> str:
    """Why the daemon should get no clients now, in a sentence; empty where it should. `/ready`, the agent check and
    `forkd status` all say this.

    A worker counts when it serves and its loop has run lately; those of a former generation don't.
    """
    if state.master_state is not MasterState.RUNNING:
        return f"the daemon is {state.master_state.value}"
    if state.drained:
        return "the daemon is drained, by forkd drain"
    settings, now = state.generation.settings, time.monotonic()
    serving = [
        one
        for one in state.workers.values()
        if one.state is WorkerState.SERVING and one.generation == state.generation.number and one.slot <= state.wanted
    ]
    # For as long as the machine slept no loop has run.
    stuck = [one for one in serving if _is_stuck(one, settings, now, state.awake_since)]
    needed = min(settings.admin.ready_workers, state.wanted)
    if len(serving) - len(stuck) < needed:
        told = f"{len(serving) - len(stuck)} workers serve, and ready_workers is {needed}"
        return f"{told}; stuck: {', '.join(one.name for one in stuck)}" if stuck else told
    return "; ".join(_listener_faults(state))


def is_leaving(state: DaemonState) -> bool:
    """Whether new clients should go elsewhere, as the daemon stops or an operator has said so, and those that are here
    may stay.
    """
    return state.master_state.ends or state.drained


def _summary(state: DaemonState, change: str) -> dict[str, Any]:
    """That part of it which needs no question to the kernel."""
    now = time.monotonic()
    settings = state.generation.settings
    workers = sorted((one for one in state.workers.values() if one.slot != HELPER), key=lambda w: (w.slot, w.pid))
    serving = {w.slot for w in workers if w.state is WorkerState.SERVING and w.generation == state.generation.number}
    missing = set(range(1, state.wanted + 1)) - serving
    reasons = [_why_missing(state, slot, now) for slot in sorted(missing)] + _listener_faults(state)
    degraded = state.master_state is MasterState.RUNNING and bool(reasons)
    return {
        "name": settings.name,
        "pid": os.getpid(),
        "version": __version__,
        "hot_path": hot_path(),
        "source": state.launch.source,
        "directory": state.launch.directory,
        "run_directory": state.launch.run_directory,
        "state": "degraded" if degraded else state.master_state.value,
        "reason": shorten("; ".join(reasons), _MOST_REASON) if degraded else "",
        "not_ready": why_not_ready(state),
        "drained": state.drained,
        "change": change,
        **_changes(state),
        "generation": state.generation.number,
        "started": state.started,
        "log": str(log_target(settings, detached=state.launch.detached) or "stderr"),
        "foreground": not state.launch.detached,
        "wanted": state.wanted,
        "boot_timeout": settings.boot_timeout,
        "serving": len(serving),
        "workers": [_worker(worker, settings, now) for worker in workers],
        "totals": _totals(state),
        "death_counts": {
            EXPECTED: state.pool.exit_counts[EXPECTED],
            "unexpected": {cause: state.pool.exit_counts[cause] for cause in CAUSES},
        },
        "log_lines_lost": log_lines_lost(),
    }


def _changes(state: DaemonState) -> dict[str, Any]:
    """How reloads and upgrades went: the last that failed, until another does not; the last that did not; how many."""
    text, failed_at, done_at = state.change_failure, state.change_failed_at, state.changed_at
    return {
        "last_failure": {"time": failed_at, "text": text} if text else None,
        "last_success": {"time": done_at, "generation": state.generation.number} if done_at else None,
        "change_counts": {result: state.change_counts[result] for result in ("success", "failure")},
        "refusal": text,  # the former name of the text
    }


def _listener_faults(state: DaemonState) -> list[str]:
    """What is wrong with listeners, each as a sentence."""
    faults = []
    for bound in state.generation.bound:
        if fault := state.listener_faults.get(str(bound.address)):
            faults.append(fault)
        elif bound.is_lost:
            faults.append(f"the path of {bound.address} is gone (it is made again in a moment)")
    return faults


def clients_of(state: DaemonState) -> ClientsReply:
    """Where the clients of the daemon are to be found: its workers, and its listeners, with those that were closed
    while a worker had clients of them.
    """
    workers = [one for one in state.workers.values() if one.slot != HELPER]
    places = [bound.endpoints() for bound in state.generation.bound]
    for former in (place for worker in workers for place in worker.closed_listeners):
        if former not in places:
            places.append(former)
    return ClientsReply(
        pid=os.getpid(),
        workers=[{"slot": one.slot, "pid": one.pid, "row": one.row.index} for one in workers],
        listeners=[place for place in places if place["sockets"]],
        datagrams=[str(bound.address) for bound in state.generation.bound if bound.address.takes_datagrams],
        region_size=REGION_SIZE,
    )


def status_line(state: DaemonState, change: str) -> str:
    """The state of the daemon in one line, for a service manager."""
    found = _summary(state, change)
    serving = f"{found['serving']} of {found['wanted']} workers"
    parts = [f"{found['state']}: {serving}, {client_count(state)} clients", found["reason"]]
    parts += ["drained" * state.drained, f"{change} is under way" if change else found["refusal"]]
    return escaped("; ".join(filter(None, parts)))


def client_count(state: DaemonState) -> int:
    """How many connections are open, in all workers, as these claim."""
    return sum(max(0, one.row.active) for one in state.workers.values() if one.slot != HELPER)


def _why_missing(state: DaemonState, slot: int, now: float) -> str:
    """Why no worker serves in a slot: why its last one ended, and when the next one comes."""
    records = reversed([*state.pool.exit_records])
    record = next((one for one in records if one["slot"] == slot and not one["expected"]), None)
    text = f"worker {slot}"
    if record is not None:
        text += f" has ended: {record['exit']}" + (f", {record['cause']}" if record["cause"] else "")
    booting = any(one.slot == slot and one.state is WorkerState.BOOTING for one in state.workers.values())
    recent = state.pool.slots[state.generation.number].get(slot)
    wait = 0.0 if recent is None else max(0.0, recent.retry_at - now)
    return f"{text} ({'the next one boots' if booting else f'the next one comes in {wait:.1f} s'})"


def listener_status(bound: BoundListener) -> dict[str, Any]:
    """What the kernel and the settings say of a listener."""
    queues = [accept_queue_of(sock) for sock in bound.sockets]
    drops, resets = _sum(queue.drops for queue in queues), None
    if drops is not None and not bound.address.takes_datagrams:
        drops, resets = split_drops(drops, bound.counted_before, listen_counters())
    return {
        "address": str(bound.address),
        "handler": bound.listener.served_by,
        "backlog": bound.listener.backlog,
        "queue": _sum(queue.waiting for queue in queues),
        "queue_limit": _sum(queue.limit for queue in queues),
        "drops": drops,
        "resets": resets,
        "limit": bound.listener.limits.connections or None,
    }


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum of those that are known; None where none is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _totals(state: DaemonState) -> dict[str, Any]:
    """What workers have counted since the daemon was started, those that have ended included."""
    return _sorted(sum(totals_by_slot(state).values(), Counter()))


def totals_by_slot(state: DaemonState) -> dict[int, Counter[str]]:
    """The same for each slot, by field."""
    found = {slot: Counter(counts) for slot, counts in state.pool.exited_totals.items()}
    for worker in state.workers.values():
        if worker.slot != HELPER:
            found.setdefault(worker.slot, Counter()).update(counters_of(worker.row))
    return found


def _sorted(counts: Mapping[str, int]) -> dict[str, Any]:
    """What was counted, with refusals and ends of connections by reason."""
    found: dict[str, Any] = {}
    for field in COUNTERS:
        name = field.name.lower()
        group, _, reason = name.partition("_")
        if reason:
            found.setdefault(group, {})[reason] = counts.get(name, 0)
        else:
            found[name] = counts.get(name, 0)
    return found


def heartbeat_age(worker: Worker, now: float) -> float | None:
    """Seconds since the loop of a worker last ran; None where it has not run yet."""
    heartbeat = worker.row[Field.HEARTBEAT] / 1e9
    return round(max(0.0, now - heartbeat), 3) if heartbeat > 0 else None


def _is_stuck(worker: Worker, settings: Settings, now: float, awake_since: float = -inf) -> bool:
    """Whether a worker's loop, which should run, has missed its heartbeats since then."""
    age = heartbeat_age(worker, now)
    beat = beat_seconds(settings.stall_timeout if worker.stall_timeout is None else worker.stall_timeout)
    return worker.state in _BEATING and age is not None and min(age, now - awake_since) > STUCK_BEATS * beat


def shown_state(worker: Worker, settings: Settings, now: float) -> str:
    """A worker's state in a word."""
    return "stuck" if _is_stuck(worker, settings, now) else worker.state.value


def _worker(worker: Worker, settings: Settings, now: float) -> dict[str, Any]:
    row = worker.row
    return {
        "slot": worker.slot,
        "pid": worker.pid,
        "generation": worker.generation,
        "state": shown_state(worker, settings, now),
        "heartbeat_age": heartbeat_age(worker, now),
        "age": round(now - worker.forked_at, 3),
        # A worker writes its row itself, so what stands there is what it claims.
        "clients": max(0, row.active),
        **_sorted(counters_of(row)),
        "lag": round(row[Field.LAG] / 1e9, 6),
    }


def peers_of(slot: int, pid: int, claim: object) -> Iterator[dict[str, Any]]:
    """What a worker claims of the latest peers of its datagram sockets, as far as it is of the right form."""
    for one in claim if isinstance(claim, list) else ():
        match one:
            case [str(listener), str(peer), float() | int() as age, float() | int() as idle, int(came), int(gone)] if (
                all(0 <= number < _MOST_CLAIMED for number in (age, idle, came, gone))
            ):
                yield {
                    "worker": slot,
                    "pid": pid,
                    "listener": shorten(listener, 200),
                    "client": shorten(peer, 200),
                    "age": age,
                    "idle": idle,
                    "datagrams_in": came,
                    "datagrams_out": gone,
                }
