"""The pid file and its directory: the lock alone is the truth, one daemon at most has it, and what somebody else could
have put there is refused.
"""

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
from forkd.system.pidfile import PidFile, RunDirectory, default_run_directory, make_private_directory

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
        assert file.holder() == (True, pid)
        assert path.read_text() == f"{pid}\n"


def test_a_second_acquirer_in_this_process_is_kept_out_too(path: Path) -> None:
    with acquired(path), pytest.raises(AlreadyRunning, match=r"^other is already running$"):
        PidFile(path, "other").acquire()


def test_the_file_of_a_daemon_that_was_killed_is_taken_over(path: Path) -> None:
    with held_elsewhere(path) as pid:
        pass
    file = PidFile(path, "mine")
    assert file.holder() == (False, pid)
    with acquired(path) as ours:
        ours.write()
        assert file.holder() == (True, os.getpid())
    assert file.holder() == (False, os.getpid())


def test_a_longer_number_than_ours_is_overwritten_as_a_whole(path: Path) -> None:
    path.write_text("1234567890123456789\nand more\n")
    with acquired(path) as file:
        file.write()
        assert path.read_text() == f"{os.getpid()}\n"


@pytest.mark.parametrize("content", ["", "\n", "abc\n", "-1\n", "12 13\n", "\0\0", "١٢\n"])
def test_a_file_without_a_number_has_none(path: Path, content: str) -> None:
    path.write_text(content)
    assert PidFile(path, "x").holder() == (False, None)
    with acquired(path):
        assert PidFile(path, "x").holder() == (True, None)


def test_without_a_file_nobody_holds_it(path: Path) -> None:
    assert PidFile(path, "x").holder() == (False, None)
    assert not path.exists()
    assert PidFile(path / "deeper", "x").holder() == (False, None)


def test_asking_who_holds_it_leaves_the_lock_free(path: Path) -> None:
    path.write_text("1\n")
    file = PidFile(path, "x")
    assert [file.holder() for _ in range(3)] == [(False, 1)] * 3
    with acquired(path):
        assert path.read_text() == "1\n"


def test_the_lock_stays_while_any_process_has_the_descriptor(path: Path) -> None:
    """As after the forks of a start: it is the daemon's, not the launcher's."""
    with acquired(path) as file:
        copy = os.dup(file.descriptor)
    try:
        assert PidFile(path, "x").holder()[0]
    finally:
        os.close(copy)
    assert not PidFile(path, "x").holder()[0]


def test_removing_takes_the_file_away_and_frees_the_name(path: Path) -> None:
    with acquired(path) as file:
        assert not os.get_inheritable(file.descriptor)
        file.remove()
        assert file.descriptor == -1
        assert not path.exists()
        with acquired(path):
            assert path.exists()


def test_removing_leaves_a_successors_file(path: Path) -> None:
    """Somebody removed our file by hand, and a second daemon started since."""
    with acquired(path) as ours:
        path.unlink()
        with acquired(path) as theirs:
            theirs.write()
            ours.remove()
            assert path.exists()
            assert PidFile(path, "x").holder() == (True, os.getpid())


@pytest.mark.parametrize("lent", [False, True])
def test_a_lock_that_was_handed_over_is_held_with_who_had_it(path: Path, lent: bool) -> None:
    with acquired(path) as theirs:
        theirs.write()
        ours = PidFile(path, "mine")
        ours.adopt(os.dup(theirs.descriptor), lent=lent)
        theirs.close()
        assert PidFile(path, "other").holder() == (True, os.getpid())
        with pytest.raises(AlreadyRunning):
            PidFile(path, "other").acquire()
        ours.close()
        assert PidFile(path, "other").holder() == (False, os.getpid())


def test_who_is_lent_the_lock_does_not_remove_the_file_until_it_is_his(path: Path) -> None:
    with acquired(path) as theirs:
        theirs.write()
        ours = PidFile(path, "mine")
        ours.adopt(os.dup(theirs.descriptor), lent=True)
        ours.remove()
        assert ours.descriptor == -1
        assert PidFile(path, "other").holder() == (True, os.getpid())
        ours.adopt(os.dup(theirs.descriptor), lent=True)
        path.write_text("1\n")
        ours.write()
        assert path.read_text() == f"{os.getpid()}\n"
        theirs.lent = True
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

    monkeypatch.setattr(pidfile.fcntl, "flock", later)


