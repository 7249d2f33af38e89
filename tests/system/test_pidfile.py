"""The pid file: the lock alone is the truth, and one daemon at most has it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkd.errors import AlreadyRunning, ForkdError
from forkd.system import pidfile
from forkd.system.pidfile import PidFile

HOLD = """
import sys
from pathlib import Path
from forkd.system.pidfile import PidFile
held = PidFile(Path(sys.argv[1]), "first")
held.acquire()
held.write()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pid"


@contextlib.contextmanager
def held_elsewhere(path: Path) -> Iterator[int]:
    """Another process that holds the lock; at the end it dies without giving it back."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process.pid
        finally:
            process.kill()


@contextlib.contextmanager
def acquired(path: Path) -> Iterator[PidFile]:
    file = PidFile(path, "mine")
    file.acquire()
    try:
        yield file
    finally:
        file.close()


def test_the_lock_of_another_process_keeps_us_out_and_names_it(path: Path) -> None:
    with held_elsewhere(path) as pid:
        file = PidFile(path, "second")
        with pytest.raises(AlreadyRunning, match=f"second is already running, pid {pid}") as caught:
            file.acquire()
        assert (caught.value.name, caught.value.pid, file.descriptor) == ("second", pid, -1)
        assert file.probe() == (True, pid)
        assert path.read_text() == f"{pid}\n"


def test_a_second_acquirer_in_this_process_is_kept_out_too(path: Path) -> None:
    with acquired(path), pytest.raises(AlreadyRunning, match=r"^other is already running$"):
        PidFile(path, "other").acquire()


def test_the_file_of_a_daemon_that_was_killed_is_taken_over(path: Path) -> None:
    with held_elsewhere(path) as pid:
        pass
    file = PidFile(path, "mine")
    assert file.probe() == (False, pid)
    with acquired(path) as ours:
        ours.write()
        assert file.probe() == (True, os.getpid())
    assert file.probe() == (False, os.getpid())


def test_a_longer_number_than_ours_is_overwritten_as_a_whole(path: Path) -> None:
    path.write_text("1234567890123456789\nand more\n")
    with acquired(path) as file:
        file.write()
        assert path.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("content", ["", "\n", "abc\n", "-1\n", "12 13\n", "\0\0", "١٢\n"])
def test_a_file_without_a_number_has_none(path: Path, content: str) -> None:
    path.write_text(content)
    assert PidFile(path, "x").probe() == (False, None)
    with acquired(path):
        assert PidFile(path, "x").probe() == (True, None)


def test_probe_without_a_file_finds_no_lock(path: Path) -> None:
    assert PidFile(path, "x").probe() == (False, None)
    assert not path.exists()
    assert PidFile(path / "deeper", "x").probe() == (False, None)


def test_probe_leaves_the_lock_free(path: Path) -> None:
    path.write_text("1\n")
    file = PidFile(path, "x")
    assert [file.probe() for _ in range(3)] == [(False, 1)] * 3
    with acquired(path):
        assert path.read_text() == "1\n"


def test_the_lock_stays_while_any_process_has_the_descriptor(path: Path) -> None:
    """As after the forks of a start: it is the daemon's, not the launcher's."""
    with acquired(path) as file:
        copy = os.dup(file.descriptor)
    try:
        assert PidFile(path, "x").probe()[0]
    finally:
        os.close(copy)
    assert not PidFile(path, "x").probe()[0]


def test_removing_takes_the_file_away_and_frees_the_name(path: Path) -> None:
    with acquired(path) as file:
        assert not os.get_inheritable(file.descriptor)
        file.remove()
        assert file.descriptor == -1
        assert not path.exists()
        with acquired(path):
            assert path.exists()


def test_removing_leaves_a_successors_file(path: Path) -> None:
    """The file was removed by hand, and a second daemon was started since."""
    with acquired(path) as ours:
        path.unlink()
        with acquired(path) as theirs:
            theirs.write()
            ours.remove()
            assert path.exists()
            assert PidFile(path, "x").probe() == (True, os.getpid())


@pytest.mark.parametrize("borrowed", [False, True])
def test_adopted_lock_is_shared_with_its_former_holder(path: Path, borrowed: bool) -> None:
    with acquired(path) as theirs:
        theirs.write()
        ours = PidFile(path, "mine")
        ours.adopt(os.dup(theirs.descriptor), borrowed=borrowed)
        theirs.close()
        assert PidFile(path, "other").probe() == (True, os.getpid())
        with pytest.raises(AlreadyRunning):
            PidFile(path, "other").acquire()
        ours.close()
        assert PidFile(path, "other").probe() == (False, os.getpid())


def test_borrowed_file_is_not_removed_until_it_is_owned(path: Path) -> None:
    with acquired(path) as theirs:
        theirs.write()
        ours = PidFile(path, "mine")
        ours.adopt(os.dup(theirs.descriptor), borrowed=True)
        ours.remove()
        assert ours.descriptor == -1
        assert PidFile(path, "other").probe() == (True, os.getpid())
        ours.adopt(os.dup(theirs.descriptor), borrowed=True)
        path.write_text("1\n")
        ours.write()
        assert path.read_text() == f"{os.getpid()}\n"
        theirs.borrowed = True
        theirs.remove()
        assert path.exists()
        ours.remove()
        assert not path.exists()


def before_each_lock(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
    """Has something happen right before each flock(2), in turn."""
    waiting = list(actions)
    flock = fcntl.flock

    def later(descriptor: int, operation: int) -> None:
        if waiting:
            waiting.pop(0)()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", later)


def test_file_removed_before_the_lock_is_not_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before_each_lock(monkeypatch, path.unlink)
    with acquired(path) as file:
        assert os.path.samestat(os.fstat(file.descriptor), path.stat())


def test_file_replaced_before_the_lock_is_not_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = path.with_name("other")
    other.touch()
    before_each_lock(monkeypatch, lambda: other.replace(path))
    with acquired(path) as file:
        assert os.path.samestat(os.fstat(file.descriptor), path.stat())


def test_probe_at_the_same_time_does_not_make_a_start_fail(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    monkeypatch.setattr(pidfile, "PROBE_SECONDS", 2.0)  # a busy machine may let us wait for longer than the real one
    with path.open() as asking:
        flock = fcntl.flock
        before_each_lock(
            monkeypatch, lambda: flock(asking, fcntl.LOCK_SH), lambda: None, lambda: flock(asking, fcntl.LOCK_UN)
        )
        with acquired(path) as file:
            assert file.descriptor >= 0


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_symbolic_link_is_refused_and_its_target_left_alone(path: Path, target: str) -> None:
    (path.parent / "there").write_text("precious")
    path.symlink_to(path.parent / target)
    file = PidFile(path, "x")
    for use in (file.acquire, file.probe):
        with pytest.raises(ForkdError, match=f"can't open the pid file {path}: "):
            use()
    assert (path.parent / "there").read_text() == "precious"
    assert not (path.parent / "nowhere").exists()


def test_a_file_that_cannot_be_made_is_told_with_its_path(path: Path) -> None:
    with pytest.raises(ForkdError, match=f"can't make the pid file {path / 'pid'}: its directory is gone"):
        PidFile(path / "pid", "x").acquire()
    path.mkdir()
    with pytest.raises(ForkdError, match=f"can't open the pid file {path}: Is a directory"):
        PidFile(path, "x").acquire()


def test_restored_file_is_whole_when_it_appears(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, seen = os.link, []

    def see(source: Path, destination: Path) -> None:
        link(source, destination)
        seen.append((destination.read_text(), PidFile(destination, "asks").probe()))

    with acquired(path) as file:
        path.unlink()
        monkeypatch.setattr(os, "link", see)
        assert file.restore()
        assert seen == [(f"{os.getpid()}\n", (True, os.getpid()))]
        assert [entry.name for entry in path.parent.iterdir()] == ["pid"]


def test_number_is_never_missing_while_it_is_rewritten(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truncate, seen = os.ftruncate, []

    def see(descriptor: int, size: int) -> None:
        seen.append(PidFile(path, "asks").probe())
        truncate(descriptor, size)

    path.write_text("1234567890123\n")  # a longer number, of the process before
    with acquired(path) as file:
        monkeypatch.setattr(os, "ftruncate", see)
        file.write()
        assert seen == [(True, os.getpid())]
        assert path.read_text() == f"{os.getpid()}\n"
