r"""The kinds of values that settings have: how each is read from text, shown again, and described to an editor.

Below are first the parsers: words and names, addresses and networks; those of quantities and of escapes are in `units`.
Then come the kinds, each a `ScalarKind`, which `settings` and `listener` declare their settings with.

A value is read from the text that the user wrote, never from what YAML 1.1 makes of it: there `no` is false, `22:22` is
1342 and `0660` is 432. Every parser raises ValueError with a sentence that says what was wanted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeGuard, TypeVar

from forkd import MOST_WORKERS
from forkd.config.address import Address, parse_address
from forkd.config.units import (
    DURATION_FORM,
    LARGEST_SIZE,
    LONGEST_DURATION,
    PERCENT_FORM,
    RATE_FORM,
    SIZE_FORM,
    Rate,
    escape_controls,
    parse_duration,
    parse_escaped,
    parse_percent,
    parse_rate,
    parse_size,
    show_duration,
    show_percent,
    show_rate,
    show_size,
)

if TYPE_CHECKING:
    import ipaddress

    Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: The value of a limit that is unlimited, as setrlimit(2) and Python's resource module have it.
UNLIMITED = -1

#: The word for a deadline that is switched off.
OFF = "off"

#: The word for systemd's journal as the log's target.
JOURNAL = "journal"

#: The word for what connects to a unix socket, where others are told by their networks.
UNIX = "unix"

#: What is open in a process, by the paths that the kernel and udev(7) give it (proc_pid_fd(5)).
_OPEN_FILE = re.compile(r"/dev/std(in|out|err)|/proc/(self|thread-self|\d+)(/task/\d+)?/fd/\d+", re.ASCII)

_MOST_LINKS = 40  # as the kernel follows (path_resolution(7))

_TRUE_WORDS, _FALSE_WORDS = ("true", "yes", "on"), ("false", "no", "off")
_HANDLER_PATTERN = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"

_ARGUMENTS = (str, int, float, bool, type(None))

ARGUMENT_NAME = r"[A-Za-z_][A-Za-z0-9_]*"

T = TypeVar("T")


# Words, paths, addresses and networks


def parse_boolean(text: str) -> bool:
    """True or False. `yes`, `no`, `on` and `off` mean them only in a setting that is declared as boolean."""
    if text.lower() in _TRUE_WORDS:
        return True
    if text.lower() in _FALSE_WORDS:
        return False
    raise ValueError(f"{text!r} is not true or false")


def parse_mode(text: str) -> int:
    """Permission bits from three or four octal digits, as in `0660` (chmod(1))."""
    if not re.fullmatch(r"(0o)?[0-7]{3,4}", text):
        raise ValueError(f"{text!r} is not a file mode; write three or four octal digits, as in 0660")
    return int(text.removeprefix("0o"), 8)


def parse_network(text: str) -> Network:
    """A network of addresses, from `10.0.0.0/8`, `::1` or `192.168.7.9`."""
    import ipaddress  # noqa: PLC0415 (imported only where networks are used)

    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        wanted = "write an address or a network, as in 192.168.7.9, 10.0.0.0/8 or ::1"
        if "host bits" in str(error):
            wanted = f"did you mean {ipaddress.ip_network(text, strict=False)}?"
        raise ValueError(f"{text[:80]!r} is not a network; {wanted}") from None


def parse_proxy(text: str) -> Network | str:
    """Where proxies connect from: a network, or `UNIX`."""
    if text != UNIX and text.lower().startswith(UNIX):
        raise ValueError(f"{text[:80]!r} is not a network; did you mean {UNIX}?")
    return UNIX if text == UNIX else parse_network(text)


def parse_group(text: str) -> str:
    """A multicast group of addresses, with the network interface that it is joined on behind a `%`, if any."""
    import ipaddress  # noqa: PLC0415 (as above)

    host, separator, interface = text.partition("%")
    try:
        fits = ipaddress.ip_address(host).is_multicast
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{text[:80]!r} is not a multicast group; write 239.1.2.3, 239.1.2.3%eth0 or ff02::fb%eth0")
    if separator and not re.fullmatch(r"[^\s/%]{1,15}", interface):  # IFNAMSIZ of netdevice(7) less the final NUL
        raise ValueError(f"{text[:80]!r}: a network interface has a name of at most 15 characters, as in eth0")
    return text


def parse_peer(text: str) -> Address:
    """An address to connect to: `tcp://HOST:PORT`, with a port."""
    address = parse_address(text)
    if address.scheme != "tcp" or not address.port:
        raise ValueError(f"{text!r} can't be connected to; write tcp://HOST:PORT with the other end's port")
    return address


def parse_own_address(text: str) -> Address:
    """An address of the master's own: `tcp://HOST:PORT`, `unix:/path`, or a port alone, which is this machine's own."""
    if re.fullmatch(r"[0-9]{1,5}", text, re.ASCII):
        text = f"tcp://127.0.0.1:{text}"
    address = parse_address(text)
    if address.scheme not in ("tcp", "unix"):
        raise ValueError(f"{text!r} takes no connections; write tcp://HOST:PORT, unix:/path, or a port of 127.0.0.1")
    return address


def parse_statsd(text: str) -> Address:
    """Where statsd takes datagrams: `HOST:PORT`."""
    address = parse_address(text if text.startswith("udp://") else f"udp://{text}")
    if not address.port:
        raise ValueError(f"{text!r} has no port that could be sent to; write HOST:PORT, as in 127.0.0.1:8125")
    return address


def _parse_text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is not a line of printable text")
    return text


def _parse_program_text(text: str) -> str:
    if unfit := next((one for one in text if not one.isprintable() and one not in "\t\n"), ""):
        raise ValueError(f"{text!r} has the character {unfit!r}; write printable text, tabs and ends of lines")
    return text


def current_directory() -> Path:
    """The current directory, by the path that the user knows it by: $PWD where that is the same directory, as pwd(1)
    has it. So a link such as `current -> releases/1` stays one. Raises FileNotFoundError where the directory is gone.
    """
    named = os.environ.get("PWD", "")
    if named.startswith("/") and ".." not in Path(named).parts:
        with contextlib.suppress(OSError):
            if os.path.samefile(named, "."):
                return Path(named)
    return Path.cwd()


def _parse_path(text: str) -> Path:
    """An absolute path. A relative one is relative to where forkd was started."""
    try:
        path = Path(_parse_text(text)).expanduser()
        if not path.is_absolute():
            path = current_directory() / path
    except RuntimeError:
        raise ValueError(f"{text!r}: there is no such user's home directory") from None
    except FileNotFoundError:
        raise ValueError(f"{text!r} is relative to the current directory, which is gone") from None
    _parse_text(str(path))  # the home or the current directory may have brought in what can't be shown and read again
    return path


#: What other programs take as the place of a log, and here would be a file in the current directory.
_NO_LOGS = frozenset(("console", "false", "journald", "no", "none", "null", "off", "syslog", "systemd"))


def _parse_log_target(text: str) -> Path | str:
    if text.lower() in _NO_LOGS:
        raise ValueError(f"{text!r} is no file to log to; write stderr, journal, or ./{text} for a file of that name")
    path = None if text in (JOURNAL, "stdout", "-") else _parse_path(text)
    if text in ("stdout", "-") or (path is not None and is_open_file(path)):
        raise ValueError(f"{text!r} is no file to log to; write stderr, journal, or the path of a file")
    return path or JOURNAL


def is_open_file(path: Path) -> bool:
    """Whether a path, or what a link at it leads to, means what a process has open, as /dev/stdout does."""
    for _ in range(_MOST_LINKS):
        place = Path(os.path.realpath(path.parent), path.name)
        if _OPEN_FILE.fullmatch(str(place)):
            return True
        try:
            path = place.parent / os.readlink(place)
        except OSError:
            return False
    return False


def _parse_argument(text: str) -> Any:
    """A number, true, false, null, a text in double quotes or a list, as JSON has them; any other text is itself."""
    if re.match(r"-?\d|true$|false$|null$|[\[\"]", text, re.ASCII):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(text, parse_constant=_parse_text)
            items = found if isinstance(found, list) else [found]
            if all(isinstance(one, _ARGUMENTS) and one not in (math.inf, -math.inf) for one in items):
                return found
    return _parse_text(text)


def _show_argument(value: Any) -> str:
    """The shortest text that parses to this value again."""
    if isinstance(value, str) and value and value.isprintable() and _parse_argument(value) == value:
        return value
    return json.dumps(value)


def is_reference(value: object) -> TypeGuard[str]:
    """Whether an argument is `module:attribute`, and stands for what is there."""
    return isinstance(value, str) and re.fullmatch(_HANDLER_PATTERN, value, re.ASCII) is not None


def _matching(pattern: str, wanted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f"{text!r} is not {wanted}")
        return text

    return parse


# Kinds


class ScalarKind(NamedTuple, Generic[T]):
    """One kind of scalar value.

    Attributes:
        name: what the reference page calls it.
        parse: text to value; raises ValueError.
        show: value to the text that parses to it again.
        schema: the JSON Schema (draft-07) of what may be written.
        unset: the word that is read as None, where there is one.
        bounds: the least and the most value, where there are bounds.
        zero: whether 0 may be written too, though it is less than the least value.
    """

    name: str
    parse: Callable[[str], T]
    show: Callable[[T], str]
    schema: Mapping[str, Any]
    unset: str = ""
    bounds: tuple[Any, Any] | None = None
    zero: bool = False

    def text(self, value: T | None) -> str | None:
        """As `show`; None for a value of None for which there is no word."""
        return (self.unset or None) if value is None else self.show(value)


def integer(minimum: int, maximum: int) -> ScalarKind[int]:
    """Whole numbers from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
            raise ValueError(f"{text!r} is not a whole number")
        if not minimum <= int(text) <= maximum:
            raise ValueError(f"{text} is not from {minimum} to {maximum}")
        return int(text)

    schema = {"type": "integer", "minimum": minimum, "maximum": maximum}
    return ScalarKind("whole number", parse, str, schema, bounds=(minimum, maximum))


