"""The log: stdlib logging, a record written whole by one write(2), in text or JSON.

Every process of a daemon writes to the same descriptor, opened for appending, so records of several workers never mix.
Nothing that a client sends can forge a line: what is not printable is escaped, and the lines below a record's first (a
traceback's) start with a mark that no record starts with.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import select
import time
from pathlib import Path

from forkd.errors import ForkdError

_MARK = "  | "
# C0 and C1 controls, and the separators that some viewers take for ends of lines.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class _Process:
    """Who writes: set once in each process."""

    daemon = "forkd"
    role = "master"
    descriptor = 2


def escaped(text: str) -> str:
    """`text` in one line: controls as Python writes them in a string."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def _timestamp(created: float, fraction: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created)) + f".{int(fraction):03d}Z"


class TextFormatter(logging.Formatter):
    """`TIME LEVEL DAEMON ROLE[PID] LOGGER: MESSAGE`, and marked lines for a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = _timestamp(record.created, record.msecs)
        first = f"{when} {record.levelname} {_Process.daemon} {_Process.role}[{os.getpid()}] {record.name}: "
        message, *more = record.getMessage().split("\n")
        more += _traceback(self, record).splitlines()
        return "\n".join([first + escaped(message), *(_MARK + escaped(line) for line in more)])


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, daemon, process, pid, logger, message; a traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record.created, record.msecs),
            "level": record.levelname,
            "daemon": _Process.daemon,
            "process": _Process.role,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if traceback := _traceback(self, record):
            fields["traceback"] = traceback
        return json.dumps(fields)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


class DescriptorHandler(logging.Handler):
    """Writes each record by one write(2)."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = (self.format(record) + "\n").encode(errors="backslashreplace")
            while data:  # a pipe takes what it has room for
                try:
                    data = data[os.write(self.descriptor, data) :]
                except BlockingIOError:  # somebody who shares the pipe has made it non-blocking
                    select.select([], [self.descriptor], [])
        except OSError:  # the disk is full, the reader of the pipe is gone: the daemon serves on
            return
        except Exception:  # noqa: BLE001 (as all handlers of logging: a record that can't be formatted harms nobody)
            self.handleError(record)


def open_log(path: Path) -> int:
    """A descriptor that appends to the log file, made with its directory where they are missing. Raises ForkdError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except FileExistsError:
        raise ForkdError(f"can't open the log file {path}: {path.parent} is not a directory") from None
    except OSError as error:
        is_link = error.errno == errno.ELOOP and path.is_symlink()
        why = "it is a symbolic link; name the file itself" if is_link else error.strerror
        raise ForkdError(f"can't open the log file {path}: {why}") from None


def default_log_file(name: str) -> Path:
    """Where a detached daemon logs unless told otherwise (file-hierarchy(7), XDG base directories)."""
    if os.geteuid() == 0:
        return Path("/var/log/forkd", f"{name}.log")
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state, "forkd", f"{name}.log")


def start_logging(daemon: str, level: str, form: str, descriptor: int) -> None:
    """Sends every record of this process, and of those forked from it, to `descriptor`."""
    _Process.daemon, _Process.descriptor = daemon, descriptor
    handler = DescriptorHandler(descriptor)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.captureWarnings(capture=True)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


def replace_log(descriptor: int) -> None:
    """Sends every record to what this descriptor leads to, from now on, under the number that the log had; so do
    standard output and error where they led to the log. Takes the descriptor over.
    """
    log = _Process.descriptor
    for number in (1, 2, log):
        if same_file(number, log):  # the log's own is the last that is looked at
            os.dup2(descriptor, number, inheritable=number < 3)
    os.close(descriptor)


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors lead to the same file; not so when either is closed."""
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:
        return False


def set_role(role: str) -> None:
    """Says who this process is, in every record from now on."""
    _Process.role = role
