"""The pid file and its lock.

The lock on the pid file alone says whether a daemon runs; the number in it is a hint for people, and no process is ever
signalled because of it. A pid file that is a symbolic link is refused.

`app` takes the lock at a start; the commands of `cli` find the daemon by it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from pathlib import Path

from forkd.errors import AlreadyRunning, ForkdError, NotAllowed

#: Seconds for which the lock may be held not by a daemon but by a command that asks whether one runs (`PidFile.probe`).
PROBE_SECONDS = 0.05


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
