"""A daemon's directory: it is made for it alone, and what another user could have put there is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkd.config.address import LONGEST_PATH
from forkd.errors import ForkdError
from forkd.system.identity import Identity
from forkd.system.private_directory import hold_run_directory, make_private_directory
from forkd.system.run_directory import RunDirectory
from tests.support.needs import needs_root


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def test_run_directory_is_made_with_its_parents_and_private(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    before = os.umask(0)
    try:
        make_private_directory(path, Identity())
        make_private_directory(path, Identity())  # it is ours, and stays so
    finally:
        os.umask(before)
    assert [found.stat().st_mode & 0o7777 for found in (path, path.parent, path.parent.parent)] == [0o755] * 3


def make_link(path: Path, mode: int = 0o700) -> None:
    """A link to another one, which leads to a directory."""
    make_open(path.with_name("real"), mode)
    path.with_name("other").symlink_to("real")
    path.symlink_to(path.with_name("other"))


def make_link_in_the_open(path: Path) -> None:
    make_link(path)
    path.parent.chmod(0o1777)


def make_open(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)


def make_open_above(path: Path) -> None:
    path.mkdir()
    path.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda path: path.symlink_to("nowhere"), "nowhere, which is not there; remove it, or set run_directory"),
        (lambda path: path.symlink_to(path), "is a symbolic link that leads to too many others; set run_directory"),
        (lambda path: make_link(path, 0o777), "open to others to write; chmod go-w it, or set run_directory"),
        (make_link_in_the_open, "is a symbolic link that others could have made; remove it, or set run_directory"),
        (Path.touch, "is not a directory but should be"),
        (lambda path: make_open(path, 0o777), "open to others to write; chmod go-w it, or set run_directory"),
        (lambda path: make_open(path, 0o775), "open to others to write; chmod go-w it, or set run_directory"),
        (lambda path: make_open(path, 0o1777), "open to others to write; chmod go-w it, or set run_directory"),
        (make_open_above, "above is open to "),
    ],
    ids=[
        "broken link",
        "link to itself",
        "link to others",
        "link that others could make",
        "file",
        "others",
        "group",
        "sticky",
        "above",
    ],
)
def test_a_run_directory_where_others_could_put_files_is_refused(
    tmp_path: Path, prepare: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "above" / "run"
    path.parent.mkdir()
    prepare(path)
    with pytest.raises(ForkdError) as caught:
        make_private_directory(path, Identity())
    assert said in str(caught.value)
    assert str(path.parent) in str(caught.value)


def test_run_directory_may_be_a_link_of_our_own(tmp_path: Path) -> None:
    make_link(tmp_path / "run")
    make_private_directory(tmp_path / "run", Identity())
    assert (tmp_path / "run").is_symlink()


def test_link_of_another_user_is_refused(tmp_path: Path) -> None:
    needs_root()
    make_link(tmp_path / "run")
    os.chown(tmp_path / "run", 12345, -1, follow_symlinks=False)
    with pytest.raises(ForkdError, match="is a symbolic link that others could have made"):
        make_private_directory(tmp_path / "run", Identity())


def test_another_users_run_directory_is_refused(tmp_path: Path) -> None:
    path = Path("/usr")
    if os.geteuid() == 0:
        path = tmp_path / "theirs"
        path.mkdir()
        os.chown(path, 12345, -1)
    with pytest.raises(ForkdError, match=f"^{path} is another user's"):
        make_private_directory(path, Identity())


def test_a_run_directory_in_a_shared_sticky_directory_is_safe(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    make_private_directory(tmp_path / "run", Identity())
    assert (tmp_path / "run").is_dir()


def test_a_run_directory_below_a_file_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run"
    with pytest.raises(ForkdError, match=f"can't make the directory {path}: Not a directory"):
        make_private_directory(path, Identity())


def test_run_directory_that_goes_meanwhile_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = RunDirectory("x", tmp_path / "run")
    made = []

    def make(path: Path, identity: Identity) -> None:
        make_private_directory(path, identity)
        made.append(path)
        if len(made) < 3:
            path.rmdir()  # by a daemon that ends at this moment

    monkeypatch.setattr("forkd.system.private_directory.make_private_directory", make)
    hold_run_directory(run, Identity())
    assert (len(made), run.pid_file.probe()[0]) == (3, True)
    run.remove(own_directory=True)
    assert not run.path.exists()


def test_run_directory_has_room_for_the_sockets_of_a_restart(tmp_path: Path) -> None:
    longest = LONGEST_PATH - len("/control.sock.new")
    for length, fits in ((longest, True), (longest + 1, False)):
        path = tmp_path / ("d" * (length - len(str(tmp_path)) - 1))
        if fits:
            make_private_directory(path, Identity())
            continue
        with pytest.raises(ForkdError, match=f"{LONGEST_PATH + 1} bytes, and {LONGEST_PATH} is the most"):
            make_private_directory(path, Identity())
        assert not path.exists()
