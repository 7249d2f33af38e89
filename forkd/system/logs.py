"""The log: stdlib logging, each record written whole, as text, as JSON, or to systemd's journal with fields.

Every process of a daemon writes to the same descriptor, opened for appending, each record by one write(2) where it is a
file, so records of several workers never mix; `log_writer` has what pipes and terminals need. Nothing that a client
sends can forge a line: what is not printable is escaped, and the lines below a record's first (a traceback's) start
with a mark that no record starts with.

A record for the journal is one datagram of assignments (systemd.io/JOURNAL_NATIVE_PROTOCOL); a larger one goes as a
sealed memfd. Where standard error is a stream into the journal, lines begin with their priority (sd-daemon(3)).

`app` opens the log and starts logging; a reload reopens it by `replace_log`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import struct
import time
from collections.abc import Callable
from functools import lru_cache
from math import inf
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from forkd.config.values import JOURNAL, is_open_file
from forkd.errors import ForkdError, escaped
from forkd.system.identity import Identity
from forkd.system.log_writer import PATIENCE, LogWriter, Loop, UnwrittenLog
from forkd.system.safe_paths import UnsafePath, open_file

if TYPE_CHECKING:
    from forkd.config.settings import Settings

#: The logger of the access log, which has a setting of its own; the level is for all others.
ACCESS_LOGGER = "forkd.access"

#: Attributes of a record that say what it is about, where they were given to the logger by `extra`.
RECORD_FIELDS = ("worker", "client", "listener", "seconds", "reason", "bytes_in", "bytes_out", "rtt")

JOURNAL_SOCKET = "/run/systemd/journal/socket"

_RECORD_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL

#: Records of one kind and listener that are written in full within so many seconds, and kinds that are told apart;
#: all others are one.
BURST, BURST_SECONDS = 10, 60.0
MOST_KINDS = 256

_CONTINUATION = "  | "

_WRITTEN = "in_forkd_log"  # the attribute of a record that was offered to forkd's log


class LogContext:
    """What the records of this process say of it, and where they go; one for the process."""

    daemon = "forkd"
    role = "master"
    descriptor = 2
    level = logging.INFO
    writer = LogWriter()
    handler: logging.Handler | None = None  # None: logging was not started
    bursts: BurstFilter | None = None  # likewise

    @classmethod
    def is_kept(cls, logger: str, level: int) -> bool:
        """Whether forkd's own log keeps records of this level."""
        return level >= (logging.INFO if logger == ACCESS_LOGGER else cls.level)


class _Burst:
    """Records of one kind since a time."""

    __slots__ = ("began", "count", "more")

    def __init__(self, began: float) -> None:
        self.began = began
        self.count = 0
        self.more: Callable[[int], logging.LogRecord] | None = None  # makes what tells of those that were not written


class BurstFilter(logging.Filter):
    """Keeps clients from flooding the log: of what is about them, and of what handlers raise, `BURST` records of each
    kind are written within `BURST_SECONDS`, and then how many more there were. A kind is what a record says before its
    facts are put in, of which listener, and where an exception comes from.

    Args:
        write: writes the record that says how many.
        clock: in seconds.
    """

    def __init__(self, write: Callable[[logging.LogRecord], object], clock: Callable[[], float] = monotonic) -> None:
        super().__init__()
        self._write = write
        self._clock = clock
        self._bursts: dict[tuple[object, ...], _Burst] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = _kind_of(record)
        if not kind:
            return True
        now = self._clock()
        burst = self._bursts.get(kind)
        if burst is None or now - burst.began >= BURST_SECONDS:
            self.tell(now)
            if len(self._bursts) >= MOST_KINDS:
                kind = ("others",)
            burst = self._bursts.setdefault(kind, _Burst(now))
        burst.count += 1
        if burst.count > BURST:
            burst.more = burst.more or _more_of(record)
            return False
        return True

    def tell(self, now: float = inf) -> None:
        """Says of each kind whose time is over at `now` how many were not written."""
        for kind, burst in [*self._bursts.items()]:
            if now - burst.began >= BURST_SECONDS:
                del self._bursts[kind]
                if burst.more is not None:
                    self._write(burst.more(burst.count - BURST))


