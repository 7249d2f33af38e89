"""What the master tells of itself: the answer to `forkd status`."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from forkd import __version__
from forkd.master.certificate import words_of
from forkd.master.spawn import HELPER, Worker
from forkd.master.state import State
from forkd.states import Life, Mode
from forkd.system.bound import BoundListener
from forkd.system.logs import escaped
from forkd.system.queues import queue_of
from forkd.system.scoreboard import COUNTERS, Field, counts_of


def status(state: State, change: str) -> dict[str, Any]:
    """The state of the daemon, fit for JSON; ages are in seconds, times since the epoch.

    Args:
        state: the master's.
        change: what is under way.
    """
    listeners = [_listener(bound) for bound in state.generation.bound]
    return {**_summary(state, change), "listeners": listeners, "deaths": list(state.crew.deaths)}


def _summary(state: State, change: str) -> dict[str, Any]:
    """That part of it which is there without asking the kernel."""
    now = time.monotonic()
    settings = state.generation.settings
    workers = sorted((one for one in state.workers.values() if one.slot != HELPER), key=lambda w: (w.slot, w.pid))
    serving = {w.slot for w in workers if w.life is Life.SERVING and w.generation == state.generation.number}
    missing = set(range(1, state.wanted + 1)) - serving
    degraded = state.mode is Mode.RUNNING and missing
    return {
        "name": settings.name,
        "pid": os.getpid(),
        "version": __version__,
        "state": "degraded" if degraded else state.mode.value,
        "reason": "; ".join(_why_missing(state, slot, now) for slot in sorted(missing)) if degraded else "",
        "change": change,
        "refusal": state.refusal,
        "generation": state.generation.number,
        "started": state.started,
        "wanted": state.wanted,
        "boot_timeout": settings.boot_timeout,
        "serving": len(serving),
        "workers": [_worker(worker, now) for worker in workers],
        "totals": _totals(state),
    }


def whereabouts(state: State) -> dict[str, Any]:
    """Where the clients of the daemon are to be found, fit for JSON: its workers, and its listeners, with those that
    were closed while a worker had clients of them.
    """
    workers = [one for one in state.workers.values() if one.slot != HELPER]
    places = [bound.places() for bound in state.generation.bound]
    for former in (place for worker in workers for place in worker.forsaken):
        if former not in places:
            places.append(former)
    return {
        "pid": os.getpid(),
        "workers": [{"slot": one.slot, "pid": one.pid, "row": one.row.index} for one in workers],
        "listeners": [place for place in places if place["sockets"]],
        "datagrams": [str(bound.address) for bound in state.generation.bound if bound.address.takes_datagrams],
    }


def status_line(state: State, change: str) -> str:
    """The state of the daemon in one line, for a service manager."""
    found = _summary(state, change)
    clients = sum(worker["clients"] for worker in found["workers"])
    words = [f"{found['state']}: {found['serving']} of {found['wanted']} workers, {clients} clients", found["reason"]]
    words.append(f"{change} is under way" if change else found["refusal"])
    return escaped("; ".join(filter(None, words)))


def _why_missing(state: State, slot: int, now: float) -> str:
    """Why nobody serves in a slot: what its last worker died of, and what is done about it."""
    death = next((one for one in reversed([*state.crew.deaths]) if one["slot"] == slot and not one["expected"]), None)
    words = f"worker {slot}"
    if death is not None:
        words += f" has ended: {death['exit']}" + (f", {death['cause']}" if death["cause"] else "")
    booting = any(one.slot == slot and one.life is Life.BOOTING for one in state.workers.values())
    luck = state.crew.slots[state.generation.number].get(slot)
    retry_at = now if luck is None else luck.retry_at
    wait = max(0.0, retry_at - now)
    return f"{words} ({'the next one boots' if booting else f'the next one comes in {wait:.1f} s'})"


def _listener(bound: BoundListener) -> dict[str, Any]:
    queues = [queue_of(sock) for sock in bound.sockets]
    return {
        "address": str(bound.address),
        "handler": bound.listener.handler,
        "backlog": bound.listener.backlog,
        "queue": _sum(queue.waiting for queue in queues),
        "queue_limit": _sum(queue.limit for queue in queues),
        "drops": _sum(queue.drops for queue in queues),
    }


def _sum(counts: Iterable[int | None]) -> int | None:
    """The sum of those that are known; None where none is."""
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _totals(state: State) -> dict[str, Any]:
    """What workers have counted since the daemon was started, the dead and the living together."""
    found = Counter(state.crew.buried)
    for worker in state.workers.values():
        found += Counter(counts_of(worker.row))
    return _sorted(found)


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


def _worker(worker: Worker, now: float) -> dict[str, Any]:
    row = worker.row
    return {
        "slot": worker.slot,
        "pid": worker.pid,
        "generation": worker.generation,
        "state": worker.life.value,
        "age": round(now - worker.born, 3),
        # A worker writes its row itself, so what stands there is what it claims.
        "clients": max(0, row.active),
        **_sorted(counts_of(row)),
        "lag": round(row[Field.LAG] / 1e9, 6),
    }


def peers_of(slot: int, pid: int, claim: object) -> Iterator[dict[str, Any]]:
    """What a worker claims of the latest peers of its datagram sockets, as far as it is of the right form."""
    for one in claim if isinstance(claim, list) else ():
        match one:
            case [str(listener), str(peer), float() | int() as age, float() | int() as idle, int(came), int(gone)]:
                yield {
                    "worker": slot,
                    "pid": pid,
                    "listener": words_of(listener, 200),
                    "client": words_of(peer, 200),
                    "age": age,
                    "idle": idle,
                    "datagrams_in": came,
                    "datagrams_out": gone,
                }
