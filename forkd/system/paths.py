"""The paths of unix sockets: taken over only from a dead owner, and never for a moment open to others."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat


def take_path(sock: socket.socket, path: str, mode: int) -> None:
    """Binds a unix socket to a path with these permissions, never for a moment with wider ones.

    A socket file whose owner is dead is replaced; one that somebody listens on is not.

    Raises:
        OSError: EADDRINUSE for a live owner or a file that is no socket, else as bind(2).
    """
    if not is_free(path):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    # By the umask, for by now a path may lead elsewhere: unix(7) makes the file with all permissions that it leaves.
    before = os.umask(0o777 & ~mode)
    try:
        sock.bind(path)
    finally:
        os.umask(before)


def is_free(path: str) -> bool:
    """Whether there is nothing, or a socket file whose owner is dead."""
    try:
        return stat.S_ISSOCK(os.lstat(path).st_mode) and not _somebody_listens(path)
    except FileNotFoundError:
        return True


def current_umask() -> int:
    """The umask; the kernel tells it only to who sets it (umask(2))."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _somebody_listens(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # EAGAIN: its backlog is full; EACCES, EPROTOTYPE: not ours to judge
            return True
        return True


def inode_of(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
