"""Listening sockets: bound, set up and checked here, closed here; they belong to the master.

A unix socket's path is taken over only from a dead owner, and removed only while it is still the file that we made.
Sockets that were inherited (`inherited`) are served as they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.errors import ForkdError
from forkd.system.accounts import find_group, find_user
from forkd.system.bound import BoundListener
from forkd.system.datagrams import bind_group, follow_groups
from forkd.system.holders import explained, in_use
from forkd.system.inherited import adopt_listeners
from forkd.system.paths import current_umask, inode_of, is_free, take_path
from forkd.system.tuning import tune


def bind_listener(listener: Listener, slots: int = 1) -> BoundListener:
    """Binds and listens, or takes over what was inherited.

    Args:
        listener: its settings.
        slots: how many workers there are to be, each of which has its own sockets for datagrams.

    Raises:
        AddressInUse: somebody else listens there; the message says who, where that can be told.
        ForkdError: the address can't be had for another reason.
    """
    address = listener.address
    if address.scheme == "fd":
        bound = BoundListener(listener, *adopt_listeners(address))
        for sock in bound.sockets:
            tune(sock, listener)
        return bound
    try:
        if address.scheme == "udp":
            sockets = bind_group(listener, slots)
            for sock in sockets:
                tune(sock, listener)
            where = Address("udp", host=address.host, port=sockets[0].getsockname()[1])
            return BoundListener(listener, where, sockets)
        return _bind_unix(listener) if address.is_unix else _bind_tcp(listener)
    except UnicodeError:
        raise ForkdError(f"can't listen on {address}: {address.host!r} is no host name") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise in_use(address) from None
        raise ForkdError(f"can't listen on {address}: {explained(error, address)}") from None


def bind_all(listeners: Sequence[Listener], held: Sequence[BoundListener] = (), slots: int = 1) -> list[BoundListener]:
    """Binds every listener that is not among those `held`, or none: what was bound is closed again when one can't be.
    `slots` and what it raises are as of `bind_listener`.
    """
    bound: list[BoundListener] = []
    with contextlib.ExitStack() as undo:
        for listener, kept in zip(listeners, match_listeners(listeners, held), strict=True):
            bound.append(kept or bind_listener(listener, slots))
            if kept is None:
                undo.callback(bound[-1].remove)
        undo.pop_all()
    return bound


def match_listeners(listeners: Sequence[Listener], held: Iterable[BoundListener]) -> list[BoundListener | None]:
    """For each listener the one of those held that listens where it should, with the new settings; else None."""
    free = list(held)
    found: list[BoundListener | None] = []
    for listener in listeners:
        by_settings = [bound for bound in free if bound.listener.address == listener.address]
        # One that was given a free port may be asked for by that port from now on.
        match = next(iter(by_settings or [bound for bound in free if bound.address == listener.address]), None)
        if match is not None:
            free.remove(match)
        found.append(match and replace(match, listener=listener))
    return found


def update_listener(bound: BoundListener, before: Listener | None = None) -> None:
    """Has a listener that was kept follow its new settings: backlog, options of its connections, multicast groups, and
    a path's mode and owner. Raises OSError or ForkdError.

    Args:
        bound: the listener.
        before: its settings until now, where they are known.
    """
    for sock in bound.sockets:
        tune(sock, bound.listener)
        if bound.listener.address.scheme in ("tcp", "unix"):
            sock.listen(bound.listener.backlog)
    if bound.listener.address.scheme == "udp":
        follow_groups(bound.sockets, before.multicast if before is not None else (), bound.listener)
    if bound.inode is not None:
        _give(bound.listener, bound.inode)  # where there is no mode it stays as the umask of the start made it


def probe_listener(listener: Listener) -> None:
    """Whether an address could be bound now, leaving everything as it is. Raises as `bind_listener`."""
    address = listener.address
    if address.scheme == "fd":  # only the process that is started with it could tell
        return
    if not address.is_unix or address.abstract:
        bind_listener(listener).remove()
        return
    directory = Path(address.path).parent
    if not os.access(directory, os.W_OK | os.X_OK):
        why = "can't write to" if directory.is_dir() else "there is no"
        raise ForkdError(f"can't listen on {address}: {why} directory {directory}")
    _owner(listener)
    if not is_free(address.path):
        raise in_use(address)


def _bind_tcp(listener: Listener) -> BoundListener:
    address = listener.address
    infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    port = address.port
    with contextlib.ExitStack() as undo:
        sockets = []
        for family, host in dict.fromkeys((info[0], str(info[4][0])) for info in infos):
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tune(sock, listener)
            if family == socket.AF_INET6:  # so that [::]:80 and 0.0.0.0:80 can both be listened on (ipv6(7))
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((host, port))
            port = sock.getsockname()[1]
            _listen(sock, listener)
            sockets.append(sock)
        undo.pop_all()
    return BoundListener(listener, Address("tcp", host=address.host, port=port), sockets)


def _bind_unix(listener: Listener) -> BoundListener:
    address = listener.address
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, _type_of(address)))
        if address.abstract:
            sock.bind("\0" + address.path[1:])
            inode = None
        else:
            take_path(sock, address.path, _mode(listener))
            inode = inode_of(address.path)
            undo.callback(Path(address.path).unlink)
            _give(listener, inode)
        if address.takes_datagrams:
            sock.setblocking(False)
        else:
            _listen(sock, listener)
        undo.pop_all()
    return BoundListener(listener, address, [sock], inode)


def _type_of(address: Address) -> socket.SocketKind:
    return socket.SOCK_DGRAM if address.takes_datagrams else socket.SOCK_STREAM


def _mode(listener: Listener) -> int:
    return 0o666 & ~current_umask() if listener.mode is None else listener.mode


def _give(listener: Listener, inode: tuple[int, int]) -> None:
    """Gives a unix socket's path its owner and permissions, and nothing that somebody has put in its place: the
    directory may be another user's.
    """
    uid, gid = _owner(listener)
    if listener.mode is None and (uid, gid) == (-1, -1):
        return
    handle = os.open(listener.address.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if (found.st_dev, found.st_ino) == inode:
            path = f"/proc/self/fd/{handle}"  # calls that take descriptors take none of O_PATH (open(2))
            os.chown(path, uid, gid)
            if listener.mode is not None:
                os.chmod(path, listener.mode)
    finally:
        os.close(handle)


def _listen(sock: socket.socket, listener: Listener) -> None:
    sock.setblocking(False)
    sock.listen(listener.backlog)


def _owner(listener: Listener) -> tuple[int, int]:
    """The user and the group that a path is to have; -1, which chown(2) takes for "leave it", where none is set."""
    try:
        uid = -1 if listener.owner is None else find_user(listener.owner)[0]
        return uid, -1 if listener.group is None else find_group(listener.group)
    except ValueError as error:
        raise ForkdError(str(error)) from None
