"""The command line: `main` is the `forkd` command. Errors become one message and an exit status here, and only here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from forkd.cli.parser import parse
from forkd.errors import BootError, ConfigError, ForkdError
from forkd.wire import RESUME


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        arguments: the command line without the program's name; None for this process's.

    Returns:
        The exit status (sysexits.h: 64 for a wrong command line, 78 for wrong settings).
    """
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        status = _resume(command) if RESUME in os.environ else command.run(command)
        sys.stdout.flush()
    except ConfigError as error:
        mistakes = len(error.problems)
        print(f"{error}\nforkd: {mistakes} mistake{'s' if mistakes > 1 else ''} in the settings", file=sys.stderr)
        return error.status
    except ForkdError as error:
        details = error.details.rstrip("\n") + "\n" if isinstance(error, BootError) and error.details else ""
        print(f"{details}forkd: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _resume(command: argparse.Namespace) -> int:
    """The command by which a daemon was started, run by its master to go on as another image of itself."""
    from forkd.cli.lifecycle import resume  # noqa: PLC0415 (as `parser` does: what a command does is imported when it runs)

    return resume(command, os.environ.pop(RESUME))
