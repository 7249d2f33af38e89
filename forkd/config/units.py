"""The kinds of values that settings have: how each is read from text, shown again, and described to an editor.

A value is read from the text that the user wrote, never from what YAML 1.1 makes of it: there `no` is false, `22:22` is
1342 and `0660` is 432. Every parser raises ValueError with a sentence that says what was wanted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from forkd.config.address import Address, parse_address
from forkd.config.escapes import parse_escaped
from forkd.config.scales import (
    DURATION_FORM,
    PERCENT_FORM,
    RATE_FORM,
    SIZE_FORM,
    Rate,
    parse_duration,
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

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Kind(Generic[T]):
    """One kind of scalar value.

    Attributes:
        name: what the reference page calls it.
        parse: text to value; raises ValueError.
        show: value to the text that parses to it again.
        schema: the JSON Schema (draft-07) of what may be written.
        unset: the word that is read as None, where there is one.
        bounds: the least and the most that there is, where there are such.
    """

    name: str
    parse: Callable[[str], T]
    show: Callable[[T], str]
    schema: Mapping[str, Any]
    unset: str = ""
    bounds: tuple[Any, Any] | None = None

    def text(self, value: T | None) -> str | None:
        """As `show`; None for a None that no word stands for."""
        return (self.unset or None) if value is None else self.show(value)


_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_HANDLER = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


def parse_boolean(text: str) -> bool:
    """True or False; only where a setting is declared so are `yes`, `no`, `on`, `off` words for them."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(f"{text!r} is not true or false")


def parse_mode(text: str) -> int:
    """Permission bits from three or four octal digits, as in `0660` (chmod(1))."""
    if not re.fullmatch(r"(0o)?[0-7]{3,4}", text):
        raise ValueError(f"{text!r} is not a file mode; write three or four octal digits, as in 0660")
    return int(text.removeprefix("0o"), 8)


def _pattern(pattern: str, wanted: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f"{text!r} is not {wanted}")
        return text

    return parse


def _text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError(f"{text!r} is not a line of printable text")
    return text


def _path(text: str) -> Path:
    """An absolute path. A relative one is relative to where forkd was started."""
    try:
        path = Path(_text(text)).expanduser().absolute()
    except RuntimeError:
        raise ValueError(f"{text!r}: there is no such user's home directory") from None
    except FileNotFoundError:
        raise ValueError(f"{text!r} is relative to the current directory, which is gone") from None
    _text(str(path))  # what the home or the current directory brought in is shown and read again with the rest
    return path


def parse_network(text: str) -> Network:
    """A network of addresses, from `10.0.0.0/8`, `::1` or `192.168.7.9`."""
    import ipaddress  # noqa: PLC0415 (who names no network does not pay for it)

    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        wanted = "write an address or a network, as in 192.168.7.9, 10.0.0.0/8 or ::1"
        if "host bits" in str(error):
            wanted = f"did you mean {ipaddress.ip_network(text, strict=False)}?"
        raise ValueError(f"{text[:80]!r} is not a network; {wanted}") from None


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


def integer(minimum: int, maximum: int) -> Kind[int]:
    """Whole numbers from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
            raise ValueError(f"{text!r} is not a whole number")
        if not minimum <= int(text) <= maximum:
            raise ValueError(f"{text} is not from {minimum} to {maximum}")
        return int(text)

    return Kind("whole number", parse, str, {"type": "integer", "minimum": minimum, "maximum": maximum})


def choice(*words: str) -> Kind[str]:
    """One of a few words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError(f"{text!r} is not one of {', '.join(words)}")
        return text

    return Kind(" or ".join(words), parse, str, {"enum": list(words)})


def within(kind: Kind[Any], least: float, most: float) -> Kind[Any]:
    """`kind`, with no less and no more than that."""

    def parse(text: str) -> Any:
        value = kind.parse(text)
        if not least <= value <= most:
            raise ValueError(f"{text} is not from {kind.show(least)} to {kind.show(most)}")
        return value

    return replace(kind, parse=parse, bounds=(least, most))


def _or_word(word: str, kind: Kind[T]) -> Kind[T | None]:
    """`kind`, or a word that is read as None."""
    return Kind(
        f"{kind.name} or {word}",
        lambda text: None if text == word else kind.parse(text),
        lambda value: word if value is None else kind.show(value),
        {"anyOf": [kind.schema, {"const": word}]},
        unset=word,
    )


