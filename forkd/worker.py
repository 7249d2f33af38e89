"""The worker that a handler runs in, for handlers that want to know:

    from forkd import worker

    logging.info("worker %d of %s", worker.slot, worker.name)
    worker.loop.call_soon_threadsafe(callback)

* `slot`: its number, from 1 on; a worker that takes the place of another one has the same, for a moment beside it.
* `name`: the daemon's name.
* `generation`: the number of its generation, from 1 on, which is another one after each reload.
* `loop`: its event loop, also for threads.

All are known when the handlers are imported. In `forkd once` slot and generation are 1. Outside of a worker, as in the
master with `preload` and in tests of a handler, both are 0, the name is empty, and there is no loop. So ask for
`worker.slot` when it is wanted: what a module takes by `from forkd.worker import slot` stays what it was at its import.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    slot: int
    name: str
    generation: int
    loop: AbstractEventLoop


class _Process:
    """This process."""

    facts: dict[str, Any] = {"slot": 0, "name": "", "generation": 0}  # noqa: RUF012 (replaced, never changed)
    region: memoryview | None = None


def __getattr__(attribute: str) -> Any:
    try:
        return _Process.facts[attribute]
    except KeyError:
        why = "this process is no worker" if attribute == "loop" else "there is no such thing"
        raise AttributeError(f"forkd.worker.{attribute}: {why}") from None


def begin(*, slot: int, name: str, generation: int, loop: AbstractEventLoop, region: memoryview | None = None) -> None:
    """For the worker: this process is one, from now on.

    Args:
        slot, name, generation, loop: what handlers are told.
        region: memory that it shares with the master, where `forkd.metrics` counts; None: it is not shared.
    """
    _Process.facts = {"slot": slot, "name": name, "generation": generation, "loop": loop}
    share(region)


def share(region: memoryview | None) -> None:
    """For a process that was just forked: what memory it shares with the master, where `forkd.metrics` counts; None:
    it counts for itself alone.
    """
    _Process.region = region
    if (metrics := sys.modules.get("forkd.metrics")) is not None:  # its parent had imported it
        metrics.begin()


def shared_region() -> memoryview | None:
    """For `forkd.metrics`: the memory that this process shares with the master."""
    return _Process.region
