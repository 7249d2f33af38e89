"""What the settings say of a listener's connections, told to the kernel, with every answer looked at.

On Linux a connection inherits its options from the listening socket (tcp(7), socket(7)), as they were when the client
came. So they are set once, on that, before it listens: the receive buffer has its say in the window's scale, of which
the handshake tells the client. What is not inherited is set on each connection, where the settings ask for it: the
buffer of a unix socket, and TCP_QUICKACK, which the kernel takes back as it likes.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any, NamedTuple

from forkd.config.listener import Listener
from forkd.config.options import Settings
from forkd.config.scales import show_duration, show_size
from forkd.errors import ForkdError

# asm-generic/socket.h; Python has no names for them.
_SO_BUSY_POLL, _SO_BUF_LOCK = 46, 72

_BUFFERS = {"send_buffer": socket.SO_SNDBUF, "receive_buffer": socket.SO_RCVBUF}
_LOCKS = {"send_buffer": 1, "receive_buffer": 2}  # SOCK_SNDBUF_LOCK and SOCK_RCVBUF_LOCK of linux/socket.h
_SYSCTLS = {"send_buffer": "net.core.wmem_max", "receive_buffer": "net.core.rmem_max"}


class _Wish(NamedTuple):
    """A setting's name, and what it wants of setsockopt(2)."""

    setting: str
    level: int
    option: int
    value: int


def tune(sock: socket.socket, listener: Listener) -> None:
    """Has a socket follow its listener's settings: a listening one, for what it accepts, or a connection.

    Where buffers and busy polling have been set by an earlier call, and the settings leave them to the system now, they
    become the system's again; but those of an inherited socket are left to whoever made it. A datagram socket has the
    buffers and busy polling alone; a unix socket for connections none, but the buffer that `connection_tuner` sees to.

    Raises:
        ForkdError: the kernel refuses one; the message names the setting and says why.
    """
    for_datagrams, is_unix = sock.type == socket.SOCK_DGRAM, sock.family == socket.AF_UNIX
    if is_unix and not for_datagrams:
        return
    for wish in (*(() if for_datagrams else _wishes_of_tcp(listener)), *_wishes(listener)):
        if not (is_unix and wish.option == _SO_BUSY_POLL):
            _set(sock, listener, wish)
    if listener.address.scheme != "fd":
        _give_back(sock, listener)


def try_options(listener: Listener, like: socket.socket) -> None:
    """Whether the kernel would let a socket of this family and type follow the settings. Raises as `tune`."""
    with socket.socket(like.family, like.type) as sock:
        tune(sock, listener)


def connection_tuner(listener: Listener) -> Callable[[socket.socket], socket.socket] | None:
    """What is to be done with each connection of a listener, and returns it; None where that is nothing."""
    scheme, options = listener.address.scheme, listener.socket
    if not (options.quickack and scheme != "unix") and not (options.send_buffer and scheme != "tcp"):
        return None
    wish = _Wish("socket.send_buffer", socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_buffer)

    def fit(sock: socket.socket) -> socket.socket:
        if sock.family == socket.AF_UNIX:
            if options.send_buffer:
                _set(sock, listener, wish)
            return sock
        return QuickAckSocket.of(sock) if options.quickack else sock

    return fit


class QuickAckSocket(socket.socket):
    """A connection that acknowledges at once what it reads: the kernel forgets that it was asked to (tcp(7),
    TCP_QUICKACK), and is asked again at each read.
    """

    _source: socket.socket

    @classmethod
    def of(cls, sock: socket.socket) -> QuickAckSocket:
        """The same connection, taken over."""
        blocking = sock.getblocking()
        taken = cls(sock.family, sock.type, sock.proto, sock.detach())
        taken._source = sock
        taken.setblocking(blocking)
        taken.acknowledge()
        return taken

    def close(self) -> None:
        """As a socket's, and that of the one it was: somebody may wait for its end, to count it."""
        super().close()
        self._source.close()

    def acknowledge(self) -> None:
        """Sends an acknowledgement that is due, and the next ones without delay."""
        self.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """As a socket's; then acknowledges."""
        data = super().recv(bufsize, flags)
        self.acknowledge()
        return data

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """As a socket's; then acknowledges."""
        count = super().recv_into(buffer, nbytes, flags)
        self.acknowledge()
        return count


def shortcomings(settings: Settings) -> Iterator[str]:
    """What the kernel will make of the settings that they don't say, a sentence each."""
    for place, listener in enumerate(settings.listen):
        for name, what in (*_overruled(listener), *_capped(listener)):
            yield f"listen[{place}].{name}: {what}"


