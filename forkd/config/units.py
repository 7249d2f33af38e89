r"""Quantities with their units, and text with escapes: read from text, and shown again.

The settings are written in them, and the options of commands. Every parser raises ValueError with a sentence that says
what was wanted.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

DURATION_FORM = r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+"
SIZE_FORM = r"(\d+(?:\.\d+)?) ?(B|KB|MB|GB|KiB|MiB|GiB)?"
RATE_FORM = r"([1-9]\d{0,8})/(s|m|h|d)"
PERCENT_FORM = r"(100(?:\.0+)?|\d{1,2}(?:\.\d+)?)%"

_DURATION_UNITS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_SIZE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

#: The largest values. No process runs for as long, and all that such a time is added to or multiplied by is still a
#: number of nanoseconds in 64 bits.
LONGEST_DURATION = 36500 * 86400.0
LARGEST_SIZE = (1 << 63) - 1

_ESCAPE_SEQUENCE = re.compile(r"\\(x[0-9A-Fa-f]{2}|[rnt0\\]|.?)", re.DOTALL)
_ESCAPED = {"r": b"\r", "n": b"\n", "t": b"\t", "0": b"\0", "\\": b"\\"}


# Quantities with their units


def parse_duration(text: str) -> float:
    """Seconds, from `250ms`, `30s`, `5m`, `1h30m` or `0`."""
    if text == "0":
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"{text!r} has no unit; did you mean {text}s?")
    if not re.fullmatch(DURATION_FORM, text, re.ASCII):
        raise ValueError(f"{text!r} is not a duration; write a number with ms, s, m, h or d, as in 30s or 1h30m")
    seconds = sum(Decimal(number) * _DURATION_UNITS[unit] for number, unit in re.findall(r"([\d.]+)(ms|[smhd])", text))
    return _check_duration(text, float(seconds))


def show_duration(seconds: float) -> str:
    """The shortest text that parses to `seconds` again."""
    exact = Decimal(repr(seconds))
    for unit in ("d", "h", "m", "s"):
        if exact % _DURATION_UNITS[unit] == 0:
            return f"{exact // _DURATION_UNITS[unit]:f}{unit}" if exact else "0s"
    return f"{(exact * 1000).normalize():f}ms"


def _check_duration(text: str, number: float) -> float:
    if number > LONGEST_DURATION:
        raise ValueError(f"{text[:40]!r} is too long; the longest is {show_duration(LONGEST_DURATION)}")
    return number


def parse_size(text: str) -> int:
    """Bytes, from `512B`, `64KiB`, `1.5GiB`, `10MB` or a bare number of bytes."""
    match = re.fullmatch(SIZE_FORM, text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number with {', '.join(_SIZE_UNITS)}, as in 64KiB")
    size = Decimal(match[1]) * _SIZE_UNITS[match[2] or "B"]
    if size > LARGEST_SIZE:
        raise ValueError(f"{text[:40]!r} is too large")
    return int(size)


def show_size(size: int) -> str:
    """The shortest text that parses to `size` again."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _SIZE_UNITS[unit] == 0:
            return f"{size // _SIZE_UNITS[unit]}{unit}"
    return f"{size}B"


class Rate(NamedTuple):
    """So many events, at most, in any time that is so many seconds long."""

    events: int
    seconds: int


def parse_rate(text: str) -> Rate:
    """A rate, from `20/s`, `100/m`, `5/h` or `1/d`."""
    match = re.fullmatch(RATE_FORM, text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a rate; write a whole number per s, m, h or d, as in 20/s")
    return Rate(int(match[1]), int(_DURATION_UNITS[match[2]]))


def show_rate(rate: Rate) -> str:
    """The text that parses to `rate`."""
    unit = next(unit for unit, seconds in _DURATION_UNITS.items() if seconds == rate.seconds)
    return f"{rate.events}/{unit}"


def parse_percent(text: str) -> float:
    """A fraction from 0 to 1, from `10%` or `2.5%`."""
    if re.fullmatch(PERCENT_FORM, f"{text}%", re.ASCII):
        raise ValueError(f"{text!r} has no unit; did you mean {text}%?")
    match = re.fullmatch(PERCENT_FORM, text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a percentage; write 0% to 100%, as in 10%")
    return float(Decimal(match[1]) / 100)


def show_percent(fraction: float) -> str:
    """The text that parses to `fraction` again."""
    return f"{(Decimal(repr(fraction)) * 100).normalize():f}%"


# Text with escapes that stands for octets: \r, \n, \t, \0, \\ and \xHH, which is one octet. All else is UTF-8, or the
# bytes of a command line that are not.


def parse_escaped(text: str) -> str:
    """The text itself, its escapes checked. Raises ValueError for a wrong one, with its position."""
    for found in _ESCAPE_SEQUENCE.finditer(text):
        if found[1] not in _ESCAPED and len(found[1]) < 3:
            raise ValueError(
                f"{text[:80]!r} has no escape {found[0]} (character {found.start() + 1}); there are \\r, \\n, \\t, "
                "\\0, \\\\ and \\xHH with two hexadecimal digits"
            )
    return text


def escape_controls(text: str) -> str:
    """Controls as their escapes: YAML has read those of a text in double quotes already."""
    names = {"\r": "\\r", "\n": "\\n", "\t": "\\t", "\0": "\\0"}
    return "".join(names.get(one, one) for one in text)


def unescape(text: str) -> bytes:
    """The octets that a text stands for, which `parse_escaped` has checked."""
    data, end = b"", 0
    for found in _ESCAPE_SEQUENCE.finditer(text):
        data += _encode(text[end : found.start()])
        data += _ESCAPED.get(found[1]) or bytes.fromhex(found[1][1:])
        end = found.end()
    return data + _encode(text[end:])


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
