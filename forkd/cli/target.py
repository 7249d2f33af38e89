"""From TARGET and the options beside it to settings, or to the run directory of a running daemon."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, TypeVar

from forkd.config import units
from forkd.config.load import Loaded, read_settings
from forkd.config.options import BUILTIN_DATAGRAM_ECHO, BUILTIN_ECHO, DEFAULT_ADDRESS, Settings
from forkd.config.override import Override
from forkd.errors import UsageError
from forkd.system.identity import look_up
from forkd.system.pidfile import RunDirectory

T = TypeVar("T")

#: Where a bare name is looked for.
_PLACES = (Path("/etc/forkd"), Path("etc/forkd"))


def settings_of(command: argparse.Namespace) -> Settings:
    """The settings that a command means. Raises ConfigError with all mistakes, UsageError for no TARGET at all."""
    return read_target(command).sound()


def read_target(command: argparse.Namespace) -> Loaded:
    """As `settings_of`, with the mistakes beside what could be read. Raises UsageError."""
    loaded = _read(command)
    for key, message in look_up(loaded.settings)[1]:
        loaded.add(message, *key.split("."))
    return loaded


def _read(command: argparse.Namespace) -> Loaded:
    target = command.target
    handler = BUILTIN_ECHO if target is None else target if _is_handler(target) else None
    if handler is None:
        path = _file(target)
        if path is None:
            looked = " and ".join(str(place / f"{target}.yaml") for place in _PLACES)
            raise UsageError(f"there is no {target!r}: looked for {looked}; a handler is module:attribute")
        return read_settings(path, _overrides(command), {"name": _name(path.stem)})
    addresses = command.listen or [DEFAULT_ADDRESS]
    where = "--listen" if command.listen else handler
    listeners = [{"address": one, "handler": handler if target else _echo(one)} for one in addresses]
    overrides = [Override("listen", listeners, where), *_overrides(command, with_listen=False)]
    return read_settings(None, overrides, {"name": _name(target) if target else "echo"})


def _echo(address: str) -> str:
    """The built-in echo that fits an address, which may be none."""
    return BUILTIN_DATAGRAM_ECHO if address.startswith(("udp:", "unix-dgram:")) else BUILTIN_ECHO


def run_directory_of(command: argparse.Namespace) -> RunDirectory:
    """The run directory of the daemon that a command means, even if its file is broken or gone by now.

    Raises:
        UsageError: a name or directory on the command line that can't be one.
    """
    target = command.target
    path = None if target is None or _is_handler(target) else _file(target)
    settings = read_settings(path, (), {"name": _name(path.stem)}).settings if path else None
    if command.name is not None:
        name = _option("--name", units.NAME, command.name)
    elif settings is not None:
        name = settings.name
    elif target is None or _is_handler(target):
        name = _name(target) if target else "echo"
    else:
        name = _option(target, units.NAME, target)
    if command.run_directory is not None:
        return RunDirectory(name, _option("--run-directory", units.PATH, command.run_directory))
    return RunDirectory(name, settings.run_directory if settings else None)


def _option(where: str, kind: units.Kind[T], text: str) -> T:
    try:
        return kind.parse(text)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from None


def _is_handler(target: str) -> bool:
    try:
        units.HANDLER.parse(target)
    except ValueError:
        return False
    return True


def _file(target: str) -> Path | None:
    """The settings file that a TARGET means; what looks like a path is one, whether it is there or not."""
    if "/" in target or target.endswith((".yaml", ".yml")):
        return Path(target)
    return next((path for place in _PLACES if (path := place / f"{target}.yaml").exists()), None)


def _name(text: str) -> str:
    """A daemon's name made of a file's name or a handler's."""
    return re.sub(r"[^A-Za-z0-9._-]+", ".", text).lstrip("._-")[:64] or "forkd"


def _overrides(command: argparse.Namespace, *, with_listen: bool = True) -> list[Override]:
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
    return [Override(key, value, where) for key, value, where in given if value is not None]


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
