"""Files that are removed by the process that made them, and by no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkd.system.pidfile import PidFile
from forkd.system.unix_paths import OwnedPath, inode_of
from tests.support.forked import run_in_child


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.touch()
    return made


def owned(path: Path, *, borrowed: bool = False) -> OwnedPath:
    return OwnedPath(path, inode_of(str(path)), borrowed=borrowed)


def test_owned_path_is_removed_by_its_process(path: Path) -> None:
    owned(path).remove()
    assert not path.exists()


def test_owned_path_is_left_by_a_forked_child(path: Path) -> None:
    file = owned(path)
    run_in_child(file.remove)
    assert path.exists()


def test_owned_path_follows_the_child_that_goes_on(path: Path) -> None:
    file = owned(path)

    def go_on() -> None:
        file.follow_fork()
        file.remove()

    run_in_child(go_on)
    assert not path.exists()
    file.remove()


def test_borrowed_path_stays_borrowed_after_a_fork(path: Path) -> None:
    file = owned(path, borrowed=True)

    def go_on() -> None:
        file.follow_fork()
        file.remove()

    run_in_child(go_on)
    assert path.exists()
    file.own()
    file.remove()
    assert not path.exists()


def test_owned_path_is_removed_once(path: Path) -> None:
    file = owned(path)
    file.remove()
    path.touch()
    file.inode = inode_of(str(path))  # as file systems give a number again at once
    file.remove()
    assert path.exists()


def test_pid_file_is_left_by_a_forked_child(tmp_path: Path) -> None:
    file = PidFile(tmp_path / "pid", "x")
    file.acquire()
    try:
        run_in_child(file.remove)
        assert (tmp_path / "pid").exists()
    finally:
        file.remove()
    assert not (tmp_path / "pid").exists()
