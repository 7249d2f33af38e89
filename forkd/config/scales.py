"""Quantities as people write them, with their units: durations, sizes, rates and percentages, read and shown again."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600), "d": Decimal(86400)}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_MOST = 1e15  # seconds or bytes: no number that a setting can mean is near it
DURATION_FORM = r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+"
SIZE_FORM = r"(\d+(?:\.\d+)?) ?(B|KB|MB|GB|KiB|MiB|GiB)?"
RATE_FORM = r"([1-9]\d{0,8})/(s|m|h|d)"
PERCENT_FORM = r"(100(?:\.0+)?|\d{1,2}(?:\.\d+)?)%"


def parse_duration(text: str) -> float:
    """Seconds, from `250ms`, `30s`, `5m`, `1h30m` or `0`."""
    if text == "0":
        return 0.0
    if re.fullmatch(r"\d+(\.\d+)?", text):
        raise ValueError(f"{text!r} has no unit; did you mean {text}s?")
    if not re.fullmatch(DURATION_FORM, text, re.ASCII):
        raise ValueError(f"{text!r} is not a duration; write a number with ms, s, m, h or d, as in 30s or 1h30m")
    seconds = sum(Decimal(number) * _SECONDS[unit] for number, unit in re.findall(r"([\d.]+)(ms|[smhd])", text))
    return _finite(text, float(seconds))


def show_duration(seconds: float) -> str:
    """The shortest text that parses to `seconds` again."""
    exact = Decimal(repr(seconds))
    for unit in ("d", "h", "m", "s"):
        if exact % _SECONDS[unit] == 0:
            return f"{exact // _SECONDS[unit]:f}{unit}" if exact else "0s"
    return f"{(exact * 1000).normalize():f}ms"


def _finite(text: str, number: float) -> float:
    if number > _MOST:
        raise ValueError(f"{text[:40]!r} is more than anybody can mean")
    return number


def parse_size(text: str) -> int:
    """Bytes, from `512B`, `64KiB`, `1.5GiB`, `10MB` or a bare number of bytes."""
    match = re.fullmatch(SIZE_FORM, text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a size; write a number with {', '.join(_BYTES)}, as in 64KiB")
    size = Decimal(match[1]) * _BYTES[match[2] or "B"]
    if size >= 1 << 63:
        raise ValueError(f"{text[:40]!r} is more than anybody can mean")
    return int(size)


def show_size(size: int) -> str:
    """The shortest text that parses to `size` again."""
    for unit in ("GiB", "MiB", "KiB"):
        if size and size % _BYTES[unit] == 0:
            return f"{size // _BYTES[unit]}{unit}"
    return f"{size}B"


@dataclass(frozen=True, slots=True)
class Rate:
    """So many events, at most, in any time that is so many seconds long."""

    count: int
    seconds: int


def parse_rate(text: str) -> Rate:
    """A rate, from `20/s`, `100/m`, `5/h` or `1/d`."""
    match = re.fullmatch(RATE_FORM, text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a rate; write a whole number per s, m, h or d, as in 20/s")
    return Rate(int(match[1]), int(_SECONDS[match[2]]))


def show_rate(rate: Rate) -> str:
    """The text that parses to `rate`."""
    unit = next(unit for unit, seconds in _SECONDS.items() if seconds == rate.seconds)
    return f"{rate.count}/{unit}"


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
