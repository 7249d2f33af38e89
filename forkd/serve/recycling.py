"""When a worker has served enough: a rule alone, with no clock, socket or luck of its own."""

from __future__ import annotations

from typing import Protocol

#: Seconds under which luck makes no limit of age shorter.
_YOUNG = 1.0


class Limits(Protocol):
    """What one worker may come to, as the settings have it; 0: whatever it likes."""

    @property
    def connections(self) -> int:
        """Connections accepted."""

    @property
    def age(self) -> float:
        """Seconds since its birth."""

    @property
    def memory(self) -> int:
        """Bytes of resident memory."""

    @property
    def jitter(self) -> float:
        """The fraction by which luck may lower each of these."""


class Wear:
    """What one worker may come to, and whether it has.

    Args:
        limits: what is allowed at most.
        luck: from 0 to 1, drawn once for each worker, so that those that were born together do not end together.

    Attributes:
        connections, age, memory: the worker's own limits; 0: none.
    """

    __slots__ = ("age", "connections", "memory")

    def __init__(self, limits: Limits, luck: float) -> None:
        part = 1 - limits.jitter * luck
        self.connections = max(int(limits.connections * part), min(limits.connections, 1))
        self.age = max(limits.age * part, min(limits.age, _YOUNG))
        self.memory = max(int(limits.memory * part), min(limits.memory, 1))

    def begin(self, memory: int) -> str:
        """Hears what memory a worker has that has served nobody yet.

        If that is over the limit already, so will be that of whoever replaces it, and there would be no end to it: then
        the limit is dropped.

        Returns:
            The sentence that says so; empty when all is well.
        """
        if not 0 < self.memory < memory:
            return ""
        limit, self.memory = self.memory, 0
        return (
            f"recycle.memory is ignored: a worker that has served nobody has {_mebibytes(memory)} of memory, "
            f"and the limit is {_mebibytes(limit)}"
        )

    def worn(self, accepted: int, age: float, memory: int) -> str:
        """Why this worker has served enough; empty when it has not."""
        if 0 < self.connections <= accepted:
            return f"{accepted} connections, of {self.connections}"
        if 0 < self.age <= age:
            return f"{_duration(age)} old"
        if 0 < self.memory < memory:
            return f"{_mebibytes(memory)} of memory"
        return ""


def _mebibytes(size: int) -> str:
    return f"{size >> 20} MiB"


def _duration(seconds: float) -> str:
    """In hours and minutes, or below an hour in minutes and seconds; what is 0 is left out."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    parts = [(hour, "h"), (minute, "m")] if hour else [(minute, "m"), (second, "s")]
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"