def choice(*words: str) -> ScalarKind[str]:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return ScalarKind(" or ".join(words), parse, str, {"enum": list(words)})


def within(kind: ScalarKind[Any], least: float, most: float) -> ScalarKind[Any]:
    """`kind`, from `least` to `most`."""

    def parse(text: str) -> Any:
        value = kind.parse(text)
        if not least <= value <= most:
            raise ValueError(f"{text} is not from {kind.show(least)} to {kind.show(most)}")
        return value

    return kind._replace(parse=parse, bounds=(least, most))


def at_least(kind: ScalarKind[Any], least: float, *, or_zero: bool = False) -> ScalarKind[Any]:
    """`kind`, from `least` on, or 0."""
    most = kind.bounds[1] if kind.bounds is not None else math.inf

    def parse(text: str) -> Any:
        value = kind.parse(text)
        if value < least and not (or_zero and value == 0):
            raise ValueError(f"{text} is too little; write {'0, or ' * or_zero}at least {kind.show(least)}")
        return value

    return kind._replace(parse=parse, bounds=(least, most), zero=or_zero)


def _or_word(word: str, kind: ScalarKind[T]) -> ScalarKind[T | None]:
    """`kind`, or a word that is read as None."""
    return ScalarKind(
        f"{kind.name} or {word}",
        lambda text: None if text == word else kind.parse(text),
        lambda value: word if value is None else kind.show(value),
        {"anyOf": [kind.schema, {"const": word}]},
        unset=word,
        bounds=kind.bounds,
    )


