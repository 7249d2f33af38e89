"""The next deadline of many exchanges, in one heap that is looked at lazily.

An exchange whose deadline moves away leaves its entry where it is; when that comes up, the exchange is looked at and
gets a new one. So a packet that only puts a deadline off costs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush


class Alarms:
    """When to look at which exchange (by its number) again."""

    __slots__ = ("_at", "_heap")

    def __init__(self) -> None:
        self._at: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def want(self, key: int, at: float) -> None:
        """Has an exchange looked at no later than that."""
        if at < self._at.get(key, float("inf")):
            self._at[key] = at
            heappush(self._heap, (at, key))

    def forget(self, key: int) -> None:
        self._at.pop(key, None)

    @property
    def next(self) -> float | None:
        """When the next one is due; None without any."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[int]:
        """Those whose time has come, each once; who is to be looked at again has to be wanted again."""
        while (at := self.next) is not None and at <= now:
            _, key = heappop(self._heap)
            del self._at[key]
            yield key
