"""Records for systemd's journal: their datagrams, and a worker's that go to a socket that stands for the journal's."""

from __future__ import annotations

import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.errors import ForkdError
from forkd.serve.loop import PollLoop
from forkd.system import logs
from forkd.system.identity import Identity


def decode(data: bytes) -> dict[str, str]:
    """A record's fields, read as the journal reads them (systemd.io/JOURNAL_NATIVE_PROTOCOL)."""
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (size,) = struct.unpack("<Q", data[:8])
            value, data = data[8 : 8 + size], data[8 + size + 1 :]
        fields[name.decode()] = value.decode()
    return fields


@pytest.fixture
def heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket that stands for the journal's, and logging that goes there; undone at the end."""
    monkeypatch.setattr(logs, "JOURNAL_SOCKET", str(tmp_path / "journal"))
    root = logging.getLogger()
    before = root.handlers[:], root.level, logs.LogContext.daemon, logs.LogContext.role, logs.LogContext.descriptor
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(logs.JOURNAL_SOCKET)
        sock.settimeout(20)
        descriptor = logs.open_log("journal", Identity())
        root.handlers[:] = []
        logs.start_logging("chat", "info", "journal", descriptor)
        try:
            yield sock
        finally:
            logs.LogContext.handler = None
            logging.captureWarnings(capture=False)
            root.handlers[:], root.level = before[:2]
            logs.LogContext.daemon, logs.LogContext.role, logs.LogContext.descriptor = before[2:]
            os.close(descriptor)


@given(st.dictionaries(st.sampled_from(["MESSAGE", "CLIENT", "WORKER"]), st.text(st.characters(codec="utf-8"))))
def test_encoded_record_is_read_as_the_same_fields(fields: dict[str, str]) -> None:
    assert decode(logs.encode_journal_record(fields)) == fields


def test_a_value_of_several_lines_forges_no_field() -> None:
    forged = "hello\nPRIORITY=0\nMESSAGE=all is well"
    assert decode(logs.encode_journal_record({"MESSAGE": forged, "PRIORITY": "6"})) == {
        "MESSAGE": forged,
        "PRIORITY": "6",
    }


def test_a_record_has_fields_for_what_it_is_about(heard: socket.socket) -> None:
    logs.set_role("worker 3")
    logging.getLogger("shop").error("no more %s", "tea", extra={"client": "1.2.3.4", "listener": "tcp://0.0.0.0:80"})
    found = decode(heard.recv(65536))
    wanted = {
        "MESSAGE": "no more tea", "PRIORITY": "3", "SYSLOG_IDENTIFIER": "chat", "LOGGER": "shop", "WORKER": "3",
        "CLIENT": "1.2.3.4", "LISTENER": "tcp://0.0.0.0:80", "CODE_FILE": __file__,
    }  # fmt: skip
    assert wanted.items() <= found.items()


def test_a_traceback_is_part_of_the_message(heard: socket.socket) -> None:
    try:
        int("odd")
    except ValueError:
        logging.getLogger("shop").exception("failed")
    message = decode(heard.recv(65536))["MESSAGE"]
    assert message.startswith("failed\nTraceback")
    assert "ValueError: invalid literal" in message


def test_a_record_that_no_datagram_holds_comes_as_a_sealed_file(heard: socket.socket) -> None:
    logging.getLogger("shop").warning("x" * (4 << 20))
    data, descriptors, _, _ = socket.recv_fds(heard, 10, 1)
    assert data == b""
    with open(descriptors[0], "rb") as file:
        file.seek(0)
        found = decode(file.read())
    assert len(found["MESSAGE"]) == 4 << 20


def test_journal_that_is_gone_does_not_block(heard: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    heard.close()
    logging.getLogger("shop").warning("hello")
    assert capsys.readouterr().err == ""


def test_missing_journal_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "JOURNAL_SOCKET", str(tmp_path / "nobody"))
    with pytest.raises(ForkdError, match=r"can't log to the journal: .*nobody: No such file or directory"):
        logs.open_log("journal", Identity())


@pytest.mark.parametrize(("level", "number"), [(10, 7), (20, 6), (30, 4), (40, 3), (50, 2)])
def test_a_level_has_its_priority(level: int, number: int) -> None:
    assert logs.syslog_priority(level) == number


def test_lines_for_the_journals_stream_begin_with_their_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    try:
        found = os.fstat(writer)
        assert not logs.is_journal_stream(writer)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert logs.is_journal_stream(writer)
    finally:
        os.close(reader)
        os.close(writer)
    assert not logs.is_journal_stream(writer)
    record = logging.LogRecord("shop", logging.WARNING, "f", 1, "one\ntwo", None, None)
    for formatter, count in ((logs.TextFormatter(), 2), (logs.JsonFormatter(), 1)):
        handler = logs.DescriptorHandler(logs.LogContext.writer, with_priority=True)
        handler.setFormatter(formatter)
        assert [line[:3] for line in handler.encode(record).splitlines()] == [b"<4>"] * count


def test_failure_of_a_handler_is_logged_with_its_client(caplog: pytest.LogCaptureFixture) -> None:
    about = {"client": "1.2.3.4", "listener": "tcp://0.0.0.0:80"}
    loop = PollLoop()
    try:
        loop.call_exception_handler({"message": "It failed.", "transport": SimpleNamespace(about=lambda: about)})
        loop.call_exception_handler({"message": "It failed again."})
    finally:
        loop.close()
    first, second = (record.__dict__ for record in caplog.records)
    assert about.items() <= first.items()
    assert not about.keys() & second.keys()
