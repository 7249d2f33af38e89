"""What one image of the master hands over to the next: all of it arrives, and what is of another format or not whole is
refused in one sentence, before anything is given up.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.errors import BootError, ForkdError
from forkd.master.generation import Generation
from forkd.master.plan import Slot
from forkd.master.spawn import STDERR_LINES, Worker
from forkd.master.upgrade import FORMAT, LaunchContext, MasterSnapshot, handed_settings
from forkd.states import WorkerState
from forkd.system.channel import channel_pair
from forkd.system.listeners import bind_all
from forkd.system.log_writer import UnwrittenLog
from forkd.system.scoreboard import Field, Scoreboard
from tests.support.strategies import SETTINGS


def listeners(path: Path) -> tuple[Listener, ...]:
    addresses = ["tcp://127.0.0.1:0", f"unix:{path}/s"]
    return tuple(Listener(address=parse_address(one), handler="a:b") for one in addresses)


class Estate:
    """A running master's state, with real descriptors."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        settings = Settings(listen=listeners(path), workers=2, agent=parse_address(f"unix:{path}/agent"))
        bound, services = bind_all(settings.listen), bind_all(settings.service_listeners)
        for one in (*bound, *services):
            stack.callback(one.remove)
        board = Scoreboard(8)
        stack.callback(board.close)
        self.workers = [self.worker(number, board, stack) for number in (1, 2)]
        self.snapshot = MasterSnapshot(
            launch=LaunchContext("/somewhere", detached=True, lock=100),
            generation=Generation(7, settings, bound, 101, services=services),
            wanted=3,
            drained=True,
            started=1234.5,
            changed_at=1300.5,
            control=102,
            board=board,
            workers=self.workers,
            slots={1: Slot(2, 17.5), 3: Slot()},
            exit_records=[{"slot": 2, "stderr_lines": ["a", "b"], "age": 0.5}],
            clients=[103, 104],
            unwritten=UnwrittenLog((b"half of a l\xff", b"ine\n"), 2, 7),
        )

    def worker(self, number: int, board: Scoreboard, stack: ExitStack) -> Worker:
        ours, theirs = channel_pair()
        stack.callback(ours.close)
        stack.callback(theirs.close)
        row = board.claim()
        row[Field.PID] = 50 + number
        return Worker(
            50 + number, number, 7, row, ours, 90 + number, WorkerState.SERVING, since=3.0, forked_at=2.0, ready_at=3.0
        )


@pytest.fixture
def estate(tmp_path: Path) -> Iterator[Estate]:
    with ExitStack() as stack:
        yield Estate(tmp_path, stack)


def written(snapshot: MasterSnapshot) -> dict[str, Any]:
    """What stands in the file."""
    descriptor = snapshot.write()
    try:
        found: dict[str, Any] = json.loads(os.pread(descriptor, 1 << 20, 0))
        return found
    finally:
        os.close(descriptor)


def read(data: bytes, reader: Callable[[int], Any] = MasterSnapshot.read) -> Any:
    descriptor = os.memfd_create("test")
    try:
        os.write(descriptor, data)
        return reader(descriptor)
    finally:
        os.close(descriptor)


def read_copy(snapshot: MasterSnapshot) -> MasterSnapshot:
    """The snapshot as the next image reads it, by copies of the descriptors: here both are in one process."""
    plain = written(snapshot)
    for one in [*plain["listeners"], *plain["services"]]:
        one["descriptors"] = [os.dup(number) for number in one["descriptors"]]
    for worker in plain["workers"]:
        if worker["channel"] >= 0:
            worker["channel"] = os.dup(worker["channel"])
    for memory in ("descriptor", "regions"):
        plain["board"][memory] = os.dup(plain["board"][memory])
    found: MasterSnapshot = read(json.dumps(plain).encode())
    return found


def close(snapshot: MasterSnapshot) -> None:
    for bound in (*snapshot.generation.bound, *snapshot.generation.services):
        bound.close()
    for worker in snapshot.workers:
        worker.channel.close()
    snapshot.board.close()


def test_all_of_it_arrives(estate: Estate) -> None:
    before = estate.snapshot
    after = read_copy(before)
    assert (after.launch, after.wanted, after.started, after.control) == (before.launch, 3, 1234.5, 102)
    assert after.unwritten == before.unwritten
    assert (after.drained, after.changed_at) == (True, 1300.5)
    assert (after.generation.number, after.generation.settings) == (7, before.generation.settings)
    assert (after.generation.log, after.slots, after.exit_records, after.clients) == (
        101,
        before.slots,
        before.exit_records,
        [103, 104],
    )
    ours_and_theirs = zip(
        [*before.generation.bound, *before.generation.services],
        [*after.generation.bound, *after.generation.services],
        strict=True,
    )
    for ours, theirs in ours_and_theirs:
        assert (theirs.address, theirs.inode, theirs.listener) == (ours.address, ours.inode, ours.listener)
        assert [sock.getsockname() for sock in theirs.sockets] == [sock.getsockname() for sock in ours.sockets]
        assert not theirs.borrowed
    close(after)


