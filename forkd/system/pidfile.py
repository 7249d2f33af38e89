"""The pid file and its lock, the run directory that it is in, and where else a daemon has its files.

The lock on the pid file alone says whether a daemon runs; the number in it is a hint for people, and no process is ever
signalled because of it. A pid file that is a symbolic link is refused, and so is a directory that another user owns or
may write to.

`app` makes the directory and takes the lock at a start; the commands of `cli` find the daemon by them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import tempfile
import time
from pathlib import Path

from forkd.config.address import LONGEST_PATH
from forkd.config.settings import Settings
from forkd.config.values import current_directory
from forkd.errors import AlreadyRunning, ForkdError, NotAllowed
from forkd.system.identity import Identity
from forkd.system.logs import default_log_file, obstacle_to_making
from forkd.system.safe_paths import UnsafePath, open_directory

#: Seconds for which the lock may be held not by a daemon but by a command that asks whether one runs (`PidFile.probe`).
PROBE_SECONDS = 0.05

#: Where root's daemons, and those of systemd's units, have their run directories (file-hierarchy(7)).
ROOT_DIRECTORY = Path("/run/forkd")

#: Links that a run directory's path may lead over.
_MOST_LINKS = 4


class DirectoryGone(ForkdError):
    """The run directory has been removed since it was looked at."""


class PidFile:
    """A locked pid file.

    Args:
        path: where; its directory exists.
        name: the daemon's name, for messages.

    Attributes:
        borrowed: whether the file is another process's, which shares the lock; then it is not removed here.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._descriptor = -1
        self._owner = 0  # the process that took the lock, or goes on in its place
        self.borrowed = False

    @property
    def descriptor(self) -> int:
        """The descriptor that holds the lock; -1 when it is not held."""
        return self._descriptor

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            AlreadyRunning: another process holds it.
            ForkdError: the file can't be made.
        """
        deadline = time.monotonic() + PROBE_SECONDS
        while True:
            descriptor = self._open(os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _read_pid(descriptor)
                os.close(descriptor)
                if time.monotonic() > deadline:
                    raise AlreadyRunning(self._name, pid) from None
                time.sleep(PROBE_SECONDS / 10)
                continue
            if self._still_there(descriptor):
                self._hold(descriptor)
                return
            os.close(descriptor)  # its last holder removed it between our open and our lock

    def adopt(self, descriptor: int, *, borrowed: bool) -> None:
        """Holds the lock by a descriptor that was handed over: flock(2) is shared by all copies of it."""
        self._hold(descriptor)
        self.borrowed = borrowed

    def _hold(self, descriptor: int) -> None:
        self._descriptor, self._owner = descriptor, os.getpid()
        with contextlib.suppress(OSError):  # older versions made it readable; who can open it can lock it
            os.fchmod(descriptor, 0o600)

    def follow_fork(self) -> None:
        """In a forked child that goes on in the place of its parent: takes the file over."""
        self._owner = os.getpid()

    def restore(self) -> bool:
        """Makes the file again, under the same descriptor, if something has removed it; whether it had. From its
        first moment the new file is locked and has the number in it.

        Raises:
            ForkdError: it can't be made.
        """
        if self._path.exists() or self._path.is_symlink():
            return False
        unfinished = self._path.with_name(f"{self._path.name}.new")
        unfinished.unlink(missing_ok=True)
        descriptor = self._open(os.O_RDWR | os.O_CREAT | os.O_EXCL, unfinished)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.dup2(descriptor, self._descriptor, inheritable=False)
            self.write()
            os.link(unfinished, self._path)
        except FileExistsError:
            return False  # a start has made one at this moment; it finds that the daemon runs by its control socket
        except OSError as error:
            raise ForkdError(f"can't make the pid file {self._path}: {error.strerror}") from None
        finally:
            os.close(descriptor)
            unfinished.unlink(missing_ok=True)
        return True

    def write(self) -> None:
        """Writes this process's number; after the last fork of a start. The file is never empty meanwhile. Raises
        ForkdError.
        """
        self.borrowed = False
        line = f"{os.getpid()}\n".encode()
        try:
            os.pwrite(self._descriptor, line, 0)
            os.ftruncate(self._descriptor, len(line))
        except OSError as error:
            raise ForkdError(f"can't write the pid file {self._path}: {error.strerror}") from None

    def remove(self) -> bool:
        """Removes the file, if it is still this process's, then gives the lock back: a file that is to go is not to be
        locked. A forked child removes nothing. Whether it was this process's.
        """
        owned = self._descriptor >= 0 and self._owner == os.getpid() and not self.borrowed
        if owned and self._still_there(self._descriptor):
            self._path.unlink(missing_ok=True)
        self.close()
        return owned

    def close(self) -> None:
        """Closes the descriptor: what a forked child does with what its master holds."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def probe(self) -> tuple[bool, int | None]:
        """Whether a process holds the lock, and the number in the file (None when there is none, or no file).

        Raises:
            NotAllowed: another user may not open it: who could would hold up a start by flock(2).
            ForkdError: the file is there and can't be opened.
        """
        try:
            descriptor = self._open(os.O_RDONLY)
        except FileNotFoundError:
            return False, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, _read_pid(descriptor)
        else:
            return False, _read_pid(descriptor)
        finally:
            os.close(descriptor)

    def _open(self, flags: int, path: Path | None = None) -> int:
        flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a named pipe would be waited for
        try:
            descriptor = os.open(path or self._path, flags, 0o600)
        except FileNotFoundError:
            if flags & os.O_CREAT:
                raise DirectoryGone(f"can't make the pid file {self._path}: its directory is gone") from None
            raise
        except OSError as error:
            if isinstance(error, PermissionError) and not flags & os.O_CREAT:
                raise NotAllowed(f"can't tell whether {self._name} runs: this user may not open {self._path}") from None
            why = "it is a symbolic link; remove it" if error.errno == errno.ELOOP else error.strerror
            raise ForkdError(f"can't open the pid file {self._path}: {why}") from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ForkdError(f"can't open the pid file {self._path}: it is no file; remove it")
        return descriptor

    def _still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.lstat())
        except FileNotFoundError:
            return False


