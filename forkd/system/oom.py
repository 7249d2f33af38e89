"""The kernel's out-of-memory killer: whether it has struck in this process's control group (cgroups(7)).

It kills by SIGKILL, which tells nobody who sent it; the group's count of such kills does.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_GROUPS = Path("/proc/self/cgroup")  # which groups this process is in


def oom_kills() -> int | None:
    """Processes of this control group that the kernel has killed for lack of memory; None where that is not counted."""
    for path in _counters():
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
            return int(fields["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None


def _counters() -> Iterator[Path]:
    """Where the count may stand: by version 2 of control groups, by version 1; a container sees its own as the root."""
    try:
        lines = _GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        for inside in (group.lstrip("/"), ""):
            if not controllers:
                yield _ROOT / inside / "memory.events"
            elif "memory" in controllers.split(","):
                yield _ROOT / "memory" / inside / "memory.oom_control"
