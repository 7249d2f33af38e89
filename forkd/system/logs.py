"""The log: stdlib logging, a record written whole by one write(2), in text or JSON, or sent to systemd's journal.

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

from forkd.config.units import JOURNAL
from forkd.errors import ForkdError
from forkd.system.journal import encode, is_journal_stream, open_journal, priority, send

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
    """`TIME LEVEL DAEMON ROLE[PID] LOGGER: MESSAGE`, and marked lines for a traceback.

    Args:
        with_priority: whether each line begins with `<N>`, as who reads them for the journal understands it.
    """

    def __init__(self, *, with_priority: bool = False) -> None:
        super().__init__()
        self._with_priority = with_priority

    def format(self, record: logging.LogRecord) -> str:
        when = _timestamp(record.created, record.msecs)
        first = f"{when} {record.levelname} {_Process.daemon} {_Process.role}[{os.getpid()}] {record.name}: "
        message, *more = record.getMessage().split("\n")
        more += _traceback(self, record).splitlines()
        before = f"<{priority(record.levelno)}>" if self._with_priority else ""
        return "\n".join(before + line for line in (first + escaped(message), *(_MARK + escaped(one) for one in more)))


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, daemon, process, pid, logger, message, what it is about (`EXTRA`); a
    traceback if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record.created, record.msecs),
            "level": record.levelname,
            "daemon": _Process.daemon,
            "process": _Process.role,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in EXTRA if hasattr(record, name)},
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


_PLAIN = logging.Formatter()

#: Attributes of a record that say what it is about, where who logged it has given them by `extra`.
EXTRA = ("worker", "client", "listener", "seconds", "reason", "bytes_in", "bytes_out", "rtt")


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


class JournalHandler(logging.Handler):
    """Sends each record to the journal, with fields: what it is about beside what it says."""

    def __init__(self, descriptor: int) -> None:
        super().__init__()
        self.descriptor = descriptor

    def emit(self, record: logging.LogRecord) -> None:
        try:
            send(self.descriptor, encode(self.fields(record)))
        except OSError:  # as for a file: the daemon serves on
            return
        except Exception:  # noqa: BLE001 (as all handlers of logging)
            self.handleError(record)

    def fields(self, record: logging.LogRecord) -> dict[str, str]:
        """The record's fields (systemd.journal-fields(7)); WORKER, CLIENT and LISTENER where it is about one."""
        fields = {
            "MESSAGE": "\n".join(filter(None, (record.getMessage(), _traceback(_PLAIN, record)))),
            "PRIORITY": str(priority(record.levelno)),
            "SYSLOG_IDENTIFIER": _Process.daemon,
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
        }
        if _Process.role.startswith("worker "):
            fields["WORKER"] = _Process.role.removeprefix("worker ")
        about = {name.upper(): str(getattr(record, name)) for name in EXTRA if hasattr(record, name)}
        return {**fields, **about}


#: The logger of the access log, which has a setting of its own; the level is for all others.
ACCESS = "forkd.access"


def open_log(target: Path | str) -> int:
    """A descriptor to log to.

    Args:
        target: a file, which is made with its directory where they are missing, or `JOURNAL`.

    Raises:
        ForkdError: it can't be had.
    """
    if target == JOURNAL:
        return open_journal()
    path = Path(target)
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
    """Sends every record of this process, and of those forked from it, to `descriptor`.

    Args:
        daemon: its name.
        level: the least severe that is kept.
        form: how: `text`, `json`, or `journal`, for a descriptor that leads there.
        descriptor: by `open_log`, or standard error's.
    """
    _Process.daemon, _Process.descriptor = daemon, descriptor
    handler: logging.Handler
    if form == JOURNAL:
        handler = JournalHandler(descriptor)
    else:
        handler = DescriptorHandler(descriptor)
        with_priority = is_journal_stream(descriptor)
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter(with_priority=with_priority))
    logging.captureWarnings(capture=True)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    logging.getLogger(ACCESS).setLevel(logging.INFO)


def replace_log(descriptor: int, *, output: bool = True) -> None:
    """Sends every record to what this descriptor leads to, from now on, under the number that the log had. Takes the
    descriptor over.

    Args:
        descriptor: by `open_log`, or a copy of standard error's.
        output: whether standard output and error go with the log, where they led to it.
    """
    log = _Process.descriptor
    for number in (1, 2, log) if output else (log,):
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
