"""Paths that nobody else can lead elsewhere: by them alone root opens, creates, binds, unlinks and reads.

A path is as safe as each directory on it. One who may write to one of them puts a link, a directory or a named pipe of
theirs in the place of the next. So each is opened below the one before it (openat(2)) and looked at: it belongs to root
or to this process's user, and no other may write there, but where the sticky bit keeps them from each other's files. A
link on the way is followed, if it is as safe.

It is looked at where that protects somebody: in a process of root's, and in one whose workers are another user. What an
ordinary user does within the own files is the user's affair.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from forkd.errors import ForkdError
from forkd.system.identity import Identity, Mistake

if TYPE_CHECKING:
    from forkd.config.settings import Settings

#: Groups up to this number are the system's (login.defs(5)). To let one of them write, as Ubuntu lets syslog write to
#: /var/log, is taken for the administrator's decision; unless workers have it.
LAST_SYSTEM_GROUP = 999

_MOST_LINKS = 40  # as path_resolution(7)

_HANDLE = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


class UnsafePath(ForkdError):
    """Another user could lead a path elsewhere."""


def open_directory(path: Path, identity: Identity, *, make: bool = False) -> int:
    """A handle (O_PATH) of a directory that only this process's user and root can have put there.

    Args:
        path: of the directory.
        identity: that of the workers.
        make: whether to make it, and those above it, where they are missing.

    Raises:
        UnsafePath: another user could put another one there.
        OSError: it can't be opened or made.
    """
    rest = [*reversed(Path.cwd().joinpath(path).parts[1:])]
    where, links = Path("/"), 0
    here = os.open(where, _HANDLE | os.O_DIRECTORY)
    try:
        _check(os.fstat(here), where, identity)
        while rest:
            name = rest.pop()
            found = _open_below(here, name, make=make)
            try:
                status = os.fstat(found)
                _check(status, where / name, identity)
                if stat.S_ISDIR(status.st_mode):
                    where = where.parent if name == ".." else where / name
                    here, found = found, here
                    continue
                links += 1
                target = Path(_read_link(found, where / name, links))
            finally:
                os.close(found)
            rest += reversed(target.parts[target.is_absolute() :])
            if target.is_absolute():
                os.close(here)
                where = Path("/")
                here = os.open(where, _HANDLE | os.O_DIRECTORY)
    except BaseException:
        os.close(here)
        raise
    return here


def open_file(path: Path, flags: int, mode: int, identity: Identity, *, make_directory: bool = False) -> int:
    """Opens a file in such a directory, and only if it is as safe itself. It is not waited for; no link is followed.

    Raises:
        UnsafePath: another user could put, or has put, another file there.
        OSError: it can't be opened; ELOOP: it is a link.
    """
    directory = open_directory(path.parent, identity, make=make_directory)
    try:
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(path.name, flags, mode, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        _check(os.fstat(descriptor), path, identity)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def unsafe_path(path: Path, identity: Identity) -> str:
    """Why a path of a file or directory is unsafe; empty where it is not, or where that shows only when it is used."""
    try:
        directory = open_directory(path.parent, identity)
        try:
            status = os.stat(path.name, dir_fd=directory, follow_symlinks=False) if path.name else os.fstat(directory)
        finally:
            os.close(directory)
        _check(status, path, identity)
        if stat.S_ISLNK(status.st_mode):
            return unsafe_path(path.parent / os.readlink(path), identity)
    except UnsafePath as error:
        return str(error)
    except OSError:
        pass
    return ""


def unsafe_settings(settings: Settings, identity: Identity) -> list[Mistake]:
    """A mistake for each path in the settings of a daemon, whose workers are this, that another user could lead
    elsewhere.
    """
    found = [(key, reason) for key, path in _paths_of(settings) if (reason := unsafe_path(path, identity))]
    return [*dict.fromkeys(found)]  # several files may be found by one directory


def _paths_of(settings: Settings) -> Iterator[tuple[str, Path]]:
    """The paths in the settings that the master, or a worker before it is another user, opens: by setting."""
    if isinstance(settings.log.to, Path):
        yield "log.to", settings.log.to
    if settings.run_directory is not None:
        yield "run_directory", settings.run_directory.parent  # itself is looked at when it is made
    if settings.once.pid_file is not None:
        yield "once.pid_file", settings.once.pid_file
    if settings.chroot is not None:
        yield "chroot", settings.chroot
    yield from _paths_of_listeners(settings)
    if settings.preload:
        for path in settings.python_path:
            yield "python_path", path
        if not settings.python_path:
            yield "preload", settings.working_directory or Path.cwd()


def _paths_of_listeners(settings: Settings) -> Iterator[tuple[str, Path]]:
    for number, listener in enumerate(settings.listen):
        address = listener.address
        if address.path and not address.abstract:
            # Its own file is made again, and may belong to the listener's owner.
            yield f"listen.{number}.address", Path(address.path).parent
        for file in filter(None, (listener.tls.cert, listener.tls.key, listener.tls.client_ca)):
            yield from ((f"listen.{number}.tls", place) for place in _places_of(file))
        for name in listener.tls.names:
            for file in filter(None, (name.cert, name.key)):
                yield from ((f"listen.{number}.tls.names", place) for place in _places_of(file))
    for service in settings.services:
        address = service.listener.address
        if address.path and not address.abstract:
            yield ".".join(map(str, service.keys)), Path(address.path).parent


def _places_of(file: Path) -> Iterator[Path]:
    """What decides which file is read by a path: its directory, and where it is a link, those of what it leads to. The
    file itself may be another user's, whose content that is, but for where its owner could put another one.
    """
    for _ in range(_MOST_LINKS):
        yield file.parent
        try:
            if file.parent.stat().st_mode & stat.S_ISVTX:
                yield file
            file = file.parent / os.readlink(file)
        except OSError:  # it is no link, or not there
            return


def _open_below(directory: int, name: str, *, make: bool) -> int:
    try:
        return os.open(name, _HANDLE, dir_fd=directory)
    except FileNotFoundError:
        if not make:
            raise
    with contextlib.suppress(FileExistsError):  # made by another process meanwhile
        os.mkdir(name, 0o755, dir_fd=directory)
    return os.open(name, _HANDLE, dir_fd=directory)


def _read_link(handle: int, path: Path, links: int) -> str:
    """Where a link leads. Raises OSError for what is no link, and for too many."""
    if not stat.S_ISLNK(os.fstat(handle).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    if links > _MOST_LINKS:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return os.readlink("", dir_fd=handle)


def _check(found: os.stat_result, path: Path, identity: Identity) -> None:
    """Raises UnsafePath where another user may change what is there."""
    own = os.geteuid()
    if own != 0 and identity.uid in (None, own):
        return
    if found.st_uid not in (0, own) and _is_mapped(found.st_uid):
        raise UnsafePath(
            f"{path} belongs to {_user_name(found.st_uid)}, who could put anything there; chown it to root, or name "
            "another place"
        )
    if stat.S_ISLNK(found.st_mode) or stat.S_ISCHR(found.st_mode):
        return  # the permissions of a link say nothing, and a device stays the device
    if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX:
        return
    if found.st_mode & stat.S_IWOTH:
        raise UnsafePath(f"{path} is open to all users to write; chmod o-w it, or name another place")
    if found.st_mode & stat.S_IWGRP and _is_others(found.st_gid, identity):
        raise UnsafePath(
            f"{path} is open to group {found.st_gid} to write, which has others than root; chmod g-w it, or name "
            "another place"
        )


def _is_mapped(uid: int) -> bool:
    """Whether a user is one of this user namespace. Files of all others, the machine's root too, seem to belong to the
    same number (user_namespaces(7)): of them nothing can be said.
    """
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except OSError:
        return True
    ranges = [(int(first), int(count)) for first, _, count in map(str.split, lines)]
    return any(first <= uid < first + count for first, count in ranges)


def _is_others(group: int, identity: Identity) -> bool:
    """Whether users that are neither root nor this one have a group."""
    workers = identity.uid not in (None, 0) and group in (identity.gid, *(identity.groups or ()))
    return workers or (group > LAST_SYSTEM_GROUP and group != os.getegid())


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
