"""Sockets that this process was started with: by systemd (sd_listen_fds(3)), an inetd, or any other program.

They are found by an `fd:` address and taken over, each once. They are never bound here, and no path is ever unlinked:
the program that made them does that. systemd's variables are removed from the environment, so that no program that is
started later takes them for its own. Sockets that systemd has only kept for us belong to `fdstore`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from forkd.config.address import Address
from forkd.config.listener import Listener, address_disagreements
from forkd.config.values import UNIX
from forkd.errors import ForkdError
from forkd.system.logs import same_file

_FIRST = 3  # SD_LISTEN_FDS_START of sd_listen_fds(3)

#: How the names of sockets begin that systemd has kept for us (`fdstore`); no `fd:` address has a space.
STORED_PREFIX = "forkd "

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

# The process that was started, of which LISTEN_PID speaks: a daemon looks for its sockets when it has forked.
_STARTED = os.getpid()


@dataclass(frozen=True, slots=True)
class InheritedSocket:
    """A socket that was taken over.

    Attributes:
        sock: the socket, non-blocking, not inheritable, and never one of the standard descriptors.
        number: the descriptor that it had.
        standard: those of 0, 1 and 2 that led to it too; they lead to /dev/null now.
    """

    sock: socket.socket
    number: int
    standard: frozenset[int]


class _SystemdSockets:
    """The sockets that systemd has handed to this process, and those that are taken; one for the process."""

    names: ClassVar[dict[int, str] | None] = None  # by descriptor; None until the environment is read
    stored: ClassVar[dict[int, str]] = {}  # those that systemd has only kept
    taken: ClassVar[set[int]] = set()  # descriptors of any origin


def systemd_sockets() -> dict[int, str]:
    """The descriptors that systemd handed over, with their names, without those that it has only kept.

    Raises:
        ForkdError: LISTEN_FDS is no number.
    """
    if _SystemdSockets.names is None:
        said = {name: os.environ.pop(name, "") for name in _VARIABLES}
        named = _named_descriptors(said) if said["LISTEN_PID"] == str(_STARTED) else {}
        for descriptor in named:
            with contextlib.suppress(OSError):  # it is closed; `take_inherited` says so
                os.set_inheritable(descriptor, False)
        _SystemdSockets.stored = {number: name for number, name in named.items() if name.startswith(STORED_PREFIX)}
        _SystemdSockets.names = {number: name for number, name in named.items() if number not in _SystemdSockets.stored}
        _SystemdSockets.taken |= _SystemdSockets.stored.keys()
    return _SystemdSockets.names


def stored_sockets() -> dict[int, str]:
    """The descriptors that systemd has kept for us, with their names; `fdstore` owns them. Raises as
    `systemd_sockets`.
    """
    systemd_sockets()
    return _SystemdSockets.stored


def _named_descriptors(said: dict[str, str]) -> dict[int, str]:
    count = said["LISTEN_FDS"]
    if not (count.isdecimal() and len(count) < 5):
        raise ForkdError(f"LISTEN_FDS is {count!r}, not a number of sockets, in the environment")
    names = said["LISTEN_FDNAMES"].split(":") if said["LISTEN_FDNAMES"] else []
    names += ["unknown"] * (int(count) - len(names))
    return dict(zip(range(_FIRST, _FIRST + int(count)), names, strict=False))


def take_inherited(address: Address) -> list[InheritedSocket]:
    """Takes over the sockets that an `fd:` address means: one, or all that systemd has given its name to.

    Raises:
        ForkdError: there is none, or it is not of a kind that forkd serves; then none is taken.
    """
    numbers = _find_descriptors(address)
    for number in numbers:
        if wrong := _why_unusable(number):
            raise ForkdError(f"{address}: {wrong}")
    return [_take(number) for number in numbers]


def is_listening(sock: socket.socket) -> bool:
    """Whether a stream socket listens; else it is, or may become, a connection. A datagram socket never listens."""
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def is_connected(sock: socket.socket) -> bool:
    """Whether a socket has a peer."""
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def address_of(sock: socket.socket) -> Address:
    """Where a socket listens, as users write it."""
    name = sock.getsockname()
    datagrams = sock.type == socket.SOCK_DGRAM
    if sock.family != socket.AF_UNIX:
        return Address("udp" if datagrams else "tcp", host=name[0], port=name[1])
    path = os.fsdecode(name)
    return Address("unix-dgram" if datagrams else "unix", path=f"@{path[1:]}" if path.startswith("\0") else path)


def check_inherited(listener: Listener, sockets: Sequence[socket.socket]) -> None:
    """That what a listener's settings say of addresses can hold at one of its sockets at least. Raises ForkdError."""
    found = []
    for address in map(address_of, sockets):
        proxies = tuple(one for one in listener.proxy_protocol if (one == UNIX) is address.is_unix)
        like = replace(listener, address=address, proxy_protocol=proxies or listener.proxy_protocol)
        found.append(dict(address_disagreements(like)))
    for keys, why in found[0].items():
        if all(keys in one for one in found):
            raise ForkdError(f"{listener.address}: {'.'.join(keys)} {why}")


