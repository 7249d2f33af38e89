"""For those who write handlers: `init` begins a project, and `run --reload` reloads when its files change.

`run --reload` starts the daemon as a process of its own, so that there it is as everywhere, and sends it HUP. A reload
that fails is told on the terminal by the daemon, which serves on with the old code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import keyword
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import FrameType
from typing import Any

from forkd import signals
from forkd.cli.files import unit_word
from forkd.cli.settings import settings_of
from forkd.cli.target import source_of
from forkd.errors import ForkdError, how_to_install, printable, system_reason
from forkd.system.process import signal_when_parent_dies

#: Milliseconds without a change after which those that came are one, and between two looks at the daemon.
_SETTLED, _PAUSE = 100, 200

_NAME = re.compile(r"[a-z_][a-z0-9_]*", re.ASCII)


def init(command: argparse.Namespace) -> int:
    """`forkd init`. What is there already is left alone, and an error."""
    directory = Path(command.directory)
    where = directory.resolve()
    name = where.name.lower().replace("-", "_")
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ForkdError(f"{where.name!r} can't be a Python module's name; name another directory")
    if not str(where).isprintable():
        raise ForkdError(f"{str(where)!r} can't stand in a settings file: it is not printable; name another directory")
    files = {
        f"{name}.yaml": _SETTINGS,
        f"{name}.py": _HANDLER,
        f"test_{name}.py": _TEST,
        f"{name}.service": _UNIT,
    }
    there = [str(directory / file) for file in files if os.path.lexists(directory / file)]
    if there:
        raise ForkdError(f"left alone, since they are there: {', '.join(there)}; name another directory")
    if _is_taken(name, where):
        raise ForkdError(f"there is another Python module {name!r} already; name another directory")
    words = {
        "NAME": name,
        "DIRECTORY": json.dumps(str(where), ensure_ascii=False),  # as YAML reads it, too
        "FORKD": f"{unit_word(sys.executable)} -m forkd",
        "SETTINGS": unit_word(str(where / f"{name}.yaml")).replace("$", "$$"),  # of variables (systemd.service(5))
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            made = re.sub(r"@([A-Z]+)@", lambda found: words[found[1]], text)
            (directory / file).write_text(made, encoding="utf-8")
    except OSError as error:
        raise ForkdError(f"can't write the files: {system_reason(error)}") from None
    enter = f"cd {shlex.quote(str(directory))}"
    print(printable(f"{directory} has {', '.join(files)}; try: {enter} && forkd run --reload {name}.yaml"))
    return 0


def _is_taken(name: str, directory: Path) -> bool:
    """Whether a module that is not in a directory has a name: one of Python's own, or an installed one."""
    if name == "forkd" or name in sys.stdlib_module_names:
        return True
    near = (directory, directory.parent, Path.cwd())
    found = PathFinder.find_spec(name, [path for path in sys.path if Path(path).resolve() not in near])
    return found is not None and found.origin is not None  # else it is a mere directory


def run_and_reload(command: argparse.Namespace) -> int:
    """`forkd run --reload`: the daemon's exit status."""
    try:
        from watchfiles import Change, PythonFilter, watch  # noqa: PLC0415 (an extra, for this alone)
    except ModuleNotFoundError:
        raise ForkdError(f"--reload needs a package that watches files: {how_to_install('reload')}") from None
    settings_of(command)  # mistakes are told before anything is started
    daemon = _start_daemon()
    is_code = PythonFilter()

    def is_wanted(change: Change, path: str) -> bool:
        return path == source_of(command) or is_code(change, path)

    for paths in _watched(command, daemon):
        for changes in watch(
            *paths,
            watch_filter=is_wanted,
            debounce=_SETTLED,
            step=_SETTLED // 2,
            rust_timeout=_PAUSE,
            yield_on_timeout=True,
            raise_interrupt=False,
            ignore_permission_denied=True,
        ):
            if daemon.poll() is not None:
                break
            if changes:
                daemon.send_signal(signal.SIGHUP)
                break  # the settings may name other directories now, and be another file of that name
    return daemon.wait()


