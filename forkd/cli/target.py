"""From TARGET and the options beside it to settings, or to the run directory of a running daemon.

A TARGET is a settings file, its name in /etc/forkd or ./etc/forkd, or a handler; none is the built-in echo.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from forkd.config import values
from forkd.config.loader import LoadResult, SettingOverride, mark_without_file, read_settings
from forkd.config.settings import BUILTIN_DATAGRAM_ECHO, BUILTIN_ECHO, DEFAULT_ADDRESS, Settings
from forkd.errors import UsageError
from forkd.system.identity import look_up_identity
from forkd.system.pidfile import RunDirectory
from forkd.system.safe_paths import unsafe_path, unsafe_settings
from forkd.system.unix_paths import is_hidden

T = TypeVar("T")

_LONGEST_NAME = 64

#: Where the file of a bare name is looked for.
_DIRECTORIES = (Path("/etc/forkd"), Path("etc/forkd"))


def settings_of(command: argparse.Namespace) -> Settings:
    """The settings that a command means. Raises ConfigError with all mistakes, UsageError for a missing TARGET."""
    return read_target(command).valid_settings()


def read_target(command: argparse.Namespace) -> LoadResult:
    """As `settings_of`, but returns what could be read beside the mistakes. Raises UsageError."""
    result = _read(command)
    identity, mistakes = look_up_identity(result.settings)
    source = source_of(command)
    if source.startswith("/") and (reason := unsafe_path(Path(source), identity)):
        result.add_problem_at(mark_without_file(source), reason)
    for key, message in mistakes + unsafe_settings(result.settings, identity):
        result.add_problem(message, *(int(part) if part.isdigit() else part for part in key.split(".")))
    return result


@dataclass(frozen=True, slots=True)
class WantedDaemon:
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
    path = None if target is None or _is_handler(target) else _settings_file(target)
    result = read_settings(path, (), {"name": _daemon_name(path.stem)}) if path else None
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
        directory=_here(),
    )


def starting_daemon(command: argparse.Namespace, result: LoadResult) -> WantedDaemon:
    """The same of a daemon that is to be started by these settings."""
    settings, source = result.settings, source_of(command)
    return WantedDaemon(
        name=settings.name,
        run_directory=settings.run_directory,
        run_directory_is_sure=True,
        named=("name",) in result.marks,
        source=source,
        file=source.startswith("/"),
        directory=_here(),
    )


def source_of(command: argparse.Namespace) -> str:
    """What the settings come from: the path of a file, a handler, or nothing."""
    target = command.target
    if target is None or _is_handler(target):
        return target or ""
    path = _settings_file(target)
    return "" if path is None else str(Path(_here(), path))


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
    if target is None or _is_handler(target):
        return (_daemon_name(target) if target else "echo"), False
    return _parse_option(target, values.NAME, target), True


def _here() -> str:
    """The current directory, or nothing where it is gone."""
    try:
        return str(values.current_directory())
    except FileNotFoundError:
        return ""


def _read(command: argparse.Namespace) -> LoadResult:
    target = command.target
    handler = BUILTIN_ECHO if target is None else target if _is_handler(target) else None
    if handler is None:
        path = _settings_file(target)
        if path is None:
            looked = " and ".join(str(directory / f"{target}.yaml") for directory in _DIRECTORIES)
            hidden = [str(one) for one in _DIRECTORIES if is_hidden(one / f"{target}.yaml")]
            denied = f"; user {os.geteuid()} can't look into {' and '.join(hidden)}" if hidden else ""
            raise UsageError(f"there is no {target!r}: looked for {looked}; a handler is module:attribute{denied}")
        return read_settings(path, _overrides(command), {"name": _daemon_name(path.stem)})
    addresses = command.listen or [DEFAULT_ADDRESS]
    where = "--listen" if command.listen else handler
    given = _overrides(command, with_listen=False)
    listeners = [{"address": one, "handler": handler if target else _echo_handler(one)} for one in addresses]
    if target is None and any(one.key == "listen.command" for one in given):
        listeners = [{"address": one} for one in addresses]
    overrides = [SettingOverride("listen", listeners, where), *given]
    return read_settings(None, overrides, {"name": _daemon_name(target) if target else "echo"})


def _settings_file(target: str) -> Path | None:
    """The settings file that a TARGET means; what looks like a path is one, also where there is no such file."""
    if "/" in target or target.endswith((".yaml", ".yml")):
        return Path(target)
    return next((path for directory in _DIRECTORIES if os.path.exists(path := directory / f"{target}.yaml")), None)


def _is_handler(target: str) -> bool:
    try:
        values.HANDLER.parse(target)
    except ValueError:
        return False
    return True


def _daemon_name(text: str) -> str:
    """A daemon's name made of a file's name or a handler's.

    Where letters had to go, a part of the text's digest tells it from others that would be called the same, as `grün`
    and `grön` would.
    """
    text = unicodedata.normalize("NFC", text)
    name = re.sub(r"[^A-Za-z0-9._-]+", ".", text).lstrip("._-") or "forkd"
    if text.isascii() and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:6]
    return f"{name[: _LONGEST_NAME - 7]}-{digest}"


def _echo_handler(address: str) -> str:
    """The built-in echo for an address, which may be wrong."""
    return BUILTIN_DATAGRAM_ECHO if address.startswith(("udp:", "unix-dgram:")) else BUILTIN_ECHO


def _parse_option(where: str, kind: values.ScalarKind[T], text: str) -> T:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _overrides(command: argparse.Namespace, *, with_listen: bool = True) -> list[SettingOverride]:
    given: list[tuple[str, Any, str]] = [
        ("name", command.name, "--name"),
        ("log.level", command.log_level, "--log-level"),
        ("run_directory", command.run_directory, "--run-directory"),
    ]
    given += _once_overrides(command) if command.command == "once" else [("workers", command.workers, "--workers")]
    if with_listen:
        given += [(f"listen.{index}.address", text, f"--listen {text}") for index, text in enumerate(command.listen)]
    for text in command.set:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--set {text}: write KEY=VALUE")
        given.append((key, value, f"--set {text}"))
    return [SettingOverride(key, value, where) for key, value, where in given if value is not None]


def _once_overrides(command: argparse.Namespace) -> list[tuple[str, Any, str]]:
    networks = f"[{', '.join(command.networks)}]" if command.networks else None
    return [
        ("mode", "once", "forkd once"),
        ("once.timeout", command.timeout, "--timeout"),
        ("once.from", networks, "--from"),
        ("once.adopt", "true" if command.adopt else None, "--adopt"),
        ("once.fd", command.fd, "--fd"),
        ("once.rendezvous", command.rendezvous, "--rendezvous"),
        ("once.pid_file", command.pid_file, "--pid-file"),
        ("log.to", command.log, "--log"),
    ]
