"""Socket options, as the settings of a listener have them: keepalive, buffers, TCP_NODELAY, busy polling, quick ACKs.

On Linux a connection inherits its options from the listening socket (tcp(7), socket(7)), as they were when the client
connected. So `tune` sets them once, on that, before it listens: the receive buffer decides the window scale, which the
handshake tells the client. What is not inherited is set on each connection by `connection_tuner`, where the settings
ask for it: the buffer of a unix socket, and TCP_QUICKACK, which the kernel resets by itself.

What the kernel refuses is an error that names the setting; what it only caps is told by `option_warnings`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import ceil
from typing import Any, NamedTuple

from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.config.units import show_duration, show_size
from forkd.errors import ForkdError

# asm-generic/socket.h; Python has no names for them.
_SO_BUSY_POLL, _SO_BUF_LOCK, _SO_SNDBUFFORCE = 46, 72, 32

#: The send buffer of a datagram socket, as far as the system allows, unless the settings have one. In it lies, of all
#: clients together, what those of a unix socket have not read, and what waits for hosts of the local network that do
#: not answer by ARP: 208 KiB for each, for three seconds (arp(7), unres_qlen_bytes).
_DATAGRAM_BUFFER = 4 << 20

# linux/in.h and in6.h; likewise.
_FREEBIND = {socket.AF_INET: (socket.IPPROTO_IP, 15), socket.AF_INET6: (socket.IPPROTO_IPV6, 78)}

# linux/in.h, in6.h, and asm-generic/socket.h, likewise.
_IP_MINTTL, _IPV6_MINHOPCOUNT = 21, 73
_SO_DETACH_FILTER, _SO_DETACH_REUSEPORT_BPF = 27, 68

#: What `reset_flags` calls it that accept(2), or the receipt of a datagram, would block.
BLOCKING = "O_NONBLOCK"

_NO, _ONE, _NEVER = bytes(4), struct.pack("=i", 1), bytes(16)
_LONGEST = 16  # bytes of an option's value

#: Options that no setting has, most of which a connection gets from its listener: their right values, by the socket's
#: family and type.
_OF_ALL = (
    ("SO_LINGER", socket.SOL_SOCKET, socket.SO_LINGER, bytes(8)),
    ("SO_RCVTIMEO", socket.SOL_SOCKET, socket.SO_RCVTIMEO, _NEVER),
    ("SO_SNDTIMEO", socket.SOL_SOCKET, socket.SO_SNDTIMEO, _NEVER),
    ("SO_RCVLOWAT", socket.SOL_SOCKET, socket.SO_RCVLOWAT, _ONE),
)
_OF_TCP = (
    *_OF_ALL,
    ("TCP_DEFER_ACCEPT", socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, _NO),
    ("TCP_CORK", socket.IPPROTO_TCP, socket.TCP_CORK, _NO),
)
_DEVICE = ("SO_BINDTODEVICE", socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"")
_OF_IPV4 = (_DEVICE, ("IP_MINTTL", socket.IPPROTO_IP, _IP_MINTTL, _NO))
_OF_IPV6 = (_DEVICE, ("IPV6_MINHOPCOUNT", socket.IPPROTO_IPV6, _IPV6_MINHOPCOUNT, _NO))
_FIXED = {
    (socket.AF_UNIX, socket.SOCK_STREAM): _OF_ALL,
    (socket.AF_UNIX, socket.SOCK_DGRAM): _OF_ALL,
    (socket.AF_INET, socket.SOCK_STREAM): (*_OF_TCP, *_OF_IPV4),
    (socket.AF_INET6, socket.SOCK_STREAM): (*_OF_TCP, *_OF_IPV6),
    (socket.AF_INET, socket.SOCK_DGRAM): (*_OF_ALL, *_OF_IPV4),
    (socket.AF_INET6, socket.SOCK_DGRAM): (*_OF_ALL, *_OF_IPV6),
}
#: By family, options whose value the kernel tells together with its default: set back whatever they are.
_UNSET = {
    socket.AF_INET: ((socket.IPPROTO_IP, socket.IP_TTL, -1), (socket.IPPROTO_IP, socket.IP_TOS, 0)),
    socket.AF_INET6: (
        (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, -1),
        (socket.IPPROTO_IPV6, socket.IPV6_TCLASS, -1),
    ),
}
_FILTER = ("a socket filter", _SO_DETACH_FILTER)
_FILTERS = {
    socket.SOCK_STREAM: (_FILTER,),
    socket.SOCK_DGRAM: (_FILTER, ("a filter of its group", _SO_DETACH_REUSEPORT_BPF)),
}

_BUFFERS = {"send_buffer": socket.SO_SNDBUF, "receive_buffer": socket.SO_RCVBUF}
_LOCKS = {"send_buffer": 1, "receive_buffer": 2}  # SOCK_SNDBUF_LOCK and SOCK_RCVBUF_LOCK of linux/socket.h
_SYSCTLS = {"send_buffer": "net.core.wmem_max", "receive_buffer": "net.core.rmem_max"}


def tune(sock: socket.socket, listener: Listener) -> None:
    """Sets the options of a listener's settings on a socket: a listening one, for what it accepts, or a connection.

    Where buffers and busy polling were set by an earlier call, and the settings leave them to the system now, they
    become the system's again; but those of an inherited socket stay as they are. A datagram socket has the buffers and
    busy polling alone; a unix stream socket has none but the buffer that `connection_tuner` sets.

    Raises:
        ForkdError: the kernel refuses one; the message names the setting and says why.
    """
    for_datagrams, is_unix = sock.type == socket.SOCK_DGRAM, sock.family == socket.AF_UNIX
    if is_unix and not for_datagrams:
        return
    for wanted_option in (*(() if for_datagrams else _tcp_options(listener)), *_common_options(listener)):
        if not (is_unix and wanted_option.option == _SO_BUSY_POLL):
            _set(sock, listener, wanted_option)
    if listener.address.scheme != "fd":
        _restore_defaults(sock, listener)
        if for_datagrams and not listener.socket.send_buffer:
            _set_largest_buffer(sock)


def set_freebind(sock: socket.socket, *, wanted: bool) -> None:
    """Whether an internet socket may be bound to an address that the machine does not have."""
    level, option = _FREEBIND[sock.family]
    sock.setsockopt(level, option, wanted)


def has_freebind(sock: socket.socket) -> bool:
    """Whether that was allowed."""
    level, option = _FREEBIND[sock.family]
    return bool(sock.getsockopt(level, option))


def reset_flags(sock: socket.socket) -> list[str]:
    """Sets back the flags that any process which has a copy of the socket can change for all that have one; those that
    were changed. Raises OSError.
    """
    flags = fcntl.fcntl(sock, fcntl.F_GETFL)
    if flags & (os.O_NONBLOCK | os.O_ASYNC) == os.O_NONBLOCK:
        return []
    fcntl.fcntl(sock, fcntl.F_SETFL, flags & ~os.O_ASYNC | os.O_NONBLOCK)
    return ["O_ASYNC" if flags & os.O_NONBLOCK else BLOCKING]


def reset_options(sock: socket.socket, listener: Listener) -> list[str]:
    """Sets back the options that its settings have, or that are no settings and have one right value. An inherited
    socket's are its maker's.

    Returns:
        Those that were changed, of the latter.

    Raises:
        OSError, ForkdError: one can't be set back.
    """
    changed: list[str] = []
    if listener.address.scheme == "fd":
        return changed
    for level, option, unset in _UNSET.get(sock.family, ()):
        sock.setsockopt(level, option, unset)
    for name, level, option, value in _FIXED[sock.family, sock.type]:
        if option == socket.SO_BINDTODEVICE and sock.family == socket.AF_INET6 and sock.getsockname()[3]:
            continue  # a link-local address is one of its device
        if sock.getsockopt(level, option, _LONGEST) != value:
            changed.append(name)
            sock.setsockopt(level, option, value)
    for name, option in _FILTERS[sock.type]:
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, 0)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINVAL, errno.ENOPROTOOPT):  # there is none
                raise ForkdError(f"{name} can't be taken off it: {error.strerror}") from None
        else:
            changed.append(name)
    tune(sock, listener)
    return changed


def try_options(listener: Listener, like: socket.socket) -> None:
    """Tries the settings on a new socket of the same family and type as another. Raises as `tune`."""
    with socket.socket(like.family, like.type) as sock:
        tune(sock, listener)


def connection_tuner(listener: Listener) -> Callable[[socket.socket], socket.socket] | None:
    """A function that sets up each connection of a listener and returns it; None where there is nothing to do."""
    scheme, options = listener.address.scheme, listener.socket
    if not (options.quickack and scheme != "unix") and not (options.send_buffer and scheme != "tcp"):
        return None
    wanted_option = _WantedOption("socket.send_buffer", socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_buffer)

    def set_up(sock: socket.socket) -> socket.socket:
        if sock.family == socket.AF_UNIX:
            if options.send_buffer:
                _set(sock, listener, wanted_option)
            return sock
        return QuickAckSocket.of(sock) if options.quickack else sock

    return set_up


class QuickAckSocket(socket.socket):
    """A connection that acknowledges at once what it reads. The kernel resets TCP_QUICKACK by itself (tcp(7)), so it is
    set again at each read.
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
        """Closes this socket and the object that it was made of, which may count the end of the connection."""
        super().close()
        self._source.close()

    @property
    def proxy_header(self) -> Any:
        """What that object knows of the proxy that has made the connection; None where there is none."""
        return getattr(self._source, "proxy_header", None)

    @property
    def proxy_peername(self) -> Any:
        """Likewise."""
        return getattr(self._source, "proxy_peername", None)

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


