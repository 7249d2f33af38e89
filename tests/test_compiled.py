"""Which twin of the hot path runs, and who says so."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import pytest

from forkd import __version__, compiled
from forkd.cli import main
from tests.support.daemon import Harness
from tests.support.needs import needs_compiled_twin
from tests.support.paths import CHECKOUT


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """For this test the choice is made again."""
    monkeypatch.delenv(compiled.PURE, raising=False)
    monkeypatch.setattr(compiled, "_chosen", cache(compiled._chosen.__wrapped__))


def other_extension(directory: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """Has `compiled` choose a module with this text, in a package of this name with a source beside it."""
    (directory / name).mkdir()
    (directory / name / "_fast.py").write_text(text)
    (directory / name / "_fast.pyx").write_text("what it is compiled from\n")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(compiled, "EXTENSIONS", (f"{name}._fast",))
    for module in (name, f"{name}._fast"):
        monkeypatch.delitem(sys.modules, module, raising=False)


def test_extensions_are_all_that_have_a_source() -> None:
    sources = (CHECKOUT / "forkd").rglob("*.pyx")
    names = {".".join(source.relative_to(CHECKOUT).with_suffix("").parts) for source in sources}
    assert names == set(compiled.EXTENSIONS)


@pytest.mark.usefixtures("undecided")
def test_extension_of_the_source_beside_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_extension(tmp_path, monkeypatch, "fits", "")
    (tmp_path / "fits/_fast.py").write_text(f"SOURCE = {compiled.stamp(tmp_path / 'fits/_fast.pyx')!r}\n")
    assert (compiled.hot_path(), compiled.describe()) == ("compiled", "compiled")
    assert compiled.extension("fits._fast").SOURCE


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("source_is_there", [True, False])
def test_extension_of_other_sources_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source_is_there: bool
) -> None:
    built_from = f"{__version__}-00000000" if source_is_there else "0.0.1-00000000"
    other_extension(tmp_path, monkeypatch, "stale", f"SOURCE = {built_from!r}\n")
    if not source_is_there:  # as in a wheel
        (tmp_path / "stale/_fast.pyx").unlink()
    assert compiled.hot_path() == "pure"
    assert compiled.describe() == "pure Python: _fast.py was built from other sources; install forkd again"
    assert compiled.extension("stale._fast") is None


@pytest.mark.usefixtures("undecided")
def test_extension_that_can_not_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_extension(tmp_path, monkeypatch, "broken", "raise ImportError('undefined symbol: spam')\n")
    assert compiled.describe() == "pure Python: undefined symbol: spam"


@pytest.mark.usefixtures("undecided")
def test_extension_that_was_not_built_is_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "EXTENSIONS", ("forkd.serve._absent",))
    assert compiled.describe() == "pure Python: it was installed without a C compiler"


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize("value", ["1", "yes"])
def test_version_says_that_the_environment_chose_python(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORKD_PURE", value)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"forkd {__version__} (pure Python: FORKD_PURE is set)\n"


@pytest.mark.parametrize(("value", "expected"), [("1", "pure"), ("0", "compiled")])
def test_status_says_which_twin_the_daemon_runs(harness: Harness, value: str, expected: str) -> None:
    needs_compiled_twin()
    daemon = harness.daemon(workers=1, environment={"FORKD_PURE": value}).run()
    assert daemon.status()["hot_path"] == expected
    assert f"forkd {__version__} ({expected})" in daemon.command("status").stdout