def adopt_listeners(listener: Listener) -> tuple[Address, list[socket.socket]]:
    """The listening sockets that the `fd:` address of a listener means, and where they listen. Raises ForkdError."""
    address = listener.address
    found = [one.sock for one in take_inherited(address)]
    if len({sock.type for sock in found}) > 1:
        raise ForkdError(f"{address}: means sockets of connections and of datagrams; give them two names")
    for sock in found:
        if sock.type == socket.SOCK_STREAM and not is_listening(sock):
            raise ForkdError(
                f"{address}: does not listen, so it is a connection; a listening socket is wanted here, and "
                "`forkd once` serves connections"
            )
    check_inherited(listener, found)
    return address_of(found[0]), found


def _find_descriptors(address: Address) -> list[int]:
    wanted, handed = address.path, systemd_sockets()
    if wanted.isdecimal():
        return [int(wanted)]
    if not handed:
        raise ForkdError(
            f"{address}: systemd handed over no sockets (LISTEN_FDS and LISTEN_PID of this process are not in the "
            "environment); by its number, as in fd:0, a socket of any origin can be had"
        )
    if not wanted:
        return [min(handed)]
    found = [number for number, name in handed.items() if name == wanted]
    if not found:
        known = ", ".join(dict.fromkeys(handed.values()))
        raise ForkdError(f"{address}: systemd handed over no socket of that name; there are {known}")
    return found


def _why_unusable(number: int) -> str:
    """Why a descriptor can't be served; empty when it can."""
    try:
        mode = os.fstat(number).st_mode
    except OSError:
        others = "".join(f"{found}, " for found in _open_sockets()).rstrip(", ")
        return f"there is no descriptor {number} here" + (f"; there are sockets at {others}" if others else "")
    if number in _SystemdSockets.taken:
        return f"descriptor {number} is another listener's already"
    if not stat.S_ISSOCK(mode):
        return f"descriptor {number} is {_file_type(mode)}, not a socket"
    with socket.socket(fileno=os.dup(number)) as sock:
        families, types = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX), (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        if sock.type not in types or sock.family not in families:
            served = "AF_INET, AF_INET6 and AF_UNIX, SOCK_STREAM and SOCK_DGRAM"
            found = f"{_constant_name(sock.family)} {_constant_name(sock.type)}"
            return f"descriptor {number} is a socket of {found}; forkd serves {served}"
    return ""


def _open_sockets() -> Iterator[str]:
    """The descriptors that are sockets and came from outside: what Python opens itself is not inheritable."""
    for number, name in systemd_sockets().items():
        yield f"{number} ({name})"
    for number in range(256):
        with contextlib.suppress(OSError):
            if os.get_inheritable(number) and stat.S_ISSOCK(os.fstat(number).st_mode):
                yield str(number)


def _constant_name(number: int) -> str:
    return getattr(number, "name", str(number))


def _file_type(mode: int) -> str:
    kinds = ((stat.S_ISREG, "a file"), (stat.S_ISCHR, "a terminal or another device"), (stat.S_ISFIFO, "a pipe"))
    return next((what for fits, what in kinds if fits(mode)), "something else")


def _take(number: int) -> InheritedSocket:
    """Takes a socket over. Standard descriptors that lead to it are led to /dev/null: what a program prints by mistake
    is not for the client, and the end of the connection is not to wait for the end of the process.
    """
    standard = frozenset(one for one in range(3) if one == number or same_file(one, number))
    descriptor = os.dup(number) if number < _FIRST else number
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for one in standard:
        os.dup2(nowhere, one)
    os.close(nowhere)
    os.set_inheritable(descriptor, False)
    _SystemdSockets.taken.add(number)
    sock = socket.socket(fileno=descriptor)
    sock.setblocking(False)
    return InheritedSocket(sock, number, standard)