def option_warnings(settings: Settings) -> Iterator[str]:
    """Where the kernel will do otherwise than the settings say, a sentence each."""
    for place, listener in enumerate(settings.listen):
        for name, what in (*_overruled_options(listener), *_capped_options(listener)):
            yield f"listen[{place}].{name}: {what}"


class _WantedOption(NamedTuple):
    """A setting's name, and the arguments of setsockopt(2) that it stands for."""

    setting: str
    level: int
    option: int
    value: int


def _tcp_options(listener: Listener) -> Iterator[_WantedOption]:
    alive, options, tcp = listener.keepalive, listener.socket, socket.IPPROTO_TCP
    user_timeout = _round_up(alive.effective_user_timeout * 1000)
    yield _WantedOption("keepalive.idle", socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(alive.idle))
    if alive.idle:
        yield _WantedOption("keepalive.idle", tcp, socket.TCP_KEEPIDLE, _round_up(alive.idle))
        yield _WantedOption("keepalive.interval", tcp, socket.TCP_KEEPINTVL, _round_up(alive.interval))
        yield _WantedOption("keepalive.count", tcp, socket.TCP_KEEPCNT, alive.count)
    yield _WantedOption("keepalive.user_timeout", tcp, socket.TCP_USER_TIMEOUT, user_timeout)
    yield _WantedOption("socket.nodelay", tcp, socket.TCP_NODELAY, options.nodelay)


