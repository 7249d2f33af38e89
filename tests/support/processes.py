"""Processes as the tests see them from outside: whether they live, what they are called, what memory they have.

`eventually` is the one place in the end-to-end tests that looks again and again; all else blocks with a deadline.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import TypeVar

#: Seconds within which anything that is to happen has happened, on a busy machine too.
DEADLINE = 20.0

T = TypeVar("T")


def eventually(condition: Callable[[], T | None], seconds: float = DEADLINE, *, what: str = "") -> T:
    """What `condition` returns once that is true; the only place that looks again and again."""
    deadline = monotonic() + seconds
    while not (value := condition()):
        assert monotonic() < deadline, f"{what or 'what was waited for'} did not happen within {seconds} s: {value!r}"
        select.select([], [], [], 0.02)
    return value


def stat_of(pid: int) -> tuple[str, int] | None:
    """A process's state letter and parent (proc_pid_stat(5)); None when it has gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, _ = text[text.rindex(b")") + 2 :].split(b" ", 2)
    return state.decode(), int(parent)


def parent_of(pid: int) -> int:
    stat = stat_of(pid)
    return stat[1] if stat else 0


def descendants(of: int) -> dict[int, str]:
    """All processes below one, with their state letters; `Z` is a zombie."""
    stats = {int(entry): stat_of(int(entry)) for entry in os.listdir("/proc") if entry.isdigit()}
    found: dict[int, str] = {}
    level = {of}
    while level:
        level = {pid for pid, stat in stats.items() if stat is not None and stat[1] in level}
        found.update({pid: stat[0] for pid, stat in stats.items() if stat is not None and pid in level})
    return found


def children(of: int) -> dict[int, str]:
    """A process's own, with their state letters."""
    return {pid: state for pid, state in descendants(of).items() if parent_of(pid) == of}


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    stat = stat_of(pid)
    return stat is not None and stat[0] != "Z"


def wait_end(pid: int, seconds: float = DEADLINE) -> None:
    """Returns when the process has ended, or fails."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        assert poll.poll(seconds * 1000), f"process {pid} ({title(pid)}) did not end within {seconds} s"
    finally:
        os.close(descriptor)


def title(pid: int) -> str:
    """What ps(1) shows of a process."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def resident(pid: int) -> int:
    """Bytes of a process's memory that no other process shares with it by a file (proc_pid_status(5), RssAnon)."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def has_another_owner(address: str) -> bool:
    """Whether a port that is in use is no socket's of this process and its children. Of tests that run at the same time
    one may get a port that another has just left, for a client too.
    """
    scheme, _, rest = address.partition("://")
    if not rest:
        return False
    port = f":{int(rest.rpartition(':')[2]):04X}"
    tables = [Path("/proc/net", scheme + version).read_text().splitlines()[1:] for version in ("", "6")]
    rows = [line.split() for table in tables for line in table]
    sockets = {f"socket:[{row[9]}]" for row in rows if row[1].endswith(port)}
    return sockets.isdisjoint(link for pid in (os.getpid(), *descendants(os.getpid())) for link in links_of(pid))


def links_of(pid: int) -> list[str]:
    """What the descriptors of a process lead to; nothing of one that has ended."""
    found = []
    with suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found.append(os.readlink(entry))
    return found
