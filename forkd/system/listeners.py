"""Listening sockets: bound, set up, checked, handed to other processes and images, and closed.

`BoundListener` is a listener's settings with its sockets. `bind_all` binds those of a start; `match_listeners` and
`update_listener` keep those that a reload has in common; `probe_listener` tries what `forkd check` asks. The sockets
belong to the master, which gives each worker those of its slot.

A unix socket's path is taken over only from a dead owner, and removed only while it is still the file that was made
here. Inherited sockets (`inherited`) are served as they are. Which process holds an address that is in use is read from
/proc (proc_net(5)): a hint for the error message, never a fact to act on, and empty for another user's processes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from forkd.config.address import Address, parse_address
from forkd.config.listener import Listener
from forkd.errors import AddressInUse, ForkdError
from forkd.system.host_addresses import bind_host, is_wildcard, rivals_of, sharing_port
from forkd.system.identity import find_group, find_user
from forkd.system.inherited import adopt_listeners, is_connected
from forkd.system.proc import descriptors_of, unix_sockets
from forkd.system.socket_options import BLOCKING, reset_flags, reset_options, set_freebind, tune
from forkd.system.socket_stats import ListenCounters, listen_counters
from forkd.system.udp_groups import (
    arrange_by_slot,
    bind_group,
    grow_group,
    rebind,
    sockets_per_slot,
    stop_receiving,
    update_multicast,
)
from forkd.system.unix_paths import OwnedPath, bind_path, current_umask, inode_of, is_hidden, is_path_free

#: The states in /proc/net/tcp and udp of sockets that take any peer: TCP_LISTEN, and TCP_CLOSE.
_BOUND_STATES = {"tcp": "0A", "udp": "07"}


@dataclass(slots=True)
class BoundListener:
    """A listener and its sockets.

    Attributes:
        listener: its settings.
        address: where it really listens: with the port that the kernel chose where the settings say 0; of an inherited
            socket, where it was bound.
        sockets: one for each address of the host's name, for udp as many for each slot, slot by slot; one in all other
            cases.
        file: a unix socket's path, which all copies of the listener share; else None.
        lacking: a sentence for each address of the host's name that this machine lacks, where it was bound here.
        counted_before: what the kernel had counted for all listeners when this one was bound.
    """

    listener: Listener
    address: Address
    sockets: list[socket.socket]
    file: OwnedPath | None = None
    lacking: tuple[str, ...] = ()
    counted_before: ListenCounters = field(default_factory=listen_counters)

    @property
    def inode(self) -> tuple[int, int] | None:
        """Device and inode of a unix socket's path, else None."""
        return None if self.file is None else self.file.inode

    @property
    def borrowed(self) -> bool:
        """Whether its path is another process's, which alone may remove it."""
        return self.file is not None and self.file.borrowed

    @property
    def is_lost(self) -> bool:
        """Whether its path is gone, so that no client finds it."""
        return self.file is not None and self.file.lost

    def own(self) -> None:
        """Makes its path this process's."""
        if self.file is not None:
            self.file.own()

    def disown(self) -> None:
        """Leaves its path to another process."""
        if self.file is not None:
            self.file.disown()

    def follow_fork(self) -> None:
        """In a forked child that goes on in the place of its parent: takes its path over."""
        if self.file is not None:
            self.file.follow_fork()

    def endpoints(self) -> dict[str, Any]:
        """Where its sockets accept connections, fit for JSON: the address, and family, host and port of each socket
        that is open; of a unix one the path, an abstract one with NUL before it.
        """
        listening = [] if self.address.takes_datagrams else [sock for sock in self.sockets if sock.fileno() >= 0]
        return {"address": str(self.address), "sockets": [_endpoint(sock) for sock in listening]}

    def describe(self) -> dict[str, Any]:
        """All but the settings and the sockets, fit for JSON; `from_description` makes it a listener again."""
        return {
            "wanted": str(self.listener.address),
            "address": str(self.address),
            "sockets": len(self.sockets),
            "inode": self.inode,
            "counted_before": self.counted_before,
        }

    @classmethod
    def from_description(
        cls, description: Mapping[str, Any], listener: Listener, descriptors: list[int], *, borrowed: bool = False
    ) -> BoundListener:
        """One that another process bound.

        Args:
            description: by `describe`.
            listener: its settings.
            descriptors: of its sockets, in order; they are taken from the front of the list.
            borrowed: whether its path still belongs to another process.

        Raises:
            ValueError: the description is wrong, or there are fewer descriptors.
        """
        if len(descriptors) < description["sockets"]:
            raise ValueError(f"{description['wanted']} came without its sockets")
        sockets = [socket.socket(fileno=descriptors.pop(0)) for _ in range(description["sockets"])]
        if listener.address.scheme == "udp":
            sockets = arrange_by_slot(sockets)
        device_and_inode = description["inode"]
        address, file = parse_address(description["address"]), None
        if device_and_inode is not None:
            inode = int(device_and_inode[0]), int(device_and_inode[1])
            file = OwnedPath(address.path, inode, borrowed=borrowed)
        before = ListenCounters(*description.get("counted_before") or listen_counters())
        return cls(listener, address, sockets, file, counted_before=before)

    def resize(self, slots: int, *, shrink: bool = True) -> None:
        """Binds the datagram sockets that are missing for so many slots, and closes those that are too many. What is in
        their queues is for the processes that have them. All generations that have this listener share the list.

        Args:
            slots: how many workers there are to be.
            shrink: whether those that are too many are closed.

        Raises:
            ForkdError: one can't be bound; then nothing has changed.
        """
        if self.listener.address.scheme != "udp":
            return
        slots = _slots(self.listener, slots)
        try:
            grown = grow_group(self.sockets, slots)
        except OSError as error:
            raise ForkdError(f"can't bind {self.address} for {slots} workers: {error.strerror}") from None
        for sock in grown:
            tune(sock, self.listener)
        self.sockets += grown
        if not shrink:
            return
        width = sockets_per_slot(self.sockets)
        going, self.sockets[slots * width :] = self.sockets[slots * width :], []
        for sock in going:
            with contextlib.suppress(OSError):  # then it takes part until its last copy is closed
                stop_receiving(sock)
            sock.close()

    def stop_receiving(self) -> None:
        """Takes no more datagrams, for the end of the daemon: senders get an ICMP error, as from a closed port."""
        for sock in self.sockets if self.listener.address.scheme == "udp" else ():
            with contextlib.suppress(OSError):  # as above
                stop_receiving(sock)

    def sockets_of_slot(self, slot: int) -> list[socket.socket]:
        """The sockets that the worker in this slot, from 1 on, serves."""
        if self.listener.address.scheme != "udp":
            return self.sockets
        width = sockets_per_slot(self.sockets)
        return self.sockets[(slot - 1) * width : slot * width]

    def reset_slot(self, slot: int) -> None:
        """Before a worker gets the slot: sets back what the one before it may have done to sockets that it alone had.
        Raises OSError or ForkdError.
        """
        if self.listener.address.scheme == "udp":
            for sock in self.sockets_of_slot(slot):
                reset_options(sock, self.listener)

    def keep_slot(self, slot: int) -> None:
        """In a worker: closes the sockets of the other slots."""
        own = self.sockets_of_slot(slot)
        for sock in self.sockets:
            if sock not in own:
                sock.close()
        self.sockets = own

    def repair(self, *, replace: bool) -> Repair:
        """Sets right what other processes that have the sockets, or can reach the path, may have spoilt for all.

        Args:
            replace: whether a socket that can't be made to listen again is replaced; else it is left as it is.

        Raises:
            ForkdError: it can't be set right; a sentence about this listener.
        """
        found: list[str] = []
        if self.listener.wait:  # what becomes of the socket is for the program that has it
            return Repair()
        if self.is_lost:
            return self._bind_again("its path was removed") if replace else Repair()
        try:
            for index, sock in enumerate(self.sockets):
                if why := _why_deaf(sock):
                    if self.listener.address.scheme != "tcp":
                        return self._bind_again(why, index) if replace else Repair()
                    self._listen_again(sock)
                    found.append(why)
                changed = reset_flags(sock)
                if self.listener.address.scheme != "udp":  # else it is one worker's, whose handler may set options
                    changed += reset_options(sock, self.listener)
                found += [f"{one} was changed" for one in changed if f"{one} was changed" not in found]
                if self.listener.address.scheme in ("tcp", "unix"):
                    sock.listen(self.listener.backlog)
        except OSError as error:
            raise ForkdError(f"{self.address}: {error.strerror}") from None
        return Repair(tuple(found), f"{BLOCKING} was changed" in found)

    def _listen_again(self, sock: socket.socket) -> None:
        """After a shutdown(2), which takes away a port that the kernel has chosen. Raises ForkdError."""
        host, _, *more = sock.getsockname()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((host, self.address.port, *more))
            except OSError as error:
                if error.errno != errno.EINVAL:  # it has its port
                    raise
            sock.listen(self.listener.backlog)
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = _in_use_error(self.address, with_holder=False) if in_use else error.strerror
            raise ForkdError(f"{self.address} was shut down, and can't listen again: {why}") from None

    def _bind_again(self, why: str, index: int = 0) -> Repair:
        """Puts a new socket in the place of one. Raises ForkdError."""
        address, slots = self.listener.address, tuple[int, ...]()
        try:
            if address.scheme == "udp":
                fresh = rebind(self.sockets[index])
                with contextlib.suppress(OSError):  # the kernel is to pass over it, while its worker has it
                    stop_receiving(self.sockets[index])
                slots = (index // sockets_per_slot(self.sockets) + 1,)
                tune(fresh, self.listener)
            elif address.is_unix and not address.abstract and not self.borrowed:
                made = _bind_unix(self.listener)
                [fresh] = made.sockets
                if self.file is not None:
                    self.file.inode = made.inode
            else:
                raise ForkdError(f"{self.address}: {why}; restart the daemon")
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            text = _in_use_error(address, with_holder=False) if in_use else error.strerror
            raise ForkdError(f"{self.address}: {why}, and it can't be made again: {text}") from None
        self.sockets[index].close()
        self.sockets[index] = fresh
        if address.scheme == "udp":
            update_multicast(self.sockets, (), self.listener)
        return Repair((why,), replaced=True, slots=slots)

    def close(self) -> None:
        """Closes the sockets in this process; other processes that have them still listen."""
        for sock in self.sockets:
            sock.close()

    def remove(self) -> None:
        """Closes the sockets, and removes a unix socket's path if it is still the file that this process made."""
        self.close()
        if self.file is not None:
            self.file.remove()


class Repair(NamedTuple):
    """What was set right about a listener.

    Attributes:
        found: what was wrong, a phrase each.
        blocked: whether workers may wait in it for a client.
        replaced: whether it has another socket now, which the workers do not have.
        slots: those whose workers alone had the former one; empty: all had it.
    """

    found: tuple[str, ...] = ()
    blocked: bool = False
    replaced: bool = False
    slots: tuple[int, ...] = ()


def _why_deaf(sock: socket.socket) -> str:
    """Why no more clients come by a socket; empty where they do."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    if poll.poll(0):
        return "it was shut down"
    return "it was connected" if sock.type == socket.SOCK_DGRAM and is_connected(sock) else ""


# Binding


def _slots(listener: Listener, slots: int) -> int:
    """For how many workers a udp listener has sockets of their own."""
    return 1 if listener.wait else slots


def bind_all(listeners: Sequence[Listener], held: Sequence[BoundListener] = (), slots: int = 1) -> list[BoundListener]:
    """Binds every listener that is not among those `held`, or none: what was bound is closed again when one can't be.
    `slots` is as in `bind_listener`, and so are the errors.
    """
    bound: list[BoundListener] = []
    going = unmatched(matching_indexes(listeners, held), held)
    with contextlib.ExitStack() as undo:
        for listener, kept in zip(listeners, match_listeners(listeners, held), strict=True):
            bound.append(kept or bind_listener(listener, slots, beside=going))
            if kept is None:
                undo.callback(bound[-1].remove)
        undo.pop_all()
    return bound


def bind_listener(
    listener: Listener, slots: int = 1, *, beside: Sequence[socket.socket] = (), with_holder: bool = True
) -> BoundListener:
    """Binds and listens, or takes over what was inherited.

    Args:
        listener: its settings.
        slots: how many workers there are to be, each of which has its own sockets for datagrams.
        beside: sockets of this daemon's that are to go, which do not keep it from their port: one at the very address
            is taken over, and so is one whose address a wildcard includes, with the clients that wait there.
        with_holder: whether the process is looked for that has an address which is in use.

    Raises:
        AddressInUse: another process listens there; the message names it, where it can be found out.
        ForkdError: the address can't be bound for another reason.
    """
    address = listener.address
    if address.scheme == "fd":
        bound = BoundListener(listener, *adopt_listeners(listener))
        for sock in bound.sockets:
            tune(sock, listener)
        return bound
    try:
        if address.scheme == "udp":
            sockets, lacking = bind_group(listener, _slots(listener, slots), beside)
            for sock in sockets:
                tune(sock, listener)
            where = Address("udp", host=address.host, port=sockets[0].getsockname()[1])
            return BoundListener(listener, where, sockets, lacking=lacking)
        return _bind_unix(listener) if address.is_unix else _bind_tcp(listener, beside)
    except UnicodeError:
        raise ForkdError(f"can't listen on {address}: {address.host!r} is no host name") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use_error(address, with_holder=with_holder) from None
        raise ForkdError(f"can't listen on {address}: {_bind_failure(error, address)}") from None


def match_listeners(listeners: Sequence[Listener], held: Sequence[BoundListener]) -> list[BoundListener | None]:
    """For each listener the one of `held` that listens at its address, with the new settings; else None."""
    indexes = zip(listeners, matching_indexes(listeners, held), strict=True)
    return [None if index is None else replace(held[index], listener=listener) for listener, index in indexes]


def matching_indexes(listeners: Sequence[Listener], held: Sequence[BoundListener]) -> list[int | None]:
    """For each listener the index of the one of `held` that listens at its address; else None. A path that is gone is
    to be made again, by another socket.
    """
    free = {index: bound for index, bound in enumerate(held) if not bound.is_lost}
    found: list[int | None] = []
    for listener in listeners:
        by_settings = [index for index, bound in free.items() if bound.listener.address == listener.address]
        # One that was bound to any free port may be wanted at that port from now on.
        by_address = [index for index, bound in free.items() if bound.address == listener.address]
        match = next(iter(by_settings or by_address), None)
        if match is not None:
            del free[match]
        found.append(match)
    return found


def unmatched(indexes: Sequence[int | None], held: Sequence[BoundListener]) -> list[socket.socket]:
    """The sockets of those that no listener keeps, by `matching_indexes`."""
    return [sock for index, bound in enumerate(held) if index not in indexes for sock in bound.sockets]


def update_listener(bound: BoundListener, before: Listener | None = None) -> None:
    """Applies new settings to a listener that was kept: backlog, options of its connections, multicast groups, and a
    path's mode and owner. Raises OSError or ForkdError.

    Args:
        bound: the listener.
        before: its settings until now, where they are known.
    """
    for sock in bound.sockets:
        tune(sock, bound.listener)
        if bound.listener.address.scheme in ("tcp", "udp"):
            set_freebind(sock, wanted=bound.listener.freebind)  # for what grows by it
        if bound.listener.address.scheme in ("tcp", "unix"):
            sock.listen(bound.listener.backlog)
    if bound.listener.address.scheme == "udp":
        update_multicast(bound.sockets, before.multicast if before is not None else (), bound.listener)
    if bound.inode is not None:
        _set_owner_and_mode(
            bound.listener, bound.inode
        )  # where there is no mode it stays as the umask of the start made it


def probe_listener(listener: Listener, run_directory: Path | None = None) -> tuple[str, ...]:
    """Checks that an address could be bound now, and leaves everything as it is.

    Args:
        listener: its settings.
        run_directory: a directory that a start makes where there is none yet.

    Returns:
        What of the host's addresses would be lacking.

    Raises:
        ForkdError: as `bind_listener`, but it does not look for the process that has the address (`find_holders`).
    """
    address = listener.address
    if address.scheme == "fd":  # only the process that is started with it has it
        return ()
    if not address.is_unix or address.abstract:
        bound = bind_listener(listener, with_holder=False)
        bound.remove()
        return bound.lacking
    directory = Path(address.path).parent
    if directory == run_directory and not os.path.lexists(directory):
        _path_owner(listener)
        return ()
    if not os.access(directory, os.W_OK | os.X_OK):
        why = (
            "can't write to"
            if os.path.isdir(directory)
            else "can't look into"
            if is_hidden(directory)
            else "there is no"
        )
        raise ForkdError(f"can't listen on {address}: {why} directory {directory}")
    _path_owner(listener)
    if not is_path_free(address.path):
        raise _in_use_error(address, with_holder=False)
    return ()


def _bind_tcp(listener: Listener, beside: Sequence[socket.socket] = ()) -> BoundListener:
    address, within = listener.address, list[socket.socket]()

    def bind(family: int, where: tuple[Any, ...]) -> socket.socket:
        rivals = rivals_of(socket.SOCK_STREAM, family, where, beside)
        if (same := next((one for one in rivals if one.getsockname() == where), None)) is not None:
            return same.dup()
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tune(sock, listener)
            if family == socket.AF_INET6:  # so that [::]:80 and 0.0.0.0:80 can both be listened on (ipv6(7))
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            set_freebind(sock, wanted=listener.freebind)
            with sharing_port([sock, *rivals] if rivals else []):
                sock.bind(where)
                _listen(sock, listener)
            undo.pop_all()
        within.extend(rivals if is_wildcard(where) else ())
        return sock

    sockets, lacking = bind_host(address, socket.SOCK_STREAM, bind)
    sockets += [sock.dup() for sock in within]
    where = Address("tcp", host=address.host, port=sockets[0].getsockname()[1])
    return BoundListener(listener, where, sockets, lacking=lacking)


def _bind_unix(listener: Listener) -> BoundListener:
    address = listener.address
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(socket.AF_UNIX, _type_of(address)))
        if address.abstract:
            sock.bind("\0" + address.path[1:])
            file = None
        else:
            bind_path(sock, address.path, _mode(listener))
            inode = inode_of(address.path)
            file = OwnedPath(address.path, inode)
            undo.callback(file.remove)
            _set_owner_and_mode(listener, inode)
        if address.takes_datagrams:
            sock.setblocking(False)
            tune(sock, listener)
        else:
            _listen(sock, listener)
        undo.pop_all()
    return BoundListener(listener, address, [sock], file)


def _listen(sock: socket.socket, listener: Listener) -> None:
    sock.setblocking(False)
    sock.listen(listener.backlog)


def _type_of(address: Address) -> socket.SocketKind:
    return socket.SOCK_DGRAM if address.takes_datagrams else socket.SOCK_STREAM


def _mode(listener: Listener) -> int:
    return 0o666 & ~current_umask() if listener.mode is None else listener.mode


def _path_owner(listener: Listener) -> tuple[int, int]:
    """The user and group ids that a path is to have; -1, by which chown(2) leaves them, where none is set."""
    try:
        uid = -1 if listener.owner is None else find_user(listener.owner)[0]
        return uid, -1 if listener.group is None else find_group(listener.group)
    except ValueError as error:
        raise ForkdError(str(error)) from None


def _set_owner_and_mode(listener: Listener, inode: tuple[int, int]) -> None:
    """Gives a unix socket's path its owner and permissions, but no other file that has taken its place: the directory
    may be another user's.
    """
    uid, gid = _path_owner(listener)
    if listener.mode is None and (uid, gid) == (-1, -1):
        return
    handle = os.open(listener.address.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(handle)
        if (found.st_dev, found.st_ino) == inode:
            path = f"/proc/self/fd/{handle}"  # calls that take descriptors take none of O_PATH (open(2))
            # Nothing is asked for that is so already, and the mode first: what the path's owner may not do takes
            # CAP_FOWNER or CAP_CHOWN, and the units' filter has no chown(2).
            if listener.mode not in (None, stat.S_IMODE(found.st_mode)):
                os.chmod(path, listener.mode)
            if uid not in (-1, found.st_uid) or gid not in (-1, found.st_gid):
                os.chown(path, uid, gid)
    except PermissionError as error:
        why = f"it may not set owner, group or mode of the path: {error.strerror}"
        raise ForkdError(f"can't listen on {listener.address}: {why}") from None
    finally:
        os.close(handle)


def _endpoint(sock: socket.socket) -> list[Any]:
    name = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return [sock.family, os.fsdecode(name), 0]
    return [sock.family, *name[:2]]


# Why an address can't be bound


def find_holders(addresses: Collection[Address]) -> dict[Address, str]:
    """`NAME, pid N` of a process that listens at each address, where that can be found out; with one look at the
    kernel's tables and at all processes.
    """
    tables, wanted = _SocketTables(), dict[str, list[Address]]()
    for address in addresses:
        for inode in tables.unix_inodes(address) if address.is_unix else tables.internet_inodes(address):
            wanted.setdefault(f"socket:[{inode}]", []).append(address)
    found: dict[Address, str] = {}
    for process in Path("/proc").glob("[0-9]*") if wanted else ():
        try:
            for _, link in descriptors_of(int(process.name)):
                for address in wanted.get(link, ()):
                    if address not in found:
                        found[address] = f"{_process_name(process)}, pid {process.name}"
        except OSError:  # it has gone, or is not ours to look at
            continue
    return found


def find_holder(address: Address) -> str:
    """As `find_holders`; empty where it can't be found out."""
    return find_holders([address]).get(address, "")


def _in_use_error(address: Address, *, with_holder: bool = True) -> ForkdError:
    """The error for an address that is in use."""
    path = Path(address.path)
    if address.is_unix and not address.abstract and path.is_symlink():
        return ForkdError(f"can't listen on {address}: it is a symbolic link; remove it, or name where it leads")
    if address.is_unix and not address.abstract and path.exists() and not path.is_socket():
        return AddressInUse(f"{address} is in use by a file that is not a socket")
    holder = find_holder(address) if with_holder else ""
    return AddressInUse(f"{address} is in use" + (f" by {holder}" if holder else ""))


def _bind_failure(error: OSError, address: Address) -> str:
    """Why an address can't be bound."""
    if error.errno == errno.EACCES and not address.is_unix and address.port < 1024:
        return "ports below 1024 are for root, or need CAP_NET_BIND_SERVICE"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{address.host} is no address of this machine (freebind: true listens before it comes)"
    return error.strerror or str(error)


def _process_name(process: Path) -> str:
    words = (process / "cmdline").read_bytes().split(b"\0")
    text = " ".join(word.decode(errors="replace") for word in words if word)
    return (text if text.isprintable() else ascii(text))[:80] or (process / "comm").read_text().strip()


class _SocketTables:
    """The kernel's tables of sockets (proc_net(5)), each read once."""

    def __init__(self) -> None:
        self._bound: dict[str, dict[int, list[tuple[str, str]]]] = {}  # by table and port: host and inode
        self._paths: dict[str, list[str]] | None = None

    def internet_inodes(self, address: Address) -> Iterator[str]:
        """The inodes of the sockets that keep others from an address."""
        try:
            wanted = {info[4][0] for info in socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)}
        except OSError:
            return
        for table, family in ((address.scheme, socket.AF_INET), (f"{address.scheme}6", socket.AF_INET6)):
            if table not in self._bound:
                self._bound[table] = _bound_sockets(table, family, _BOUND_STATES[address.scheme])
            for found, inode in self._bound[table].get(address.port, ()):
                # A wildcard conflicts with every address, and the other way round.
                if found in wanted or {found, *wanted} & {"0.0.0.0", "::"}:  # noqa: S104
                    yield inode

    def unix_inodes(self, address: Address) -> list[str]:
        """The inodes of the sockets at a path."""
        if self._paths is None:
            self._paths = {}
            with contextlib.suppress(OSError):
                for inode, name, _ in unix_sockets(os.getpid()):
                    self._paths.setdefault(name, []).append(inode)
        return self._paths.get(address.path, [])


def _bound_sockets(table: str, family: socket.AddressFamily, state: str) -> dict[int, list[tuple[str, str]]]:
    """The sockets of a table that are bound for good, by port: the host and the inode of each."""
    bound: dict[int, list[tuple[str, str]]] = {}
    for fields in _proc_net_rows(table):
        if fields[3] == state:
            host, _, port = fields[1].partition(":")
            bound.setdefault(int(port, 16), []).append((_proc_net_host(host, family), fields[9]))
    return bound


def _proc_net_rows(table: str) -> Iterator[list[str]]:
    try:
        with Path("/proc/net", table).open(errors="surrogateescape") as lines:
            next(lines, None)
            yield from map(str.split, lines)
    except OSError:
        return


def _proc_net_host(text: str, family: socket.AddressFamily) -> str:
    """A host of /proc/net/tcp or udp: each 32-bit word in hexadecimal, as this machine stores it."""
    words = [int(text[i : i + 8], 16).to_bytes(4, sys.byteorder) for i in range(0, len(text), 8)]
    return socket.inet_ntop(family, b"".join(words))
