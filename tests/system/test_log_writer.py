"""The log's writer: what is not read holds nobody up for long, what is lost is counted and told, and what others share
(a pipe, a terminal) is left as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkd.errors import ForkdError
from forkd.system import log_writer
from forkd.system.identity import Identity
from forkd.system.log_writer import LogWriter
from forkd.system.logs import DescriptorHandler, open_log, send_journal_record
from tests.support.forked import run_in_child

LINE = b"x" * 99 + b"\n"

Ends = tuple[int, int]


def pipe() -> Ends:
    return os.pipe()


def terminal() -> Ends:
    """A terminal that does not change what is written."""
    import tty  # noqa: PLC0415

    master, slave = os.openpty()
    tty.setraw(slave)
    return master, slave


def sockets() -> Ends:
    one, other = socket.socketpair()
    return one.detach(), other.detach()


@pytest.fixture(params=[pipe, terminal, sockets])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """What is read, and what is written to."""
    before = {*os.listdir("/proc/self/fd")}
    found: Ends = request.param()
    flags = fcntl.fcntl(found[1], fcntl.F_GETFL)
    yield found
    assert fcntl.fcntl(found[1], fcntl.F_GETFL) == flags
    for one in found:
        os.close(one)
    assert {*os.listdir("/proc/self/fd")} == before


@contextlib.contextmanager
def patient(seconds: float) -> Iterator[None]:
    before, log_writer.PATIENCE = log_writer.PATIENCE, seconds
    try:
        yield
    finally:
        log_writer.PATIENCE = before


@contextlib.contextmanager
def writer_on(descriptor: int, seconds: float = 0.0) -> Iterator[LogWriter]:
    with patient(seconds):
        writer = LogWriter(descriptor)
        try:
            yield writer
        finally:
            writer.open(descriptor)


def drain(reader: int, writer: LogWriter, size: int) -> bytes:
    """So many bytes, read while the writer writes them."""
    data = b""
    while len(data) < size:
        writer.flush()
        data += os.read(reader, 1 << 16)
    return data


def test_unread_records_wait_and_come_whole_and_in_order(ends: Ends) -> None:
    reader, written = ends
    lines = [b"%08d" % number + LINE[8:] for number in range(5000)]
    with writer_on(written) as writer:
        began = time.monotonic()
        for line in lines:
            writer.put(line)
        assert time.monotonic() - began < 20
        assert drain(reader, writer, 100 * len(lines)) == b"".join(lines)
        assert writer.lost_total == 0


def test_lost_records_are_counted_and_told(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    reader, written = ends
    with writer_on(written) as writer:
        for _ in range(30_000):
            writer.put(LINE)
        lost = writer.lost_total
        assert 0 < lost < 30_000
        assert caplog.messages == []
        assert set(drain(reader, writer, 100 * (30_000 - lost)).split(b"\n")) == {LINE[:-1], b""}
        writer.flush()
        assert caplog.messages == [f"{lost} log lines lost: the log could not be written"]
        writer.put(LINE)
        assert os.read(reader, 1000) == LINE
    assert len(caplog.messages) == 1


def test_process_waits_for_its_reader_for_a_bounded_time(ends: Ends) -> None:
    with writer_on(ends[1], 0.2) as writer:
        began = time.monotonic()
        for _ in range(1000):
            writer.put(LINE * 10)
        assert 0.2 <= time.monotonic() - began < 20


def test_loop_that_sees_to_the_log_is_not_held_up(ends: Ends) -> None:
    reader, written = ends
    with writer_on(written, 60.0) as writer, selectors.DefaultSelector() as selector:

        class Loop:
            def add_writer(self, fd: int, callback: Callable[[], object]) -> None:
                selector.register(fd, selectors.EVENT_WRITE, callback)

            def remove_writer(self, fd: int) -> None:
                selector.unregister(fd)

        writer.attach(Loop(), 0.0)
        began = time.monotonic()
        for _ in range(3000):
            writer.put(LINE)
        assert time.monotonic() - began < 20
        data = b""
        while len(data) < 100 * 3000:
            for key, _ in selector.select(0):
                key.data()
            data += os.read(reader, 1 << 16)
        assert data == LINE * 3000
        assert [*selector.get_map()] == []


def test_forked_child_writes_nothing_of_its_parent(ends: Ends) -> None:
    reader, written = ends
    with writer_on(written) as writer:
        for _ in range(5000):
            writer.put(LINE)

        def write() -> int:
            writer.flush()
            writer.put(b"child\n")
            return writer.lost_total

        assert run_in_child(write) == 0
        assert b"child" not in drain(reader, writer, 100 * 5000)


def test_reader_that_is_gone_is_counted(ends: Ends) -> None:
    reader, written = ends
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, reader)
    os.close(null)
    with writer_on(written) as writer:
        writer.put(LINE)
        assert writer.lost_total == 1


def test_full_disk_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with writer_on(descriptor) as writer:
        writer.put(LINE)
        writer.put(LINE)
        assert (writer.lost_total, caplog.messages) == (2, [])
    os.close(descriptor)


def test_pipe_of_a_filtered_process_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "splice", forbidden)
    reader, written = os.pipe()
    with writer_on(written) as writer:
        for _ in range(3000):
            writer.put(LINE)
        assert drain(reader, writer, 100 * 3000) == LINE * 3000
    os.close(reader)
    os.close(written)


def test_journal_that_reads_nothing_is_not_waited_for() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, patient(0.0):
        writer = LogWriter(theirs.fileno(), send_journal_record)
        for number in range(2000):
            writer.put(b"MESSAGE=%d\n" % number)
        for number in range(2000):
            writer.flush()
            assert ours.recv(100) == b"MESSAGE=%d\n" % number
        writer.open(theirs.fileno())


def test_terminal_that_a_process_does_not_have_is_no_log() -> None:
    def open_terminal() -> None:
        os.setsid()
        with pytest.raises(ForkdError, match="can't open the log file /dev/tty: there is no terminal"):
            open_log(Path("/dev/tty"), Identity())

    run_in_child(open_terminal)


def test_named_pipe_without_a_reader_is_no_log(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    with pytest.raises(ForkdError, match="it is a named pipe that no program reads"):
        open_log(tmp_path / "log", Identity())


def test_handler_flushes_its_writer() -> None:
    calls: list[str] = []

    class Noting(LogWriter):
        def put(self, record: bytes) -> None:
            calls.append(record.decode())

        def flush(self) -> None:
            calls.append("flush")

    handler = DescriptorHandler(Noting())
    handler.emit(logging.LogRecord("a", logging.INFO, "f", 1, "hello", None, None))
    handler.flush()
    assert calls == ["hello\n", "flush"]
