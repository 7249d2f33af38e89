"""A connection without a server: both ends connect to each other from a bound port until they meet, in what TCP calls
a simultaneous open (RFC 9293, section 3.5).

An end that connects first is refused by the other machine at once, as nothing is bound there yet. It would then have to
hit the moment in which the other end connects too, which on one machine lasts microseconds. So where the kernel can
(Linux), that refusal is filtered out, and the socket goes on connecting: the end that comes second meets it with its
first segment. Where the kernel can't, and after any other error, a fresh socket tries again after a short wait.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import random
import socket
import struct
from typing import TYPE_CHECKING, Any

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.errors import ForkdError
from forkd.serve.loop import OUT, PollLoop
from forkd.system.inherited import address_of
from forkd.system.socket_options import tune

if TYPE_CHECKING:
    from asyncio import TimerHandle

    from forkd.serve.once.sources import OnConnection

#: Seconds that the two ends have unless the settings say otherwise: longer than the kernel holds a pair of ports in
#: TIME_WAIT after its last connection.
DEFAULT_TIMEOUT = 120.0

#: Seconds between two tries, at first and at most.
_FIRST_WAIT, _LONGEST_WAIT = 0.002, 0.25

# socket(7), SO_ATTACH_FILTER and SO_DETACH_FILTER, which Python has no names for.
_ATTACH, _DETACH = 26, 27

# A classic BPF program (linux/filter.h: code, jump if true, jump if false, operand) on a TCP header: a refusal of a
# first segment is a reset with sequence number 0, which no reset of a connection that stands has but by a rare chance.
_NO_REFUSALS = (
    (0x20, 0, 0, 4),  # load the sequence number
    (0x15, 0, 3, 0),  # not 0: keep
    (0x30, 0, 0, 13),  # load the flags
    (0x45, 0, 1, 0x04),  # no RST: keep
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # keep
)


class Rendezvous:
    """A source whose client is met. The port is bound from the start, so that no other program gets it.

    Args:
        listener: its address is where to connect from (port 0: any free one), and the connection follows its settings.
        theirs: where to connect to.

    Raises:
        ForkdError: one of the addresses can't be had, or both are the same.
    """

    def __init__(self, listener: Listener, theirs: Address) -> None:
        ours = listener.address
        self._listener = listener
        self._target = theirs
        self._family, self._ours, self._theirs = _resolved(ours, theirs)
        try:
            self._holder = self._bound()
        except OSError as error:
            raise ForkdError(f"can't connect from {ours}: {error.strerror}") from None
        self._ours = self._holder.getsockname()
        if _is_self(self._ours, self._theirs):
            self._holder.close()
            raise ForkdError(f"once.rendezvous: {theirs} is our own address too; a socket would connect to itself")
        self._sock: socket.socket | None = None
        self._retry: TimerHandle | None = None
        self._wait = _FIRST_WAIT
        self._last_error = ""

    @property
    def address(self) -> Address:
        """Where this end connects from."""
        return address_of(self._holder)

    def release(self) -> None:
        """Closes the bound socket in a process that is not to connect."""
        self._holder.close()

    def open(self, loop: PollLoop, on_connection: OnConnection) -> None:
        """Begins to connect."""
        self._loop = loop
        self._on_connection = on_connection
        self._try()

    def close(self) -> None:
        """Gives up connecting."""
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._sock is not None:
            self._unwatch(self._sock)
            self._sock.close()
            self._sock = None
        self._holder.close()

    def last_error(self) -> str:
        """The other end's address, and the last error if there was one."""
        return f"{self._target}: {self._last_error or 'no answer'}"

    def _bound(self) -> socket.socket:
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            # The port is shared with the socket that holds it, and with the one before this one.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            tune(sock, self._listener)
            sock.bind(self._ours)
        except (OSError, ForkdError):
            sock.close()
            raise
        return sock

    def _try(self) -> None:
        self._retry = None
        try:
            self._sock = sock = self._bound()
            _ignore_refusals(sock)
            error = sock.connect_ex(self._theirs)
        except OSError as failure:
            error = failure.errno or errno.EIO
        if error in (0, errno.EINPROGRESS):
            self._loop.selector.served[sock.fileno()] = self._ready
            self._loop.selector.epoll.register(sock.fileno(), OUT)
        else:
            self._try_later(error)

    def _ready(self, mask: int) -> None:
        sock = self._sock
        assert sock is not None  # noqa: S101 (for the type checker)
        self._unwatch(sock)
        if error := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._try_later(error)
            return
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, _DETACH, 0)
        self._sock = None
        self.close()
        self._on_connection(sock, self._theirs, -1)

    def _try_later(self, error: int) -> None:
        self._last_error = os.strerror(error)
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        # Not always the same wait: two ends in step would miss each other for ever.
        self._retry = self._loop.call_later(self._wait * random.uniform(0.5, 1), self._try)  # noqa: S311
        self._wait = min(_LONGEST_WAIT, self._wait * 1.5)

    def _unwatch(self, sock: socket.socket) -> None:
        self._loop.selector.epoll.unregister(sock.fileno())
        del self._loop.selector.served[sock.fileno()]


def _resolved(ours: Address, theirs: Address) -> tuple[socket.AddressFamily, Any, Any]:
    """An address family that both have, and the socket address of each in it. Raises ForkdError."""
    found: list[dict[socket.AddressFamily, Any]] = []
    for address in (ours, theirs):
        try:
            infos = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise ForkdError(f"can't look up {address}: {getattr(error, 'strerror', None) or error}") from None
        found.append({info[0]: info[4] for info in reversed(infos)})
    for family, own in found[0].items():
        if family in found[1]:
            return family, own, found[1][family]
    raise ForkdError(f"{ours} and {theirs} can't meet: one is IPv4, the other IPv6")


def _is_self(ours: Any, theirs: Any) -> bool:
    """Whether a socket that is bound to `ours` would reach itself by connecting to `theirs`."""
    wildcards = ("0.0.0.0", "::")  # noqa: S104 (nothing is bound here)
    if ours[1] != theirs[1] or (ours[0] != theirs[0] and not {ours[0], theirs[0]} & {*wildcards}):
        return False
    if ours[0] not in wildcards:  # to connect to a wildcard is to connect to this machine
        return True
    with socket.socket(socket.AF_INET6 if ours[0] == "::" else socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((theirs[0], 0))  # an address of this machine can be bound
        except OSError:
            return False
    return True


def _ignore_refusals(sock: socket.socket) -> None:
    """Has the kernel drop refusals of a socket that connects (socket(7), SO_ATTACH_FILTER)."""
    program = array.array("B", b"".join(struct.pack("=HBBI", *line) for line in _NO_REFUSALS))
    where, _ = program.buffer_info()
    with contextlib.suppress(OSError):  # a kernel without filters: then the short waits have to do
        sock.setsockopt(socket.SOL_SOCKET, _ATTACH, struct.pack("@HP", len(_NO_REFUSALS), where))
