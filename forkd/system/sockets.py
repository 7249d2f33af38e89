"""Listening sockets: bound, set up and checked here, closed here; they belong to the master.

A unix socket's path is taken over only from a dead owner, and removed only while it is still the file that we made.
Sockets that were inherited (`inherited`) are served as they are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forkd.config.address import Address, parse_address
from forkd.config.options import Listener
from forkd.errors import ForkdError
from forkd.system.accounts import find_group, find_user
from forkd.system.datagrams import arranged, bind_group, deafen, grow_group, width_of
from forkd.system.holders import explained, in_use
from forkd.system.inherited import adopt_listeners
from forkd.system.paths import current_umask, inode_of, is_free, take_path
from forkd.system.tuning import tune


@dataclass(slots=True)
class BoundListener:
    """A listener and its sockets.

    Attributes:
        listener: its settings.
        address: where it really listens: with the port that the kernel chose where the settings say 0, and for an
            inherited socket where its maker has bound it.
        sockets: one for each address that the host's name stands for, of udp as many for each slot, slot by slot; one
            in all other cases.
        inode: device and inode of a unix socket's path, else None.
        lent: whether it is another master's yet, who alone may remove its path.
    """

    listener: Listener
    address: Address
    sockets: list[socket.socket]
    inode: tuple[int, int] | None = None
    lent: bool = False

    def places(self) -> dict[str, Any]:
        """Where its sockets take connections, fit for JSON: the address, and family, host and port of each socket that
        is open; of a unix one the path, an abstract one with NUL before it.
        """
        listening = [] if self.address.takes_datagrams else [sock for sock in self.sockets if sock.fileno() >= 0]
        return {"address": str(self.address), "sockets": [_place(sock) for sock in listening]}

    def described(self) -> dict[str, Any]:
        """All but the settings and the sockets, fit for JSON; `BoundListener.taken` makes it one again."""
        return {
            "wanted": str(self.listener.address),
            "address": str(self.address),
            "sockets": len(self.sockets),
            "inode": self.inode,
        }

    @classmethod
    def taken(
        cls, described: Mapping[str, Any], listener: Listener, descriptors: list[int], *, lent: bool = False
    ) -> BoundListener:
        """One that another process bound.

        Args:
            described: by `described`.
            listener: its settings.
            descriptors: of its sockets, in order; they are taken over, from the front of the list.
            lent: as the attribute.

        Raises:
            ValueError: it is not so described, or there are fewer descriptors.
        """
        if len(descriptors) < described["sockets"]:
            raise ValueError(f"{described['wanted']} came without its sockets")
        sockets = [socket.socket(fileno=descriptors.pop(0)) for _ in range(described["sockets"])]
        if listener.address.scheme == "udp":
            sockets = arranged(sockets)
        device_and_inode = described["inode"]
        inode = None if device_and_inode is None else (int(device_and_inode[0]), int(device_and_inode[1]))
        return cls(listener, parse_address(described["address"]), sockets, inode, lent)

    def fit(self, slots: int, *, shrink: bool = True) -> None:
        """Binds the datagram sockets that are missing for so many slots, and lets go those that are too many, unless
        these should stay; what lies in their queues is for the processes that have them. All generations that have this
        listener have the same list.

        Raises:
            ForkdError: one can't be bound; then nothing has changed.
        """
        if self.listener.address.scheme != "udp":
            return
        try:
            grown = grow_group(self.sockets, slots)
        except OSError as error:
            raise ForkdError(f"can't bind {self.address} for {slots} workers: {error.strerror}") from None
        for sock in grown:
            tune(sock, self.listener)
        self.sockets += grown
        if not shrink:
            return
        width = width_of(self.sockets)
        going, self.sockets[slots * width :] = self.sockets[slots * width :], []
        for sock in going:
            with contextlib.suppress(OSError):  # then it takes part until its last copy is closed
                deafen(sock)
            sock.close()

    def fall_silent(self) -> None:
        """Takes no more datagrams, for the end of the daemon: who sends one is told that nobody is there."""
        for sock in self.sockets if self.listener.address.scheme == "udp" else ():
            with contextlib.suppress(OSError):  # as above
                deafen(sock)

    def of_slot(self, slot: int) -> list[socket.socket]:
        """The sockets that the worker in this slot, from 1 on, serves."""
        if self.listener.address.scheme != "udp":
            return self.sockets
        width = width_of(self.sockets)
        return self.sockets[(slot - 1) * width : slot * width]

    def confine(self, slot: int) -> None:
        """In a worker: closes the sockets of the other slots."""
        own = self.of_slot(slot)
        for sock in self.sockets:
            if sock not in own:
                sock.close()
        self.sockets = own

    def close(self) -> None:
        """Closes the sockets in this process; the listener lives on in others that have them."""
        for sock in self.sockets:
            sock.close()

    def remove(self) -> None:
        """Closes the sockets and removes a unix socket's path, if it is still the one that was made here."""
        self.close()
        if self.inode is not None and not self.lent:
            with contextlib.suppress(FileNotFoundError):
                if inode_of(self.address.path) == self.inode:
                    Path(self.address.path).unlink()


def _place(sock: socket.socket) -> list[Any]:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return [sock.family, os.fsdecode(name), 0]
    return [sock.family, *name[:2]]


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


def update_listener(bound: BoundListener) -> None:
    """Has a listener that was kept follow its new settings: backlog, options of its connections, and a path's mode and
    owner. Raises OSError or ForkdError.
    """
    for sock in bound.sockets:
        tune(sock, bound.listener)
        if bound.listener.address.scheme in ("tcp", "unix"):
            sock.listen(bound.listener.backlog)
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
