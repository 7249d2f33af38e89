"""Paths of unix sockets: bound with their permissions from the first moment, and taken over only from a dead owner.

`OwnedPath` knows which file was made, and which process is to remove it. For `listeners`, and for the master's control
socket.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path


class OwnedPath:
    """A file and the process that is to remove it, one object for all that share the file.

    A forked child has a copy of this and owns nothing: another process's number is in it.

    Args:
        path: where it is.
        inode: device and inode of the file that was made; None: there is none any more.
        borrowed: whether it belongs to another process.

    Attributes:
        path, inode: as above.
    """

    __slots__ = ("_owner", "inode", "path")

    def __init__(self, path: Path | str, inode: tuple[int, int] | None, *, borrowed: bool = False) -> None:
        self.path = Path(path)
        self.inode = inode
        self._owner = 0 if borrowed else os.getpid()

    @property
    def borrowed(self) -> bool:
        """Whether another process, or none, is to remove it."""
        return self._owner != os.getpid()

    def own(self) -> None:
        """Makes it this process's."""
        self._owner = os.getpid()

    def follow_fork(self) -> None:
        """In a forked child that goes on in the place of its parent: what was the parent's is this process's."""
        if self._owner:
            self._owner = os.getpid()

    def disown(self) -> None:
        """Leaves it to another process."""
        self._owner = 0

    def there(self) -> tuple[int, int] | None:
        """Device and inode of what is at the path; None for nothing."""
        try:
            return inode_of(str(self.path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    @property
    def lost(self) -> bool:
        """Whether what was made is not at the path any more: something else has removed or replaced it."""
        return self.inode is not None and self.there() != self.inode

    def remove(self) -> None:
        """Removes it once, if it is this process's and still the file that was made."""
        if not self.borrowed and self.inode is not None and self.there() == self.inode:
            self.path.unlink(missing_ok=True)
            self._owner = 0  # the next file at this path may have the same inode


def bind_path(sock: socket.socket, path: str, mode: int) -> None:
    """Binds a unix socket to a path with these permissions, never for a moment with wider ones.

    A socket file whose owner is dead is replaced; one that a process listens on is not.

    Raises:
        OSError: EADDRINUSE for a live owner or a file that is no socket, else as bind(2).
    """
    if not is_path_free(path):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    # By the umask, as chmod(2) of the path may reach another file: unix(7) makes it with the permissions that are left.
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def is_path_free(path: str) -> bool:
    """Whether there is nothing at the path, or a socket file whose owner is dead."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode) and not _is_served(path)
    except FileNotFoundError:
        return True


def current_umask() -> int:
    """This process's umask, which can only be read by setting it (umask(2))."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def is_hidden(path: Path) -> bool:
    """Whether this user may not see if there is such a path."""
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def inode_of(path: str) -> tuple[int, int]:
    """Device and inode of the file at a path, which may be a symbolic link. Raises OSError."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _is_served(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # EAGAIN: its backlog is full; EACCES, EPROTOTYPE: not ours to judge
            return True
        return True
