"""The command line's grammar: all commands and their options (`_COMMANDS`, at the end).

Every command is a process of its own, so what it does is imported only when it runs, and of the options only those of
the command that is given are declared.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

from forkd import MOST_WORKERS, __version__
from forkd.errors import UsageError

_TARGET = (
    "a YAML file, the name of one in /etc/forkd or ./etc/forkd, or a handler as module:attribute; default: an echo"
)
_RUNNING = "the daemon: its YAML file, its name, or the handler that it was started with; default: the echo"

#: Those that completions are made for.
SHELLS = ("bash", "zsh", "fish", "tcsh")

_EPILOG = """\
exit status: 0 done, 1 failed, 64 wrong command line, 78 wrong settings;
of status: 0 running, 1 dead with a pid file, 3 stopped;
of every command about a running daemon: 4 it runs, and this user may not ask it"""


_Commands = Any  # argparse has no public name for what add_subparsers returns

# argparse makes a formatter for each option that is declared, which would look up how wide the terminal is.
_DECLARING = partial(argparse.HelpFormatter, width=80)


class _UsageErrorParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Prints the version. Only here is tried whether the compiled twin can be had."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        from forkd.compiled import describe  # noqa: PLC0415 (no other command asks here)

        print(f"forkd {__version__} ({describe()})")
        parser.exit()


class _CommandParser(_UsageErrorParser):
    """A command's parser: options may stand between its TARGET and its N."""

    _intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed:  # the intermixed parsing calls this method again
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        if not any(word.startswith("-") and "h" in word for word in args):
            self.usage = self.prog  # else the whole usage is put together, which only --help shows
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