def test_scoreboard_is_the_same_memory(estate: Estate) -> None:
    after = read_copy(estate.snapshot)
    estate.workers[1].row[Field.ACCEPTED] = 42
    assert after.workers[1].row[Field.ACCEPTED] == 42
    assert (after.board.capacity, after.board.used) == (8, 2)
    close(after)


def test_worker_is_known_and_heard_as_before(estate: Estate) -> None:
    one = estate.workers[0]
    one.state, one.killed_in, one.readable, one.recycle_reason = (
        WorkerState.KILLED,
        WorkerState.DRAINING,
        True,
        "it is old",
    )
    one.cause, one.partial_line, one.since = "it did not end", "half a li", 8.25
    one.stderr_lines.extend(["first", "ü\n"])
    one.unanswered |= {1 << 62, 7}
    after = read_copy(estate.snapshot)
    found = after.workers[0]
    assert replace(found, row=one.row, channel=one.channel) == one
    assert os.path.sameopenfile(found.channel.fileno(), one.channel.fileno())
    assert found.stderr_lines == deque(["first", "ü\n"])
    assert found.stderr_lines.maxlen == STDERR_LINES
    close(after)


@pytest.mark.parametrize("state", [state for state in WorkerState if state is not WorkerState.GONE])
def test_worker_is_about_what_it_was_about_before(estate: Estate, state: WorkerState) -> None:
    estate.workers[1].state, estate.workers[1].ready_at = state, None
    after = read_copy(estate.snapshot)
    assert (after.workers[1].state, after.workers[1].killed_in, after.workers[1].ready_at) == (state, None, None)
    close(after)


def test_worker_that_says_nothing_any_more_does_not_begin_to(estate: Estate) -> None:
    one = estate.workers[0]
    one.channel.close()
    one.readable, one.stderr = False, -1
    assert {one.channel.fileno(), one.stderr} == {-1}
    after = read_copy(estate.snapshot)
    assert (after.workers[0].channel.fileno(), after.workers[0].stderr, after.workers[0].readable) == (-1, -1, False)
    close(after)


def test_worker_may_be_told_again_to_write_its_stacks(estate: Estate) -> None:
    """When it was told before is not handed over: the next image gives it the same time once more."""
    estate.workers[0].dumped_at = 9.0
    after = read_copy(estate.snapshot)
    assert after.workers[0].dumped_at == -inf
    close(after)


def test_snapshot_names_all_descriptors_that_stay_open(estate: Estate) -> None:
    estate.workers[1].channel.close()
    estate.workers[1].stderr = -1
    snapshot = estate.snapshot
    bound = [*snapshot.generation.bound, *snapshot.generation.services]
    sockets = [sock.fileno() for one in bound for sock in one.sockets]
    worker, board = estate.workers[0], snapshot.board
    rest = [worker.channel.fileno(), worker.stderr, board.descriptor, board.regions.descriptor]
    found = snapshot.descriptors()
    assert sorted(found) == sorted([100, 101, 102, 103, 104, *sockets, *rest])


def test_file_goes_to_no_program_unasked_and_leaves_no_name(estate: Estate) -> None:
    descriptor = estate.snapshot.write()
    assert not os.get_inheritable(descriptor)
    assert "forkd-state (deleted)" in os.readlink(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


def test_reading_leaves_the_file_to_be_read_again(estate: Estate) -> None:
    descriptor = estate.snapshot.write()
    assert handed_settings(descriptor) == handed_settings(descriptor) == estate.snapshot.generation.settings
    os.close(descriptor)


@settings(max_examples=50, deadline=None)
@given(drawn=SETTINGS, exit_records=st.lists(st.dictionaries(st.text(), st.text() | st.integers()), max_size=3))
def test_snapshot_carries_any_settings_and_any_output(drawn: Settings, exit_records: list[dict[str, Any]]) -> None:
    board = Scoreboard(2)
    snapshot = MasterSnapshot(
        LaunchContext("/", False, -1), Generation(1, drawn, [], -1), 1, 0.0, -1, board, [], {}, exit_records, []
    )
    descriptor = snapshot.write()
    try:
        assert handed_settings(descriptor) == drawn
        assert written(snapshot)["exit_records"] == exit_records
    finally:
        os.close(descriptor)
        board.close()


def other_format(plain: dict[str, Any]) -> None:
    plain["format"] = FORMAT + 1


def other_fields(plain: dict[str, Any]) -> None:
    plain["board"]["fields"].append("NOVELTY")


def fewer_fields(plain: dict[str, Any]) -> None:
    del plain["board"]["fields"][-1]


@pytest.mark.parametrize("change", [other_format, other_fields, fewer_fields])
@pytest.mark.parametrize("reader", [MasterSnapshot.read, handed_settings])
def test_another_form_is_refused_with_what_to_do(
    estate: Estate, change: Callable[[dict[str, Any]], None], reader: Callable[[int], Any]
) -> None:
    plain = written(estate.snapshot) | {"version": "99.1"}
    change(plain)
    with pytest.raises(ForkdError, match=r"can't take over from forkd 99\.1.*`forkd restart`"):
        read(json.dumps(plain).encode(), reader)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"1", b"\xff\xfe", b'{"format": 1}', b'"x"'])
