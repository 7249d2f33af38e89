"""How children end: what is recorded of each, whether it has failed, what that means for its slot, and which events the
master takes.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from forkd import signals
from forkd.master import workers
from forkd.master.plan import HEALTHY, SPREAD
from forkd.master.spawn import HELPER, STDERR_LINES, Exit
from forkd.master.workers import MOST_RECORDS, HelperExited, HelperSaid
from forkd.messages import LARGEST, DifferencesEvent, FailedEvent, ReadyEvent, encode
from forkd.states import WorkerEvent, WorkerState
from forkd.system.scoreboard import NOT_ACCEPTING, Field
from tests.support.fake_children import Child, FakeChildren

EXIT_3 = 3 << 8  # as wait(2) has it
SEGFAULT = int(signal.SIGSEGV)
KILLED = int(signal.SIGKILL)


@pytest.fixture
def children() -> Iterator[FakeChildren]:
    with ExitStack() as stack:
        made = FakeChildren(stack)
        yield made
        made.close()


def serving(children: FakeChildren, slot: int = 1, generation: int = 1, since: float = 0.0) -> Child:
    """A child that has served for so many seconds."""
    child = children.child(slot, generation, WorkerState.SERVING)
    child.worker.ready_at = time.monotonic() - since
    return child


def test_worker_that_dies_is_recorded_and_its_row_is_free(
    children: FakeChildren, caplog: pytest.LogCaptureFixture
) -> None:
    child = serving(children, slot=2, generation=4)
    child.worker.row[Field.ACCEPTED], child.worker.row[Field.CLOSED] = 7, 2
    child.write(b"oh\n")
    children.end(child, SEGFAULT)
    assert children.pool.workers == {}
    assert child.worker.state is WorkerState.GONE
    (record,) = children.pool.exit_records
    assert (record["slot"], record["generation"], record["pid"], record["expected"]) == (2, 4, child.worker.pid, False)
    assert (record["exit"], record["code"], record["clients"]) == ("killed by SIGSEGV", -SEGFAULT, 5)
    assert record["words"] == ["oh"]
    assert (child.worker.row[Field.PID], child.worker.row[Field.LOAD]) == (0, NOT_ACCEPTING)
    ((number, error, had_served),) = children.failures
    assert (number, str(error), had_served) == (4, "worker 2 has ended: killed by SIGSEGV", True)
    assert children.pool.slots[4][2].failures == 1
    assert [record.levelno for record in caplog.records][-1] == logging.ERROR
    assert not children.selector.select(0)


@pytest.mark.parametrize("event", [WorkerEvent.RETIRE, WorkerEvent.CLOSE])
@pytest.mark.parametrize("status", [0, EXIT_3, int(signal.SIGTERM)])
def test_worker_that_was_told_to_end_has_not_failed(
    children: FakeChildren, event: WorkerEvent, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    child = serving(children)
    children.pool.tell(child.worker, event, signals.DRAIN, "the daemon stops")
    children.end(child, status)
    (record,) = children.pool.exit_records
    assert (record["expected"], record["cause"]) == (True, "the daemon stops")
    assert children.failures == []
    assert children.pool.slots[1] == {}
    assert [record.levelno for record in caplog.records if "has ended" in record.getMessage()] == [logging.INFO]


def test_worker_killed_while_it_drained_is_an_error_of_no_slot(
    children: FakeChildren, caplog: pytest.LogCaptureFixture
) -> None:
    child = serving(children)
    children.pool.tell(child.worker, WorkerEvent.RETIRE, signals.DRAIN)
    children.pool.tell(child.worker, WorkerEvent.KILL, signals.KILL, "it did not end by its drain deadline")
    children.end(child, KILLED)
    assert children.failures == []
    assert children.pool.slots[1] == {}
    (record,) = children.pool.exit_records
    assert (record["expected"], record["cause"]) == (False, "it did not end by its drain deadline")
    assert caplog.records[-1].levelno == logging.ERROR


def test_worker_that_ends_well_unasked_is_a_failure_but_no_error(
    children: FakeChildren, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    children.end(serving(children), 0)
    assert len(children.failures) == 1
    assert children.pool.slots[1][1].failures == 1
    assert caplog.records[-1].levelno == logging.INFO


@pytest.mark.parametrize(("served", "failures"), [(HEALTHY + 1.0, 1), (0.0, 2)])
def test_failure_after_healthy_service_is_the_first_again(children: FakeChildren, served: float, failures: int) -> None:
    children.end(serving(children), SEGFAULT)
    children.end(serving(children, since=served), SEGFAULT)
    assert children.pool.slots[1][1].failures == failures


def test_workers_that_end_together_are_not_replaced_all_at_once(children: FakeChildren) -> None:
    made = [serving(children, slot) for slot in (1, 2, 3)]
    before = time.monotonic()
    for child in made:
        children.end(child, KILLED)
    first, *others = (children.pool.slots[1][slot].retry_at for slot in (1, 2, 3))
    assert before <= first <= time.monotonic()
    assert all(first + SPREAD / 2 <= other <= time.monotonic() + SPREAD for other in others)


def test_failures_of_a_slot_count_for_its_generation(children: FakeChildren) -> None:
    children.end(serving(children, generation=1), SEGFAULT)
    children.end(serving(children, generation=2), SEGFAULT)
    assert [children.pool.slots[number][1].failures for number in (1, 2)] == [1, 1]


def could_not_boot(child: Child) -> None:
    child.say(FailedEvent("no module", "Traceback\n  of it"))


def crashed(child: Child) -> None:
    child.write(b"Traceback\n  of it\n")


@pytest.mark.parametrize(
    ("before", "reason", "cause"),
    [
        (could_not_boot, "worker 1 could not boot: no module", "could not boot: no module"),
        (crashed, "worker 1 ended before it was ready: exit status 3", "it ended before it was ready"),
    ],
)
def test_reason_of_a_failed_boot_is_told_with_its_output(
    children: FakeChildren, before: object, reason: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    child = children.child()
    before(child)  # type: ignore[operator]
    children.end(child, EXIT_3)  # with all of it unheard yet
    ((_, error, had_served),) = children.failures
    assert (str(error), error.details.rstrip(), had_served) == (reason, "Traceback\n  of it", False)
    assert children.pool.exit_records[0]["cause"] == cause
    assert "of it" in caplog.text


def test_worker_killed_while_it_booted_has_the_masters_reason(children: FakeChildren) -> None:
    child = children.child()
    child.write(b"stack of MainThread\n")
    children.pool.tell(child.worker, WorkerEvent.KILL, signals.KILL, "it was not ready by its boot_timeout")
    children.end(child, KILLED)
    ((_, error, _),) = children.failures
    assert str(error) == "worker 1 could not boot: it was not ready by its boot_timeout"
    assert error.details == "stack of MainThread"
    assert children.pool.slots[1][1].failures == 1


@pytest.mark.parametrize(
    ("before", "after", "killer"), [(3, 4, "kernel"), (3, 3, ""), (None, 4, ""), (3, None, ""), (None, None, "")]
)
def test_kernel_is_named_where_its_count_of_kills_has_grown(
    monkeypatch: pytest.MonkeyPatch, before: int | None, after: int | None, killer: str
) -> None:
    monkeypatch.setattr(workers, "oom_kills", lambda: before)
    with ExitStack() as stack:
        children = FakeChildren(stack)
        monkeypatch.setattr(workers, "oom_kills", lambda: after)
        children.end(serving(children), KILLED)
        children.end(serving(children), KILLED)
        assert [killer in record["cause"] for record in children.pool.exit_records] == [True, not killer]
        assert [bool(record["cause"]) for record in children.pool.exit_records] == [bool(killer), False]
        assert [killer in str(error) for _, error, _ in children.failures] == [True, not killer]
        children.close()


def test_masters_own_kill_is_not_the_kernels(children: FakeChildren, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "oom_kills", lambda: 10**9)
    child = serving(children)
    children.pool.tell(child.worker, WorkerEvent.KILL, signals.KILL, "its loop stood still")
    children.end(child, KILLED)
    assert children.pool.exit_records[0]["cause"] == "its loop stood still"


def test_last_output_is_read_though_others_hold_the_pipe_open(children: FakeChildren) -> None:
    child = children.child()
    child.say(FailedEvent("no module"))
    child.write(b"first\nunfinished")
    children.reap(child, EXIT_3)
    assert [*child.worker.stderr_lines] == ["first", "unfinished"]
    assert str(children.failures[0][1]) == "worker 1 could not boot: no module"
    assert (child.worker.stderr, child.worker.channel.fileno(), child.worker.readable) == (-1, -1, False)
    assert not children.selector.get_map()


def test_endless_output_after_an_exit_blocks_nothing(children: FakeChildren) -> None:
    """A program that the worker started, say: it has the pipe, and is faster than the master."""
    child = children.child()
    reader, writer = child.worker.stderr, os.open("/dev/zero", os.O_RDONLY)
    os.dup2(writer, reader)  # what is read there never ends
    os.close(writer)
    children.reap(child, EXIT_3)
    assert child.worker.stderr == -1
    assert len(child.worker.stderr_lines) <= STDERR_LINES


def test_ended_worker_is_not_read_by_an_event_of_the_same_round(children: FakeChildren) -> None:
    child = children.child()
    child.say(ReadyEvent())
    child.write(b"word\n")
    events = children.selector.select(0)
    assert len(events) == 2
    children.end(child, EXIT_3)
    known = list(children.failures)
    for key, mask in events:
        key.data(mask)
    assert child.worker.state is WorkerState.GONE
    assert children.failures == known


def test_exit_records_are_kept_of_the_latest_exits_alone(children: FakeChildren) -> None:
    pids = []
    for _ in range(MOST_RECORDS + 5):
        child = serving(children)
        pids.append(child.worker.pid)
        children.end(child, SEGFAULT)
    assert [record["pid"] for record in children.pool.exit_records] == pids[5:]


def test_exit_records_all_fit_into_one_message(children: FakeChildren) -> None:
    child = children.child(1, 1, WorkerState.BOOTING)
    child.worker.row[Field.ACCEPTED] = 1
    child.say(FailedEvent("\u0436" * 5000, "\U0001f600" * 5000))
    child.write(("\u0436" * 1400 + "\n").encode() * 20)
    children.end(child, EXIT_3)
    (record,) = children.pool.exit_records
    assert len(encode(record)) * MOST_RECORDS < LARGEST // 2


def test_exit_record_has_no_negative_number_of_clients(children: FakeChildren) -> None:
    child = serving(children)
    child.worker.row[Field.CLOSED] = 9
    children.end(child, SEGFAULT)
    assert children.pool.exit_records[0]["clients"] == 0


def test_several_exits_are_reaped_at_once_and_orphans_ignored(children: FakeChildren) -> None:
    """As PID 1 of a container the master inherits orphans."""
    workers = [serving(children, slot) for slot in (1, 2, 3)]
    for child in workers[1:]:
        child.leave()
        children.spawner.ended += [Exit(77, 0, 0), Exit(child.worker.pid, SEGFAULT, 0)]
    children.pool.reap()
    assert list(children.pool.workers) == [workers[0].worker.pid]
    assert [record["slot"] for record in children.pool.exit_records] == [2, 3]


def test_helper_exit_comes_after_its_messages_and_is_no_failure(children: FakeChildren) -> None:
    helper = children.child(HELPER, generation=2)
    helper.say(DifferencesEvent([]))
    helper.write(b"forkd: no such file\n")
    children.end(helper, EXIT_3)
    said, exited = children.helper_events
    assert said == HelperSaid(helper.worker, DifferencesEvent([]))
    assert isinstance(exited, HelperExited)
    assert (exited.helper, exited.ended.code) == (helper.worker, 3)
    assert [*helper.worker.stderr_lines] == ["forkd: no such file"]
    assert (list(children.pool.exit_records), children.exits, dict(children.pool.slots)) == ([], [], {})
    assert children.pool.workers == {}


def test_helper_row_is_free_before_its_exit_is_told(children: FakeChildren) -> None:
    helper = children.child(HELPER)
    helper.leave()
    children.spawner.ended.append(Exit(helper.worker.pid, 0, 1024))
    children.pool.reap()
    assert children.helper_events == []
    assert helper.worker.row[Field.PID] == 0


def test_helper_descriptors_stay_open_until_its_exit_is_handled(children: FakeChildren) -> None:
    helper = children.child(HELPER)
    helper.worker.channel.takes_descriptors = True
    reader, writer = os.pipe()
    helper.channel.send_with_descriptors(DifferencesEvent([]), [writer])
    os.close(writer)
    children.end(helper)
    assert helper.worker.channel.fileno() >= 0
    (descriptor,) = helper.worker.channel.descriptors
    os.write(descriptor, b"written")
    assert os.read(reader, 100) == b"written"
    os.close(reader)
