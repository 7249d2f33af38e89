"""Who is online: put together from the kernel's tables of sockets, from /proc, and from what the workers have noted.

No worker is asked, and none notices. The kernel tells of every connection; a worker's /proc/PID/fd tells which of them
are its own, and by which descriptor; under that number the worker has noted when it began (`roll`). A client that waits
in the accept queue is nobody's yet, and not among these. Datagram sockets have no connections: whoever has talked to
one of late is known to its worker alone, who is asked by way of the master.
"""

from __future__ import annotations

import os
import socket
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from time import monotonic_ns
from typing import Any

from forkd.errors import ForkdError
from forkd.system.netns import network_of
from forkd.system.roll import read_roll
from forkd.system.sock_diag import TcpSocket, UnixSocket, tcp_sockets, unix_sockets
from forkd.system.tcp_info import CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK
from forkd.wire import Message

#: A client by the names of the columns: `id`, `worker` and `pid` are numbers; `listener`, `client` and `state` text;
#: `age`, `idle` and `rtt` seconds; `in`, `out`, `recvq` and `sendq` bytes. None is what nobody knows.
Client = dict[str, Any]

#: How ss(8) calls the states.
_STATES = {
    ESTABLISHED: "established",
    FIN_WAIT1: "fin-wait-1",
    FIN_WAIT2: "fin-wait-2",
    CLOSE_WAIT: "close-wait",
    LAST_ACK: "last-ack",
    CLOSING: "closing",
}
_WILDCARDS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104 (nothing is bound here)
_SOCKET = "socket:["


@dataclass(frozen=True, slots=True)
class _Owner:
    """The worker that has a socket, by which descriptor, and when that became a connection; 0 where it is not known."""

    slot: int
    pid: int
    began: int


def list_clients(name: str, told: Message, regions: int) -> list[Client]:
    """The clients of a daemon.

    Args:
        name: the daemon's.
        told: by its master, about its workers and listeners.
        regions: a descriptor of the regions' memory; -1: there is none.

    Raises:
        ForkdError: they can't be seen from here; the sentence says why.
    """
    owners: dict[int, _Owner] = {}
    for worker in told["workers"]:
        owners.update(_owned(name, worker, regions))
    with network_of(told["pid"]):
        now = monotonic_ns()
        return [*_tcp_clients(told["listeners"], owners, now), *_unix_clients(told["listeners"], owners, now)]


def _owned(name: str, worker: Mapping[str, Any], regions: int) -> Iterator[tuple[int, _Owner]]:
    """By inode, the sockets of one worker."""
    slot, pid = worker["slot"], worker["pid"]
    try:
        sockets = sorted(_sockets_of(pid), reverse=True)  # of those of one socket the lowest descriptor counts
    except PermissionError:
        raise ForkdError(f"the workers of {name} are another user's; only root can see their clients") from None
    except OSError:  # it has ended meanwhile, and its connections with it
        return
    cells = array("q") if regions < 0 or not sockets else read_roll(regions, worker["row"], sockets[0][0] + 1)
    for descriptor, inode in sockets:
        yield inode, _Owner(slot, pid, cells[descriptor] if descriptor < len(cells) else 0)


def _sockets_of(pid: int) -> Iterator[tuple[int, int]]:
    """Descriptor and inode of each socket of a process (proc_pid_fd(5)). Raises OSError."""
    directory = os.open(f"/proc/{pid}/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for name in os.listdir(directory):
            try:
                link = os.readlink(name, dir_fd=directory)
            except FileNotFoundError:  # closed meanwhile
                continue
            if link.startswith(_SOCKET):
                yield int(name), int(link[len(_SOCKET) : -1])
    finally:
        os.close(directory)


def _tcp_clients(listeners: Iterable[Message], owners: Mapping[int, _Owner], now: int) -> Iterator[Client]:
    places = {
        (family, host.partition("%")[0], port): listener["address"]
        for listener in listeners
        for family, host, port in listener["sockets"]
        if family != socket.AF_UNIX
    }
    seen: set[int] = set()  # the table may change while it is read, which may show a socket twice
    for family, port in {(family, port) for family, _, port in places}:
        for found in tcp_sockets(port, family):
            owner = owners.get(found.inode)
            listener = places.get((family, found.local[0], port)) or places.get((family, _WILDCARDS[family], port))
            if owner is not None and listener is not None and found.inode not in seen:
                seen.add(found.inode)
                yield _tcp_client(found, owner, listener, now)


def _tcp_client(found: TcpSocket, owner: _Owner, listener: str, now: int) -> Client:
    host, port = found.peer
    info = found.info
    return {
        "id": found.cookie,
        "worker": owner.slot,
        "pid": owner.pid,
        "listener": listener,
        "client": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
        "age": _age(owner, now),
        "idle": min(info.last_data_sent, info.last_data_received) / 1e3,
        "in": found.received,
        "out": found.acked,
        "recvq": found.unread,
        "sendq": found.unacked,
        "rtt": info.rtt / 1e6,
        "state": _STATES[found.state],
    }


def _age(owner: _Owner, now: int) -> float | None:
    """Seconds since the worker says that it began, where that can be so."""
    return (now - owner.began) / 1e9 if 0 < owner.began <= now else None


def _unix_clients(listeners: Iterable[Message], owners: Mapping[int, _Owner], now: int) -> Iterator[Client]:
    places = {
        path: listener["address"]
        for listener in listeners
        for family, path, _ in listener["sockets"]
        if family == socket.AF_UNIX
    }
    if not places:
        return
    everyone = {found.inode: found for found in unix_sockets()}
    clients = [
        found
        for found in everyone.values()
        if found.name in places and found.inode in owners and found.state == ESTABLISHED
    ]
    processes = _holders({found.peer for found in clients} - {0})
    for found in clients:
        peer = everyone.get(found.peer)
        owner = owners[found.inode]
        yield {
            "id": found.cookie,
            "worker": owner.slot,
            "pid": owner.pid,
            "listener": places[found.name],
            "client": _unix_peer(peer, processes),
            "age": _age(owner, now),
            "idle": None,
            "in": None,
            "out": None,
            "recvq": found.unread,
            "sendq": 0 if peer is None else peer.unread,  # what was sent lies where the peer is to read it
            "rtt": None,
            "state": _STATES[ESTABLISHED] if peer is not None else _STATES[CLOSE_WAIT],
        }


def _unix_peer(peer: UnixSocket | None, processes: Mapping[int, int]) -> str | None:
    """The user and the process at the other end, as far as they are known."""
    if peer is None:
        return None
    known = (("uid", peer.uid), ("pid", processes.get(peer.inode)))
    return ",".join(f"{name}={number}" for name, number in known if number is not None) or None


def _holders(inodes: set[int]) -> dict[int, int]:
    """By inode, the first process that has a socket, of those that this one may look at."""
    found: dict[int, int] = {}
    pids: Sequence[int] = sorted(int(entry.name) for entry in Path("/proc").glob("[0-9]*")) if inodes else ()
    for pid in pids:
        if len(found) == len(inodes):
            break
        try:
            mine = {inode for _, inode in _sockets_of(pid)} & inodes
        except OSError:  # another user's, or gone
            continue
        found = {**dict(zip(mine, repeat(pid))), **found}
    return found
