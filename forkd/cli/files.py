"""What comes with forkd: `files` writes it, `schema` and `completion` print their part of it.

A wheel has the units, the example files and the completions below `forkd/_files` (pyproject.toml, hatch_build.py). In a
checkout units and examples are beside the package, and completions are made of the command line's grammar.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from forkd.cli.parser import SHELLS, make_parser
from forkd.config.schema import json_schema, reference_page
from forkd.errors import ForkdError, printable, system_reason

#: Directories that are written, by what they are called in a checkout.
DIRECTORIES = ("systemd", "etc/forkd")

#: Where the units say that the command is.
_COMMAND = "/usr/bin/forkd"

_HOMES = ("/home/", "/root/", "/run/user/")  # what ProtectHome= of systemd.exec(5) hides

_PACKAGE = Path(__file__).parents[1]

_NO_SHTAB = "completions need shtab: pip install '.[completion]' in forkd's checkout"


def schema(command: argparse.Namespace) -> int:
    """`forkd schema`."""
    print(reference_page() if command.markdown else json.dumps(json_schema(), indent=2))
    return 0


def completion(command: argparse.Namespace) -> int:
    """`forkd completion`."""
    text = _completion(command.shell)
    if not text:
        raise ForkdError(_NO_SHTAB)
    print(text, end="")
    return 0


def files(command: argparse.Namespace) -> int:
    """`forkd files`. What is there already and differs is left alone, and an error."""
    directory = Path(command.directory)
    wanted = dict(_files())
    if differing := [path for path, text in wanted.items() if _differs(directory / path, text)]:
        names = ", ".join(str(directory / path) for path in differing)
        raise ForkdError(f"left alone, since they are there and differ: {names}; move them, or name another directory")
    try:
        for path, text in wanted.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_text(text)
    except OSError as error:
        raise ForkdError(f"can't write the files: {system_reason(error)}") from None
    print(printable(f"{len(wanted)} files in {directory}; the units start {_installed_command()}"))
    if sys.executable.startswith(_HOMES):
        print("warning: the units can't see it there (ProtectHome); install forkd in /opt, say", file=sys.stderr)
    if not any(path.startswith("completions/") for path in wanted):
        print(f"warning: {_NO_SHTAB}", file=sys.stderr)
    return 0


def _files() -> Iterator[tuple[str, str]]:
    """What is to be written: paths, and what is in each file."""
    root = installed if (installed := _PACKAGE / "_files").is_dir() else _PACKAGE.parent
    for name in DIRECTORIES:
        found = sorted(path for path in (root / name).glob("*") if path.is_file())
        if not found:
            raise ForkdError(f"{root / name} is not there: install forkd from its checkout")
        for path in found:
            yield f"{name}/{path.name}", path.read_text().replace(_COMMAND, _installed_command())
    for shell in SHELLS:
        if text := _completion(shell):
            yield f"completions/forkd.{shell}", text


def _completion(shell: str) -> str:
    """A shell's completion; empty where it can't be had."""
    made = _PACKAGE / "_files" / "completions" / f"forkd.{shell}"
    if made.exists():
        return made.read_text()
    try:
        shtab = importlib.import_module("shtab")
    except ModuleNotFoundError:
        return ""
    return str(shtab.complete(make_parser(), shell=shell)) + "\n"


def _installed_command() -> str:
    """The path of the command that runs, in a form for units."""
    command = Path(sys.executable).with_name("forkd")
    return unit_word(str(command)) if os.access(command, os.X_OK) else f"{unit_word(sys.executable)} -m forkd"


def unit_word(text: str) -> str:
    """A text as one word of a unit of systemd (systemd.syntax(7), systemd.unit(5))."""
    word = text.replace("%", "%%")
    if not re.search(r"[\s\"'\\;]", word):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _differs(path: Path, text: str) -> bool:
    try:
        return path.read_text() != text
    except UnicodeDecodeError:
        return True
    except OSError:  # there is none, or none can be: writing it will tell
        return False
