"""Resource limits of the workers (setrlimit(2)): raised as far as they can be, told where they can't."""

from __future__ import annotations

import resource
from pathlib import Path

from forkd.config.options import Rlimits, Settings
from forkd.config.scales import show_size
from forkd.config.units import UNLIMITED
from forkd.system.capabilities import Capability, has_capability

#: Descriptors that a worker has need of beside its connections', about.
RESERVED = 64

_NUMBERS = {
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
    lacking = []
    for name, number in _NUMBERS.items():
        value = _value(wanted, name)
        if value is not None and not _raise_hard(number, value):
            there = resource.getrlimit(number)[1]
            lacking.append(
                f"rlimits.{name}: wanted {_shown(name, value)}, there is {_shown(name, there)}: the hard limit that "
                "forkd was started with, which root alone (CAP_SYS_RESOURCE) may raise"
            )
    try:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # ValueError is how Python tells of EPERM and EINVAL
        lacking.append(f"rlimits.nofile: can't be raised to the hard limit, {_shown('nofile', hard)}: {error}")
    return lacking


def lacking_files(settings: Settings) -> list[str]:
    """A sentence where a worker can't have the descriptors that the limits of its listeners allow it to need."""
    needed = sum(listener.limits.per_worker for listener in settings.listen) + RESERVED
    wanted, hard = _value(settings.rlimits, "nofile"), resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    there = hard if wanted is None or (0 <= hard < wanted and not has_capability(Capability.SYS_RESOURCE)) else wanted
    if needed == RESERVED or there == UNLIMITED or there >= needed:
        return []
    return [
        f"limits.per_worker: wants {needed - RESERVED} connections of one worker, which may have {there} descriptors, "
        f"of which it needs about {RESERVED} itself: more clients wait in the backlog; see rlimits.nofile"
    ]


def set_limits(wanted: Rlimits) -> None:
    """Sets this process's limits, soft and hard, to those of the settings, or as near as the hard ones let it.

    Raises:
        OSError: one can't be set though it is no more than the hard limit.
    """
    for name, number in _NUMBERS.items():
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
    if name == "nofile" and value == UNLIMITED:  # the kernel knows no such number of descriptors
        return _most_files()
    return value


def _most_files() -> int:
    try:
        return int(Path("/proc/sys/fs/nr_open").read_text())
    except (OSError, ValueError):
        return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def _raise_hard(number: int, value: int) -> bool:
    """Whether the hard limit is, maybe now, as high as that."""
    soft, hard = resource.getrlimit(number)
    if hard == UNLIMITED or (value != UNLIMITED and value <= hard):
        return True
    try:
        resource.setrlimit(number, (soft, value))
    except (OSError, ValueError):
        return False
    return True


def _shown(name: str, value: int) -> str:
    if value == UNLIMITED:
        return "unlimited"
    return str(value) if name == "nofile" else show_size(value)
