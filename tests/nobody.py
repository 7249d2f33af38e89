"""Daemons of root's whose workers are nobody, for the tests of what those can and can't."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon, Harness
from needs import needs_python_for_all

NOBODY = 65534
GROUP = 4321
AS_NOBODY = (f"user={NOBODY}", f"group={GROUP}")


@pytest.fixture(name="place")
def places() -> Iterator[Path]:
    """A directory of root's that every user can get to, unlike pytest's own."""
    needs_python_for_all()
    with tempfile.TemporaryDirectory(prefix="forkd-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


@pytest.fixture(name="open_harness")
def harnesses(place: Path) -> Iterator[Harness]:
    with Harness(place).watch() as made:
        yield made


def daemon_of(harness: Harness, *settings: str, handler: str | None = "hostile:Hostile", **more: Any) -> Daemon:
    return harness.daemon(target=handler, settings=(*AS_NOBODY, *settings), **more)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: " ".join(value.split()) for name, _, value in (line.partition(":") for line in lines)}


def limit_of(pid: int, name: str) -> list[str]:
    text = Path(f"/proc/{pid}/limits").read_text()
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()[:2]


def tell(harness: Harness, daemon: Daemon | str, *deed: object) -> Any:
    """Has a worker do something; what it says of it."""
    sock = harness.connect(daemon)
    sock.sendall(json.dumps(deed).encode() + b"\n")
    with sock.makefile("rb") as lines:
        return json.loads(lines.readline())


def lives(daemon: Daemon, master: int, workers: dict[int, int]) -> None:
    assert daemon.command("status").returncode == 0
    assert (daemon.pid, daemon.workers()) == (master, workers)