def _or_unlimited(kind: ScalarKind[int]) -> ScalarKind[int]:
    """`kind`, or the word unlimited, which is read as UNLIMITED."""
    return ScalarKind(
        f"{kind.name} or unlimited",
        lambda text: UNLIMITED if text == "unlimited" else kind.parse(text),
        lambda value: "unlimited" if value == UNLIMITED else kind.show(value),
        {"anyOf": [*kind.schema.get("anyOf", [kind.schema]), {"const": "unlimited"}]},
        bounds=kind.bounds,
    )


def _or_off(kind: ScalarKind[T], zero: T) -> ScalarKind[T]:
    """`kind`, or the word off, which is read as `zero`."""
    return ScalarKind(
        f"{kind.name} or off",
        lambda text: zero if text == OFF else kind.parse(text),
        lambda value: kind.show(value) if value else OFF,
        # An editor's YAML reads off as false.
        {"anyOf": [*kind.schema.get("anyOf", [kind.schema]), {"enum": [OFF, False]}]},
        bounds=kind.bounds,
    )


WORKERS = _or_word("auto", integer(1, MOST_WORKERS))

DURATION = ScalarKind(
    "duration",
    parse_duration,
    show_duration,
    {"anyOf": [{"type": "string", "pattern": f"^{DURATION_FORM}$"}, {"const": 0}]},
    bounds=(0.0, LONGEST_DURATION),
)
DEADLINE = _or_off(DURATION, 0.0)
FAILURES = _or_off(integer(1, 10**6), 0)
SIZE = ScalarKind(
    "size",
    parse_size,
    show_size,
    {"anyOf": [{"type": "string", "pattern": f"^{SIZE_FORM}$"}, {"type": "integer", "minimum": 0}]},
    bounds=(0, LARGEST_SIZE),
)
RATE: ScalarKind[Rate] = ScalarKind("rate", parse_rate, show_rate, {"type": "string", "pattern": f"^{RATE_FORM}$"})
PERCENT = ScalarKind("percentage", parse_percent, show_percent, {"type": "string", "pattern": f"^{PERCENT_FORM}$"})
BOOLEAN = ScalarKind("true or false", parse_boolean, lambda value: str(value).lower(), {"type": "boolean"})
MODE = ScalarKind(
    "file mode",
    parse_mode,
    lambda value: f"{value:04o}",
    # An editor's YAML reads 0660 as a number, so both are right there.
    {"anyOf": [{"type": "string", "pattern": "^(0o)?[0-7]{3,4}$"}, {"type": "integer", "minimum": 0}]},
)
FILES_LIMIT = _or_unlimited(integer(64, 1 << 30))
SIZE_LIMIT = _or_unlimited(SIZE)
ACCOUNT = ScalarKind(
    "name or number",
    _parse_text,
    str,
    {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}]},
)
TEXT = ScalarKind("text", _parse_text, str, {"type": "string", "minLength": 1})
#: What is for a program to understand: it may be empty, or of several lines, as a script for sh -c.
PROGRAM_TEXT = ScalarKind("text", _parse_program_text, str, {"type": "string"})
MESSAGE = ScalarKind(
    "text with escapes",
    lambda text: parse_escaped(_parse_text(escape_controls(text))),
    str,
    {"type": "string", "minLength": 1},
)
PATH = ScalarKind("path", _parse_path, str, {"type": "string", "minLength": 1})
LOG_TARGET = _or_word(
    "stderr", ScalarKind("path or journal", _parse_log_target, str, {"type": "string", "minLength": 1})
)
NAME = ScalarKind(
    "name",
    _matching(_NAME_PATTERN, "a name; write up to 64 letters, digits, dots, dashes and underscores"),
    str,
    {"type": "string", "pattern": f"^{_NAME_PATTERN}$"},
)
ARGUMENT: ScalarKind[Any] = ScalarKind("argument", _parse_argument, _show_argument, {})
HANDLER = ScalarKind(
    "module:attribute",
    _matching(_HANDLER_PATTERN, "a handler; write module:attribute, as in chat.server:ChatProtocol"),
    str,
    {"type": "string", "pattern": f"^{_HANDLER_PATTERN}$"},
)
ADDRESS = ScalarKind(
    "address", parse_address, str, {"type": "string", "pattern": "^(tcp://|udp://|unix:|unix-dgram:|fd:)"}
)
NETWORK = ScalarKind("network", parse_network, str, {"type": "string", "pattern": r"^[0-9A-Fa-f:.]+(/[0-9]+)?$"})
PROXY = ScalarKind(
    "network or unix", parse_proxy, str, {"type": "string", "pattern": r"^([0-9A-Fa-f:.]+(/[0-9]+)?|unix)$"}
)
GROUP = ScalarKind(
    "multicast group", parse_group, str, {"type": "string", "pattern": r"^[0-9A-Fa-f:.]+(%[^\s/%]{1,15})?$"}
)
PEER = ScalarKind("tcp address", parse_peer, str, {"type": "string", "pattern": "^tcp://"})
OWN_ADDRESS = ScalarKind(
    "tcp or unix address",
    parse_own_address,
    str,
    {"anyOf": [{"type": "string", "pattern": "^(tcp://|unix:|[0-9]{1,5}$)"}, {"type": "integer", "minimum": 0}]},
)
STATSD = ScalarKind(
    "HOST:PORT",
    parse_statsd,
    lambda address: str(address).removeprefix("udp://"),
    {"type": "string", "pattern": "^[^/]+:[0-9]{1,5}$"},
)
