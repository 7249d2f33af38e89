"""The run directory and the pid file in it.

The lock on the pid file is the truth about whether a daemon runs; the number in it is a hint for people, and nobody is
ever signalled on its word.

A path that is a symbolic link, or a directory that somebody else owns or may write, is refused.
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

from forkd.errors import AlreadyRunning, ForkdError

#: Seconds for which a lock may be no daemon's but that of somebody who asks whether one runs (`PidFile.holder`).
_PROBE = 0.05


def default_run_directory(name: str) -> Path:
    """Where the daemon `name` keeps its pid file and control socket unless told otherwise (file-hierarchy(7))."""
    if os.geteuid() == 0:
        return Path("/run/forkd", name)
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base, "forkd", name)
    return Path(tempfile.gettempdir(), f"forkd-{os.geteuid()}", name)


def make_private_directory(path: Path) -> None:
    """Makes the directory and those above it, or checks that what is there is ours alone.

    Raises:
        ForkdError: it can't be made, or others could put files of theirs in it.
    """
    try:
        for directory in (*reversed(path.parents), path):
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o755)
        found, above = path.lstat(), path.parent.stat()
    except OSError as error:
        raise ForkdError(f"can't make the directory {path}: {error.strerror}") from None
    if stat.S_ISLNK(found.st_mode):
        raise ForkdError(f"{path} is a symbolic link; remove it, or set run_directory to where it leads")
    if not stat.S_ISDIR(found.st_mode):
        raise ForkdError(f"{path} is not a directory but should be")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ForkdError(f"{path} is another user's, or open to others to write; remove it or set run_directory")
    if above.st_uid not in (0, os.geteuid()) or (above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX):
        raise ForkdError(f"{path.parent} is open to others to write, so {path} is not safe there; set run_directory")


class PidFile:
    """A locked pid file.

    Args:
        path: where; its directory exists.
        name: the daemon's name, for messages.

    Attributes:
        lent: whether the file is another process's, with whom the lock is shared; then it is not removed here.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._descriptor = -1
        self.lent = False

    @property
    def descriptor(self) -> int:
        """The descriptor that holds the lock; -1 when it is not held."""
        return self._descriptor

    def acquire(self) -> None:
        """Takes the lock.

        Raises:
            AlreadyRunning: somebody holds it.
            ForkdError: the file can't be made.
        """
        deadline = time.monotonic() + _PROBE
        while True:
            descriptor = self._open(os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = _number(descriptor)
                os.close(descriptor)
                if time.monotonic() > deadline:
                    raise AlreadyRunning(self._name, pid) from None
                time.sleep(_PROBE / 10)
                continue
            if self._still_there(descriptor):
                self._descriptor = descriptor
                return
            os.close(descriptor)  # its last holder removed it between our open and our lock

    def adopt(self, descriptor: int, *, lent: bool) -> None:
        """Holds the lock by a descriptor that was handed over: flock(2) is shared by all copies of it."""
        self._descriptor, self.lent = descriptor, lent

    def write(self) -> None:
        """Writes this process's number; after the last fork of a start. Raises ForkdError."""
        self.lent = False
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise ForkdError(f"can't write the pid file {self._path}: {error.strerror}") from None

    def remove(self) -> None:
        """Removes the file, if it is still ours, then gives the lock back: nobody should lock a file that is to go."""
        if self._descriptor >= 0 and not self.lent and self._still_there(self._descriptor):
            self._path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Closes the descriptor: what a forked child does with what its master holds."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def holder(self) -> tuple[bool, int | None]:
        """Whether somebody holds the lock, and the number in the file (None when there is none, or no file).

        Raises:
            ForkdError: the file is there and can't be opened.
        """
        try:
            descriptor = self._open(os.O_RDWR)
        except FileNotFoundError:
            return False, None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, _number(descriptor)
        else:
            return False, _number(descriptor)
        finally:
            os.close(descriptor)

    def _open(self, flags: int) -> int:
        try:
            return os.open(self._path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            if flags & os.O_CREAT:
                raise ForkdError(f"can't make the pid file {self._path}: its directory is gone") from None
            raise
        except OSError as error:
            why = "it is a symbolic link; remove it" if error.errno == errno.ELOOP else error.strerror
            raise ForkdError(f"can't open the pid file {self._path}: {why}") from None

    def _still_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), self._path.lstat())
        except FileNotFoundError:
            return False


def _number(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None


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
