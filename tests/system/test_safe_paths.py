"""Paths that another user could lead elsewhere are refused with the directory's name; all others are opened."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Tls, TlsName
from forkd.config.settings import Admin, Log, Once
from forkd.system.identity import Identity
from forkd.system.safe_paths import UnsafePath, open_directory, open_file, unsafe_path, unsafe_settings
from tests.support.forked import run_in_child
from tests.support.needs import lacks, needs_root
from tests.system.test_privileges import NOBODY, wanting

WORKERS = Identity(NOBODY, 1234, (77,))
STRANGER = 54321


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory whose parent can be given away."""
    needs_root()
    made = tmp_path / "above" / "place"
    made.mkdir(parents=True)
    return made


@pytest.mark.parametrize("which", ["itself", "above"])
@pytest.mark.parametrize(
    ("owner", "mode", "said"),
    [
        ((NOBODY, 0), 0o500, "belongs to user nobody"),
        ((STRANGER, 0), 0o755, f"belongs to user {STRANGER}"),
        ((STRANGER, 0), 0o1777, f"belongs to user {STRANGER}"),
        ((0, 0), 0o777, "is open to all users to write"),
        ((0, 1234), 0o775, "is open to group 1234 to write"),
        ((0, 77), 0o775, "is open to group 77 to write"),
        ((0, 4321), 0o775, "is open to group 4321 to write"),
        ((0, 0), 0o775, ""),
        ((0, 78), 0o775, ""),  # a system's group, as that of /var/log
        ((0, 0), 0o1777, ""),
        ((0, 0), 0o700, ""),
    ],
)
def test_directory_that_others_could_change_is_refused(
    place: Path, which: str, owner: tuple[int, int], mode: int, said: str
) -> None:
    given = place if which == "itself" else place.parent
    os.chown(given, *owner)
    given.chmod(mode)
    found = unsafe_path(place / "file", WORKERS)
    assert found.startswith(f"{given} {said}" if said else "")
    assert bool(found) is bool(said)
    if said:
        with pytest.raises(UnsafePath):
            open_file(place / "file", os.O_CREAT | os.O_WRONLY, 0o640, WORKERS)
        assert not (place / "file").exists()
    else:
        os.close(open_file(place / "file", os.O_CREAT | os.O_WRONLY, 0o640, WORKERS))


def test_link_is_followed_where_it_is_as_safe(place: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("above")
    os.close(open_directory(tmp_path / "link" / ".." / "link" / "place", WORKERS))
    os.chown(tmp_path / "link", STRANGER, 0, follow_symlinks=False)
    assert unsafe_path(tmp_path / "link" / "place", WORKERS).startswith(f"{tmp_path / 'link'} belongs to user")
    os.chown(tmp_path / "link", 0, 0, follow_symlinks=False)
    os.chown(place.parent, STRANGER, 0)
    assert unsafe_path(tmp_path / "link" / "place", WORKERS).startswith(f"{place.parent} belongs to user")


def test_links_in_a_circle_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(OSError, match="Too many levels"):
        open_directory(tmp_path / "one", WORKERS)


def test_file_of_another_user_is_refused_also_in_a_sticky_directory(place: Path) -> None:
    place.chmod(0o1777)
    (place / "file").touch()
    os.chown(place / "file", NOBODY, 0)
    assert unsafe_path(place / "file", WORKERS).startswith(f"{place / 'file'} belongs to user nobody")
    with pytest.raises(UnsafePath):
        open_file(place / "file", os.O_WRONLY, 0, WORKERS)


def test_directories_that_are_made_are_nobody_elses_to_write(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        os.close(open_directory(tmp_path / "a" / "b", WORKERS if os.geteuid() == 0 else Identity(), make=True))
    finally:
        os.umask(before)
    assert [(tmp_path / one).stat().st_mode & 0o777 for one in ("a", "a/b")] == [0o755] * 2


def test_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    descriptor = open_file(tmp_path / "pipe", os.O_RDONLY, 0, Identity())
    assert stat.S_ISFIFO(os.fstat(descriptor).st_mode)
    os.close(descriptor)


def test_ordinary_user_may_use_any_path(open_directory: Path) -> None:
    place = open_directory / "shared" / "place"
    place.mkdir(parents=True)
    place.chmod(0o777)
    place.parent.chmod(0o777)

    def use() -> str:
        os.setuid(STRANGER)
        os.close(open_file(place / "file", os.O_CREAT | os.O_WRONLY, 0o640, Identity()))
        return unsafe_path(place / "file", Identity())

    assert run_in_child(use) == ""


def test_root_without_workers_of_another_user_looks_as_well(place: Path) -> None:
    os.chown(place, NOBODY, 0)
    assert unsafe_path(place, Identity()).startswith(f"{place} belongs to user nobody")


def unsafe_in(place: Path) -> Iterator[tuple[str, dict[str, object]]]:
    file = place / "file"
    yield "log.to", {"log": Log(to=file)}
    yield "run_directory", {"run_directory": file}
    yield "once.pid_file", {"once": Once(pid_file=file)}
    yield "chroot", {"chroot": place}
    yield "python_path", {"preload": True, "python_path": (place,)}
    yield "preload", {"preload": True, "working_directory": place}
    yield "admin.address.0", {"admin": Admin(address=(parse_address(f"unix:{file}"),))}
    yield "agent", {"agent": parse_address(f"unix:{file}")}
    yield "", {"python_path": (place,), "working_directory": place, "agent": parse_address("unix:@file")}


def test_each_path_that_root_uses_is_looked_at(place: Path) -> None:
    os.chown(place.parent, NOBODY, 0)
    for key, more in unsafe_in(place):
        found = unsafe_settings(wanting(user=str(NOBODY), **more), WORKERS)
        assert [one for one, _ in found] == [key] * bool(key)


def test_files_of_tls_are_safe_where_links_lead(place: Path) -> None:
    ours, link, theirs = place.parent / "ours", place.parent / "link", place / "file"
    link.symlink_to(theirs)
    ours.touch()
    os.chown(ours, NOBODY, 0)
    for key, tls in (
        ("listen.0.tls", Tls(cert=theirs)),
        ("listen.0.tls", Tls(cert=link)),
        ("listen.0.tls", Tls(cert=ours, key=link, client_ca=link)),
        ("listen.0.tls.names", Tls(cert=ours, names=(TlsName(cert=link),))),
        ("listen.0.tls.names", Tls(cert=ours, names=(TlsName(cert=ours, key=theirs),))),
    ):
        settings = wanting(user=str(NOBODY))
        settings = replace(settings, listen=(replace(settings.listen[0], tls=tls),))
        assert unsafe_settings(settings, WORKERS) == []
        os.chown(place, NOBODY, 0)
        ((found, said),) = unsafe_settings(settings, WORKERS)
        assert (found, said.startswith(f"{place} belongs to user nobody")) == (key, True)
        os.chown(place, 0, 0)
    place.parent.chmod(0o1777)  # there the owner of a file may put another one in its place
    assert str(ours) in unsafe_settings(settings, WORKERS)[0][1]


def test_paths_are_not_judged_by_users_that_are_not_mapped(tmp_path: Path) -> None:
    """In a user namespace the machine's root directory belongs to no user that is known there."""
    code = (
        "import sys; from pathlib import Path; from forkd.system.safe_paths import unsafe_path; "
        "from forkd.system.identity import Identity; print(unsafe_path(Path('/usr/x'), Identity()))"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in result.stderr:
        lacks("user namespaces")
    assert (result.stdout, result.stderr) == ("\n", "")
