"""The log: nothing that a client says forges a line, each record is written whole or not at all, and no record, however
wrong, harms the caller.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forkd.errors import ForkdError
from forkd.system.identity import Identity
from forkd.system.log_writer import LogWriter
from forkd.system.logs import DescriptorHandler, JsonFormatter, TextFormatter, default_log_file, open_log, same_file
from tests.support.forked import exit_code, start_child
from tests.support.processes import eventually

FIRST = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (\w+) forkd master\[(\d+)\] tested: (.*)")
HOSTILE = st.text(st.sampled_from("a\n\r\t\x0b\x0c\x1b\x1c\x85\x9b\u2028\u2029\x00\x7f |")) | st.text()


def record(message: object, *arguments: object, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("tested", logging.ERROR, __file__, 1, message, arguments, info)


def raised(error: BaseException) -> BaseException:
    """The error, with a traceback."""
    with pytest.raises(type(error)) as caught:
        raise error
    return caught.value


def logger_on(descriptor: int, formatter: type[logging.Formatter] = TextFormatter) -> logging.Logger:
    """A logger of its own, which shares nothing with pytest's."""
    logger = logging.Logger("tested")
    handler = DescriptorHandler(LogWriter(descriptor))
    handler.setFormatter(formatter())
    logger.addHandler(handler)
    return logger


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = open_log(path, Identity())
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@given(message=HOSTILE, argument=HOSTILE)
@example(message="a\n2026-01-01T00:00:00.000Z INFO forkd master[1] tested: forged", argument="")
@example(message="a\r\x1b[2Kforged\u2028forged", argument="\udc80")
def test_no_message_forges_a_line(message: str, argument: str) -> None:
    text = TextFormatter().format(record("%s|%s", message, argument))
    first, *more = text.splitlines()
    found = FIRST.fullmatch(first)
    assert found is not None
    assert found.group(1, 2) == ("ERROR", str(os.getpid()))
    assert len(more) == f"{message}{argument}".count("\n")
    assert [line for line in more if not line.startswith("  | ")] == []
    assert {unicodedata.category(letter) for letter in text.replace("\n", "")} & {"Cc", "Zl", "Zp"} == set()


@given(said=HOSTILE)
def test_traceback_lines_are_marked_with_any_exception_text(said: str) -> None:
    first, *more = TextFormatter().format(record("failed", error=raised(ValueError(said)))).splitlines()
    assert FIRST.fullmatch(first)
    assert more[0] == "  | Traceback (most recent call last):"
    assert [line for line in more if not line.startswith("  | ")] == []
    assert any(line.startswith("  | ValueError") for line in more)


def test_printable_text_is_logged_unchanged() -> None:
    text = TextFormatter().format(record("grüße, 日本 %d%%", 5))
    assert text.endswith("tested: grüße, 日本 5%")


@given(message=HOSTILE, said=HOSTILE)
def test_a_json_record_is_one_line_that_parses_to_what_was_said(message: str, said: str) -> None:
    text = JsonFormatter().format(record("%s", message, error=raised(ValueError(said))))
    assert len(text.splitlines()) == 1
    found = json.loads(text)
    assert found["message"] == message
    assert found["traceback"].startswith("Traceback (most recent call last):")
    assert (found["level"], found["daemon"], found["process"]) == ("ERROR", "forkd", "master")
    assert (found["pid"], found["logger"]) == (os.getpid(), "tested")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found["time"])
    assert "traceback" not in json.loads(JsonFormatter().format(record("fine")))


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize("formatter", [TextFormatter, JsonFormatter])
@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("%s %s", (1,)),
        ("%d", ("x",)),
        ("%", (1,)),
        ("nothing", (1,)),
        ("%(a)s", ({"b": 1},)),
        ("%s", (Broken(),)),
        (Broken(), ()),
    ],
    ids=["too few", "no number", "half", "too many", "no such key", "broken argument", "broken message"],
)
def test_a_record_that_cannot_be_formatted_does_no_harm(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    formatter: type[logging.Formatter],
    message: Any,
    arguments: tuple[Any, ...],
) -> None:
    with opened(tmp_path / "log") as descriptor:
        logger = logger_on(descriptor, formatter)
        logger.error(message, *arguments)
        logger.error("the next")
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("the next" in line for line in lines) == 1
    assert len(lines) > 1 or capsys.readouterr().err  # and it is reported


