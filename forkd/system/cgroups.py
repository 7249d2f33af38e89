"""What the control groups of this process say (cgroups(7)), of either version: the share of the processors that they
leave it, and how many of their processes the kernel's out-of-memory killer has killed.

Where the system lacks something, a function returns what its docstring says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction

CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_CGROUP = Path("/proc/self/cgroup")  # which groups this process is in

#: By the version's type of file system: the files of a group that hold quota and period, in microseconds.
_QUOTA_FILES = {"cgroup": ("cpu.cfs_quota_us", "cpu.cfs_period_us"), "cgroup2": ("cpu.max",)}

_PROC = Path("/proc/self")

_ESCAPED = re.compile(r"\\([0-7]{3})")


def processors() -> int:
    """How many processors this process may use: those that it may run on (sched_getaffinity(2)), or as many as its
    control groups leave it the time of, rounded up, where that is less.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return count if quota is None else min(count, ceil(quota))


def oom_kills() -> int | None:
    """How many processes of this control group the kernel's out-of-memory killer has killed (cgroups(7)); None where
    that is not counted. It kills by SIGKILL without a sender; this count is how such a death is recognized.
    """
    for path in _oom_count_files():
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
            return int(fields["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return None


def _oom_count_files() -> Iterator[Path]:
    """Files that may have the count, by version 2 or 1 of control groups; a container sees its own one as the root."""
    try:
        lines = PROC_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        for inside in (group.lstrip("/"), ""):
            if not controllers:
                yield CGROUP_ROOT / inside / "memory.events"
            elif "memory" in controllers.split(","):
                yield CGROUP_ROOT / "memory" / inside / "memory.oom_control"


# The share of the processors


def cpu_quota() -> Fraction | None:
    """Processors whose time this process's groups may use; None where there is no quota.

    A quota holds for a group and for all below it, so each group is looked at, from the process's own up to the one
    that is mounted (a container sees no more than that), and the least counts.
    """
    found = []
    try:
        groups = [*group_directories((_PROC / "cgroup").read_text(), (_PROC / "mountinfo").read_text())]
    except OSError:
        return None
    for kind, directory in groups:
        try:
            text = " ".join((directory / name).read_text() for name in _QUOTA_FILES[kind])
        except OSError:  # the topmost group has no quota, nor has one without this controller
            continue
        if (quota := parse_quota(text)) is not None:
            found.append(quota)
    return min(found, default=None)


def parse_quota(text: str) -> Fraction | None:
    """The quota in processors; None where there is none.

    Args:
        text: quota and period, as `cpu.max` has them, or the two files of version 1 in this order.
    """
    match text.split():
        case [quota, period] if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
            from fractions import Fraction  # noqa: PLC0415 (most have no quota)

            return Fraction(int(quota), int(period))
    return None  # "max", or -1 in version 1


def group_directories(groups: str, mounts: str) -> Iterator[tuple[str, Path]]:
    """The directories of the groups that a process is in, each followed by those above it, with the type of their file
    system.

    Args:
        groups: /proc/PID/cgroup.
        mounts: /proc/PID/mountinfo (proc(5)).
    """
    paths = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif "cpu" in controllers.split(","):
            paths["cgroup"] = path
    for line in mounts.splitlines():
        mount, _, (kind, _, options, *_) = (part.split() for part in line.partition(" - "))
        if kind not in paths or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        root, where = (_ESCAPED.sub(lambda match: chr(int(match[1], 8)), field) for field in mount[3:5])
        inside = Path(paths[kind])
        # A container may see its own group as the topmost one, or have only that one mounted.
        below = inside.relative_to(root) if inside.is_relative_to(root) and ".." not in inside.parts else Path()
        for directory in (below, *below.parents):
            yield kind, Path(where) / directory