#: The value of a limit that is none, as setrlimit(2) and Python's resource module have it.
UNLIMITED = -1


def _or_unlimited(kind: Kind[int]) -> Kind[int]:
    """`kind`, or the word unlimited, which is read as UNLIMITED."""
    return Kind(
        f"{kind.name} or unlimited",
        lambda text: UNLIMITED if text == "unlimited" else kind.parse(text),
        lambda value: "unlimited" if value == UNLIMITED else kind.show(value),
        {"anyOf": [*kind.schema.get("anyOf", [kind.schema]), {"const": "unlimited"}]},
    )


#: The word for a deadline that there is not.
OFF = "off"


def _or_off(kind: Kind[float]) -> Kind[float]:
    """`kind`, or the word off, which is read as 0."""
    return Kind(
        f"{kind.name} or off",
        lambda text: 0.0 if text == OFF else kind.parse(text),
        lambda value: kind.show(value) if value else OFF,
        {"anyOf": [*kind.schema["anyOf"], {"enum": [OFF, False]}]},  # an editor's YAML reads off as false
    )


#: Workers of one daemon at most; the scoreboard has rows for as many, and for as many again that drain.
MOST_WORKERS = 512

WORKERS = _or_word("auto", integer(1, MOST_WORKERS))
DURATION = Kind(
    "duration",
    parse_duration,
    show_duration,
    {"anyOf": [{"type": "string", "pattern": f"^{DURATION_FORM}$"}, {"const": 0}]},
)
DEADLINE = _or_off(DURATION)
SIZE = Kind(
    "size",
    parse_size,
    show_size,
    {"anyOf": [{"type": "string", "pattern": f"^{SIZE_FORM}$"}, {"type": "integer", "minimum": 0}]},
)
RATE: Kind[Rate] = Kind("rate", parse_rate, show_rate, {"type": "string", "pattern": f"^{RATE_FORM}$"})
PERCENT = Kind("percentage", parse_percent, show_percent, {"type": "string", "pattern": f"^{PERCENT_FORM}$"})
BOOLEAN = Kind("true or false", parse_boolean, lambda value: str(value).lower(), {"type": "boolean"})
MODE = Kind(
    "file mode",
    parse_mode,
    lambda value: f"{value:04o}",
    # An editor's YAML reads 0660 as a number, so both are right there.
    {"anyOf": [{"type": "string", "pattern": "^(0o)?[0-7]{3,4}$"}, {"type": "integer", "minimum": 0}]},
)
FILES_LIMIT = _or_unlimited(integer(64, 1 << 30))
SIZE_LIMIT = _or_unlimited(SIZE)
ACCOUNT = Kind(
    "name or number",
    _text,
    str,
    {"anyOf": [{"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}]},
)
TEXT = Kind("text", _text, str, {"type": "string", "minLength": 1})
MESSAGE = Kind("text with escapes", lambda text: parse_escaped(_text(text)), str, {"type": "string", "minLength": 1})
PATH = Kind("path", _path, str, {"type": "string", "minLength": 1})
#: Stands for systemd's journal where a log goes to.
JOURNAL = "journal"


def _log_target(text: str) -> Path | str:
    return JOURNAL if text == JOURNAL else _path(text)


LOG_TARGET = _or_word("stderr", Kind("path or journal", _log_target, str, {"type": "string", "minLength": 1}))
NAME = Kind(
    "name",
    _pattern(_NAME, "a name; write up to 64 letters, digits, dots, dashes and underscores"),
    str,
    {"type": "string", "pattern": f"^{_NAME}$"},
)
HANDLER = Kind(
    "module:attribute",
    _pattern(_HANDLER, "a handler; write module:attribute, as in chat.server:ChatProtocol"),
    str,
    {"type": "string", "pattern": f"^{_HANDLER}$"},
)
ADDRESS = Kind("address", parse_address, str, {"type": "string", "pattern": "^(tcp://|udp://|unix:|unix-dgram:|fd:)"})
NETWORK = Kind("network", parse_network, str, {"type": "string", "pattern": r"^[0-9A-Fa-f:.]+(/[0-9]+)?$"})
GROUP = Kind("multicast group", parse_group, str, {"type": "string", "pattern": r"^[0-9A-Fa-f:.]+(%[^\s/%]{1,15})?$"})
PEER = Kind("tcp address", parse_peer, str, {"type": "string", "pattern": "^tcp://"})