@pytest.mark.parametrize("reader", [MasterSnapshot.read, handed_settings])
def test_snapshot_that_is_none_is_refused(data: bytes, reader: Callable[[int], Any]) -> None:
    with pytest.raises(ForkdError, match=r"^what was handed over is not whole: "):
        read(data, reader)


def test_descriptor_that_is_none_is_refused() -> None:
    closed = os.memfd_create("test")
    os.close(closed)
    for reader in (MasterSnapshot.read, handed_settings):
        with pytest.raises(ForkdError, match=r"^what was handed over is not whole: .*Bad file descriptor"):
            reader(closed)


def test_state_that_was_cut_off_is_refused(estate: Estate) -> None:
    data = json.dumps(written(estate.snapshot)).encode()
    for length in range(1, len(data), 97):
        with pytest.raises(ForkdError, match=r"^what was handed over is not whole: "):
            read(data[:length])


KEYS = [
    "format",
    "launch",
    "generation",
    "settings",
    "listeners",
    "services",
    "log",
    "wanted",
    "drained",
    "started",
    "control",
    "board",
    "workers",
    "slots",
    "exit_records",
    "clients",
    "idle_clients",
    "identity",
    "exited_totals",
    "exit_counts",
    "exited_listeners",
    "handler_metrics",
    "changed_at",
    "change_counts",
    "kept_counts",
    "pushed",
    "expiry_warned",
    "moments",
    "unwritten",
]


@pytest.mark.parametrize("key", KEYS)
def test_state_that_lacks_something_is_refused(estate: Estate, key: str) -> None:
    plain = written(estate.snapshot)
    assert set(KEYS) == set(plain) - {"version"}
    plain["listeners"] = plain["services"] = plain["workers"] = []  # theirs are this process's own descriptors
    plain["settings"]["listen"] = plain["settings"]["listen"][:1]
    del plain[key]
    with pytest.raises(ForkdError, match=r"^what was handed over is not whole: "):
        read(json.dumps(plain).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("launch", {"directory": "/"}),
        ("launch", {"directory": "/", "detached": True, "lock": 1, "more": 2}),
        ("settings", {"wokers": "2"}),
        ("settings", []),
        ("listeners", [{}]),
        ("unwritten", [[7], 0, 0]),
        ("unwritten", [["\u0100"], 0, 0]),
        ("unwritten", []),
        ("listeners", []),
        ("slots", {"one": [0, 0.0]}),
        ("slots", {"1": [0, 0.0, 0]}),
        ("slots", []),
        ("workers", [{}]),
        ("workers", [{"row": 8}]),
        ("workers", [{"row": -1}]),
        ("workers", [{"state": "asleep"}]),
        ("workers", [{"channel": "x"}]),
        ("board", {"capacity": "x"}),
        ("board", {"capacity": -5}),
        ("board", {"capacity": 8, "descriptor": 10**6}),
    ],
)
def test_state_with_something_wrong_in_it_is_refused(estate: Estate, key: str, value: Any) -> None:
    plain = written(estate.snapshot)
    one = plain["workers"][0] | {"channel": -1}
    mapped = os.dup(plain["board"]["descriptor"])
    for name in ("listeners", "services"):
        plain[name] = [one | {"sockets": 0, "descriptors": []} for one in plain[name]]
    plain["workers"], plain["board"]["descriptor"] = [], mapped
    if key == "workers" and value[0]:
        value = [one | value[0]]
    elif key == "board":
        value = plain["board"] | value
    plain[key] = value
    with pytest.raises(ForkdError) as caught:
        read(json.dumps(plain).encode())
    os.close(mapped)
    assert str(caught.value)


def test_listener_whose_descriptor_is_no_socket_is_refused(estate: Estate) -> None:
    plain = written(estate.snapshot)
    reader, writer = os.pipe()
    plain["workers"] = plain["services"] = []
    plain["listeners"] = [one | {"descriptors": [reader]} for one in plain["listeners"]]
    with pytest.raises(ForkdError, match=r"^what was handed over is not whole: "):
        read(json.dumps(plain).encode())
    os.close(reader)
    os.close(writer)


def test_reason_of_a_failed_boot_is_told_by_the_next_image_too(estate: Estate) -> None:
    estate.workers[0].failure = BootError("worker 1 could not boot: no", "Traceback: no")
    found = read_copy(estate.snapshot)
    try:
        first, second = (worker.failure for worker in found.workers)
    finally:
        close(found)
    assert first is not None
    assert (str(first), first.details) == ("worker 1 could not boot: no", "Traceback: no")
    assert second is None
