"""The pid file and its directory: the lock alone is the truth, one daemon at most has it, and what another user could
have put there is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from forkd.config.address import LONGEST_PATH
from forkd.errors import AlreadyRunning, ForkdError
from forkd.system import pidfile
from forkd.system.identity import Identity
from forkd.system.pidfile import PidFile, RunDirectory, default_run_directory, make_private_directory
from tests.support.needs import needs_root

HOLD = """
import sys
from pathlib import Path
from forkd.system.identity import Identity
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

    monkeypatch.setattr("forkd.system.pidfile.make_private_directory", make)
    run.hold(Identity())
    assert (len(made), run.pid_file.probe()[0]) == (3, True)
    run.remove(own_directory=True)
    assert not run.path.exists()


def test_default_run_directory_depends_on_user_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_run_directory("x") == Path("/run/forkd/x")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_run_directory("x") == Path("/run/user/1000/forkd/x")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert default_run_directory("x") == tmp_path / "forkd-1000" / "x"


def test_a_run_directory_has_its_files_in_it(tmp_path: Path) -> None:
    run = RunDirectory("x", tmp_path)
    assert (run.name, run.path, run.control) == ("x", tmp_path, tmp_path / "control.sock")
    run.pid_file.acquire()
    run.pid_file.close()
    assert (tmp_path / "pid").exists()


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
