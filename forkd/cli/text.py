"""How the commands that look show what they have found: tables, ages, and what is not known."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """The lines of a table, its columns as wide as need be."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]


def age(seconds: float) -> str:
    """A duration in the largest unit of which it has one."""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}"
    return f"{seconds:.1f}s"


def or_dash(value: object) -> str:
    """What is not known is shown as a dash."""
    return "-" if value is None else str(value)
