"""The pool of children while they live: what they send and write is taken, bounded, and believed of no other child. How
they end is in `test_workers_exits`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkd import signals
from forkd.errors import BootError, system_reason
from forkd.master.plan import Slot
from forkd.master.spawn import HELPER, STDERR_LINES
from forkd.master.workers import HelperSaid
from forkd.messages import (
    FailedEvent,
    JsonObject,
    LogCommand,
    ReadyEvent,
    WornEvent,
    decode_command,
)
from forkd.states import WorkerEvent, WorkerState
from forkd.system.scoreboard import Field
from tests.support.fake_children import FakeChildren

LINE = 4096  # characters of one line at most


@pytest.fixture
def children() -> Iterator[FakeChildren]:
    with ExitStack() as stack:
        made = FakeChildren(stack)
        yield made
        made.close()


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged on behalf of a child's standard error."""
    return [record.getMessage() for record in caplog.records if "output: " in record.getMessage()]


def test_worker_serves_once_it_has_reported_ready(children: FakeChildren) -> None:
    child = children.child(slot=2, generation=3)
    assert (child.worker.state, child.worker.ready_at) == (WorkerState.BOOTING, None)
    child.say(ReadyEvent())
    children.read()
    first = child.worker.ready_at
    assert child.worker.state is WorkerState.SERVING
    assert first is not None
    assert first >= child.worker.forked_at
    child.say(ReadyEvent())
    children.read()
    assert (child.worker.state, child.worker.ready_at) == (WorkerState.SERVING, first)


@pytest.mark.parametrize("state", [WorkerState.DRAINING, WorkerState.CLOSING, WorkerState.KILLED])
def test_worker_that_was_told_to_end_does_not_become_ready(children: FakeChildren, state: WorkerState) -> None:
    child = children.child()
    child.worker.state = state
    child.say(ReadyEvent())
    children.read()
    assert (child.worker.state, child.worker.ready_at) == (state, None)


def test_reason_of_a_failed_boot_is_kept_and_bounded(children: FakeChildren) -> None:
    child, flood = children.child(), children.child(slot=2)
    child.say(FailedEvent("no module", "Traceback\n  of it"))
    flood.say(FailedEvent("x" * 60_000, "y" * 60_000))
    children.read()
    assert child.worker.cause == "could not boot: no module"
    assert child.worker.failure is not None
    assert (str(child.worker.failure), child.worker.failure.details) == (
        "worker 1 could not boot: no module",
        "Traceback\n  of it",
    )
    assert flood.worker.failure is not None
    assert len(str(flood.worker.failure)) + len(flood.worker.failure.details) < 50_000


def test_recycle_reason_is_kept_in_few_words(children: FakeChildren) -> None:
    child, flood = children.child(state=WorkerState.SERVING), children.child(slot=2, state=WorkerState.SERVING)
    child.say(WornEvent("100 connections"))
    flood.say(WornEvent("x" * 100_000))
    children.read()
    assert child.worker.recycle_reason == "100 connections"
    assert 0 < len(flood.worker.recycle_reason) <= 200
    assert {view.slot: view.recycle_reason for view in children.pool.views(1e9)}[1] == "100 connections"


INVALID: list[JsonObject] = [
    {},
    {"event": None},
    {"event": ["ready"]},
    {"event": "dance"},
    {"order": "stop"},
    {"event": "failed"},
    {"event": "failed", "reason": 1},
    {"event": "worn"},
    {"event": "differences", "differences": []},  # of a helper
]


@pytest.mark.parametrize("message", INVALID)
def test_invalid_message_changes_nothing_but_its_count(
    children: FakeChildren, message: JsonObject, caplog: pytest.LogCaptureFixture
) -> None:
    child = children.child(state=WorkerState.SERVING)
    before = repr(child.worker)
    child.say(message)
    children.read()
    assert child.worker.invalid_messages > 0  # it is counted, so that a flood of it has an end
    child.worker.invalid_messages = 0
    assert repr(child.worker) == before
    assert "invalid message" in caplog.text


def test_worker_that_sends_garbage_is_read_no_more(children: FakeChildren) -> None:
    bad, good = children.child(), children.child(slot=2)
    bad.channel.send(ReadyEvent())
    os.write(bad.channel.fileno(), b"garbage\n")
    children.read()
    assert not bad.worker.readable
    assert bad.worker.channel.fileno() == -1
    assert bad.worker.pid in children.pool.workers
    good.say(ReadyEvent())
    children.read()
    assert good.worker.state is WorkerState.SERVING