def _kind_of(record: logging.LogRecord) -> tuple[object, ...]:
    """What a record is one of; nothing for one that clients can't cause, or that is to be complete."""
    listener = getattr(record, "listener", None)
    if record.name != "asyncio" and (listener is None or record.name == ACCESS_LOGGER):
        return ()
    text = str(record.msg).partition("\n")[0]
    raised: tuple[object, ...] = ()
    if record.exc_info:
        kind, _, traceback = record.exc_info
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        raised = (kind, traceback and (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno))
    return record.name, text, listener, getattr(record, "reason", None), *raised


def _more_of(record: logging.LogRecord) -> Callable[[int], logging.LogRecord]:
    """A function that makes what tells of so many more records like this one. It does not hold the record: an exception
    has half a program behind it.
    """
    text = record.getMessage().partition("\n")[0][:200]
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        text += f" ({type(error).__name__}: {str(error)[:200]})"
    name, level, listener = record.name, record.levelno, getattr(record, "listener", None)

    def make(count: int) -> logging.LogRecord:
        more = logging.LogRecord(name, level, __file__, 0, "%d more like this: %s", (count, text), None)
        if listener is not None:
            more.listener = listener
        return more

    return make


class OwnLogger(logging.Logger):
    """A logger of forkd's, or asyncio's, which tells of what handlers raise. Whatever a handler configures, disables or
    takes away (logging.config, logging.disable), its records come into forkd's log. A handler's own log gets them too.
    """

    @property
    def disabled(self) -> bool:
        """As that of logging, but no configuration disables it."""
        return False

    @disabled.setter
    def disabled(self, value: bool) -> None:
        pass

    def isEnabledFor(self, level: int) -> bool:
        """As that of logging; also what forkd's log keeps."""
        kept = LogContext.handler is not None and LogContext.is_kept(self.name, level)
        return kept or super().isEnabledFor(level)

    def callHandlers(self, record: logging.LogRecord) -> None:
        """As that of logging, but first writes to forkd's log."""
        own = LogContext.handler
        if own is not None:
            if LogContext.is_kept(self.name, record.levelno):
                own.handle(record)
            record.__dict__[_WRITTEN] = True
        if self.hasHandlers() and super().isEnabledFor(record.levelno):
            super().callHandlers(record)


def _is_new(record: logging.LogRecord) -> bool:
    """Whether a record was not offered to forkd's log yet, which the root logger has, too."""
    return not hasattr(record, _WRITTEN)


def start_logging(daemon: str, level: str, form: str, descriptor: int) -> None:
    """Sends every record of this process, and of those forked from it, to `descriptor`.

    Args:
        daemon: its name.
        level: the least severe that is kept.
        form: how: `text`, `json`, or `journal`, for a descriptor that leads there.
        descriptor: by `open_log`, or standard error's.
    """
    LogContext.daemon, LogContext.descriptor, LogContext.level = daemon, descriptor, logging.getLevelName(level.upper())
    writer = LogContext.writer
    writer.open(descriptor, send_journal_record if form == JOURNAL else None)
    handler: logging.Handler
    if form == JOURNAL:
        handler = JournalHandler(writer)
    else:
        handler = DescriptorHandler(writer, with_priority=is_journal_stream(descriptor))
        handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.captureWarnings(capture=True)
    handler.addFilter(_is_new)
    LogContext.bursts = BurstFilter(handler.emit)
    handler.addFilter(LogContext.bursts)
    root, former, LogContext.handler = logging.getLogger(), LogContext.handler, handler
    if former is None:
        logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    elif former in root.handlers:  # else a handler that was preloaded has its own way
        root.removeHandler(former)
        root.addHandler(handler)
        root.setLevel(level.upper())
    for name in [*logging.root.manager.loggerDict]:
        if name.partition(".")[0] in ("forkd", "asyncio"):
            logging.getLogger(name).__class__ = OwnLogger
    logging.getLogger(ACCESS_LOGGER).setLevel(logging.INFO)


