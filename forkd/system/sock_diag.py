"""The kernel's tables of sockets, by netlink (sock_diag(7)): what it knows of every connection, whoever's it is.

Nobody else is asked or held up by it, and no privileges are needed. The kernel answers for the network namespace that
the calling thread is in. The structs are those of linux/netlink.h, linux/inet_diag.h and linux/unix_diag.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

from forkd.errors import ForkdError
from forkd.system.tcp_info import CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK, TcpInfo

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY = 20  # SOCK_DIAG_BY_FAMILY
_REQUEST, _DUMP = 0x1, 0x300  # NLM_F_REQUEST, NLM_F_ROOT | NLM_F_MATCH
_ERROR, _DONE = 2, 3  # NLMSG_ERROR, NLMSG_DONE
_ANY = 0xFFFFFFFF  # INET_DIAG_NOCOOKIE, and as a mask each state

#: Those of a connection that is one, or whose end is not over on both sides.
_STATES = sum(1 << state for state in (ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, CLOSING, LAST_ACK))

_INET_INFO = 2  # INET_DIAG_INFO
_UNIX_NAME, _UNIX_PEER, _UNIX_QUEUE, _UNIX_UID = 0, 2, 4, 7
_UNIX_SHOW = 0x1 | 0x4 | 0x10 | 0x40  # UDIAG_SHOW_NAME, _PEER, _RQLEN and _UID

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_INET_REQUEST = struct.Struct("=BBBxI2s2s32xIII")  # inet_diag_req_v2
_INET_MESSAGE = struct.Struct("=BBxx2s2s16s16s4xQ4xII4xI")  # inet_diag_msg
_UNIX_REQUEST = struct.Struct("=BxxxIIIII")  # unix_diag_req
_UNIX_MESSAGE = struct.Struct("=BBBxIQ")  # unix_diag_msg
_PAIR = struct.Struct("=II")
_NUMBER = struct.Struct("=I")
_ERRNO = struct.Struct("=i")

#: Bytes of one read: as much as the kernel ever makes of a dump at a time.
_CHUNK = 1 << 17

#: An end of file takes a place in the sequence of bytes. In these states that of the peer has come; ours waits to be
#: acknowledged; ours is acknowledged.
_HEARD_END = {CLOSE_WAIT, CLOSING, LAST_ACK}
_SAYING_END = {FIN_WAIT1, CLOSING, LAST_ACK}
_SAID_END = {FIN_WAIT2}


class TcpSocket(NamedTuple):
    """A TCP connection.

    Attributes:
        local: host and port of its end here; an IPv4 host in an IPv6 socket as IPv4.
        peer: of the other end.
        state: by its number in `tcp_info`.
        inode: the socket's; 0 as long as nobody has accepted it.
        cookie: what the kernel calls it, never the same for two (socket(7), SO_COOKIE).
        unread: bytes that have come and were not read.
        unacked: bytes that were written and are not acknowledged.
        received: bytes that have come.
        acked: bytes that the peer's kernel has acknowledged.
        info: more of it.
    """

    local: tuple[str, int]
    peer: tuple[str, int]
    state: int
    inode: int
    cookie: int
    unread: int
    unacked: int
    received: int
    acked: int
    info: TcpInfo


class UnixSocket(NamedTuple):
    """A unix socket.

    Attributes:
        name: as it was bound, or as the listener was that has accepted it; an abstract one begins with NUL.
        state: by its number in `tcp_info`: ESTABLISHED, CLOSE or LISTEN.
        inode: the socket's.
        cookie: as of a `TcpSocket`.
        peer: the other end's inode; 0 when there is none.
        unread: bytes that have come and were not read; of a listening one the connections that wait.
        unsent: bytes that were written and that the other end has not read; of a listening one how many may wait.
        uid: of the user who made it; None where the kernel does not tell.
    """

    name: str
    state: int
    inode: int
    cookie: int
    peer: int
    unread: int
    unsent: int
    uid: int | None


def tcp_sockets(port: int, family: int) -> list[TcpSocket]:
    """All TCP connections whose local port is this one; not those that are over but for a wait (TIME-WAIT).

    Args:
        port: the port; 0: each.
        family: AF_INET, or AF_INET6, in which an IPv4 connection to an IPv6 listener is too.

    Raises:
        ForkdError: the kernel does not tell.
    """
    request = _INET_REQUEST.pack(
        family, socket.IPPROTO_TCP, 1 << (_INET_INFO - 1), _STATES, port.to_bytes(2, "big"), b"", 0, _ANY, _ANY
    )
    return [_tcp_socket(data, start, end) for data, start, end in _ask(request, dump=True)]


def unix_sockets(inode: int = 0) -> list[UnixSocket]:
    """All unix sockets, or the one with this inode. Raises ForkdError when the kernel does not tell."""
    request = _UNIX_REQUEST.pack(socket.AF_UNIX, _ANY, inode, _UNIX_SHOW, _ANY, _ANY)
    return [_unix_socket(data, start, end) for data, start, end in _ask(request, dump=not inode)]


def _ask(request: bytes, *, dump: bool) -> Iterator[tuple[bytes, int, int]]:
    """The kernel's answers to a request: each as a part of a buffer, from its message on."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as sock:
            sock.setblocking(False)  # the kernel has answered before sendto and recv return; a master may be asking
            flags = _REQUEST | (_DUMP if dump else 0)
            sock.sendto(_HEADER.pack(_HEADER.size + len(request), _BY_FAMILY, flags, 1, 0) + request, (0, 0))
            more = True
            while more:
                data = sock.recv(_CHUNK)
                more = dump
                for kind, start, end in _messages(data):
                    if kind == _DONE:
                        return
                    yield data, start, end
    except OSError as error:
        if error.errno == errno.ENOENT and not dump:  # there is no such socket
            return
        raise ForkdError(f"the kernel does not tell of its sockets (sock_diag): {error.strerror}") from None


