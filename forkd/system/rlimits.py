"""Resource limits of the workers (setrlimit(2)).

The master raises hard limits as far as it can (`raise_limits`), and each worker sets its own (`set_limits`). A limit
that can't be had is told in a sentence, and the daemon serves with less.
"""

from __future__ import annotations

import resource
from pathlib import Path

from forkd.config.settings import Rlimits, Settings
from forkd.config.units import show_size
from forkd.config.values import UNLIMITED
from forkd.errors import system_reason
from forkd.system.capabilities import Capability, has_capability

#: About how many descriptors a worker needs beside those of its connections.
RESERVED_DESCRIPTORS = 64

_RESOURCES = {
    "nofile": resource.RLIMIT_NOFILE,
    "core": resource.RLIMIT_CORE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "address_space": resource.RLIMIT_AS,
}


def raise_limits(wanted: Rlimits) -> list[str]:
    """Raises this process's hard limits to those of the settings where they are below, so that its children can have
    them, and the soft limit of descriptors with the hard one.

    Returns:
        For each that can't be had a sentence with what was wanted and what there is.
    """
    warnings = []
    for name, number in _RESOURCES.items():
        value = _value(wanted, name)
        if value is not None and not _raise_hard(number, value):
            there = resource.getrlimit(number)[1]
            warnings.append(
                f"rlimits.{name}: wanted {_show(name, value)}, there is {_show(name, there)}: the hard limit that "
                "forkd was started with, which root alone (CAP_SYS_RESOURCE) may raise"
            )
    try:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # Python raises ValueError for EPERM and EINVAL
        warnings.append(
            f"rlimits.nofile: can't be raised to the hard limit, {_show('nofile', hard)}: {system_reason(error)}"
        )
    return warnings


def descriptor_warnings(settings: Settings) -> list[str]:
    """A sentence where a worker can't have the descriptors that the limits of its listeners allow it to need."""
    connections = sum(listener.limits.per_worker for listener in settings.listen)
    needed = connections + RESERVED_DESCRIPTORS
    wanted, hard = _value(settings.rlimits, "nofile"), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    there = hard if wanted is None or (0 <= hard < wanted and not has_capability(Capability.SYS_RESOURCE)) else wanted
    if not connections or there == UNLIMITED or there >= needed:
        return []
    return [
        f"limits.per_worker: wants {connections} connections of one worker, which may have {there} descriptors, of "
        f"which it needs about {RESERVED_DESCRIPTORS} itself: more clients wait in the backlog; see rlimits.nofile"
    ]


def set_limits(wanted: Rlimits) -> None:
    """Sets this process's limits, soft and hard, to those of the settings, or as near as the hard ones let it.

    Raises:
        OSError: one can't be set though it is no more than the hard limit.
    """
    for name, number in _RESOURCES.items():
        value = _value(wanted, name)
        if value is None:
            continue
        if not _raise_hard(number, value):
            value = resource.getrlimit(number)[1]
        try:
            resource.setrlimit(number, (value, value))
        except ValueError as error:
            raise OSError(0, f"rlimits.{name}: {error}") from None
        if resource.getrlimit(number) != (value, value):
            raise OSError(0, f"rlimits.{name} is {resource.getrlimit(number)} after it was set to {value}")


def _value(wanted: Rlimits, name: str) -> int | None:
    value: int | None = getattr(wanted, name)
    if name == "nofile" and value == UNLIMITED:  # the kernel has no such number of descriptors
        return _system_wide_most()
    return value


def _system_wide_most() -> int:
    try:
        return int(Path("/proc/sys/fs/nr_open").read_text())
    except (OSError, ValueError):
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _raise_hard(number: int, value: int) -> bool:
    """Raises a hard limit where it is below a value; whether it is as high as that now."""
    soft, hard = resource.getrlimit(number)
    if hard == UNLIMITED or (value != UNLIMITED and value <= hard):
        return True
    try:
        resource.setrlimit(number, (soft, value))
    except (OSError, ValueError):
        return False
    return True


def _show(name: str, value: int) -> str:
    if value == UNLIMITED:
        return "unlimited"
    return str(value) if name == "nofile" else show_size(value)