def set_role(role: str) -> None:
    """Sets the role of this process, as every record from now on has it."""
    LogContext.role = role


def open_log(target: Path | str, identity: Identity) -> int:
    """A descriptor to log to.

    Args:
        target: a file, which is made with its directory where they are missing, or `JOURNAL`.
        identity: that of the workers, which may not lead it elsewhere.

    Raises:
        ForkdError: it can't be had.
    """
    if target == JOURNAL:
        return open_journal()
    path = Path(target)
    try:
        descriptor = open_file(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640, identity, make_directory=True)
        os.set_blocking(descriptor, True)
    except NotADirectoryError:
        raise ForkdError(f"can't open the log file {path}: {path.parent} is not a directory") from None
    except UnsafePath as error:
        raise ForkdError(f"can't open the log file {path}: {error}") from None
    except OSError as error:
        is_link = error.errno == errno.ELOOP and path.is_symlink()
        why = error.strerror
        if is_link:
            why = "it is a symbolic link; " + ("set log.to to stderr" if is_open_file(path) else "name the file itself")
        elif error.errno in (errno.EACCES, errno.EROFS):
            why = f"{error.strerror}; set log.to to a file that this user may write"
        elif error.errno == errno.ENXIO:
            is_terminal = path.is_char_device()
            why = "there is no terminal" if is_terminal else "it is a named pipe that no program reads, or a socket"
        raise ForkdError(f"can't open the log file {path}: {why}") from None
    return descriptor


def probe_log(path: Path) -> None:
    """Checks that `open_log` could open a file, and makes nothing. Raises ForkdError."""
    try:
        found = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        why = obstacle_to_making(path)
    except OSError as error:
        why = error.strerror or str(error)
    else:
        why = ""
        if stat.S_ISLNK(found.st_mode):
            why = "it is a symbolic link; name the file itself"
        elif stat.S_ISDIR(found.st_mode):
            why = os.strerror(errno.EISDIR)
        elif not os.access(path, os.W_OK):
            why = os.strerror(errno.EACCES)
    if why:
        raise ForkdError(f"can't open the log file {path}: {why}")


def obstacle_to_making(path: Path) -> str:
    """Why this process could not make a file or directory at a path, with those above it; empty where it could."""
    above = next((one for one in path.parents if os.path.lexists(one)), Path("/"))
    if not above.is_dir():
        return f"{above} is not a directory"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"user {os.geteuid()} may make nothing in {above}"


def log_to_stderr() -> int:
    """A descriptor that leads where standard error does. A file there is appended to from now on, as processes that
    open it once more (`separate_log`) would otherwise write over each other.
    """
    if stat.S_ISREG(os.fstat(2).st_mode):
        fcntl.fcntl(2, fcntl.F_SETFL, fcntl.fcntl(2, fcntl.F_GETFL) | os.O_APPEND)
    return os.dup(2)


def separate_log(descriptor: int) -> int:
    """A descriptor that leads to the same log and shares no state with this one, where that can be had: what a worker
    does to its own (O_APPEND, O_DIRECT, shutdown(2)) is nothing to the others. Else a copy.
    """
    mode = os.fstat(descriptor).st_mode
    with contextlib.suppress(OSError, ForkdError):
        if stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
            flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_APPEND | os.O_NONBLOCK)
            separate = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
            os.set_blocking(separate, not flags & os.O_NONBLOCK)
            return separate
        if stat.S_ISSOCK(mode) and _leads_to_journal(descriptor):
            return open_journal()
    return os.dup(descriptor)


