"""What a handler counts and measures, told with the daemon's own metrics by `admin`'s /metrics:

    from forkd import metrics

    LOGINS = metrics.Counter("chat_logins", "Users that have logged in.", ["result"])
    ROOMS = metrics.Gauge("chat_rooms", "Rooms with somebody in them.")
    WAITING = metrics.Histogram("chat_wait_seconds", "Time until a message was sent.")

    LOGINS.labels("refused").inc()
    ROOMS.inc(); ROOMS.dec()
    WAITING.observe(0.02)

Declare them at import. The values of all workers are added up, gauges too; what a worker had counted stays when it
ends, but for its gauges. They are kept in memory that the worker shares with the master, so a change is a store: no
lock, no file, no message. Threads of a worker may use them; a process that a handler forks counts for itself alone. So
does everything that is no worker, as a test of a handler, where `value` tells what was counted.

Keep `labels(...)` where it is used often: it looks up what was made before, or makes it. A worker has room for about
1,500 sets of labels. So no label should be what clients choose, such as their address.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable
from math import inf, isfinite
from typing import Any, Self

from forkd import worker
from forkd.errors import ForkdError
from forkd.system.handler_metrics import (
    COUNTER,
    GAUGE,
    HISTOGRAM,
    LABEL_NAME,
    METRIC_NAME,
    MOST_BUCKETS,
    MOST_LABELS,
    MetricCells,
    Series,
    without_surrogates,
)

#: Upper bounds of a histogram's buckets unless it has its own: for seconds, from 1 ms to 10 s.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class MetricsError(ForkdError):
    """A metric that can't be: its name, its labels, or there is no room for it."""


class _LabelsMissing:
    """In the place of the cells of a metric with labels, which has no value itself."""

    def __init__(self, name: str, labels: tuple[str, ...]) -> None:
        self._why = f"metric {name} has labels ({', '.join(labels)}): use labels(...) first"

    def __setitem__(self, at: int, value: float) -> None:
        raise MetricsError(self._why)


class _Registry:
    """All metrics of this process, and where their values are."""

    def __init__(self) -> None:
        self.cells = MetricCells(worker.shared_region())
        self.metrics: dict[str, _Metric] = {}
        self.series: dict[Series, _Metric] = {}
        self.lock = threading.RLock()  # of what is added; a change of a value needs none

    def place(self, one: _Metric, series: Series) -> None:
        """Makes room for a series. Raises MetricsError."""
        with self.lock:
            try:
                one._at = self.cells.add(series, one._doc)
            except OverflowError as error:
                raise MetricsError(
                    f"no room for metric {series.name} with labels {dict(series.labels)}: {error}; "
                    "use fewer metrics, or labels with fewer values"
                ) from None
            one._cells = self.cells.values
            self.series[series] = one

    def begin(self) -> None:
        """Counts from zero, in other memory: this is another process than the one in which they were declared."""
        self.lock = threading.RLock()  # a thread of that one may have had it
        self.cells = MetricCells(worker.shared_region())
        for series, one in list(self.series.items()):
            one._reset()
            self.place(one, series)


class _Metric:
    """One metric; or, of one with labels, its part with one set of their values."""

    __slots__ = ("_at", "_cells", "_children", "_doc", "_labels", "_name", "_value")

    _kind = ""

    def __init__(self, name: str, doc: str, labels: Iterable[str] = ()) -> None:
        self._name = name = _checked_name(name, self._kind)
        self._doc, self._labels = doc, _checked_labels(name, labels)
        self._children: dict[tuple[str, ...], Self] = {}
        self._value = 0.0
        self._at = 0
        self._cells: Any = _LabelsMissing(name, self._labels)
        if not self._labels:
            _registry.place(self, self._series(()))
        _registry.metrics[name] = self

    def labels(self, *values: object, **named: object) -> Self:
        """The part with these values of the labels, in their order or by their names, as texts.

        Raises:
            MetricsError: they are others than those declared, or there is no room for one more.
        """
        if named:
            if values or set(named) != set(self._labels):
                raise MetricsError(f"metric {self._name} has the labels {', '.join(self._labels) or 'none'}")
            values = tuple(named[label] for label in self._labels)
        key = tuple(map(str, values))
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = self._new_child(key)
        return child

    def _new_child(self, key: tuple[str, ...]) -> Self:
        if not self._labels or len(key) != len(self._labels):
            raise MetricsError(f"metric {self._name} has the labels {', '.join(self._labels) or 'none'}")
        told = tuple(map(without_surrogates, key))
        with _registry.lock:  # another thread may make the same
            if (child := self._children.get(told)) is None:
                child = type(self).__new__(type(self))
                child._name, child._doc, child._labels, child._children = self._name, self._doc, (), {}
                child._copy(self)
                _registry.place(child, self._series(told))
                self._children[told] = child
        return child

    def _series(self, values: tuple[str, ...]) -> Series:
        return Series(self._name, self._kind, tuple(zip(self._labels, values, strict=True)))

    def _copy(self, parent: Self) -> None:
        self._value = 0.0

    def _reset(self) -> None:
        self._value = 0.0

    @property
    def value(self) -> float:
        """What this process has counted."""
        return self._value


