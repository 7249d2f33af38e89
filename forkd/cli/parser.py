"""The command line's grammar: all commands and their options. What a command does is imported only when it runs."""

from __future__ import annotations

import argparse
import difflib
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from forkd import MOST_WORKERS, __version__
from forkd.compiled import describe
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


class _UsageErrorParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Prints the version. Only here is tried whether the compiled twin can be had."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(f"forkd {__version__} ({describe()})")
        parser.exit()


class _CommandParser(_UsageErrorParser):
    """A command's parser: options may stand between its TARGET and its N."""

    _intermixed = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed:  # the intermixed parsing calls this method again
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command that the arguments mean; its `run` runs it and returns the exit status.

    Raises:
        UsageError: there is no such command, or an option is wrong.
    """
    parser = make_parser()
    given = next((word for word in arguments if not word.startswith("-")), None)
    known = list(_commands(parser))
    if given is not None and given not in known and not {"-h", "--help", "--version"} & set(arguments[:1]):
        close = difflib.get_close_matches(given, known, n=1)
        meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise UsageError(f"there is no command {given!r}; {meant}")
    return parser.parse_args(arguments)


def _commands(parser: argparse.ArgumentParser) -> Sequence[str]:
    return [name for action in parser._actions if isinstance(action.choices, dict) for name in action.choices]


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _UsageErrorParser(
        prog="forkd",
        description="A pre-fork server daemon for any socket handler.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, help="show the version, and which twin of the hot path runs")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_CommandParser)

    for name, run, sentence in (
        ("run", "lifecycle:run", "run in the foreground, logging to stderr"),
        ("start", "lifecycle:start", "start in the background; return when every worker is ready"),
        ("restart", "lifecycle:restart", "start a new master, which takes over addresses and name when it serves"),
        ("check", "status:check", "check settings, addresses and handlers, and list all mistakes at once"),
    ):
        command = _add(commands, name, run, sentence, _TARGET)
        command.add_argument("--workers", metavar="N|auto", help="worker processes; auto: one for each processor")
        _add_settings(command)
        if name == "run":
            command.add_argument("--reload", action="store_true", help="reload when code or settings change")
    _add_changes(commands)
    _add_views(commands)
    _add_clients(_add(commands, "clients", "clients:clients", "list the connected clients, or close some", _RUNNING))
    scale = _add(
        commands,
        "scale",
        "control:scale",
        "change the number of workers of a running daemon, until a restart",
        _RUNNING,
    )
    scale.add_argument("workers", metavar="N", type=_number, help=f"how many workers, from 1 to {MOST_WORKERS}")
    _add_once(_add(commands, "once", "once:once", "serve exactly one client, in a process of its own", _TARGET))
    _add_call(_add(commands, "call", "call:call", "send one request and print its answer, or give up in time"))
    _add_files(commands)
    return parser


def _add_views(commands: _Commands) -> None:
    """The commands that show how daemons are."""
    status = _add(commands, "status", "status:status", "show master, workers, listeners and deaths", _RUNNING)
    status.add_argument("--json", action="store_true", help="as one JSON object")
    doctor = _add(
        commands,
        "doctor",
        "doctor:doctor",
        "tell what is wrong on this machine, or soon will be, and what to do",
        "the daemon, also one that does not run; default: all that run",
    )
    doctor.add_argument("--json", action="store_true", help="as one JSON object")
    top = _add(commands, "top", "top:top", "show the status live, and close clients or scale by keys", _RUNNING)
    top.add_argument("--once", action="store_true", help="print one picture as text")
    logs = _add(commands, "logs", "logs:logs", "print the end of the log, and follow it", _RUNNING)
    logs.add_argument("-f", "--follow", action="store_true", help="go on with what comes, also after a rotation")
    logs.add_argument("-n", "--lines", metavar="N", type=_number, default=20, help="how many lines; default: 20")
    listing = _add(commands, "list", "daemons:list_daemons", "list all daemons on this machine that you may see")
    listing.add_argument("--json", action="store_true", help="as a list of JSON objects")


def _add_files(commands: _Commands) -> None:
    """The commands that print or write files."""
    schema = _add(commands, "schema", "files:schema", "print the JSON Schema of a settings file, for editors")
    schema.add_argument("--markdown", action="store_true", help="print the reference page of the settings instead")
    completion = _add(commands, "completion", "files:completion", "print a shell's completion of this command line")
    completion.add_argument("shell", choices=SHELLS)
    init = _add(commands, "init", "develop:init", "begin a project: settings, a handler, its test, a unit of systemd")
    init.add_argument("directory", metavar="DIR", help="where to; made if it is missing; its name is the project's")
    files = _add(commands, "files", "files:files", "write systemd's units, example settings and completions")
    files.add_argument("directory", metavar="DIR", help="where to; made if it is missing")


def _add_changes(commands: _Commands) -> None:
    """The commands that change a running daemon as a whole."""
    stop = _add(commands, "stop", "control:stop", "let open connections end, then end; return when done", _RUNNING)
    stop.add_argument("--now", action="store_true", help="close open connections at once")
    for name, sentence in (
        ("drain", "have load balancers send no more clients; those that are here stay, and new ones are served"),
        ("resume", "undo a drain: have load balancers send clients again"),
    ):
        _add(commands, name, f"control:{name}", sentence, _RUNNING)
    reload = _add(
        commands,
        "reload",
        "control:reload",
        "read the settings again and boot new workers, or change nothing",
        _RUNNING,
    )
    reload.add_argument("--diff", action="store_true", help="only show which settings would change")
    _add(
        commands,
        "upgrade",
        "control:upgrade",
        "change to the code that is installed now, under the same PID",
        _RUNNING,
    )


def _add(commands: _Commands, name: str, run: str, sentence: str, target: str = "") -> argparse.ArgumentParser:
    """Adds a command: its name, the function of this package that runs it, what it does, what its TARGET is."""
    described = sentence[0].upper() + sentence[1:] + "."
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=sentence, description=described, allow_abbrev=False
    )
    command.set_defaults(run=_import_later(run))
    if target:
        command.add_argument("target", metavar="TARGET", nargs="?", help=target)
        _add_daemon_options(command)
    return command


def _add_daemon_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--name", help="the daemon's name")
    command.add_argument("--run-directory", metavar="DIR", help="where the pid file and the control socket are")


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
