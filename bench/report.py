"""Writes docs/benchmarks.md and its plots from what `figures` has found: report.py FIGURES.json DIRECTORY."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from shapes import BARE, FORKD, IDLE, MAIN, PURE, SHAPES, STAYING, VARIANTS

Found = dict[str, Any]

COLOURS = {"C": "#666666", FORKD: "#1b6ac9", PURE: "#7fb2ee", "uvloop": "#d9822b", "asyncio": "#3d9950"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 340, 70, 170, 20, 50

#: The plot of each axis: its title, and what is the same in it.
PLOTS = {
    "connections": ("connections", "1 worker, 40 bytes"),
    "workers": ("workers", "100 connections, 40 bytes"),
    "bytes": ("bytes of a message", "1 worker, 10 connections"),
}

INTRO = """\
# Benchmarks

What a request costs on forkd and on others: the CPU time of all of a server's processes, as a ratio to a pre-fork epoll
server in C that does the same under the same clients in the same round. 1.00 is the least that is possible, and 2.00
means that a machine serves half as many requests. Ratios carry over to other machines, absolute figures do not.

This page is written by `make bench`; `make bench-quick` prints a short form in a minute.
"""


def write(found: Found, directory: Path) -> None:
    """Writes the page, and a plot for each axis."""
    plots = directory / "benchmarks"
    plots.mkdir(parents=True, exist_ok=True)
    parts = [INTRO, machine(found), "## A request\n"]
    for name, shape in SHAPES.items():
        if name in found["shapes"]:
            parts.append(f"### {shape.title[0].upper()}{shape.title[1:]}\n\n{table(found['shapes'][name])}\n")
    parts += [absent(found), variants(found.get("variants", {})), rest(found.get("rest", {}))]
    if found["growth"]:
        parts.append("## How it grows\n")
    for axis, by_place in found["growth"].items():
        title, same = PLOTS[axis]
        (plots / f"{axis}.svg").write_text(plot(axis, by_place))
        parts.append(
            f"![CPU time by {title}](benchmarks/{axis}.svg)\n\nBy {title} ({same}). {sentence(axis, by_place)}\n"
        )
    (directory / "benchmarks.md").write_text("\n".join(part for part in parts if part))


def machine(found: Found) -> str:
    """Where and how it was measured."""
    versions = [f"forkd {version('forkd-server')}", f"{platform.python_implementation()} {platform.python_version()}"]
    for package in ("uvloop", "aiofastnet", "gevent", "tornado", "twisted"):
        if of_package := version(package):
            versions.append(f"{package} {of_package}")
    compiler = subprocess.run(["cc", "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[
        0
    ]
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next(
        (row.partition(":")[2].strip() for row in rows if row.startswith("model name")), platform.machine()
    )
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return (
        f"Measured on {datetime.now(UTC):%Y-%m-%d}: {processor}, {os.cpu_count()} processors, "
        f"Linux {platform.release()}; {', '.join(versions)}; {compiler}. The load averages at the end were {load}; the "
        "clients run on the same machine. "
        f"Medians of {found['rounds']} rounds of {found['seconds']:g} s, all servers in turn in each; growth is of one "
        "round. Rounds in which C itself was more than 20 % from its median were repeated.\n"
    )


def version(package: str) -> str:
    """A package's version; empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def table(rows: Found) -> str:
    """A table of one shape, the cheapest first."""
    lines = [
        "| server | CPU, of C's | least to most | CPU, us | requests/s | p50, us | p99, us | p99.9, us | failed |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for label, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]):
        name = f"**{label}**" if label in (FORKD, PURE) else label
        lines.append(
            f"| {name} | {row['ratio']:.2f} | {row['least']:.2f} to {row['most']:.2f} | {row['cpu']:.2f} | "
            f"{row['rate']:,.0f} | {row['p50']:,.0f} | {row['p99']:,.0f} | {row['p999']:,.0f} | {row['failed']:,.0f} |"
        )
    return "\n".join(lines) + "\n\n" + where_not_ahead(rows)


def where_not_ahead(rows: Found) -> str:
    """A sentence on who is cheaper than forkd."""
    own = next((label for label in (FORKD, PURE) if label in rows), None)
    if own is None:
        return ""
    cheaper = [
        label for label, row in rows.items() if label not in ("C", FORKD, PURE) and row["ratio"] < rows[own]["ratio"]
    ]
    return f"Cheaper than {own}: {', '.join(cheaper)}." if cheaper else f"No other but C is cheaper than {own}."


def absent(found: Found) -> str:
    """What is not in the tables, and why."""
    lacking = [f"{label} (for want of {reason})" for label, reason in found["missing"].items()]
    text = f"Not measured: {'; '.join(lacking)}.\n" if lacking else ""
    return text + (
        "socat has a process for each connection, Net::Server::PreFork one for each at a time, and socketserver a "
        "thread for each. What socat's processes have used is lost when they end, so its churn costs more. "
        "UDP and coroutines are compared with asyncio and uvloop alone.\n"
    )


def variants(found: Found) -> str:
    """What deadlines, limits and metrics cost."""
    if not found:
        return ""
    lines = [
        "## Deadlines, limits, metrics\n",
        f"CPU time of a request on forkd by settings, as a ratio to that of a listener with {BARE}. All clients "
        "come from one address, which all workers count together.\n",
        f"| | {' | '.join(VARIANTS)} |",
        f"| --- |{' --: |' * len(VARIANTS)}",
    ]
    for name, rows in found.items():
        ratios = [f"{rows[one]['cpu'] / rows[BARE]['cpu']:.2f}" for one in VARIANTS]
        lines.append(f"| {SHAPES[name].title} | {' | '.join(ratios)} |")
    return "\n".join(lines) + "\n"


def rest(found: Found) -> str:
    """Start-up, memory, spread."""
    if not found:
        return ""
    lines = [
        "## Start, memory, spread\n",
        f"| server | to the first answer, ms | an idle connection, KiB (of {IDLE:,}) | "
        f"fullest/emptiest of 4 workers ({STAYING:,} clients) |",
        "| --- | --: | --: | --: |",
    ]
    for label, row in found.items():
        lines.append(f"| {label} | {row['start'] * 1e3:.0f} | {row['idle']:.2f} | {row['spread']:.2f} |")
    return "\n".join(lines) + "\n"


def sentence(axis: str, by_place: Found) -> str:
    """What a plot shows, and where forkd is not ahead."""
    own = FORKD if all(FORKD in rows for rows in by_place.values()) else PURE
    ratios = [rows[own]["ratio"] for rows in by_place.values()]
    said = f"{own} takes {min(ratios):.2f} to {max(ratios):.2f} times the CPU time of C"
    behind: dict[str, list[str]] = {}
    for place, rows in by_place.items():
        for label in rows:
            if label not in ("C", FORKD, PURE) and rows[label]["cpu"] < rows[own]["cpu"]:
                behind.setdefault(label, []).append(f"{int(place):,}")
    if not behind:
        return f"{said}, and less than uvloop and asyncio at each."
    where = "; ".join(f"{label} at {', '.join(places)}" for label, places in behind.items())
    return f"{said}. Not ahead of {where} {PLOTS[axis][0]}."


def plot(axis: str, by_place: Found) -> str:
    """CPU time of a request by one thing, both logarithmic, as SVG."""
    places = [int(place) for place in by_place]
    lines = {
        label: [(int(place), rows[label]["cpu"]) for place, rows in by_place.items() if label in rows] for label in MAIN
    }
    costs = [cost for points in lines.values() for _, cost in points]
    low, high = math.floor(math.log10(min(costs))), math.ceil(math.log10(max(costs)))

    def across(place: float) -> float:
        part = math.log(place / min(places)) / math.log(max(places) / min(places))
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def up(cost: float) -> float:
        return HEIGHT - BOTTOM - (math.log10(cost) - low) / max(high - low, 1) * (HEIGHT - BOTTOM - TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        parts.append(line([(LEFT, up(10**power)), (WIDTH - RIGHT, up(10**power))], "#dddddd"))
        parts.append(text(LEFT - 8, up(10**power) + 4, f"{10**power:g}", "end"))
    for place in places:
        parts.append(text(across(place), HEIGHT - BOTTOM + 18, f"{place:,}", "middle"))
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, PLOTS[axis][0], "middle"))
    parts.append(text(LEFT, TOP - 6, "CPU time of a request, us", "start"))
    named = sorted((label for label in lines if lines[label]), key=lambda label: lines[label][-1][1])
    height = float(HEIGHT)
    for label in named:  # names stand at the ends of their lines, below each other where those meet
        points = [(across(place), up(cost)) for place, cost in lines[label]]
        height = min(points[-1][1], height - 15)
        parts += [line(points, COLOURS[label], 2), text(WIDTH - RIGHT + 8, height + 4, label, "start", COLOURS[label])]
    return "\n".join([*parts, "</svg>"]) + "\n"


def line(points: list[tuple[float, float]], colour: str, width: int = 1) -> str:
    """A line through points."""
    through = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{through}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def text(x: float, y: float, words: str, anchor: str, colour: str = "#222222") -> str:
    """A label."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'


def main() -> None:
    """Writes the page again from figures that were kept."""
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