def test_stderr_lines_are_logged_with_their_worker_and_kept(
    children: FakeChildren, caplog: pytest.LogCaptureFixture
) -> None:
    child = children.child(slot=3)
    child.write(b"first\nsecond\n")
    children.read()
    child.write(b"third\n")
    children.read()
    who = f"worker 3 (pid {child.worker.pid}) output: "
    assert logged(caplog) == [f"{who}first\nsecond", f"{who}third"]
    assert [*child.worker.stderr_lines] == ["first", "second", "third"]


def test_line_that_has_not_ended_waits_for_its_end(children: FakeChildren, caplog: pytest.LogCaptureFixture) -> None:
    child = children.child()
    for part in (b"un", b"finish"):
        child.write(part)
        children.read()
        assert logged(caplog) == []
    assert child.worker.partial_line == "unfinish"
    child.write(b"ed\nnext")
    children.read()
    assert [*child.worker.stderr_lines] == ["unfinished"]
    assert child.worker.partial_line == "next"
    child.leave()
    children.read()
    assert [*child.worker.stderr_lines] == ["unfinished", "next"]
    assert [line.rpartition(": ")[2] for line in logged(caplog)] == ["unfinished", "next"]
    assert (child.worker.stderr, child.worker.partial_line) == (-1, "")


def test_stderr_lines_of_a_flood_are_bounded(children: FakeChildren) -> None:
    child = children.child()
    for data in (b"x" * 10_000, b"\n" + b"y" * 50_000, b"z\n" * 5000, b"w" * LINE):
        child.write(data)
        children.read()
        assert len(child.worker.partial_line) <= LINE
        assert len(child.worker.stderr_lines) <= STDERR_LINES
        assert max(map(len, child.worker.stderr_lines), default=0) <= LINE
    assert set(child.worker.stderr_lines) == {"z"}


def test_bytes_on_stderr_that_are_no_text_are_kept_escaped(
    children: FakeChildren, caplog: pytest.LogCaptureFixture
) -> None:
    child = children.child()
    child.write(b"\xff\xfe ok\n")
    children.read()
    assert [*child.worker.stderr_lines] == ["\\xff\\xfe ok"]
    assert logged(caplog)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(lines=st.lists(st.text("ab \t", max_size=8), max_size=15), cuts=st.lists(st.integers(0, 130), max_size=6))
def test_lines_are_the_same_however_they_are_chunked(children: FakeChildren, lines: list[str], cuts: list[int]) -> None:
    child = children.child()
    data = "".join(f"{line}\n" for line in lines).encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        child.write(data[start:end])
        children.read()
    assert [*child.worker.stderr_lines] == lines
    child.worker.row.clear()


def test_helper_output_is_kept_and_not_logged(children: FakeChildren, caplog: pytest.LogCaptureFixture) -> None:
    helper = children.child(HELPER, generation=2)
    helper.write(b"forkd: no such file\n")
    helper.say(ReadyEvent())
    children.read()
    assert [*helper.worker.stderr_lines] == ["forkd: no such file"]
    assert logged(caplog) == []
    assert children.helper_events == [HelperSaid(helper.worker, ReadyEvent())]
    assert helper.worker.state is WorkerState.BOOTING


def test_heartbeat_from_the_future_is_of_now(children: FakeChildren) -> None:
    child, other = children.child(), children.child(slot=2)
    child.worker.row[Field.HEARTBEAT] = 10**18
    other.worker.row[Field.HEARTBEAT] = 1_500_000_000
    assert [view.heartbeat for view in children.pool.views(7.0)] == [7.0, 1.5]


def test_plan_sees_what_there_is(children: FakeChildren) -> None:
    child = children.child(slot=4, generation=2, state=WorkerState.SERVING)
    child.worker.dumped_at = 3.0
    (view,) = children.pool.views(time.monotonic())
    worker = child.worker
    assert (view.pid, view.slot, view.state, view.since, view.generation, view.dumped_at, view.recycle_reason) == (
        worker.pid, 4, WorkerState.SERVING, worker.since, 2, 3.0, "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("workers", "whole"),
    [
        ([(1, 1, WorkerState.SERVING), (2, 1, WorkerState.SERVING)], True),
        ([(1, 1, WorkerState.SERVING)], False),
        ([(1, 1, WorkerState.SERVING), (2, 1, WorkerState.BOOTING)], False),
        ([(1, 1, WorkerState.SERVING), (1, 1, WorkerState.SERVING)], False),
        ([(1, 1, WorkerState.SERVING), (2, 1, WorkerState.SERVING), (3, 1, WorkerState.SERVING)], False),
        ([(1, 1, WorkerState.SERVING), (2, 1, WorkerState.SERVING), (2, 1, WorkerState.BOOTING)], False),
        ([(1, 1, WorkerState.SERVING), (2, 1, WorkerState.SERVING), (2, 1, WorkerState.DRAINING)], True),
        ([(1, 1, WorkerState.SERVING), (2, 1, WorkerState.SERVING), (1, 2, WorkerState.BOOTING)], True),
        ([(1, 1, WorkerState.SERVING), (2, 2, WorkerState.SERVING)], False),
        ([(1, 1, WorkerState.SERVING), (2, 1, WorkerState.SERVING), (HELPER, 1, WorkerState.BOOTING)], True),
    ],
)
def test_generation_serves_when_all_of_it_and_no_other_does(
    children: FakeChildren, workers: list[tuple[int, int, WorkerState]], whole: bool
) -> None:
    for slot, generation, state in workers:
        children.child(slot, generation, state)
    assert children.pool.serves(1, 2) == whole


