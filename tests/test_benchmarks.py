"""The page that `make bench` writes (bench/report.py), from figures that are made up."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.paths import CHECKOUT


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(CHECKOUT / "bench"))
    yield importlib.import_module("report")
    for name in ("report", "shapes"):
        sys.modules.pop(name, None)


def row(cpu: float) -> dict[str, float]:
    waits = {"p50": 1.0, "p99": 2.0, "p999": 3.0}
    return {"cpu": cpu, "rate": 1e6 / cpu, "failed": 0, "ratio": cpu, "least": cpu, "most": cpu, **waits}


def rows(**more: float) -> dict[str, Any]:
    return {label: row(cpu) for label, cpu in {"C": 1.0, "forkd": 1.1, "asyncio": 2.0, **more}.items()}


def test_benchmarks_page_has_tables_and_plots(report: ModuleType, tmp_path: Path) -> None:
    growth = {"bytes": {"1": rows(), "1024": rows(uvloop=1.05)}}
    rest = {"forkd": {"start": 0.2, "idle": 0.8, "spread": 1.01}}
    found = {"rounds": 3, "seconds": 1.0, "missing": {"gevent": "the package gevent"}, "rest": rest, "growth": growth}
    own = {"no deadline, no limit": 2.0, "all deadlines and limits": 2.1, "an admin endpoint": 1.9}
    found |= {"shapes": {"few": rows(), "udp": rows(uvloop=1.05)}, "variants": {"churn": rows(**own)}}
    report.write(found, tmp_path)
    page = (tmp_path / "benchmarks.md").read_text()
    assert "| **forkd** | 1.10 |" in page
    assert "No other but C is cheaper than forkd." in page
    assert "Cheaper than forkd: uvloop." in page
    assert "Not measured: gevent (for want of the package gevent)." in page
    assert "| connect + echo + close, 4 workers, 20 at a time | 1.00 | 1.05 | 0.95 |" in page
    assert "| forkd | 200 | 0.80 | 1.01 |" in page
    assert "Not ahead of uvloop at 1,024 bytes of a message." in page
    plot = ElementTree.parse(tmp_path / "benchmarks" / "bytes.svg").getroot()  # noqa: S314 (our own)
    assert len(plot.findall(".//{*}polyline[@stroke-width='2']")) == 4


@pytest.mark.parametrize("script", sorted(path.stem for path in (CHECKOUT / "bench").glob("*.py")))
def test_script_finds_what_it_imports_from_the_others(script: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", f"import {script}"],
        cwd=CHECKOUT / "bench",
        env=os.environ | {"FORKD_GUARD_MARK": ""},  # the library that a worker of the guard loads: none
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)'", ran.stderr)
    assert ran.returncode == 0 or (missing and not (CHECKOUT / "bench" / f"{missing[1]}.py").exists()), ran.stderr
