"""The connected clients of a daemon, put together without its workers.

The kernel's tables of sockets have every connection; a worker's /proc/PID/fd tells which of them are its own, and by
which descriptor; under that number the worker has written when it accepted the connection
(`scoreboard.AcceptTimes`), and whose it is where a proxy has made it (`scoreboard.ClientAddresses`). A client that
waits in the accept queue is not listed yet.
"""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from pathlib import Path
from time import monotonic_ns
from typing import Any, NamedTuple

from forkd.errors import ForkdError
from forkd.messages import ClientsReply, JsonObject
from forkd.system.proc import descriptors_of, network_namespace_of
from forkd.system.scoreboard import read_accept_times, read_client_addresses
from forkd.system.socket_stats import (
    CLOSE_WAIT,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT1,
    FIN_WAIT2,
    LAST_ACK,
    WILDCARDS,
    TcpSocket,
    UnixSocket,
    host_text,
    tcp_sockets,
    unix_sockets,
)

#: A client by the names of the columns: `id`, `worker` and `pid` are numbers; `listener`, `client`, `proxy` and `state`
#: text;
#: `age`, `idle` and `rtt` seconds; `in`, `out`, `recvq` and `sendq` bytes. None is what is not known.
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

_SOCKET_LINK = "socket:["


def list_clients(name: str, reply: ClientsReply, regions: int) -> list[Client]:
    """The clients of a daemon.

    Args:
        name: the daemon's.
        reply: the master's, about its workers and listeners.
        regions: a descriptor of the regions' memory; -1: there is none.

    Raises:
        ForkdError: this process may not see them; the sentence says why.
    """
    owners: dict[int, SocketOwner] = {}
    for worker in reply.workers:
        owners.update(_owned_sockets(name, worker, regions))
    with network_namespace_of(reply.pid):
        now = monotonic_ns()
        return [*_tcp_clients(reply.listeners, owners, now), *_unix_clients(reply.listeners, owners, now)]


class SocketOwner(NamedTuple):
    """The worker that has a socket.

    Attributes:
        slot: the worker's.
        pid: the worker's.
        accepted: when the worker says that it accepted the connection, on the monotonic clock in nanoseconds; 0 where
            it is not known.
        clients: what the worker says of proxies' connections: by a connection's cookie its client's address and port.
    """

    slot: int
    pid: int
    accepted: int
    clients: Mapping[int, tuple[bytes, int]]


def _owned_sockets(name: str, worker: Mapping[str, Any], regions: int) -> Iterator[tuple[int, SocketOwner]]:
    """The sockets of one worker, by inode."""
    slot, pid = worker["slot"], worker["pid"]
    try:
        sockets = sorted(_sockets_of(pid), reverse=True)  # of several descriptors of a socket the lowest counts
    except PermissionError:
        raise ForkdError(f"the workers of {name} are another user's; only root can see their clients") from None
    except OSError:  # it has ended meanwhile, and its connections with it
        return
    cells, addresses = array("q"), {}
    if regions >= 0 and sockets:
        where = regions, worker["row"], sockets[0][0] + 1
        cells, addresses = read_accept_times(*where), read_client_addresses(*where)
    for descriptor, inode in sockets:
        yield inode, SocketOwner(slot, pid, cells[descriptor] if descriptor < len(cells) else 0, addresses)


def _sockets_of(pid: int) -> Iterator[tuple[int, int]]:
    """Descriptor and inode of each socket of a process (proc_pid_fd(5)). Raises OSError."""
    for descriptor, link in descriptors_of(pid):
        if link.startswith(_SOCKET_LINK):
            yield descriptor, int(link[len(_SOCKET_LINK) : -1])


def _tcp_clients(listeners: Iterable[JsonObject], owners: Mapping[int, SocketOwner], now: int) -> Iterator[Client]:
    listening = {
        (family, host.partition("%")[0], port): listener["address"]
        for listener in listeners
        for family, host, port in listener["sockets"]
        if family != socket.AF_UNIX
    }
    seen: set[int] = set()  # the table may change while it is read, which may show a socket twice
    for family, port in {(family, port) for family, _, port in listening}:
        for found in tcp_sockets(port, family):
            owner = owners.get(found.inode)
            listener = listening.get((family, found.local[0], port)) or listening.get((family, WILDCARDS[family], port))
            if owner is not None and listener is not None and found.inode not in seen:
                seen.add(found.inode)
                yield _tcp_client(found, owner, listener, now)


def _tcp_client(found: TcpSocket, owner: SocketOwner, listener: str, now: int) -> Client:
    peer, info = _endpoint(*found.peer), found.info
    told = owner.clients.get(found.cookie)
    return {
        "id": found.cookie,
        "worker": owner.slot,
        "pid": owner.pid,
        "listener": listener,
        "client": peer if told is None else _told(told),
        "proxy": None if told is None else peer,
        "age": _connection_age(owner, now),
        "idle": min(info.last_data_sent, info.last_data_received) / 1e3,
        "in": found.received,
        "out": found.acked,
        "recvq": found.unread,
        "sendq": found.unacked,
        "rtt": info.rtt / 1e6,
        "state": _STATES[found.state],
    }


def _told(client: tuple[bytes, int]) -> str:
    """A client's address and port as its proxy has told them."""
    return _endpoint(host_text(socket.AF_INET6, client[0]), client[1])


def _endpoint(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _connection_age(owner: SocketOwner, now: int) -> float | None:
    """Seconds since the connection was accepted, where the worker's time can be true."""
    return (now - owner.accepted) / 1e9 if 0 < owner.accepted <= now else None


def _unix_clients(listeners: Iterable[JsonObject], owners: Mapping[int, SocketOwner], now: int) -> Iterator[Client]:
    listening = {
        path: listener["address"]
        for listener in listeners
        for family, path, _ in listener["sockets"]
        if family == socket.AF_UNIX
    }
    if not listening:
        return
    everyone = {found.inode: found for found in unix_sockets()}
    clients = [
        found
        for found in everyone.values()
        if found.name in listening and found.inode in owners and found.state == ESTABLISHED
    ]
    processes = _processes_with({found.peer for found in clients} - {0})
    for found in clients:
        peer = everyone.get(found.peer)
        owner, process = owners[found.inode], _unix_peer(peer, processes)
        told = owner.clients.get(found.cookie)
        yield {
            "id": found.cookie,
            "worker": owner.slot,
            "pid": owner.pid,
            "listener": listening[found.name],
            "client": process if told is None else _told(told),
            "proxy": None if told is None else process,
            "age": _connection_age(owner, now),
            "idle": None,
            "in": None,
            "out": None,
            "recvq": found.unread,
            "sendq": 0 if peer is None else peer.unread,  # what was sent waits in the peer's socket
            "rtt": None,
            "state": _STATES[ESTABLISHED] if peer is not None else _STATES[CLOSE_WAIT],
        }


def _unix_peer(peer: UnixSocket | None, processes: Mapping[int, int]) -> str | None:
    """The user and the process at the other end, as far as they are known."""
    if peer is None:
        return None
    known = (("uid", peer.uid), ("pid", processes.get(peer.inode)))
    return ",".join(f"{name}={number}" for name, number in known if number is not None) or None


def _processes_with(inodes: set[int]) -> dict[int, int]:
    """By inode, the first process that has a socket, of those that this process may look at."""
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