def test_signal_changes_the_state_and_keeps_every_reason(children: FakeChildren) -> None:
    worker = children.child(state=WorkerState.SERVING).worker
    since = worker.since
    children.pool.tell(worker, WorkerEvent.RETIRE, signals.DRAIN, "another generation serves")
    assert (worker.state, worker.cause, worker.since > since) == (
        WorkerState.DRAINING,
        "another generation serves",
        True,
    )
    children.pool.tell(worker, WorkerEvent.KILL, signals.KILL, "it did not end")
    assert (worker.state, worker.killed_in) == (WorkerState.KILLED, WorkerState.DRAINING)
    children.pool.tell(worker, WorkerEvent.KILL, signals.KILL, "again")
    assert worker.killed_in is WorkerState.DRAINING
    assert worker.cause == "another generation serves; it did not end; again"
    assert children.spawner.signals == [(worker.pid, signals.DRAIN), *[(worker.pid, signals.KILL)] * 2]


def test_stack_dump_does_not_change_the_state(children: FakeChildren, caplog: pytest.LogCaptureFixture) -> None:
    worker = children.child(state=WorkerState.SERVING).worker
    before = (worker.state, worker.since, worker.cause)
    asked = time.monotonic()
    children.pool.dump_stacks(worker, "its loop stood still")
    assert asked <= worker.dumped_at <= time.monotonic()
    assert (worker.state, worker.since, worker.cause) == before
    assert children.spawner.signals == [(worker.pid, signals.DUMP)]
    assert f"worker 1 (pid {worker.pid}): its loop stood still; these are its stacks" in caplog.text


def test_command_with_descriptors_goes_to_every_open_worker(
    children: FakeChildren, caplog: pytest.LogCaptureFixture
) -> None:
    hearing, gone, deaf, helper = children.child(1), children.child(2), children.child(3), children.child(HELPER)
    deaf.channel.close()
    children.read()
    gone.channel.close()
    reader, writer = os.pipe()
    children.pool.send_all(LogCommand(), lambda: os.dup(writer))
    os.close(writer)
    assert [decode_command(each) for each in hearing.channel.receive()] == [LogCommand()]
    os.write(hearing.channel.descriptors[0], b"written")
    assert os.read(reader, 100) == b"written"
    os.close(reader)
    assert helper.channel.receive() == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"worker 2 (pid {gone.worker.pid})" in caplog.text


@pytest.mark.parametrize("error", [BlockingIOError(11, "try again"), OverflowError("all rows are taken")])
@pytest.mark.parametrize(("slot", "who"), [(2, "worker 2"), (HELPER, "a helper")])
def test_fork_that_fails_raises_and_its_slot_waits(
    children: FakeChildren, error: Exception, slot: int, who: str
) -> None:
    children.spawner.error = error
    for attempt in (1, 2):
        before = time.monotonic()
        with pytest.raises(BootError, match=f"^can't make {who}: {re.escape(system_reason(error))}$"):
            children.pool.spawn(slot, 5, lambda row, channel: 0)
        found = children.pool.slots[5][slot]
        assert found.failures == attempt
        assert found.retry_at > before
    assert children.pool.workers == {}
    assert children.pool.slots[4].get(slot, Slot()) == Slot()


def test_close_in_child_closes_all_that_the_pool_holds(children: FakeChildren) -> None:
    workers = [children.child(slot) for slot in (1, 2)]
    children.pool.close_in_child()
    for child in workers:
        assert child.worker.channel.fileno() == -1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(child.worker.stderr)
        child.worker.stderr = -1
    assert children.spawner.signals == []
