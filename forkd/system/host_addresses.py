"""Sockets at all addresses that a host's name stands for, as far as this machine has them.

`localhost` is 127.0.0.1 and ::1 in most files of hosts, also where IPv6 is off. An address that the machine lacks is
passed over, and told, as long as there is another one; an address that is in use, or not allowed, is not: clients would
reach another server there. `listeners` and `udp_groups` call this, each with its own way to make a socket.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from forkd.config.address import Address

#: The machine has no such address, or nothing of its family: socket(2), bind(2).
_LACKING = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}

#: Ports of the kernel's choice that are tried before the last one.
_CHOICES = 9

#: Makes a socket of a family, bound to an address of that family. Raises OSError, and leaves nothing open then.
Bind = Callable[[int, tuple[Any, ...]], socket.socket]


def bind_host(address: Address, kind: socket.SocketKind, bind: Bind) -> tuple[list[socket.socket], tuple[str, ...]]:
    """Binds a socket to each address of a host, all with one port.

    Args:
        address: a tcp or udp one; for port 0 the kernel chooses.
        kind: of the sockets.
        bind: makes each of them.

    Returns:
        The sockets, and a sentence for each address that was passed over.

    Raises:
        OSError: one can't be bound, or none is left.
    """
    for _ in range(_CHOICES if address.port == 0 else 0):
        try:
            return _bind_once(address, kind, bind)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:  # else the port that the kernel chose at one is taken at another
                raise
    return _bind_once(address, kind, bind)


def _bind_once(address: Address, kind: socket.SocketKind, bind: Bind) -> tuple[list[socket.socket], tuple[str, ...]]:
    infos = socket.getaddrinfo(address.host, address.port, type=kind, flags=socket.AI_PASSIVE)
    port, sockets, lacking = address.port, list[socket.socket](), list[tuple[str, OSError]]()
    with contextlib.ExitStack() as undo:
        for family, where in dict.fromkeys((info[0], info[4]) for info in infos):
            try:
                sock = undo.enter_context(bind(family, (where[0], port, *where[2:])))
            except OSError as error:
                if error.errno not in _LACKING:
                    raise
                lacking.append((str(where[0]), error))
                continue
            port = sock.getsockname()[1]
            sockets.append(sock)
        if lacking and not sockets:
            raise lacking[0][1]
        undo.pop_all()
    return sockets, tuple(f"{address}: does not listen on {host}: {error.strerror}" for host, error in lacking)


def is_wildcard(where: tuple[Any, ...]) -> bool:
    """Whether a socket address means all addresses of its family."""
    return where[0] in ("0.0.0.0", "::")  # noqa: S104 (compared)


def rivals_of(
    kind: socket.SocketKind, family: int, where: tuple[Any, ...], sockets: Sequence[socket.socket]
) -> list[socket.socket]:
    """Those of the sockets that would keep another one from an address: they are at its port, and at its very host, or
    one of the two is at all addresses.
    """
    alike = [
        sock for sock in sockets if (sock.type, sock.family) == (kind, family) and sock.getsockname()[1] == where[1]
    ]
    if is_wildcard(where):
        return alike
    return [sock for sock in alike if is_wildcard(sock.getsockname()) or sock.getsockname() == where]


@contextlib.contextmanager
def sharing_port(sockets: Sequence[socket.socket]) -> Iterator[None]:
    """Lets these sockets of one user be bound beside each other, within this block; those that are stay so."""
    try:
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield
    finally:
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