def _messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Type, beginning and end of each message in one read. Raises OSError when one says that something failed."""
    position = 0
    while position + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, position)
        if not _HEADER.size <= length <= len(data) - position:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        if kind == _ERROR:
            (number,) = _ERRNO.unpack_from(data, position + _HEADER.size)
            raise OSError(-number, os.strerror(-number))
        yield kind, position + _HEADER.size, position + length
        position += (length + 3) & ~3


def _tcp_socket(data: bytes, start: int, end: int) -> TcpSocket:
    family, state, port, peer_port, source, destination, cookie, unread, unacked, inode = _INET_MESSAGE.unpack_from(
        data, start
    )
    info = b""
    position = start + _INET_MESSAGE.size
    while position + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if kind == _INET_INFO:
            info = data[position + 4 : position + length]
            break
        position += max(4, (length + 3) & ~3)
    found = TcpInfo.parse(info)
    received, acked = found.bytes_received, found.bytes_acked
    if state != ESTABLISHED:
        unread, received = (max(0, count - (state in _HEARD_END)) for count in (unread, received))
        unacked, acked = max(0, unacked - (state in _SAYING_END)), max(0, acked - (state in _SAID_END))
    return TcpSocket(
        (_host(family, source), int.from_bytes(port, "big")),
        (_host(family, destination), int.from_bytes(peer_port, "big")),
        state,
        inode,
        cookie,
        unread,
        unacked,
        received,
        acked,
        found,
    )


def _host(family: int, address: bytes) -> str:
    if family == socket.AF_INET:
        return socket.inet_ntop(socket.AF_INET, address[:4])
    if address[:12] == bytes(10) + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, address[12:])
    return socket.inet_ntop(socket.AF_INET6, address)


def _unix_socket(data: bytes, start: int, end: int) -> UnixSocket:
    _, _, state, inode, cookie = _UNIX_MESSAGE.unpack_from(data, start)
    name, peer, unread, unsent, uid = "", 0, 0, 0, None
    position = start + _UNIX_MESSAGE.size
    while position + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        value = position + 4
        if kind == _UNIX_NAME:
            name = os.fsdecode(data[value : position + length])
        elif kind == _UNIX_PEER:
            (peer,) = _NUMBER.unpack_from(data, value)
        elif kind == _UNIX_QUEUE:
            unread, unsent = _PAIR.unpack_from(data, value)
        elif kind == _UNIX_UID:
            (uid,) = _NUMBER.unpack_from(data, value)
        position += max(4, (length + 3) & ~3)
    if not name.startswith("\0"):
        name = name.rstrip("\0")
    return UnixSocket(name, state, inode, cookie, peer, unread, unsent, uid)
