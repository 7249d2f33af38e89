"""Directories that nobody else may write to, as a daemon's run directory has to be: they are made, or what is there is
checked. One that another user owns or may write to is refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from forkd.config.address import LONGEST_PATH
from forkd.errors import ForkdError
from forkd.system.identity import Identity
from forkd.system.logs import obstacle_to_making
from forkd.system.pidfile import DirectoryGone
from forkd.system.run_directory import RunDirectory, is_put_by_root
from forkd.system.safe_paths import UnsafePath, open_directory

#: Links that a run directory's path may lead over.
_MOST_LINKS = 4


def hold_run_directory(run: RunDirectory, identity: Identity) -> None:
    """Makes the directory and takes the lock. Raises as `make_private_directory` and `PidFile.acquire`."""
    for last in (False, False, True):
        make_private_directory(run.path, identity)
        try:
            run.pid_file.acquire()
        except DirectoryGone:  # a daemon has just ended here
            if last:
                raise
        else:
            return


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