def test_text_that_is_no_unicode_is_logged_all_the_same(tmp_path: Path) -> None:
    with opened(tmp_path / "log") as descriptor:
        logger_on(descriptor).error("a%sb", "\udc80")
    assert (tmp_path / "log").read_bytes().endswith(b": a\\udc80b\n")


def test_a_reader_that_has_gone_does_no_harm() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    logger_on(writer).error("no reader is left")
    os.close(writer)
    logger_on(writer).error("the descriptor is closed")
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(writer)


@pytest.mark.parametrize("formatter", [TextFormatter, JsonFormatter])
def test_large_records_of_several_processes_do_not_mix(tmp_path: Path, formatter: type[logging.Formatter]) -> None:
    start, go = os.pipe()

    def write(letter: str) -> None:
        os.close(go)
        os.read(start, 1)  # end of file, for all at the same time
        with opened(tmp_path / "log") as descriptor:
            logger = logger_on(descriptor, formatter)
            for number in range(25):
                logger.info("<%s %d>", letter * (50_000 + number), number)

    children = [start_child(partial(write, letter)) for letter in "abcd"]
    os.close(start)
    os.close(go)
    assert [exit_code(child) for child in children] == [0] * 4
    text = (tmp_path / "log").read_text()
    found = re.findall(r"<(a+|b+|c+|d+) (\d+)>", text)
    assert sorted((word[0], len(word), int(number)) for word, number in found) == [
        (letter, 50_000 + number, number) for letter in "abcd" for number in range(25)
    ]
    assert len(text.splitlines()) == 100


@pytest.mark.parametrize("blocking", [True, False])
def test_a_record_to_a_full_pipe_is_not_lost(blocking: bool) -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    stuffing = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            stuffing += os.write(writer, b"." * 512)
    os.set_blocking(writer, blocking)

    def write() -> None:
        for number in range(3):
            logger_on(writer).error("%s%d", "x" * 300_000, number)

    child = start_child(write)
    os.close(writer)
    # It waits for room, or it has given the record up and has ended.
    eventually(lambda: Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] in "SZ")
    with open(reader, "rb") as pipe:
        text = pipe.read()
    assert exit_code(child) == 0
    assert text[:stuffing] == b"." * stuffing
    lines = text[stuffing:].splitlines()
    assert [line[-300_001:] for line in lines] == [b"x" * 300_000 + b"%d" % number for number in range(3)]


