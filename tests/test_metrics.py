"""`forkd.metrics`: what can be declared, what it counts, and what becomes of it in a daemon."""

from __future__ import annotations

import io
import os
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_fd_to_metric_families as openmetrics_families
from prometheus_client.parser import text_fd_to_metric_families

from forkd import metrics, worker
from forkd.metrics import Counter, Gauge, Histogram, MetricsError
from forkd.system.handler_metrics import LINES_SIZE, MOST_CELLS, Series, SeriesReader, SeriesTotals
from forkd.system.scoreboard import METRICS_AT, REGION_SIZE, Regions
from tests.support.admin import ask
from tests.support.changing_daemon import Changing
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, eventually, wait_end

ADMIN = {"address": "tcp://127.0.0.1:0"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test declares its own."""
    monkeypatch.setattr(metrics, "_registry", metrics._Registry())


@pytest.fixture
def regions() -> Iterator[Regions]:
    made = Regions(3)
    yield made
    worker.share(None)
    os.close(made.descriptor)


def test_counter_only_grows() -> None:
    counter = Counter("logins", "Users that have logged in.")
    counter.inc()
    counter.inc(1.5)
    assert counter.value == 2.5
    for wrong in (-1, nan, inf):
        with pytest.raises(ValueError, match="counter logins can't grow by"):
            counter.inc(wrong)
    assert counter.value == 2.5


def test_gauge_goes_up_and_down() -> None:
    gauge = Gauge("rooms", "Rooms.")
    gauge.inc()
    gauge.dec(3)
    assert gauge.value == -2
    gauge.set(7)
    assert gauge.value == 7


@pytest.mark.parametrize("wrong", [nan, inf, -inf])
def test_what_is_no_finite_number_is_refused(wrong: float) -> None:
    gauge, histogram = Gauge("rooms", "Rooms."), Histogram("wait", "Time.")
    for change in (gauge.set, gauge.inc, gauge.dec, histogram.observe):
        with pytest.raises(ValueError, match=r"(gauge rooms|histogram wait) can't "):
            change(wrong)
    assert (gauge.value, histogram.count, histogram.value) == (0, 0, 0)


def test_histogram_counts_and_adds_up() -> None:
    histogram = Histogram("wait", "Time.", ["room"], buckets=[1, 2])
    for value in (0.5, 1, 1.5, 9):
        histogram.labels("a").observe(value)
    assert (histogram.labels("a").count, histogram.labels("a").value) == (4, 12)
    assert histogram.labels("b").count == 0


def test_labels_are_found_by_place_and_by_name() -> None:
    counter = Counter("errors", "Errors.", ["kind", "code"])
    counter.labels("read", 5).inc()
    counter.labels(code="5", kind="read").inc()
    assert counter.labels("read", "5").value == 2
    for values, named in ((("read",), {}), ((), {"kind": "read"}), (("read", 5), {"kind": "read"}), ((), {"size": 1})):
        with pytest.raises(MetricsError, match="metric errors has the labels kind, code"):
            counter.labels(*values, **named)
    with pytest.raises(MetricsError, match=r"metric errors has labels \(kind, code\): use labels\(\.\.\.\) first"):
        counter.inc()


def test_labels_that_utf8_does_not_have_are_told_as_python_writes_them() -> None:
    counter = Counter("errors", "Errors.", ["kind"])
    counter.labels("a\udcff").inc()
    counter.labels("a\\udcff").inc()
    assert counter.labels("a\udcff") is counter.labels("a\\udcff")
    assert [series.labels for series in metrics._registry.series] == [(("kind", "a\\udcff"),)]


def test_labels_are_the_same_for_threads_that_make_them_at_once() -> None:
    counter, count, threads = Counter("seen", "Seen.", ["what"]), 60, 4
    together = threading.Barrier(threads)

    def see() -> None:
        for number in range(count):
            together.wait(DEADLINE)
            counter.labels(number).inc()

    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(threads) as pool:
            for done in [pool.submit(see) for _ in range(threads)]:
                done.result(DEADLINE)
    finally:
        sys.setswitchinterval(often)
    assert [counter.labels(number).value for number in range(count)] == [threads] * count
    assert len({one._at for one in counter._children.values()}) == metrics._registry.cells._next == count


@pytest.mark.parametrize(
    ("name", "more", "why"),
    [
        ("9lives", {}, "begin with no digit"),
        ("", {}, "begin with no digit"),
        ("a-b", {}, "letters, digits"),
        ("forkd_mine", {}, "the daemon's own"),
        ("a", {"labels": "kind"}, "a list of names"),
        ("a", {"labels": ["__name"]}, "can't be a label's name"),
        ("a", {"labels": ["le"]}, "can't be a label's name"),
        ("a", {"labels": ["b", "b"]}, "a name of its own"),
        ("a", {"labels": [f"l{number}" for number in range(11)]}, "at most 10 labels"),
        ("a", {"buckets": []}, "rising numbers"),
        ("a", {"buckets": [2, 1]}, "rising numbers"),
        ("a", {"buckets": [1, nan]}, "rising numbers"),
        ("a", {"buckets": range(101)}, "at most 100"),
    ],
)
def test_metric_that_cannot_be_is_refused(name: str, more: dict[str, Any], why: str) -> None:
    with pytest.raises(MetricsError, match=why):
        Histogram(name, "It.", **more)


def test_name_is_declared_once() -> None:
    Counter("seen_total", "Seen.")
    for kind in (Counter, Gauge, Histogram):
        with pytest.raises(MetricsError, match="metric seen is declared twice"):
            kind("seen", "Seen.")


def test_full_memory_is_told_and_the_rest_goes_on_counting() -> None:
    counter = Counter("seen", "Seen.", ["what"])
    first = counter.labels("first")
    for number in range(1500):
        counter.labels(number)
    with pytest.raises(MetricsError, match=r"no room for metric seen with labels .* is full: .*; use fewer"):
        deque(map(counter.labels, range(100_000)), maxlen=0)
    first.inc()
    assert first.value == 1
    with pytest.raises(MetricsError, match=r"take 5\d+ bytes; 4096 is the most"):
        counter.labels("x" * 5000)


def test_totals_add_up_workers_and_keep_those_that_have_ended(regions: Regions) -> None:
    counter, gauge = Counter("seen", "Seen."), Gauge("open", "Open.")
    totals, rows = SeriesTotals(), {100: 0, 101: 2}
    for index in rows.values():
        worker.share(regions.map_writable(index))
        assert (counter.value, gauge.value) == (0, 0)  # what a parent had counted is the parent's
        counter.inc(index + 1)
        gauge.set(index + 1)
    seen, held = Series("seen", "counter"), Series("open", "gauge")
    assert totals.read(regions.descriptor, rows) == {seen: [4], held: [4]}
    totals.keep(regions.descriptor, 101, rows.pop(101))
    regions.clear(2)
    assert totals.read(regions.descriptor, rows) == {seen: [4], held: [1]}
    later = SeriesTotals.from_plain(totals.plain())
    assert later.read(regions.descriptor, rows) == {seen: [4], held: [1]}
    assert later.docs == {"seen": "Seen.", "open": "Open."}


@given(lines=st.binary(max_size=200), used=st.integers(-(1 << 63), (1 << 63) - 1), cells=st.binary(max_size=64))
def test_nothing_that_a_worker_writes_breaks_the_reader(lines: bytes, used: int, cells: bytes) -> None:
    regions = Regions(1)
    try:
        part = regions.map_writable(0)[METRICS_AT:REGION_SIZE]
        sound = b'{"name":"a","kind":"gauge","labels":[],"buckets":[],"doc":"d","at":0}\n'
        part[8 : 8 + len(sound + lines)] = sound + lines
        part[:8] = struct.pack("=q", used)
        part[8 + LINES_SIZE : 8 + LINES_SIZE + len(cells)] = cells
        for series, values in SeriesReader(0).values(regions.descriptor).items():
            assert series == Series("a", "gauge")
            assert len(values) == 1
    finally:
        os.close(regions.descriptor)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "forkd_workers"},
        {"name": 'a"} 1\nb'},
        {"kind": "summary"},
        {"labels": [["a", "1"], ["a", "2"]]},
        {"labels": [["a", 1]]},
        {"labels": [["le", "1"]]},
        {"labels": [["a\n", "1"]]},
        {"labels": "ab"},
        {"buckets": [1]},
        {"kind": "histogram", "buckets": []},
        {"kind": "histogram", "buckets": [2, 1]},
        {"kind": "histogram", "buckets": ["1"]},
        {"kind": "histogram", "buckets": [10**400]},
        {"at": -1},
        {"at": MOST_CELLS},
        {"at": 0.5},
        {"at": True},
        {"doc": 7},
    ],
)
def test_line_of_another_form_is_no_series(regions: Regions, change: dict[str, Any]) -> None:
    said = {"name": "a", "kind": "counter", "labels": [], "buckets": [], "doc": "d", "at": 0}
    reader = SeriesReader(0)
    reader._learn(str(said | change).replace("'", '"').replace("True", "true").encode())
    assert reader.places == {}
    reader._learn(str(said).replace("'", '"').encode())
    assert len(reader.places) == 1


# In a daemon


def told(daemon: Daemon) -> dict[str, float]:
    """What the daemon tells of the handler's metrics."""
    text = io.StringIO(ask(daemon, "/metrics").body)
    samples = [one for family in text_fd_to_metric_families(text) for one in family.samples]
    return {
        " ".join([one.name.removeprefix("test_"), *one.labels.values()]): one.value
        for one in samples
        if one.name.startswith("test_") and not one.name.endswith("_created")
    }


def wait_told(daemon: Daemon, **values: float) -> None:
    """Waits until the daemon tells so; it keeps what it tells for a moment."""
    eventually(lambda: all(told(daemon).get(name.replace("__", " ")) == value for name, value in values.items()))


def say(harness: Harness, daemon: Daemon, *lines: str) -> Any:
    client = harness.connect(daemon)
    for line in lines:
        data = line.encode(errors="surrogateescape") + b"\n"
        client.sendall(data)
        assert client.recv(100) == data
    return client


def test_metrics_are_told_whatever_labels_are_made_of(harness: Harness) -> None:
    site = Changing(harness, listen=[{"address": "tcp://127.0.0.1:0", "handler": "counting:Counting"}], admin=ADMIN)
    daemon = site.daemon.start()
    say(harness, daemon, "\udcff", 'a"b\\')
    eventually(lambda: told(daemon).get('lines_total a"b\\'), what="the second label")
    assert told(daemon)["lines_total \\udcff"] == 1


def test_nothing_that_a_worker_says_of_a_metric_is_beyond_utf8(regions: Regions) -> None:
    reader = SeriesReader(0)
    reader._learn(rb'{"name":"a","kind":"gauge","labels":[["b","\ud800"]],"buckets":[],"doc":"\udfff","at":0}')
    assert (list(reader.places), reader.docs) == ([Series("a", "gauge", (("b", r"\ud800"),))], {"a": r"\udfff"})


@pytest.mark.parametrize("preload", [False, True])
def test_handlers_metrics_outlive_workers_reloads_and_upgrades(harness: Harness, preload: bool) -> None:
    site = Changing(harness, listen=[{"address": "tcp://127.0.0.1:0", "handler": "counting:Counting"}], admin=ADMIN)
    site.write(preload=preload)
    daemon = site.daemon.start()
    clients = [say(harness, daemon, "one", "two words", "one") for _ in range(4)]
    wait_told(daemon, lines_total__one=8, open=4)
    sizes = {"line_bytes_bucket 4.0": 8, "line_bytes_bucket 8.0": 8, "line_bytes_bucket +Inf": 12}
    assert told(daemon) == {
        "lines_total one": 8,
        "lines_total two": 4,
        "open": 4,
        **sizes,
        "line_bytes_count": 12,
        "line_bytes_sum": 4 * (3 + 9 + 3),
    }
    text = io.StringIO(ask(daemon, "/metrics", accept="application/openmetrics-text; version=1.0.0").body)
    families = {one.name for one in openmetrics_families(text)}  # type: ignore[no-untyped-call]
    assert {"test_lines", "test_open", "test_line_bytes"} <= families
    for client in clients:
        client.close()
    wait_told(daemon, open=0)
    after = 4
    for verb in ("reload", "upgrade", "kill"):
        if verb == "kill":
            daemon.expect("killed by SIGKILL")
            for pid in daemon.workers().values():
                os.kill(pid, 9)
                wait_end(pid)
            eventually(lambda: len(daemon.workers()) == 2)
        else:
            assert daemon.command(verb).returncode == 0
        say(harness, daemon, "two")
        after += 1
        wait_told(daemon, lines_total__one=8, lines_total__two=after)


def test_process_that_a_handler_forks_counts_for_itself(harness: Harness) -> None:
    site = Changing(harness, listen=[{"address": "tcp://127.0.0.1:0", "handler": "counting:Counting"}], admin=ADMIN)
    daemon = site.daemon.start()
    say(harness, daemon, "fork", "and", "and")
    wait_told(daemon, lines_total__and=2, lines_total__fork=1)