def _common_options(listener: Listener) -> Iterator[_WantedOption]:
    options = listener.socket
    if options.busy_poll:
        yield _WantedOption("socket.busy_poll", socket.SOL_SOCKET, _SO_BUSY_POLL, _round_up(options.busy_poll * 1e6))
    for name, option in _BUFFERS.items():
        if size := getattr(options, name):
            yield _WantedOption(f"socket.{name}", socket.SOL_SOCKET, option, size)


def _restore_defaults(sock: socket.socket, listener: Listener) -> None:
    """Restores the system's defaults where an earlier call of `tune` has set options that the settings leave now."""
    options = listener.socket
    left = [name for name in _BUFFERS if not getattr(options, name)]
    if sock.type == socket.SOCK_DGRAM and "send_buffer" in left:  # forkd chooses it
        left.remove("send_buffer")
    # Which buffers have a size that the kernel does not change. Before Linux 5.15 it can't tell, nor give one back: a
    # size that was set stays until the listener is bound again.
    held = _get(sock, _SO_BUF_LOCK)
    if not any(held & _LOCKS[name] for name in left) and (options.busy_poll or not _get(sock, _SO_BUSY_POLL)):
        return
    with socket.socket(sock.family, sock.type) as fresh:
        if not options.busy_poll:
            wanted_option = _WantedOption(
                "socket.busy_poll", socket.SOL_SOCKET, _SO_BUSY_POLL, _get(fresh, _SO_BUSY_POLL)
            )
            _set(sock, listener, wanted_option)
        for name in left:
            if held & _LOCKS[name]:
                size = fresh.getsockopt(socket.SOL_SOCKET, _BUFFERS[name]) // 2
                _set(sock, listener, _WantedOption(f"socket.{name}", socket.SOL_SOCKET, _BUFFERS[name], size))
                held &= ~_LOCKS[name]
        _set(sock, listener, _WantedOption("socket.send_buffer", socket.SOL_SOCKET, _SO_BUF_LOCK, held))


def _set_largest_buffer(sock: socket.socket) -> None:
    for option in (_SO_SNDBUFFORCE, socket.SO_SNDBUF):  # the first is for root, above net.core.wmem_max too
        with suppress(PermissionError):
            sock.setsockopt(socket.SOL_SOCKET, option, _DATAGRAM_BUFFER)
            return


def _get(sock: socket.socket, option: int) -> int:
    """A socket's option; 0 where this kernel has no such option."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, option)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return 0


def _set(sock: socket.socket, listener: Listener, wanted_option: _WantedOption) -> None:
    try:
        sock.setsockopt(wanted_option.level, wanted_option.option, wanted_option.value)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT and not wanted_option.value:  # an option that this kernel lacks is off
            return
        why = error.strerror or str(error)
        if error.errno == errno.EPERM:
            why += "; it is for root, or needs CAP_NET_ADMIN"
        raise ForkdError(f"{listener.address}: {wanted_option.setting} can't be had: {why}") from None


def _round_up(number: float) -> int:
    """The next whole number, unless what lies between is but a float's inexactness."""
    return ceil(round(number, 3))


def _overruled_options(listener: Listener) -> Iterator[tuple[str, str]]:
    alive = listener.keepalive
    if not alive.idle or listener.address.scheme not in ("tcp", "fd"):
        return
    if alive.detection_time < alive.effective_user_timeout:
        yield (
            "keepalive",
            f"a client that has vanished would be noticed after {show_duration(alive.detection_time)}, but "
            f"user_timeout overrules count (tcp(7)), and it is {show_duration(alive.effective_user_timeout)}",
        )


def _capped_options(listener: Listener) -> Iterator[tuple[str, str]]:
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