def test_log_file_is_private_appended_and_has_its_directory(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "x.log"
    for number in range(2):
        with opened(path) as descriptor:
            logger_on(descriptor).error("record %d", number)
            assert not os.get_inheritable(descriptor)
    assert [line[-8:] for line in path.read_text().splitlines()] == ["record 0", "record 1"]
    assert path.stat().st_mode & 0o027 == 0


@pytest.mark.parametrize("what", ["link", "directory", "below a file"])
def test_log_file_that_can_not_be_opened_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    (tmp_path / "plain").touch()
    if what == "link":
        path.symlink_to(tmp_path / "plain")
    elif what == "directory":
        path.mkdir()
    else:
        path = tmp_path / "plain" / "x"
    with pytest.raises(ForkdError, match=re.escape(f"can't open the log file {path}: ")):
        open_log(path, Identity())
    assert (tmp_path / "plain").read_bytes() == b""


def test_the_default_log_file_is_in_the_users_state_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_log_file("chat") == Path("/state/forkd/chat.log")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/x")
    assert default_log_file("chat") == Path("/home/x/.local/state/forkd/chat.log")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_log_file("chat") == Path("/var/log/forkd/chat.log")


PROGRAM = """
import logging, warnings
from forkd.system.logs import set_role, start_logging
start_logging("chat", "info", FORM, 1)
logging.getLogger("a").debug("too little")
logging.getLogger("a").info("first")
set_role("worker 1")
logging.getLogger("b").error("second")
warnings.warn("third")
"""


@pytest.mark.parametrize("form", ["text", "json"])
def test_loggers_and_warnings_all_go_to_the_descriptor(form: str) -> None:
    program = PROGRAM.replace("FORM", repr(form))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    if form == "json":
        found = [json.loads(line) for line in lines]
        who = [(one["level"], one["daemon"], one["process"], one["logger"]) for one in found]
    else:
        found = [re.match(r"\S+ (\S+) (\S+) (.+)\[\d+\] (\S+): ", line) for line in lines]
        who = [one.groups() for one in found if one]
    assert who[:3] == [
        ("INFO", "chat", "master", "a"),
        ("ERROR", "chat", "worker 1", "b"),
        ("WARNING", "chat", "worker 1", "py.warnings"),
    ]
    assert "third" in lines[2]


REPLACING = """
import logging, os, sys
from forkd.system.identity import Identity
from forkd.system.logs import open_log, replace_log, start_logging
from functools import partial
from pathlib import Path
log = DESCRIPTOR
start_logging("chat", "info", "text", log)
logging.info("first")
before = len(os.listdir("/proc/self/fd"))
for name in ("second", "third"):
    replace_log(open_log(Path(sys.argv[1], name), Identity()))
    logging.info(name)
    print("out", flush=True)
    print("err", file=sys.stderr, flush=True)
assert len(os.listdir("/proc/self/fd")) == before
assert os.get_inheritable(1) and os.get_inheritable(2)
assert log < 3 or not os.get_inheritable(log)
"""


def replaced(tmp_path: Path, log: str, *, err_to_log: bool) -> list[list[str]]:
    """What a process that changes its log twice leaves in each of the three, and on standard output."""
    first = tmp_path / "first"
    program = REPLACING.replace("DESCRIPTOR", log)
    with first.open("ab") as opened:
        command = [sys.executable, "-c", program, str(tmp_path)]
        err = opened if err_to_log else subprocess.PIPE
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=err,
            check=False,
            timeout=60,
            env={**os.environ, "FIRST": str(first)},
        )
    assert result.returncode == 0, result.stderr or first.read_text()
    texts = [(tmp_path / name).read_text() for name in ("first", "second", "third")]
    return [[line.split()[-1] for line in text.splitlines()] for text in [*texts, result.stdout.decode()]]


def test_replaced_log_takes_records_and_standard_error(tmp_path: Path) -> None:
    log = "open_log(Path(os.environ['FIRST']), Identity())"
    assert replaced(tmp_path, log, err_to_log=True) == [["first"], ["second", "err"], ["third", "err"], ["out", "out"]]


def test_standard_error_as_log_is_replaced_under_its_number(tmp_path: Path) -> None:
    assert replaced(tmp_path, "2", err_to_log=True) == [["first"], ["second", "err"], ["third", "err"], ["out", "out"]]


def test_standard_error_that_was_not_the_log_stays_what_it_was(tmp_path: Path) -> None:
    log = "open_log(Path(os.environ['FIRST']), Identity())"
    assert replaced(tmp_path, log, err_to_log=False) == [["first"], ["second"], ["third"], ["out", "out"]]


def test_same_file_knows_two_descriptors_and_no_closed_one(tmp_path: Path) -> None:
    with opened(tmp_path / "a") as one, opened(tmp_path / "a") as again, opened(tmp_path / "b") as other:
        assert same_file(one, one)
        assert same_file(one, again)
        assert not same_file(one, other)
    for pair in ((one, one), (one, 2), (2, one), (-1, 2)):
        assert not same_file(*pair)