def _read_pid(descriptor: int) -> int | None:
    line = os.pread(descriptor, 32, 0).partition(b"\n")[0]  # a longer number's end may follow for a moment
    return int(line) if line.isdigit() else None


# The run directory, and the other places that the settings name


class RunDirectory:
    """The paths of a daemon: its run directory, and what lies in it.

    Args:
        name: the daemon's name.
        path: where the settings put it, or None for the default.
    """

    def __init__(self, name: str, path: Path | None) -> None:
        self.name = name
        self.path = path or default_run_directory(name)
        self.control = self.path / "control.sock"
        self.pid_file = PidFile(self.path / "pid", name)

    def hold(self, identity: Identity) -> None:
        """Makes the directory and takes the lock. Raises as `make_private_directory` and `PidFile.acquire`."""
        for last in (False, False, True):
            make_private_directory(self.path, identity)
            try:
                self.pid_file.acquire()
            except DirectoryGone:  # a daemon has just ended here
                if last:
                    raise
            else:
                return

    def remove(self, *, own_directory: bool) -> None:
        """At the daemon's end: removes the pid file, if it is this process's, and then the directory if it is empty.

        Args:
            own_directory: whether the directory is in the default place, and not one that the settings name.
        """
        if self.pid_file.remove() and own_directory:
            with contextlib.suppress(OSError):  # a start may have made a file there by now
                self.path.rmdir()


def run_directory(settings: Settings) -> RunDirectory:
    """The run directory that the settings mean."""
    return RunDirectory(settings.name, settings.run_directory)


def default_run_directory(name: str) -> Path:
    """Where the daemon `name` keeps its pid file and control socket unless told otherwise (file-hierarchy(7))."""
    if os.geteuid() == 0:
        return ROOT_DIRECTORY / name
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base, "forkd", name)
    return Path(tempfile.gettempdir(), f"forkd-{os.geteuid()}", name)


def is_put_by_root(path: Path) -> bool:
    """Whether a run directory is in /run/forkd, where root alone has put it, also where it is another user's: systemd
    makes it for a unit with `User=`. Raises OSError.
    """
    above = path.parent.lstat()
    return path.parent == ROOT_DIRECTORY and above.st_uid == 0 and not above.st_mode & 0o022


def make_private_directory(path: Path, identity: Identity) -> None:
    """Makes the directory and those above it, or checks that what is there is only ours to write. It may be a link of
    root's or our own, as systemd makes for `DynamicUser=`; then where that leads is checked.

    Args:
        path: of the directory.
        identity: that of the workers.

    Raises:
        ForkdError: it can't be made, or others could put files of theirs in it.
    """
    _check_length(path)
    try:
        directory = open_directory(path.parent, identity, make=True)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path.name, 0o755, dir_fd=directory)
        finally:
            os.close(directory)
    except UnsafePath as error:
        raise ForkdError(f"{path} is not safe: {error}") from None
    except PermissionError:
        raise ForkdError(
            f"can't make the directory {path}: user {os.geteuid()} may make nothing in {path.parent}, which is user "
            f"{_owner_above(path)}'s; set run_directory, or XDG_RUNTIME_DIR, to another"
        ) from None
    except OSError as error:
        raise ForkdError(f"can't make the directory {path}: {error.strerror}") from None
    _check_private(path)


