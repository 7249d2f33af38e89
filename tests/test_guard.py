"""The guard of instruction counts (bench/guard.py): its rule and its figures. CI runs it by `make guard`."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.support.paths import CHECKOUT

BENCH = CHECKOUT / "bench"


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("guard", BENCH / "guard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("forkd_daemon", None)


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (1049, []),
        (951, []),
        (1060, ["guard: request (pure) takes 6.0% more instructions"]),
        (940, ["guard: request (pure) takes 6.0% fewer instructions"]),
    ],
)
def test_guard_fails_beyond_five_percent(guard: ModuleType, now: int, said: list[str]) -> None:
    complaints = guard.compare({"pure": {"request": 1000}}, {"pure": {"request": now}})
    assert [one.partition(" than")[0] for one in complaints] == said
    assert all(one.endswith("run `make guard-renew` and commit bench/guard.json") for one in complaints)


def test_guard_fails_where_a_shape_has_no_figure(guard: ModuleType) -> None:
    (complaint,) = guard.compare({"pure": {}}, {"pure": {"request": 1000}})
    assert complaint.startswith("guard: request (pure) has no figure")


def test_guard_has_figures_of_all_shapes_for_both_twins(guard: ModuleType) -> None:
    for counts in json.loads((BENCH / "guard.json").read_text()).values():
        assert set(counts) == {"compiled", "pure"}
        assert all(set(one) == set(guard.TIMES) for one in counts.values())


@pytest.mark.parametrize(("ci", "status"), [("", 0), ("true", "guard: CI has to have program valgrind")])
def test_guard_is_skipped_with_its_reason(
    guard: ModuleType, monkeypatch: pytest.MonkeyPatch, ci: str, status: object
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    with pytest.raises(SystemExit) as ended:
        guard.main()
    assert ended.value.code == status