def test_a_file_that_was_removed_between_open_and_lock_is_not_taken_for_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_each_lock(monkeypatch, path.unlink)
    with acquired(path) as file:
        assert os.path.samestat(os.fstat(file.descriptor), path.stat())


def test_a_file_that_was_replaced_between_open_and_lock_is_not_taken_for_ours(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = path.with_name("other")
    other.touch()
    before_each_lock(monkeypatch, lambda: other.replace(path))
    with acquired(path) as file:
        assert os.path.samestat(os.fstat(file.descriptor), path.stat())


def test_somebody_who_only_asks_does_not_make_a_start_fail(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.touch()
    monkeypatch.setattr(pidfile, "_PROBE", 2.0)  # a busy machine may let us wait for longer than the real one
    with path.open() as asking:
        flock = fcntl.flock
        before_each_lock(
            monkeypatch, lambda: flock(asking, fcntl.LOCK_SH), lambda: None, lambda: flock(asking, fcntl.LOCK_UN)
        )
        with acquired(path) as file:
            assert file.descriptor >= 0


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_symbolic_link_is_refused_and_what_it_points_to_left_alone(path: Path, target: str) -> None:
    (path.parent / "there").write_text("precious")
    path.symlink_to(path.parent / target)
    file = PidFile(path, "x")
    for use in (file.acquire, file.holder):
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


def test_the_run_directory_is_made_with_those_above_it_for_us_alone_to_write(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c"
    before = os.umask(0)
    try:
        make_private_directory(path)
        make_private_directory(path)  # it is ours, and stays so
    finally:
        os.umask(before)
    assert [found.stat().st_mode & 0o7777 for found in (path, path.parent, path.parent.parent)] == [0o755] * 3


def make_link(path: Path) -> None:
    path.with_name("real").mkdir()
    path.symlink_to(path.with_name("real"))


def make_open(path: Path, mode: int) -> None:
    path.mkdir()
    path.chmod(mode)


def make_open_above(path: Path) -> None:
    path.mkdir()
    path.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (make_link, "is a symbolic link; remove it, or set run_directory"),
        (lambda path: path.symlink_to("nowhere"), "is a symbolic link; remove it, or set run_directory"),
        (Path.touch, "is not a directory but should be"),
        (lambda path: make_open(path, 0o777), "open to others to write; remove it or set run_directory"),
        (lambda path: make_open(path, 0o775), "open to others to write; remove it or set run_directory"),
        (lambda path: make_open(path, 0o1777), "open to others to write; remove it or set run_directory"),
        (make_open_above, "is not safe there; set run_directory"),
    ],
    ids=["link", "broken link", "file", "others", "group", "sticky", "above"],
)
def test_a_run_directory_where_others_could_put_files_is_refused(
    tmp_path: Path, prepare: Callable[[Path], object], said: str
) -> None:
    path = tmp_path / "above" / "run"
    path.parent.mkdir()
    prepare(path)
    with pytest.raises(ForkdError) as caught:
        make_private_directory(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_another_users_run_directory_is_refused(tmp_path: Path) -> None:
    path = Path("/usr")
    if os.geteuid() == 0:
        path = tmp_path / "theirs"
        path.mkdir()
        os.chown(path, 12345, -1)
    with pytest.raises(ForkdError, match=f"^{path} is another user's"):
        make_private_directory(path)


def test_a_run_directory_in_a_shared_sticky_directory_is_safe(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    make_private_directory(tmp_path / "run")
    assert (tmp_path / "run").is_dir()


def test_a_run_directory_below_a_file_is_told_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run"
    with pytest.raises(ForkdError, match=f"can't make the directory {path}: Not a directory"):
        make_private_directory(path)


def test_the_default_run_directory_is_the_systems_the_users_or_a_private_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_run_directory("x") == Path("/run/forkd/x")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_run_directory("x") == Path("/run/user/1000/forkd/x")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(pidfile.tempfile, "gettempdir", lambda: str(tmp_path))
    assert default_run_directory("x") == tmp_path / "forkd-1000" / "x"


def test_a_run_directory_has_its_files_in_it(tmp_path: Path) -> None:
    run = RunDirectory("x", tmp_path)
    assert (run.name, run.path, run.control) == ("x", tmp_path, tmp_path / "control.sock")
    run.pid_file.acquire()
    run.pid_file.close()
    assert (tmp_path / "pid").exists()
