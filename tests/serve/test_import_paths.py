"""What a worker can import once it is another user: what is in the way is named, and Python's silence explained."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.serve import import_paths
from forkd.serve.handlers import load_handler
from forkd.serve.import_paths import MissingModuleExplainer, check_import_paths, obstacle
from tests.support.forked import ChildFailed, run_in_child
from tests.support.needs import needs_python_for_all, needs_root

NOBODY = 65534


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can get to, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="forkd-reach-") as directory:
        path = Path(directory)
        path.chmod(0o755)
        (path / "closed" / "inner").mkdir(parents=True)
        (path / "closed" / "inner" / "hidden_module.py").write_text("handler = lambda: None\n")
        (path / "closed").chmod(0o700)
        yield path


def as_nobody(function: Callable[[], Any]) -> Any:
    needs_root()

    def become() -> Any:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return function()

    return run_in_child(become)


def wanting(handler: str = "forkd.builtin:Echo", **more: Any) -> Settings:
    return Settings(listen=(Listener(address=parse_address("tcp://127.0.0.1:0"), handler=handler),), **more)


def test_obstacle_is_the_directory_that_cannot_be_read(place: Path) -> None:
    assert as_nobody(lambda: obstacle(str(place / "closed" / "inner"))) == str(place / "closed")
    assert as_nobody(lambda: obstacle(str(place / "closed"))) == str(place / "closed")
    assert as_nobody(lambda: obstacle(str(place))) == ""


def test_obstacle_is_found_behind_a_link(place: Path) -> None:
    (place / "link").symlink_to("closed/inner")
    assert as_nobody(lambda: obstacle(str(place / "link"))) == str(place / "closed")


def test_a_missing_path_is_no_obstacle(place: Path) -> None:
    assert as_nobody(lambda: obstacle(str(place / "nothing" / "at all"))) == ""


def test_a_directory_that_cannot_be_listed_is_an_obstacle(place: Path) -> None:
    (place / "closed").chmod(0o711)
    assert as_nobody(lambda: obstacle(str(place / "closed"))) == str(place / "closed")
    assert as_nobody(lambda: obstacle(str(place / "closed" / "inner"))) == ""


def test_a_python_path_that_the_user_cannot_read_is_refused(place: Path) -> None:
    needs_python_for_all()
    inner = place / "closed" / "inner"
    with pytest.raises(ChildFailed) as caught:
        as_nobody(lambda: check_import_paths(wanting(user="nobody", python_path=(inner,))))
    assert str(caught.value) == (
        f"HandlerError: the workers' user nobody can't read {place}/closed, and so nothing of {inner} (python_path); "
        "let it read that, or put this where it can"
    )


def test_an_interpreter_that_the_user_cannot_read_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "__file__", str(place / "closed" / "inner" / "os.py"))
    with pytest.raises(ChildFailed, match=r"can't read .*/closed, .*/closed/inner \(Python's own modules\)"):
        as_nobody(lambda: check_import_paths(wanting(user="nobody")))


def test_packages_that_the_user_cannot_read_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_python_for_all()
    monkeypatch.setattr(sys, "prefix", str(place))
    monkeypatch.setattr(sys, "path", [*sys.path, str(place / "closed" / "inner")])
    with pytest.raises(ChildFailed, match=r"can't read .*/closed, .*\(installed packages\)"):
        as_nobody(lambda: check_import_paths(wanting(user="nobody")))


def test_a_path_of_the_starting_user_is_not_required(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs_python_for_all()
    monkeypatch.setattr(sys, "path", [*sys.path, str(place / "closed")])
    assert as_nobody(lambda: check_import_paths(wanting(user="nobody"))) is None


def test_nothing_is_checked_without_user_and_chroot(place: Path) -> None:
    before = list(sys.meta_path)
    check_import_paths(wanting(python_path=(place / "nothing",)))
    assert sys.meta_path == before


@pytest.mark.parametrize("preload", [True, False])
def test_a_chroot_without_python_needs_preload(place: Path, preload: bool) -> None:
    needs_root()

    def inside() -> None:
        os.chroot(place)
        os.chdir("/")
        check_import_paths(wanting(user="nobody", chroot=place, preload=preload))

    if preload:
        assert run_in_child(inside) is None
    else:
        with pytest.raises(ChildFailed, match=rf"\(Python's own modules\) is not there in chroot {place}; "):
            run_in_child(inside)


def test_a_handler_that_cannot_be_read_is_not_just_no_module(place: Path) -> None:
    def load() -> None:
        sys.path.insert(0, str(place / "closed" / "inner"))
        load_handler(wanting("hidden_module:handler").listen[0])

    with pytest.raises(ChildFailed, match=rf"no module 'hidden_module'; .*; user {NOBODY} can't read {place}/closed"):
        as_nobody(load)


def test_a_module_that_a_handler_cannot_import_is_explained_too(place: Path) -> None:
    (place / "outer_module.py").write_text("import hidden_module\n")

    def load() -> None:
        sys.path[:0] = [str(place), str(place / "closed" / "inner")]
        load_handler(wanting("outer_module:handler").listen[0])

    with pytest.raises(ChildFailed, match=rf"No module named 'hidden_module'; user {NOBODY} can't read {place}/closed"):
        as_nobody(load)


def test_the_log_says_why_a_late_import_fails_once(place: Path) -> None:
    needs_python_for_all()

    def late() -> list[str]:
        heard: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
        import_paths.log.addHandler(handler)
        check_import_paths(wanting(user="nobody"))
        sys.path.append(str(place / "closed" / "inner"))
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module("hidden_module")
        return heard

    assert as_nobody(late) == [f"module 'hidden_module' not found; user {NOBODY} can't read {place}/closed"]


def test_a_failed_import_with_readable_paths_is_not_logged(place: Path) -> None:
    def late() -> list[str]:
        heard: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
        import_paths.log.addHandler(handler)
        sys.path[:] = [str(place)]
        sys.meta_path.append(MissingModuleExplainer())
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("hidden_module")
        return heard

    assert as_nobody(late) == []