class Counter(_Metric):
    """What only grows. Prometheus shows it with `_total` after its name.

    Args:
        name: as Prometheus wants it; a `_total` at its end may stand there or not.
        doc: a sentence about it.
        labels: their names.

    Raises:
        MetricsError: it can't be; or there is one of this name.
    """

    __slots__ = ()

    _kind = COUNTER

    def inc(self, amount: float = 1.0) -> None:
        """Adds to it. Raises ValueError for less than 0."""
        if not 0 <= amount < inf:
            raise ValueError(f"counter {self._name} can't grow by {amount}")
        # No call stands between these two, so no other thread of the interpreter comes between them either.
        self._value = value = self._value + amount
        self._cells[self._at] = value


class Gauge(_Metric):
    """What goes up and down. Those of all workers are added up; what ends with a worker is not.

    Args:
        name, doc, labels: as of `Counter`.

    Raises:
        MetricsError: as of `Counter`.
    """

    __slots__ = ()

    _kind = GAUGE

    def set(self, value: float) -> None:
        """Makes it this much. Raises ValueError for what is no finite number; so do the others."""
        if not -inf < value < inf:
            raise ValueError(f"gauge {self._name} can't be {value}")
        self._value = value
        self._cells[self._at] = value

    def inc(self, amount: float = 1.0) -> None:
        """Adds to it."""
        if not -inf < amount < inf:
            raise ValueError(f"gauge {self._name} can't change by {amount}")
        self._value = value = self._value + amount
        self._cells[self._at] = value

    def dec(self, amount: float = 1.0) -> None:
        """Takes from it."""
        self.inc(-amount)


class Histogram(_Metric):
    """How many values of which size there were, and their sum.

    Args:
        name, doc, labels: as of `Counter`.
        buckets: their upper bounds, rising; one more is for what is above the last.

    Raises:
        MetricsError: as of `Counter`.
    """

    __slots__ = ("_bounds", "_counts", "_sum_at")

    _kind = HISTOGRAM

    def __init__(self, name: str, doc: str, labels: Iterable[str] = (), buckets: Iterable[float] = BUCKETS) -> None:
        self._bounds = _checked_buckets(name, buckets)
        self._reset()
        super().__init__(name, doc, labels)

    def observe(self, value: float) -> None:
        """Counts a value. Raises ValueError for what is no finite number."""
        if not -inf < value < inf:
            raise ValueError(f"histogram {self._name} can't count {value}")
        at = bisect_left(self._bounds, value)
        self._counts[at] = count = self._counts[at] + 1.0
        self._cells[self._at + at] = count
        self._value = total = self._value + value
        self._cells[self._at + self._sum_at] = total

    def _series(self, values: tuple[str, ...]) -> Series:
        return Series(self._name, self._kind, tuple(zip(self._labels, values, strict=True)), self._bounds)

    def _copy(self, parent: Self) -> None:
        self._bounds = parent._bounds
        self._reset()

    def _reset(self) -> None:
        self._value = 0.0
        self._counts = [0.0] * (len(self._bounds) + 1)
        self._sum_at = len(self._counts)

    @property
    def count(self) -> int:
        """How many values this process has counted; `value` is their sum."""
        return int(sum(self._counts))


def _checked_name(name: str, kind: str) -> str:
    if kind == COUNTER:
        name = name.removesuffix("_total")
    if not METRIC_NAME.fullmatch(name):
        raise MetricsError(f"metric {name!r}: its name is to be of letters, digits, _ and :, and begin with no digit")
    if name.startswith("forkd_"):
        raise MetricsError(f"metric {name}: names with forkd_ are the daemon's own; choose another")
    if name in _registry.metrics:
        raise MetricsError(f"metric {name} is declared twice: each has a name of its own")
    return name


def _checked_labels(name: str, labels: Iterable[str]) -> tuple[str, ...]:
    if isinstance(labels, str):
        raise MetricsError(f"metric {name}: labels are a list of names, not a text")
    found = tuple(labels)
    for label in found:
        if not LABEL_NAME.fullmatch(label) or label == "le":
            raise MetricsError(f"metric {name}: {label!r} can't be a label's name")
    if len(found) > MOST_LABELS or len(set(found)) < len(found):
        raise MetricsError(f"metric {name}: there are at most {MOST_LABELS} labels, each with a name of its own")
    return found


def _checked_buckets(name: str, buckets: Iterable[float]) -> tuple[float, ...]:
    found = tuple(float(bound) for bound in buckets if bound != inf)
    if not found or len(found) > MOST_BUCKETS or not all(map(isfinite, found)) or list(found) != sorted(set(found)):
        raise MetricsError(f"metric {name}: its buckets are to be rising numbers, at most {MOST_BUCKETS}")
    return found


def begin() -> None:
    """For a process that was just forked: what its parent had declared counts from zero, in memory of its own."""
    _registry.begin()


_registry = _Registry()