class _Command(NamedTuple):
    """One command.

    Attributes:
        run: the function of this package that runs it, as `module:function`.
        sentence: what it does.
        target: what its TARGET is; empty where it has none.
        add_options: declares what else it takes.
    """

    run: str
    sentence: str
    target: str = ""
    add_options: Callable[[argparse.ArgumentParser], object] | None = None


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command that the arguments mean; its `run` runs it and returns the exit status.

    Raises:
        UsageError: there is no such command, or an option is wrong.
    """
    given = next((word for word in arguments if not word.startswith("-")), None)
    if given is not None and given not in _COMMANDS and not {"-h", "--help", "--version"} & set(arguments[:1]):
        raise UsageError(f"there is no command {given!r}; {_meant(given)}")
    first = list(arguments[:1])
    return make_parser(first if first == [given] else _COMMANDS).parse_args(arguments)


def _meant(given: str) -> str:
    import difflib  # noqa: PLC0415 (for what is mistyped alone)

    close = difflib.get_close_matches(given, _COMMANDS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(_COMMANDS)}"


def make_parser(names: Iterable[str] = ()) -> argparse.ArgumentParser:
    """The parser of the command line, with these commands; by default with all."""
    parser = _UsageErrorParser(
        prog="forkd",
        description="A pre-fork server daemon for any socket handler.",
        epilog=_EPILOG,
        formatter_class=_DECLARING,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show the version, and which twin of the hot path runs")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser, prog=parser.prog
    )
    for name in names or _COMMANDS:
        _add(commands, name, _COMMANDS[name])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    return parser


def _add(commands: _Commands, name: str, added: _Command) -> None:
    described = added.sentence[0].upper() + added.sentence[1:] + "."
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=added.sentence, description=described, allow_abbrev=False, formatter_class=_DECLARING
    )
    command.set_defaults(run=_import_later(added.run))
    if added.target:
        command.add_argument("target", metavar="TARGET", nargs="?", help=added.target)
        command.add_argument("--name", help="the daemon's name")
        command.add_argument("--run-directory", metavar="DIR", help="where the pid file and the control socket are")
    if added.add_options is not None:
        added.add_options(command)
    command.formatter_class = argparse.HelpFormatter


def _add_run(command: argparse.ArgumentParser) -> None:
    _add_start(command)
    command.add_argument("--reload", action="store_true", help="reload when code or settings change")


def _add_start(command: argparse.ArgumentParser) -> None:
    command.add_argument("--workers", metavar="N|auto", help="worker processes; auto: one for each processor")
    _add_settings(command)


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="as one JSON object")


def _add_logs(command: argparse.ArgumentParser) -> None:
    command.add_argument("-f", "--follow", action="store_true", help="go on with what comes, also after a rotation")
    command.add_argument("-n", "--lines", metavar="N", type=_number, default=20, help="how many lines; default: 20")


def _add_stop(command: argparse.ArgumentParser) -> None:
    command.add_argument("--now", action="store_true", help="close open connections at once")


def _add_reload(command: argparse.ArgumentParser) -> None:
    command.add_argument("--diff", action="store_true", help="only show which settings would change")


def _add_top(command: argparse.ArgumentParser) -> None:
    command.add_argument("--once", action="store_true", help="print one picture as text")


def _add_list(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="as a list of JSON objects")


def _add_scale(command: argparse.ArgumentParser) -> None:
    command.add_argument("workers", metavar="N", type=_number, help=f"how many workers, from 1 to {MOST_WORKERS}")


def _add_schema(command: argparse.ArgumentParser) -> None:
    command.add_argument("--markdown", action="store_true", help="print the reference page of the settings instead")


def _add_shell(command: argparse.ArgumentParser) -> None:
    command.add_argument("shell", choices=SHELLS)


def _add_project(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", metavar="DIR", help="where to; made if it is missing; its name is the project's")


def _add_directory(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", metavar="DIR", help="where to; made if it is missing")


def _add_settings(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--listen",
        metavar="ADDRESS",
        action="append",
        default=[],
        help="where to listen: tcp://HOST:PORT, udp://HOST:PORT, unix:/path, unix:@name, unix-dgram:/path or fd:NAME; "
        "repeatable. With a file, the first replaces the address of its first listener, and so on",
    )
    command.add_argument("--log-level", metavar="LEVEL", help="debug, info, warning or error")
    command.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any other setting, as in --set log.format=json or --set listen.backlog=128; repeatable",
    )


def _add_once(command: argparse.ArgumentParser) -> None:
    _add_settings(command)
    command.add_argument(
        "--foreground", action="store_true", help="serve in this process; its exit status is the handler's verdict"
    )
    command.add_argument("--json", action="store_true", help="print address and pid as one JSON object")
    command.add_argument("--timeout", metavar="TIME", help="how long the client may take to connect; then status 124")
    command.add_argument(
        "--from",
        dest="networks",
        metavar="NETWORK",
        action="append",
        default=[],
        help="where the client may come from, as in 10.0.0.0/8 or ::1; repeatable",
    )
    command.add_argument(
        "--adopt", action="store_true", help="give the connection the descriptor number of the listener"
    )
    command.add_argument("--fd", metavar="N", help="give the connection this descriptor number")
    command.add_argument(
        "--rendezvous",
        metavar="ADDRESS",
        help="no server: connect to tcp://PEER:PORT, which does the same, from where --listen says (simultaneous open)",
    )
    command.add_argument("--pid-file", metavar="PATH", help="a file with the process's number, while it is ready")
    command.add_argument("--log", metavar="PATH", help="where to log; default: as `start`, with --foreground stderr")


def _add_clients(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="as a list of JSON objects, in seconds and bytes")
    command.add_argument(
        "--sort",
        metavar="COLUMN",
        default="-age",
        help="by which column, as in --sort rtt; with a dash the largest first, as in --sort=-in; default: -age",
    )
    command.add_argument("--listener", metavar="ADDRESS", help="only those of this listener, as `status` shows it")
    kill = command.add_mutually_exclusive_group()
    kill.add_argument("--kill", metavar="ID", type=_client_id, help="close the connection of this ID")
    kill.add_argument(
        "--kill-ip", metavar="NETWORK", help="close all connections from this address or network, as in 10.0.0.0/8"
    )


def _client_id(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 20 and 0 < int(text) < 1 << 64):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no ID; `forkd clients` shows them")
    return int(text)


def _add_call(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "address",
        metavar="ADDRESS",
        help="tcp://HOST:PORT, unix:/path, unix:@name, udp://HOST:PORT, unix-dgram:/path or unix-dgram:@name",
    )
    command.add_argument(
        "data", metavar="DATA", nargs="?", help="the request; - or none: what comes on standard input until its end"
    )
    command.add_argument(
        "--timeout",
        metavar="TIME",
        help="how long a try waits for an answer, or over a stream for a byte in either direction; default: 1s",
    )
    command.add_argument(
        "--retries",
        metavar="N",
        type=_number,
        help="tries beyond the first; default: 5 for datagrams, which are sent again, and 0 for streams, where only "
        "connecting is tried again",
    )
    command.add_argument(
        "--deadline",
        metavar="TIME",
        help="how long the whole call may take; default: 1m for streams, for datagrams what the tries take",
    )
    command.add_argument("--hex", action="store_true", help="DATA is hexadecimal, and so is what is printed")
    command.add_argument(
        "--until",
        metavar="DELIMITER",
        help=r"streams: where the answer ends, with \n, \r, \t, \0, \\ and \xHH for bytes; default: our side is "
        "closed after the request (half-close), and the answer ends with the connection",
    )
    command.add_argument("--rdp", action="store_true", help="udp: a reliable request (docs/rdp.md)")


def _number(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number")
    return int(text)


def _import_later(name: str) -> Callable[[argparse.Namespace], int]:
    """The function `module:function` of this package, imported when it is called."""

    def run(command: argparse.Namespace) -> int:
        module, _, function = name.partition(":")
        action: Any = getattr(importlib.import_module(f"forkd.cli.{module}"), function)
        status: int = action(command)
        return status

    return run


_COMMANDS = {
    "run": _Command("lifecycle:run", "run in the foreground, logging to stderr", _TARGET, _add_run),
    "start": _Command(
        "lifecycle:start", "start in the background; return when every worker is ready", _TARGET, _add_start
    ),
    "restart": _Command(
        "lifecycle:restart",
        "start a new master, which takes over addresses and name when it serves",
        _TARGET,
        _add_start,
    ),
    "check": _Command(
        "check:check",
        "check settings, addresses and handlers, and list all mistakes at once",
        _TARGET,
        _add_start,
    ),
    "stop": _Command("control:stop", "let open connections end, then end; return when done", _RUNNING, _add_stop),
    "drain": _Command(
        "control:drain",
        "have load balancers send no more clients; those that are here stay, and new ones are served",
        _RUNNING,
    ),
    "resume": _Command("control:resume", "undo a drain: have load balancers send clients again", _RUNNING),
    "reload": _Command(
        "control:reload", "read the settings again and boot new workers, or change nothing", _RUNNING, _add_reload
    ),
    "upgrade": _Command("control:upgrade", "change to the code that is installed now, under the same PID", _RUNNING),
    "status": _Command("status:status", "show master, workers, listeners and deaths", _RUNNING, _add_json),
    "doctor": _Command(
        "doctor:doctor",
        "tell what is wrong on this machine, or soon will be, and what to do",
        "the daemon, also one that does not run; default: all that run",
        _add_json,
    ),
    "top": _Command("top:top", "show the status live, and close clients or scale by keys", _RUNNING, _add_top),
    "logs": _Command("logs:logs", "print the end of the log, and follow it", _RUNNING, _add_logs),
    "list": _Command(
        "daemons:list_daemons", "list all daemons on this machine that you may see", add_options=_add_list
    ),
    "clients": _Command("clients:clients", "list the connected clients, or close some", _RUNNING, _add_clients),
    "scale": _Command(
        "control:scale", "change the number of workers of a running daemon, until a restart", _RUNNING, _add_scale
    ),
    "once": _Command("once:once", "serve exactly one client, in a process of its own", _TARGET, _add_once),
    "call": _Command("call:call", "send one request and print its answer, or give up in time", add_options=_add_call),
    "schema": _Command(
        "files:schema", "print the JSON Schema of a settings file, for editors", add_options=_add_schema
    ),
    "completion": _Command(
        "files:completion", "print a shell's completion of this command line", add_options=_add_shell
    ),
    "init": _Command(
        "develop:init",
        "begin a project: settings, a handler, its test, a unit of systemd",
        add_options=_add_project,
    ),
    "files": _Command(
        "files:files", "write systemd's units, example settings and completions", add_options=_add_directory
    ),
}
