"""What handlers count and measure: cells in the last part of a worker's region, and lines that say what each is.

`MetricCells` is the side of the worker, which alone writes there. It adds a line for each series, in JSON, then makes
it known by storing how many bytes of lines there are; from then on a change of a value is one store. `read_series` is
the side of the master. It copies what a worker has written, and takes no word of it for granted.

A series is one metric with one set of labels. A counter or gauge has one cell; a histogram has one for each bucket, one
for what is above the last, and one for the sum.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from forkd.system.scoreboard import METRICS_AT, METRICS_SIZE, REGION_SIZE

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

#: Bytes of the lines, from the second cell on, and how many cells there are after them.
LINES_SIZE = METRICS_SIZE // 2
_CELLS_AT = 8 + LINES_SIZE
MOST_CELLS = (METRICS_SIZE - _CELLS_AT) // 8

#: Series of all workers together that the master keeps at most.
MOST_SERIES = 10_000

#: Bytes of a line, buckets of a histogram, labels of a metric, at most.
LONGEST_LINE, MOST_BUCKETS, MOST_LABELS = 4096, 100, 10

METRIC_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]{0,199}", re.ASCII)
LABEL_NAME = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]{0,99}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Series:
    """One metric with one set of labels.

    Attributes:
        name: of the metric, without the `_total` of a counter.
        kind: `COUNTER`, `GAUGE` or `HISTOGRAM`.
        labels: names and values, in the metric's order.
        buckets: upper bounds of a histogram's, in order, without infinity.
    """

    name: str
    kind: str
    labels: tuple[tuple[str, str], ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def shape(self) -> tuple[object, ...]:
        """What all series of a metric have in common."""
        return self.kind, tuple(name for name, _ in self.labels), self.buckets

    @property
    def cells(self) -> int:
        """How many it has."""
        return len(self.buckets) + 2 if self.kind == HISTOGRAM else 1


class MetricCells:
    """The part of one worker.

    Args:
        region: the worker's; None: memory of this process's own, which nobody reads.

    Attributes:
        values: all cells, as numbers of double precision.
    """

    def __init__(self, region: memoryview | None) -> None:
        part = memoryview(bytearray(METRICS_SIZE)) if region is None else region[METRICS_AT:REGION_SIZE]
        self._used = part[:8].cast("q")
        self._lines = part[8:_CELLS_AT]
        self.values = part[_CELLS_AT : _CELLS_AT + MOST_CELLS * 8].cast("d")
        self._next = 0
        self._end = 0

    def add(self, series: Series, doc: str) -> int:
        """Makes room for one more; the number of its first cell.

        Args:
            series: what it is.
            doc: a sentence about the metric.

        Raises:
            OverflowError: there is no room; it says of what.
        """
        said = asdict(series) | {"doc": doc, "at": self._next}
        line = json.dumps(said, separators=(",", ":")).encode() + b"\n"
        if len(line) > LONGEST_LINE:
            raise OverflowError(f"its labels and its sentence take {len(line)} bytes; {LONGEST_LINE} is the most")
        if self._end + len(line) > LINES_SIZE or self._next + series.cells > MOST_CELLS:
            raise OverflowError(f"the worker's memory for metrics is full: {self._next} values, {self._end} bytes")
        at, self._next = self._next, self._next + series.cells
        self._lines[self._end : self._end + len(line)] = line
        self._end += len(line)
        self._used[0] = self._end  # last: the line is whole when it is counted
        return at


@dataclass(slots=True)
class SeriesReader:
    """What is known of one worker's part.

    Attributes:
        index: of the worker's row.
        places: of each series the number of its first cell.
        docs: a sentence about each metric.
    """

    index: int
    places: dict[Series, int] = field(default_factory=dict)
    docs: dict[str, str] = field(default_factory=dict)
    _read: int = 0

    def values(self, regions: int) -> dict[Series, list[float]]:
        """What the worker has counted, as far as it is of the right form.

        Args:
            regions: a descriptor of the regions' memory.

        Raises:
            OSError: it can't be read.
        """
        start = self.index * REGION_SIZE + METRICS_AT
        used = int.from_bytes(os.pread(regions, 8, start), sys.byteorder, signed=True)
        if self._read < used <= LINES_SIZE:
            lines = os.pread(regions, used - self._read, start + 8 + self._read)
            self._read = used
            deque(map(self._learn, lines.splitlines()), maxlen=0)
        if not self.places:
            return {}
        end = max(at + one.cells for one, at in self.places.items())
        cells = array("d", os.pread(regions, end * 8, start + _CELLS_AT))
        found = {one: list(cells[at : at + one.cells]) for one, at in self.places.items()}
        return {one: values for one, values in found.items() if _is_sound(one, values)}

    def _learn(self, line: bytes) -> None:
        """Takes in a line, if it is of the right form."""
        if len(line) > LONGEST_LINE or len(self.places) >= MOST_SERIES:
            return
        try:
            said = json.loads(line)
            series, doc, at = series_of(said), said["doc"], said["at"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return
        if type(at) is int and 0 <= at <= MOST_CELLS - series.cells and isinstance(doc, str):
            self.places[series] = at
            self.docs[series.name] = " ".join(without_surrogates(doc).split())


def without_surrogates(text: str) -> str:
    """A text that can be told: with what UTF-8 does not have, as of undecodable bytes, written as Python writes it."""
    return text.encode(errors="backslashreplace").decode()


def series_of(plain: Mapping[str, Any]) -> Series:
    """What a worker, or an earlier image of the master, says. Raises ValueError, LookupError or TypeError."""
    labels = tuple((name, value) for name, value in plain["labels"])
    buckets = tuple(plain["buckets"])
    series = Series(plain["name"], plain["kind"], labels, buckets)
    names = [name for name, _ in labels]
    right = (
        METRIC_NAME.fullmatch(series.name)
        and not series.name.startswith("forkd_")
        and series.kind in (COUNTER, GAUGE, HISTOGRAM)
        and len(labels) <= MOST_LABELS
        and len(set(names)) == len(names)
        and all(LABEL_NAME.fullmatch(name) and name != "le" and isinstance(value, str) for name, value in labels)
        and len(buckets) <= MOST_BUCKETS
        and all(type(bound) in (int, float) and abs(bound) <= sys.float_info.max for bound in buckets)
        and list(buckets) == sorted(set(buckets))
        and (series.kind == HISTOGRAM) == bool(buckets)
    )
    if not right:
        raise ValueError("no series")
    return replace(series, labels=tuple((name, without_surrogates(value)) for name, value in labels))


def _is_sound(series: Series, values: list[float]) -> bool:
    """Whether these may be its values: all are numbers, and what is counted is not below zero."""
    counted = {COUNTER: values, GAUGE: [], HISTOGRAM: values[:-1]}[series.kind]
    return all(map(math.isfinite, values)) and all(value >= 0 for value in counted)


class SeriesTotals:
    """The sums over all workers; what those that have ended had counted is kept.

    Attributes:
        ended: what those have counted, gauges aside.
        docs: a sentence about each metric.
    """

    def __init__(self) -> None:
        self.ended: dict[Series, list[float]] = {}
        self.docs: dict[str, str] = {}
        self._readers: dict[int, SeriesReader] = {}  # by the worker's pid

    def read(self, regions: int, rows: Mapping[int, int]) -> dict[Series, list[float]]:
        """The sums now.

        Args:
            regions: a descriptor of the regions' memory.
            rows: by the pid of each worker that lives, the number of its row.
        """
        total = {series: list(values) for series, values in self.ended.items()}
        self._readers = {pid: self._readers.get(pid) or SeriesReader(index) for pid, index in rows.items()}
        for reader in self._readers.values():
            self._add(total, reader, regions)
        return total

    def keep(self, regions: int, pid: int, index: int) -> None:
        """A worker has ended: keeps what it has counted. To be called before its region is cleared."""
        counted: dict[Series, list[float]] = {}
        self._add(counted, self._readers.get(pid) or SeriesReader(index), regions)
        _add_all(self.ended, {one: values for one, values in counted.items() if one.kind != GAUGE})

    def plain(self) -> list[dict[str, Any]]:
        """What workers that have ended had counted, for the state that an upgrade hands over."""
        return [
            asdict(series) | {"values": values, "doc": self.docs.get(series.name, "")}
            for series, values in self.ended.items()
        ]

    @classmethod
    def from_plain(cls, plain: Iterable[Mapping[str, Any]]) -> SeriesTotals:
        """What an earlier image of the master has handed over. Raises ValueError, LookupError or TypeError."""
        made = cls()
        for one in plain:
            series = series_of(one)
            made.ended[series] = [float(value) for value in one["values"]]
            made.docs[series.name] = without_surrogates(str(one["doc"]))
        return made

    def _add(self, total: dict[Series, list[float]], reader: SeriesReader, regions: int) -> None:
        if regions < 0:
            return
        try:
            _add_all(total, reader.values(regions))
        except OSError:  # as if it had counted nothing
            return
        self.docs |= {
            name: doc for name, doc in reader.docs.items() if name in self.docs or len(self.docs) < MOST_SERIES
        }


def _add_all(total: dict[Series, list[float]], more: Mapping[Series, list[float]]) -> None:
    """Adds values to those of the same series, as far as there is room for new ones."""
    for series, values in more.items():
        if (known := total.get(series)) is not None:
            total[series] = [one + other for one, other in zip(known, values, strict=True)]
        elif len(total) < MOST_SERIES:
            total[series] = values
