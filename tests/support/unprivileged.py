"""Daemons of root whose workers run as an unprivileged user, for tests of what those can and can't do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.daemon import Daemon, Harness

NOBODY = 65534
GROUP = 4321
AS_NOBODY = (f"user={NOBODY}", f"group={GROUP}")


def unprivileged_daemon(
    harness: Harness, *settings: str, handler: str | None = "hostile:Hostile", **more: Any
) -> Daemon:
    return harness.daemon(target=handler, settings=(*AS_NOBODY, *settings), **more)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


def limit_of(pid: int, name: str) -> list[str]:
    text = Path(f"/proc/{pid}/limits").read_text()
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()[:2]


def order_worker(harness: Harness, daemon: Daemon | str, *order: object) -> Any:
    """Has a worker of `handlers/hostile.py` do something; its answer."""
    with harness.connect(daemon) as sock, sock.makefile("rb") as lines:
        sock.sendall(json.dumps(order).encode() + b"\n")
        return json.loads(lines.readline())


def check_unchanged(daemon: Daemon, master: int, workers: dict[int, int]) -> None:
    """That the daemon runs, with the same master and workers."""
    assert daemon.command("status").returncode == 0
    assert (daemon.pid, daemon.workers()) == (master, workers)