def _owner_above(path: Path) -> int:
    """The owner of the directory nearest to a path that can be seen."""
    return next((one.stat().st_uid for one in path.parents if os.access(one, os.F_OK)), 0)


def probe_private_directory(path: Path) -> None:
    """As `make_private_directory`, but makes nothing: what is there has to do, or to leave room for the rest. What
    systemd has made for a unit with another user does for that unit.
    """
    _check_length(path)
    if os.path.lexists(path):
        if os.geteuid() or not is_put_by_root(path):
            _check_private(path)
    elif blocked := obstacle_to_making(path):
        raise ForkdError(f"can't make the directory {path}: {blocked}")


def _check_length(path: Path) -> None:
    # That of a restart's, until it takes its place.
    if (size := len(os.fsencode(path / "control.sock.new"))) > LONGEST_PATH:
        raise ForkdError(
            f"run_directory {path} is too long: a control socket's path in it can have {size} bytes, and "
            f"{LONGEST_PATH} is the most"
        )


def _check_private(path: Path) -> None:
    """Raises ForkdError where others could put files of theirs into a directory, or another one in its place."""
    try:
        for _ in range(_MOST_LINKS):
            if not path.is_symlink():
                return _check_directory(path)
            path = _follow(path)
    except OSError as error:
        raise ForkdError(f"can't make the directory {path}: {error.strerror}") from None
    raise ForkdError(f"{path} is a symbolic link that leads to too many others; set run_directory to where it leads")


def _follow(path: Path) -> Path:
    """Where a link leads that root or we have made, where nobody else could. Raises ForkdError, or OSError."""
    found, above, ours = path.lstat(), path.parent.stat(), (0, os.geteuid())
    target = path.parent / path.readlink()
    if found.st_uid not in ours or above.st_uid not in ours or above.st_mode & 0o022:
        raise ForkdError(f"{path} is a symbolic link that others could have made; remove it, or set run_directory")
    if not os.path.lexists(target):
        raise ForkdError(f"{path} is a symbolic link to {target}, which is not there; remove it, or set run_directory")
    return target


def _check_directory(path: Path) -> None:
    """As `_check_private`, of what is no link. Raises OSError, too."""
    found, above = path.lstat(), path.parent.stat()
    if not stat.S_ISDIR(found.st_mode):
        raise ForkdError(f"{path} is not a directory but should be")
    if found.st_uid != os.geteuid():
        raise ForkdError(f"{path} is another user's ({found.st_uid}); set run_directory, or name, to another")
    if found.st_mode & 0o022:
        raise ForkdError(f"{path} is open to others to write; chmod go-w it, or set run_directory")
    if above.st_uid not in (0, os.geteuid()) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
        raise ForkdError(f"{path.parent} is open to others to write, so {path} is not safe there; set run_directory")


def probe_directory(settings: Settings) -> None:
    """Checks that `enter_directory` can. Raises ForkdError."""
    where = settings.working_directory
    if where is None or (os.path.isdir(where) and os.access(where, os.X_OK)):
        return
    try:
        number: int | None = errno.EACCES if stat.S_ISDIR(where.stat().st_mode) else errno.ENOTDIR
    except OSError as error:
        number = error.errno
    why = os.strerror(number or errno.EACCES)
    raise ForkdError(f"can't change to working_directory {where}: {why}")


def log_target(settings: Settings, *, detached: bool) -> Path | str | None:
    """Where the daemon logs: a file, the journal, or None for the standard error that it was started with."""
    return settings.log.to or (default_log_file(settings.name) if detached else None)


def starting_directory() -> str:
    """Where the daemon is started. Raises ForkdError where that has been removed, or can't be found out."""
    try:
        return str(current_directory())
    except OSError as error:
        raise ForkdError(f"there is no current directory: {error.strerror}; start from another one") from None


def enter_directory(settings: Settings, default: str = "") -> None:
    """Changes to the working directory that the settings name, else to the default, where its path leads now. One that
    is not there any more is an error only where the settings name it.

    Raises:
        ForkdError: the process can't change to the settings' directory.
    """
    if settings.working_directory is not None:
        try:
            change_directory(str(settings.working_directory))
        except OSError as error:
            where = settings.working_directory
            raise ForkdError(f"can't change to working_directory {where}: {error.strerror}") from None
    elif default:
        with contextlib.suppress(OSError):
            change_directory(default)


def change_directory(path: str) -> None:
    """Changes to a directory and keeps its path in $PWD, as a shell does: it may have links in it. Raises OSError."""
    os.chdir(path)
    os.environ["PWD"] = path