def _overruled(listener: Listener) -> Iterator[tuple[str, str]]:
    alive = listener.keepalive
    if not alive.idle or listener.address.scheme not in ("tcp", "fd"):
        return
    if alive.questioning < alive.patience:
        yield (
            "keepalive",
            f"a client that has vanished would be found out after {show_duration(alive.questioning)}, but user_timeout "
            f"overrules count (tcp(7)), and it is {show_duration(alive.patience)}",
        )


def _capped(listener: Listener) -> Iterator[tuple[str, str]]:
    is_unix = listener.address.scheme == "unix"
    with socket.socket(socket.AF_UNIX if listener.address.is_unix else socket.AF_INET, socket.SOCK_STREAM) as sock:
        for name, option in _BUFFERS.items():
            wanted: int = getattr(listener.socket, name)
            if not wanted or (is_unix and name == "receive_buffer"):
                continue
            sock.setsockopt(socket.SOL_SOCKET, option, wanted)
            # The kernel keeps, and tells, twice what it was asked for: the other half is for its own bookkeeping.
            there = sock.getsockopt(socket.SOL_SOCKET, option) // 2
            if there < wanted:
                yield (
                    f"socket.{name}",
                    f"wanted {show_size(wanted)}, there is {show_size(there)}: the sysctl {_SYSCTLS[name]} allows no "
                    "more",
                )


def _wishes_of_tcp(listener: Listener) -> Iterator[_Wish]:
    alive, options, tcp = listener.keepalive, listener.socket, socket.IPPROTO_TCP
    yield _Wish("keepalive.idle", socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(alive.idle))
    if alive.idle:
        yield _Wish("keepalive.idle", tcp, socket.TCP_KEEPIDLE, _whole(alive.idle))
        yield _Wish("keepalive.interval", tcp, socket.TCP_KEEPINTVL, _whole(alive.interval))
        yield _Wish("keepalive.count", tcp, socket.TCP_KEEPCNT, alive.count)
    yield _Wish("keepalive.user_timeout", tcp, socket.TCP_USER_TIMEOUT, _whole(alive.patience * 1000))
    yield _Wish("socket.nodelay", tcp, socket.TCP_NODELAY, options.nodelay)


def _wishes(listener: Listener) -> Iterator[_Wish]:
    options = listener.socket
    if options.busy_poll:
        yield _Wish("socket.busy_poll", socket.SOL_SOCKET, _SO_BUSY_POLL, _whole(options.busy_poll * 1e6))
    for name, option in _BUFFERS.items():
        if size := getattr(options, name):
            yield _Wish(f"socket.{name}", socket.SOL_SOCKET, option, size)


def _give_back(sock: socket.socket, listener: Listener) -> None:
    """Makes the system's again what an earlier call of `tune` has set and the settings don't mention now."""
    options = listener.socket
    left = [name for name in _BUFFERS if not getattr(options, name)]
    # Which buffers have a size that the kernel does not change. Before Linux 5.15 it can't tell, nor give one back: a
    # size that was set stays until the listener is bound anew.
    held = _get(sock, _SO_BUF_LOCK)
    if not any(held & _LOCKS[name] for name in left) and (options.busy_poll or not _get(sock, _SO_BUSY_POLL)):
        return
    with socket.socket(sock.family, sock.type) as fresh:
        if not options.busy_poll:
            wish = _Wish("socket.busy_poll", socket.SOL_SOCKET, _SO_BUSY_POLL, _get(fresh, _SO_BUSY_POLL))
            _set(sock, listener, wish)
        for name in left:
            if held & _LOCKS[name]:
                size = fresh.getsockopt(socket.SOL_SOCKET, _BUFFERS[name]) // 2
                _set(sock, listener, _Wish(f"socket.{name}", socket.SOL_SOCKET, _BUFFERS[name], size))
                held &= ~_LOCKS[name]
        _set(sock, listener, _Wish("socket.send_buffer", socket.SOL_SOCKET, _SO_BUF_LOCK, held))


def _get(sock: socket.socket, option: int) -> int:
    """A socket's option; 0 where this kernel has no such option."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, option)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return 0


def _whole(number: float) -> int:
    """The next whole number, unless what lies between is but a float's inexactness."""
    return ceil(round(number, 3))


def _set(sock: socket.socket, listener: Listener, wish: _Wish) -> None:
    try:
        sock.setsockopt(wish.level, wish.option, wish.value)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT and not wish.value:  # what this kernel has not is off
            return
        why = error.strerror or str(error)
        if error.errno == errno.EPERM:
            why += "; it is for root, or for who has CAP_NET_ADMIN"
        raise ForkdError(f"{listener.address}: {wish.setting} can't be had: {why}") from None