def _leads_to_journal(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as sock:
        return sock.family == socket.AF_UNIX and sock.getpeername() == JOURNAL_SOCKET


def replace_log(descriptor: int, *, output: bool = True) -> None:
    """Sends every record to what this descriptor leads to, from now on, under the number that the log had. Takes the
    descriptor over.

    Args:
        descriptor: by `open_log`, or a copy of standard error's.
        output: whether standard output and error go with the log, where they led to it.
    """
    log = LogContext.descriptor
    for number in (1, 2, log) if output else (log,):
        if same_file(number, log):  # the log's own is the last that is looked at
            os.dup2(descriptor, number, inheritable=number < 3)
    os.close(descriptor)
    LogContext.writer.reopen()


def log_descriptors() -> set[int]:
    """The descriptors that this process writes to its log by, beside the log's own."""
    return LogContext.writer.descriptors()


def log_lines_lost() -> int:
    """How many records of this process have not come to the log."""
    return LogContext.writer.lost_total


def unwritten_log() -> UnwrittenLog:
    """What this process has not written of its log."""
    return LogContext.writer.unwritten()


def go_on_with_log(unwritten: UnwrittenLog) -> None:
    """Writes first what another image of this process had not written; after `start_logging`."""
    LogContext.writer.go_on(unwritten)


def write_log() -> None:
    """Writes what waits to be written, as far as that can be; also how many records of a flood were left out."""
    if LogContext.bursts is not None:
        LogContext.bursts.tell(monotonic())
    LogContext.writer.flush()


def attach_log(loop: Loop, patience: float = PATIENCE) -> None:
    """Has this process's loop write what waits to be written, until `detach_log`; as `LogWriter.attach`."""
    LogContext.writer.attach(loop, patience)


def detach_log() -> None:
    """At the end of that loop; waits for the log's reader, if that is needed, for a moment."""
    if LogContext.bursts is not None:
        LogContext.bursts.tell()
    LogContext.writer.detach()


def log_target(settings: Settings, *, detached: bool) -> Path | str | None:
    """Where the daemon logs: a file, the journal, or None for the standard error that it was started with."""
    return settings.log.to or (default_log_file(settings.name) if detached else None)


def default_log_file(name: str) -> Path:
    """Where a detached daemon logs unless told otherwise (file-hierarchy(7), XDG base directories)."""
    if os.geteuid() == 0:
        return Path("/var/log/forkd", f"{name}.log")
    try:
        state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    except RuntimeError:
        raise ForkdError(f"user {os.geteuid()} has no home directory for the log; set log.to") from None
    return Path(state, "forkd", f"{name}.log")


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors lead to the same file; false when either is closed."""
    try:
        return os.path.samestat(os.fstat(one), os.fstat(other))
    except OSError:
        return False


# Formatters and handlers


class TextFormatter(logging.Formatter):
    """`TIME LEVEL DAEMON ROLE[PID] LOGGER: MESSAGE`, and marked lines for a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = _timestamp(record.created, record.msecs)
        first = f"{when} {record.levelname} {LogContext.daemon} {LogContext.role}[{os.getpid()}] {record.name}: "
        message, *more = record.getMessage().split("\n")
        more += _traceback(self, record).splitlines()
        return "\n".join((first + escaped(message), *(_CONTINUATION + escaped(one) for one in more)))


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, daemon, process, pid, logger, message, what it is about (`RECORD_FIELDS`),
    and a traceback if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record.created, record.msecs),
            "level": record.levelname,
            "daemon": LogContext.daemon,
            "process": LogContext.role,
            "pid": os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in RECORD_FIELDS if hasattr(record, name)},
        }
        if traceback := _traceback(self, record):
            fields["traceback"] = traceback
        return json.dumps(fields)