def _watched(command: argparse.Namespace, daemon: subprocess.Popen[bytes]) -> Iterator[list[str]]:
    """What is to be watched, again and again until the daemon has ended."""
    paths: list[str] = []
    while daemon.poll() is None:
        with contextlib.suppress(ForkdError, OSError):  # else those of before
            wanted = [str(path) for path in settings_of(command).python_path] or [str(Path.cwd())]
            paths = [path for path in (*wanted, source_of(command)) if os.path.exists(path)]
        if all(map(os.path.exists, paths)):
            yield paths
        else:  # an editor replaces the file just now
            time.sleep(_PAUSE / 1000)


def _start_daemon() -> subprocess.Popen[bytes]:
    """Starts this command without `--reload`, in a process group of its own, and passes signals on to it."""
    arguments = [word for word in sys.argv[1:] if word != "--reload"]
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # those that waited for a master's loop
    daemon = subprocess.Popen(
        [sys.executable, "-m", "forkd", *arguments],
        process_group=0,
        preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM, os.getpid()),  # noqa: PLW1509 (there is one thread)
    )

    def pass_on(number: int, _: FrameType | None) -> Any:
        daemon.send_signal(number)

    for row in signals.MASTER:
        if row.command is not signals.Command.REAP:
            signal.signal(row.signal, pass_on)
    return daemon


_SETTINGS = """\
# Settings of @NAME@. All there are: forkd schema --markdown. Is it right? forkd check @NAME@.yaml
name: @NAME@

# One for each processor: auto. Workers share no variables.
workers: 2

listen:
  - address: tcp://127.0.0.1:7007
    handler: @NAME@:Lines
    # Who is silent for so long is disconnected.
    timeouts: {idle: 5m}
    # How many clients there may be; further ones wait.
    limits: {connections: 1000}

# Where the handler is imported from.
python_path: [@DIRECTORY@]

# How long clients may take to leave at a stop or a reload.
drain_timeout: 30s
"""

_HANDLER = '''\
"""Answers each line with the same line in upper case."""

import asyncio


class Lines(asyncio.Protocol):
    """One connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        self.rest = b""

    def data_received(self, data: bytes) -> None:
        *lines, self.rest = (self.rest + data).split(b"\\n")
        for line in lines:
            self.transport.write(line.upper() + b"\\n")

    def shutdown(self) -> None:
        """The worker drains: no new clients come, and this one should leave."""
        self.transport.write(b"BYE\\n")
        self.transport.close()
'''

_TEST = '''\
"""The handler in a real daemon, on a port of its own: run it by pytest."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forkd.client import connect, recv_until, send_all

HERE = Path(__file__).parent


def forkd(*arguments: object) -> str:
    command = [sys.executable, "-m", "forkd", *map(str, arguments)]
    return subprocess.run(command, cwd=HERE, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def address(tmp_path: Path):
    here = "@NAME@.yaml", "--run-directory", tmp_path
    forkd("start", *here, "--listen", "tcp://127.0.0.1:0", "--set", f"log.to={tmp_path}/log")
    try:
        yield json.loads(forkd("status", *here, "--json"))["listeners"][0]["address"]
    finally:
        forkd("stop", *here)


def test_lines_come_back_in_upper_case(address: str) -> None:
    with connect(address, 5) as client:
        send_all(client, b"hello\\nwor", 5)
        assert recv_until(client, b"\\n", 5) == b"HELLO\\n"
        send_all(client, b"ld\\n", 5)
        assert recv_until(client, b"\\n", 5) == b"WORLD\\n"
'''

_UNIT = """\
# A unit of systemd for @NAME@, to be copied to /etc/systemd/system, with the paths where it is installed.
[Unit]
Description=@NAME@ by forkd
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
NotifyAccess=main
ExecStart=@FORKD@ run @SETTINGS@ --run-directory %t/@NAME@
ExecReload=@FORKD@ reload @SETTINGS@ --run-directory %t/@NAME@
RuntimeDirectory=@NAME@
# A user that is there only while the daemon runs; it must be able to read the code and the interpreter.
DynamicUser=yes
FileDescriptorStoreMax=64
Restart=on-failure
RestartPreventExitStatus=64 78
TimeoutStartSec=90
TimeoutStopSec=45
KillMode=mixed

[Install]
WantedBy=multi-user.target
"""
