"""`forkd logs`: the log of a daemon, wherever it goes: the end of a file, systemd's journal by journalctl(1), or else
where to look.

A file is followed by its path: one that was rotated away is read to its end, then the new one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

from forkd.cli.locate import connect
from forkd.cli.target import wanted_daemon
from forkd.config.loader import read_settings
from forkd.errors import ForkdError, NotRunning, printable, system_reason
from forkd.messages import StatusReply, StatusRequest
from forkd.system.logs import default_log_file, log_target

_BLOCK = 1 << 16  # bytes that are read at a time
_PAUSE = 0.2  # seconds between two looks for more


def logs(command: argparse.Namespace) -> int:
    """`forkd logs`."""
    where, name = _place(command), wanted_daemon(command).name
    if isinstance(where, list):
        if shutil.which("journalctl") is None:
            raise ForkdError(f"{name} logs to systemd's journal, and there is no journalctl(1) here to read it")
        more = ["-f"] if command.follow else []
        return subprocess.run(
            ["journalctl", "--no-pager", "-n", str(command.lines), *more, *where], check=False
        ).returncode
    if os.path.exists(where) and not os.path.isfile(where):
        raise ForkdError(f"{name} logs to {where}, which is no file: look at what reads it")
    try:
        file: BinaryIO = where.open("rb")
    except FileNotFoundError:
        raise ForkdError(f"{name} logs to {where}, and there is no such file") from None
    except OSError as error:
        raise ForkdError(f"{name} logs to {where}, which this user can't read: {system_reason(error)}") from None
    _seek_lines(file, command.lines)
    _print(file)
    while command.follow:
        time.sleep(_PAUSE)
        _print(file)
        file = _followed(file, where)
    file.close()
    return 0


def _place(command: argparse.Namespace) -> Path | list[str]:
    """Where the log of the daemon is: a file, or what journalctl is to be asked for. Raises ForkdError."""
    wanted = wanted_daemon(command)
    try:
        with connect(wanted) as master:
            status = master.ask(StatusRequest(), StatusReply).status
    except NotRunning:
        settings = read_settings(Path(wanted.source), (), {"name": wanted.name}).settings if wanted.file else None
        told = default_log_file(wanted.name) if settings is None else log_target(settings, detached=True)
        return ["-t", wanted.name] if not isinstance(told, Path) else told
    told, pid = status.get("log", "stderr"), status["pid"]
    if told == "journal":
        return ["-t", status["name"]]
    return Path(told) if told != "stderr" else _standard_error(status["name"], pid)


def _standard_error(name: str, pid: int) -> Path | list[str]:
    """Where the standard error of a master leads. Raises ForkdError where that can't be read."""
    path = Path(f"/proc/{pid}/fd/2")
    try:
        target, mode = os.readlink(path), path.stat().st_mode
        group = Path(f"/proc/{pid}/cgroup").read_text()
    except OSError as error:
        raise ForkdError(f"{name} logs to its standard error, and can't be looked at: {system_reason(error)}") from None
    if stat.S_ISREG(mode):
        return Path(target)
    units = re.findall(r"/([^/\n]+\.service)", group)
    if stat.S_ISSOCK(mode) and units:
        return ["--user-unit" if "/user@" in group and len(units) > 1 else "-u", units[-1]]
    kind = "a pipe: what has started it has the other end" if stat.S_ISFIFO(mode) else target
    if target == os.devnull:
        kind = f"{target}: set log.to to a file"
    raise ForkdError(f"{name}, pid {pid}, logs to its standard error, which is {kind}")


def _seek_lines(file: BinaryIO, count: int) -> None:
    """Goes to the beginning of the last lines of a file, so many."""
    position, end = file.seek(0, os.SEEK_END), b""
    while position > 0 and end.count(b"\n") <= count:
        size = min(_BLOCK, position)
        position -= size
        file.seek(position)
        end = file.read(size) + end
    lines = end.splitlines(keepends=True)
    file.seek(position + sum(map(len, lines[: max(0, len(lines) - count)])))


def _print(file: BinaryIO) -> None:
    """Prints what is left of a file. On a terminal without what that might obey."""
    while block := file.read(_BLOCK):
        if sys.stdout.isatty():
            block += file.readline()
            print(printable(block.decode(errors="backslashreplace")), end="")
        else:
            sys.stdout.buffer.write(block)
    sys.stdout.flush()


def _followed(file: BinaryIO, path: Path) -> BinaryIO:
    """The file that the path leads to by now; from its beginning where it is another one, or was cut."""
    now = os.fstat(file.fileno())
    if now.st_size < file.tell():
        file.seek(0)
    with contextlib.suppress(OSError):  # the new one is not there yet
        if not os.path.samestat(now, path.stat()):
            new = path.open("rb")
            _print(file)  # what came since
            file.close()
            return new
    return file
