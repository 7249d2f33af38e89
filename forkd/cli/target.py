"""From TARGET and the options beside it to the daemon that is meant, or to its run directory.

A TARGET is a settings file, its name in /etc/forkd or ./etc/forkd, or a handler; none is the built-in echo. The
settings that it stands for at a start are in `settings`: of a running daemon only a file is read, for its name and run
directory.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from forkd.config import values
from forkd.errors import UsageError
from forkd.system.run_directory import RunDirectory

if TYPE_CHECKING:
    from forkd.config.loader import LoadResult

T = TypeVar("T")

_LONGEST_NAME = 64

#: Where the file of a bare name is looked for.
DIRECTORIES = (Path("/etc/forkd"), Path("etc/forkd"))


class WantedDaemon(NamedTuple):
    """What a command says of a running daemon, even if its file is broken or gone by now.

    Attributes:
        name: its name.
        run_directory: where its run directory is; None: in one of the default places.
        run_directory_is_sure: whether the command line says so, and not a file that may have changed since.
        named: whether somebody has given it this name; else it follows from the file's name, or the handler's.
        source: the file's path, or the handler; empty for a bare name.
        file: whether that is a file.
        directory: where the command is run.
    """

    name: str
    run_directory: Path | None
    run_directory_is_sure: bool
    named: bool
    source: str
    file: bool
    directory: str


def wanted_daemon(command: argparse.Namespace) -> WantedDaemon:
    """The daemon that a command means. Raises UsageError for a wrong name or directory on the command line."""
    target = command.target
    path = None if target is None or is_handler(target) else settings_file(target)
    if path is not None and os.path.isdir(path):  # its name is no daemon's
        raise UsageError(f"{target} is a directory; name a settings file, or --run-directory {target}")
    result = None if path is None else _read_file(path)
    name, named = _name_of(command, result)
    directory = result.settings.run_directory if result is not None else None
    if command.run_directory is not None:
        directory = _parse_option("--run-directory", values.PATH, command.run_directory)
    return WantedDaemon(
        name=name,
        run_directory=directory,
        run_directory_is_sure=command.run_directory is not None,
        named=named or (path is not None and str(path) != target),  # a bare name is one
        source=source_of(command),
        file=path is not None,
        directory=here(),
    )


def _read_file(path: Path) -> LoadResult:
    from forkd.config.loader import read_settings  # noqa: PLC0415 (loads yaml and all settings, for a file alone)

    return read_settings(path, (), {"name": daemon_name(path.stem)})


def source_of(command: argparse.Namespace) -> str:
    """What the settings come from: the path of a file, a handler, or nothing."""
    target = command.target
    if target is None or is_handler(target):
        return target or ""
    path = settings_file(target)
    return "" if path is None else str(Path(here(), path))


def run_directory_of(command: argparse.Namespace) -> RunDirectory:
    """The run directory that a command means, if its environment is the daemon's. Raises as `wanted_daemon`."""
    wanted = wanted_daemon(command)
    return RunDirectory(wanted.name, wanted.run_directory)


def _name_of(command: argparse.Namespace, result: LoadResult | None) -> tuple[str, bool]:
    """The daemon's name, and whether it was given."""
    target = command.target
    if command.name is not None:
        return _parse_option("--name", values.NAME, command.name), True
    if result is not None:
        return result.settings.name, ("name",) in result.marks
    if target is None or is_handler(target):
        return (daemon_name(target) if target else "echo"), False
    return _parse_option(target, values.NAME, target), True


def here() -> str:
    """The current directory, or nothing where it is gone."""
    try:
        return str(values.current_directory())
    except FileNotFoundError:
        return ""


def settings_file(target: str) -> Path | None:
    """The settings file that a TARGET means; what looks like a path is one, also where there is no such file."""
    if "/" in target or target.endswith((".yaml", ".yml")):
        return Path(target)
    return next((path for directory in DIRECTORIES if os.path.exists(path := directory / f"{target}.yaml")), None)


def is_handler(target: str) -> bool:
    """Whether a TARGET is a handler, as `module:attribute`."""
    try:
        values.HANDLER.parse(target)
    except ValueError:
        return False
    return True


def daemon_name(text: str) -> str:
    """A daemon's name made of a file's name or a handler's.

    Where letters had to go, a part of the text's digest tells it from others that would be called the same, as `grün`
    and `grön` would.
    """
    if not text.isascii():
        import unicodedata  # noqa: PLC0415 (for rare names)

        text = unicodedata.normalize("NFC", text)
    name = re.sub(r"[^A-Za-z0-9._-]+", ".", text).lstrip("._-") or "forkd"
    if text.isascii() and len(name) <= _LONGEST_NAME:
        return name
    import hashlib  # noqa: PLC0415 (takes long, and is for rare names)

    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]
    return f"{name[: _LONGEST_NAME - 7]}-{digest}"


def _parse_option(where: str, kind: values.ScalarKind[T], text: str) -> T:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None