class DescriptorHandler(logging.Handler):
    """Hands each record to a writer, as lines.

    Args:
        writer: what writes them.
        with_priority: whether each line begins with its priority, for a stream to the journal.
    """

    def __init__(self, writer: LogWriter, *, with_priority: bool = False) -> None:
        super().__init__()
        self.writer = writer
        self._with_priority = with_priority

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.writer.put(self.encode(record))
        except Exception:  # noqa: BLE001 (as all handlers of logging: a record that can't be formatted does no harm)
            self.handleError(record)

    def encode(self, record: logging.LogRecord) -> bytes:
        """The record as it is written."""
        text = self.format(record)
        text = prioritized(text, record.levelno) if self._with_priority else text
        return (text + "\n").encode(errors="backslashreplace")

    def flush(self) -> None:
        """Writes what waits, as far as that can be."""
        self.writer.flush()


class JournalHandler(DescriptorHandler):
    """Hands each record to a writer that sends it to the journal, with fields: what it is about beside what it says."""

    def encode(self, record: logging.LogRecord) -> bytes:
        """The record's datagram."""
        return encode_journal_record(self.fields(record))

    def fields(self, record: logging.LogRecord) -> dict[str, str]:
        """The record's fields (systemd.journal-fields(7)); WORKER, CLIENT and LISTENER where it is about one."""
        fields = {
            "MESSAGE": "\n".join(filter(None, (record.getMessage(), _traceback(_PLAIN_FORMATTER, record)))),
            "PRIORITY": str(syslog_priority(record.levelno)),
            "SYSLOG_IDENTIFIER": LogContext.daemon,
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
        }
        if LogContext.role.startswith("worker "):
            fields["WORKER"] = LogContext.role.removeprefix("worker ")
        about = {name.upper(): str(getattr(record, name)) for name in RECORD_FIELDS if hasattr(record, name)}
        return {**fields, **about}


_PLAIN_FORMATTER = logging.Formatter()


def _timestamp(created: float, fraction: float) -> str:
    return f"{_second(int(created))}.{int(fraction):03d}Z"


@lru_cache(maxsize=1)
def _second(created: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(created))


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    parts = []
    if record.exc_info:
        parts.append(formatter.formatException(record.exc_info))
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


# The journal


def open_journal() -> int:
    """A descriptor that leads to the journal. Raises ForkdError where there is none."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(JOURNAL_SOCKET)
        except OSError as error:
            raise ForkdError(f"can't log to the journal: {JOURNAL_SOCKET}: {error.strerror}") from None
        return sock.detach()


def is_journal_stream(descriptor: int) -> bool:
    """Whether a descriptor is a stream to the journal, which takes lines: `$JOURNAL_STREAM` names its device and inode
    (systemd.exec(5)).
    """
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def prioritized(text: str, level: int) -> str:
    """`text`, each line of which begins with its priority, as the journal reads it from a stream (sd-daemon(3))."""
    return "\n".join(f"<{syslog_priority(level)}>{line}" for line in text.split("\n"))


def syslog_priority(level: int) -> int:
    """The priority of syslog(3) for a level of logging."""
    for least, number in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6)):
        if level >= least:
            return number
    return 7


def encode_journal_record(fields: dict[str, str]) -> bytes:
    """A record's datagram. Values of several lines are length-prefixed; a value can't forge a field."""
    data = bytearray()
    for name, text in fields.items():
        value = text.encode(errors="backslashreplace")
        if b"\n" in value:
            data += name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
        else:
            data += name.encode() + b"=" + value + b"\n"
    return bytes(data)


def send_journal_record(sock: socket.socket, data: bytes) -> None:
    """Sends a record to the journal, as a datagram, or as a sealed memfd where it is too large for one; never waits.

    Args:
        sock: by `open_journal`.
        data: by `encode_journal_record`.

    Raises:
        OSError: the journal does not take it; BlockingIOError: not yet.
    """
    try:
        sock.send(data, socket.MSG_DONTWAIT)
    except OSError as error:
        if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
            raise
        _send_sealed_file(sock, data)


def _send_sealed_file(sock: socket.socket, data: bytes) -> None:
    file = os.memfd_create("forkd-record", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(file, rest) :]
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _RECORD_SEALS)
        socket.send_fds(sock, [b""], [file], socket.MSG_DONTWAIT)
    finally:
        os.close(file)
