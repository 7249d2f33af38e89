"""From TARGET and the options beside it to the settings of a daemon that is to be started, checked, or run once."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from forkd.cli.target import DIRECTORIES, WantedDaemon, daemon_name, here, is_handler, settings_file, source_of
from forkd.config.loader import LoadResult, SettingOverride, mark_without_file, read_settings
from forkd.config.settings import BUILTIN_DATAGRAM_ECHO, BUILTIN_ECHO, DEFAULT_ADDRESS, Settings
from forkd.errors import UsageError
from forkd.system.identity import look_up_identity
from forkd.system.safe_paths import unsafe_path, unsafe_settings
from forkd.system.unix_paths import is_hidden


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
        directory=here(),
    )


def _read(command: argparse.Namespace) -> LoadResult:
    target = command.target
    handler = BUILTIN_ECHO if target is None else target if is_handler(target) else None
    if handler is None:
        path = settings_file(target)
        if path is None:
            looked = " and ".join(str(directory / f"{target}.yaml") for directory in DIRECTORIES)
            hidden = [str(one) for one in DIRECTORIES if is_hidden(one / f"{target}.yaml")]
            denied = f"; user {os.geteuid()} can't look into {' and '.join(hidden)}" if hidden else ""
            raise UsageError(f"there is no {target!r}: looked for {looked}; a handler is module:attribute{denied}")
        return read_settings(path, _overrides(command), {"name": daemon_name(path.stem)})
    addresses = command.listen or [DEFAULT_ADDRESS]
    where = "--listen" if command.listen else handler
    given = _overrides(command, with_listen=False)
    listeners = [{"address": one, "handler": handler if target else _echo_handler(one)} for one in addresses]
    if target is None and any(one.key == "listen.command" for one in given):
        listeners = [{"address": one} for one in addresses]
    overrides = [SettingOverride("listen", listeners, where), *given]
    return read_settings(None, overrides, {"name": daemon_name(target) if target else "echo"})


def _echo_handler(address: str) -> str:
    """The built-in echo for an address, which may be wrong."""
    return BUILTIN_DATAGRAM_ECHO if address.startswith(("udp:", "unix-dgram:")) else BUILTIN_ECHO


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
