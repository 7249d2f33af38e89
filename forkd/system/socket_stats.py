"""What the kernel knows of sockets: its tables of all connections, TCP_INFO, accept queues and send queues.

The tables come by netlink (sock_diag(7)) for the network namespace that the calling thread is in, whichever process has
the sockets; no process is asked or held up, and no privileges are needed. The structs are those of linux/netlink.h,
linux/inet_diag.h and linux/unix_diag.h.

`forkd clients` lists connections, the master's status shows accept queues, and `serve` looks at single connections.
Nothing is decided here.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import sys
import termios
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from forkd.errors import ForkdError

#: The states of a TCP socket (net/tcp_states.h).
ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = range(
    1, 12
)
_PEER_HAS_CLOSED = (CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT)

#: Those of a connection that is one, or whose end is not over on both sides.
_CONNECTION_STATES = sum(1 << state for state in (ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, CLOSING, LAST_ACK))

#: A FIN counts as a byte. In these states the peer's has come; ours waits to be acknowledged; ours is acknowledged.
_PEERS_FIN_RECEIVED = {CLOSE_WAIT, CLOSING, LAST_ACK}
_OUR_FIN_SENT = {FIN_WAIT1, CLOSING, LAST_ACK}
_OUR_FIN_ACKNOWLEDGED = {FIN_WAIT2}

_TCP_INFO = struct.Struct("=B7x 16x 2I 12x I 4x 2I 8x I 48x 2Q 8x I 52x 2Q")
_RECEIVED = struct.Struct("=B127x Q")  # its state and bytes_received
_TCP, _INFO = int(socket.IPPROTO_TCP), int(socket.TCP_INFO)
_NO_TCP_INFO = bytes(_TCP_INFO.size)

_SO_MEMINFO = 55  # asm-generic/socket.h
_MEMINFO_DROPS = struct.Struct("=32xI")  # the ninth of its 32-bit numbers
_SO_COOKIE = 57  # asm-generic/socket.h
_SIOCOUTQ = 0x5411  # TIOCOUTQ of linux/sockios.h

#: The host by which each family's sockets listen at all addresses.
WILDCARDS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104 (nothing is bound here)

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_REQUEST, _NLM_DUMP = 0x1, 0x300  # NLM_F_REQUEST, NLM_F_ROOT | NLM_F_MATCH
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_ANY_COOKIE_OR_STATE = 0xFFFFFFFF  # INET_DIAG_NOCOOKIE, and all bits of a mask of states

_INET_INFO = 2  # INET_DIAG_INFO
_UNIX_NAME, _UNIX_PEER, _UNIX_RQLEN, _UNIX_UID = 0, 2, 4, 7
_UNIX_SHOW = 0x1 | 0x4 | 0x10 | 0x40  # UDIAG_SHOW_NAME, _PEER, _RQLEN and _UID

_NLMSGHDR = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_NLATTR = struct.Struct("=HH")  # nlattr: length, type
_INET_REQUEST = struct.Struct("=BBBxI2s2s32xIII")  # inet_diag_req_v2
_INET_MESSAGE = struct.Struct("=BBxx2s2s16s16s4xQ4xII4xI")  # inet_diag_msg
_UNIX_REQUEST = struct.Struct("=BxxxIIIII")  # unix_diag_req
_UNIX_MESSAGE = struct.Struct("=BBBxIQ")  # unix_diag_msg
_TWO_UINT32 = struct.Struct("=II")
_UINT32 = struct.Struct("=I")
_INT32 = struct.Struct("=i")

#: Bytes of one read: as much as the kernel ever makes of a dump at a time.
_READ_SIZE = 1 << 17


#: A part of the same, for `parse_bytes`: the state, bytes received, sent, and sent again. And how it is asked for.
TCP_BYTES = struct.Struct("=B127x Q 64x 2Q")
IPPROTO_TCP, TCP_INFO = int(socket.IPPROTO_TCP), int(socket.TCP_INFO)


# One socket


class TcpInfo(NamedTuple):
    """What the kernel knows of a TCP connection: a part of `struct tcp_info` (linux/tcp.h), in the kernel's own units.

    The struct has grown over the kernel's versions at its end alone; what an older kernel leaves out reads as zero.

    Attributes:
        state: ESTABLISHED and so on.
        unacked: segments that were sent and not acknowledged; of a listening socket, the clients that wait in its
            accept queue.
        sacked: segments that were acknowledged out of order; of a listening socket, how many may wait.
        last_data_sent: milliseconds since data was last sent, as all of these; since the beginning where none was.
        last_data_received: milliseconds since data last came.
        last_ack_received: milliseconds since an acknowledgement last came.
        rtt: the smoothed round-trip time, in microseconds.
        bytes_acked: of the data that was sent.
        bytes_received: of data, and one for the end of file; see `received`.
        notsent: bytes that wait for the peer's window, or the network, before they are sent for the first time.
        bytes_sent: with those that were sent again.
        bytes_retrans: those that were sent again.
    """

    state: int
    unacked: int
    sacked: int
    last_data_sent: int
    last_data_received: int
    last_ack_received: int
    rtt: int
    bytes_acked: int
    bytes_received: int
    notsent: int
    bytes_sent: int
    bytes_retrans: int

    @property
    def received(self) -> int:
        """Bytes of data that have come. The kernel counts the end of file as one (tcp_rcv_nxt_update)."""
        return self.bytes_received - (self.state in _PEER_HAS_CLOSED)

    @property
    def sent(self) -> int:
        """Bytes of data that were sent, each once."""
        return self.bytes_sent - self.bytes_retrans

    @classmethod
    def parse(cls, data: bytes) -> TcpInfo:
        """From the bytes of the struct, which may be of any length."""
        return cls._make(_TCP_INFO.unpack_from(data if len(data) >= _TCP_INFO.size else data + _NO_TCP_INFO))


def parse_bytes(data: bytes) -> tuple[int, int]:
    """Bytes of data that have come and that were sent, of the first `TCP_BYTES.size` bytes of TCP_INFO; zeros where an
    old kernel tells less.
    """
    if len(data) < TCP_BYTES.size:
        return 0, 0
    state, received, sent, sent_again = TCP_BYTES.unpack(data)
    return received - (state in _PEER_HAS_CLOSED), sent - sent_again


def read_tcp_info(sock: socket.socket) -> TcpInfo | None:
    """A socket's TCP_INFO (tcp(7)); None where it is no TCP socket, or is closed."""
    try:
        return TcpInfo.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size))
    except OSError:
        return None


def received_bytes(sock: socket.socket) -> int:
    """Bytes of data that have come, as `TcpInfo.received`, for less; 0 where there is no TCP_INFO."""
    try:
        data = sock.getsockopt(_TCP, _INFO, _RECEIVED.size)
    except OSError:
        return 0
    if len(data) < _RECEIVED.size:
        return 0
    state, received = _RECEIVED.unpack(data)
    return received - (state in _PEER_HAS_CLOSED)  # type: ignore[no-any-return]


class AcceptQueue(NamedTuple):
    """The accept queue of a listening socket: connections that the kernel has made and that wait to be accepted.

    For TCP, depth and limit are `tcpi_unacked` and `tcpi_sacked` of TCP_INFO (tcp(7)). A connection is let in while the
    depth is not above the limit; each that finds it full is dropped and counted, one that tries again each time
    (SO_MEMINFO of linux/sock_diag.h, SK_MEMINFO_DROPS). A unix listener's come from sock_diag; nothing is dropped
    there: a client that finds the queue full waits in connect(2).

    Attributes:
        waiting: connections that wait. None, here and below, for what the system does not say.
        limit: how many may wait.
        drops: how many found the queue full.
    """

    waiting: int | None
    limit: int | None
    drops: int | None


def accept_queue_of(sock: socket.socket) -> AcceptQueue:
    """A listening socket's accept queue as it is now; of a datagram socket, the drops alone."""
    if sock.type == socket.SOCK_DGRAM:
        return AcceptQueue(None, None, _drops_of(sock))
    if sock.family == socket.AF_UNIX:
        with suppress(ForkdError, OSError):
            for found in unix_sockets(os.fstat(sock.fileno()).st_ino):
                return AcceptQueue(found.unread, found.unsent, None)
        return AcceptQueue(None, None, None)
    info = read_tcp_info(sock)
    if info is None or info.state != LISTEN:
        return AcceptQueue(None, None, None)
    return AcceptQueue(info.unacked, info.sacked, _drops_of(sock))


class ListenCounters(NamedTuple):
    """What the kernel has counted for all TCP listeners of a network namespace together (/proc/net/netstat).

    Attributes:
        overflows: connections that found an accept queue full (ListenOverflows).
        resets: connections that their client reset before they were made, as health checks do (EmbryonicRsts).
    """

    overflows: int = 0
    resets: int = 0


def listen_counters() -> ListenCounters:
    """The counters as they are now, of the namespace of this thread; zeros where there is no /proc."""
    with suppress(OSError, ValueError), open("/proc/net/netstat", "rb") as file:
        names, values = [line.split() for line in file if line.startswith(b"TcpExt:")]
        found = dict(zip(names, values, strict=False))
        return ListenCounters(int(found.get(b"ListenOverflows", 0)), int(found.get(b"EmbryonicRsts", 0)))
    return ListenCounters()


def split_drops(drops: int, before: ListenCounters, now: ListenCounters) -> tuple[int, int]:
    """A listening socket's drops as two numbers: those that found the queue full, and those that the client reset.

    The kernel counts both in one number of the socket, and each for all sockets together. Where several listeners have
    either at once, what can't be told apart counts as the former: a full queue is never hidden.

    Args:
        drops: as of an `AcceptQueue`.
        before: the counters when the socket was made.
        now: the counters now.
    """
    resets = min(now.resets - before.resets, drops - (now.overflows - before.overflows))
    resets = max(0, resets)
    return drops - resets, resets


def _drops_of(sock: socket.socket) -> int | None:
    with suppress(OSError, struct.error):
        return int(_MEMINFO_DROPS.unpack(sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO_DROPS.size))[0])
    return None


def cookie_of(sock: socket.socket) -> int:
    """What the kernel calls a connection, as its tables tell it (socket(7), SO_COOKIE). Raises OSError."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def unacknowledged_bytes(sock: socket.socket) -> int:
    """What is in the kernel's send queue (tcp(7), unix(7), SIOCOUTQ): for TCP the bytes that the peer has not
    acknowledged; for a unix socket the memory that those take which it has not read. Raises OSError.
    """
    return int(struct.unpack("i", fcntl.ioctl(sock, _SIOCOUTQ, bytes(4)))[0])


def unread_bytes(sock: socket.socket) -> int:
    """What has come to a stream socket and was not read (FIONREAD: SIOCINQ of tcp(7), unix(7)). Raises OSError."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


# All sockets


def inode_of(descriptor: int) -> int:
    """What tells an open socket from others, also where its descriptor was copied; 0 where the descriptor is closed."""
    try:
        return os.fstat(descriptor).st_ino
    except OSError:
        return 0


def own_sockets() -> list[tuple[int, int]]:
    """The sockets that this process has: of each descriptor the number, and the socket's inode (proc_pid_fd(5))."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own, or closed meanwhile
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                found.append((int(name), status.st_ino))
    return found


def connections_at(endpoints: Iterable[Sequence[Any]]) -> int:
    """How many connections were accepted at these places and are open, whichever process has them.

    Args:
        endpoints: of each place the family, and the host and port, or the path; see `BoundListener.endpoints`.

    Raises:
        ForkdError: the kernel refuses.
    """
    hosts = {(family, host.partition("%")[0], port) for family, host, port in endpoints if family != socket.AF_UNIX}
    paths = {path for family, path, _ in endpoints if family == socket.AF_UNIX}
    found = set()  # the table may change while it is read, which may show a socket twice
    for family, port in {(family, port) for family, _, port in hosts}:
        for tcp in tcp_sockets(port, family):
            if tcp.inode and {(family, tcp.local[0], port), (family, WILDCARDS[family], port)} & hosts:
                found.add(tcp.inode)
    for unix in unix_sockets() if paths else ():
        if unix.inode and unix.name in paths and unix.state == ESTABLISHED:
            found.add(unix.inode)
    return len(found)


class TcpSocket(NamedTuple):
    """A TCP connection.

    Attributes:
        local: host and port of its end here; an IPv4 host in an IPv6 socket as IPv4.
        peer: of the other end.
        state: ESTABLISHED and so on.
        inode: the socket's; 0 until it is accepted.
        cookie: the kernel's own number of it, never the same for two (socket(7), SO_COOKIE).
        unread: bytes that have come and were not read.
        unacked: bytes that were written and are not acknowledged.
        received: bytes that have come.
        acked: bytes that the peer's kernel has acknowledged.
        info: more of what the kernel knows.
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
        state: ESTABLISHED, CLOSE or LISTEN.
        inode: the socket's.
        cookie: as of a `TcpSocket`.
        peer: the other end's inode; 0 when there is none.
        unread: bytes that have come and were not read; of a listener, the connections that wait.
        unsent: bytes that were written and that the other end has not read; of a listener, how many may wait.
        uid: the user that made it; None where the kernel does not say.
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
    """All TCP connections of a local port, without those that only wait for late segments (TIME-WAIT).

    Args:
        port: the port; 0: each.
        family: AF_INET, or AF_INET6, in which an IPv4 connection to an IPv6 listener is too.

    Raises:
        ForkdError: the kernel refuses.
    """
    request = _INET_REQUEST.pack(
        family,
        socket.IPPROTO_TCP,
        1 << (_INET_INFO - 1),
        _CONNECTION_STATES,
        port.to_bytes(2, "big"),
        b"",
        0,
        _ANY_COOKIE_OR_STATE,
        _ANY_COOKIE_OR_STATE,
    )
    return [_tcp_socket(data, start, end) for data, start, end in _query(request, dump=True)]


def unix_sockets(inode: int = 0) -> list[UnixSocket]:
    """All unix sockets, or the one with this inode. Raises ForkdError when the kernel refuses."""
    request = _UNIX_REQUEST.pack(
        socket.AF_UNIX, _ANY_COOKIE_OR_STATE, inode, _UNIX_SHOW, _ANY_COOKIE_OR_STATE, _ANY_COOKIE_OR_STATE
    )
    return [_unix_socket(data, start, end) for data, start, end in _query(request, dump=not inode)]


def _tcp_socket(data: bytes, start: int, end: int) -> TcpSocket:
    family, state, port, peer_port, source, destination, cookie, unread, unacked, inode = _INET_MESSAGE.unpack_from(
        data, start
    )
    info = b""
    position = start + _INET_MESSAGE.size
    while position + 4 <= end:
        length, kind = _NLATTR.unpack_from(data, position)
        if kind == _INET_INFO:
            info = data[position + 4 : position + length]
            break
        position += max(4, (length + 3) & ~3)
    found = TcpInfo.parse(info)
    received, acked = found.bytes_received, found.bytes_acked
    if state != ESTABLISHED:
        unread, received = (max(0, count - (state in _PEERS_FIN_RECEIVED)) for count in (unread, received))
        unacked, acked = max(0, unacked - (state in _OUR_FIN_SENT)), max(0, acked - (state in _OUR_FIN_ACKNOWLEDGED))
    return TcpSocket(
        (host_text(family, source), int.from_bytes(port, "big")),
        (host_text(family, destination), int.from_bytes(peer_port, "big")),
        state,
        inode,
        cookie,
        unread,
        unacked,
        received,
        acked,
        found,
    )


def host_text(family: int, address: bytes) -> str:
    """A host's address as people read it; an IPv4-mapped one (RFC 4291) is of IPv4."""
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
        length, kind = _NLATTR.unpack_from(data, position)
        value = position + 4
        if kind == _UNIX_NAME:
            name = os.fsdecode(data[value : position + length])
        elif kind == _UNIX_PEER:
            (peer,) = _UINT32.unpack_from(data, value)
        elif kind == _UNIX_RQLEN:
            unread, unsent = _TWO_UINT32.unpack_from(data, value)
        elif kind == _UNIX_UID:
            (uid,) = _UINT32.unpack_from(data, value)
        position += max(4, (length + 3) & ~3)
    if not name.startswith("\0"):
        name = name.rstrip("\0")
    return UnixSocket(name, state, inode, cookie, peer, unread, unsent, uid)


def _query(request: bytes, *, dump: bool) -> Iterator[tuple[bytes, int, int]]:
    """The kernel's answers to a request: each as a buffer, and where in it the message begins and ends."""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as sock:
            sock.setblocking(False)  # the kernel has answered before sendto returns; the master calls this too
            flags = _NLM_REQUEST | (_NLM_DUMP if dump else 0)
            sock.sendto(
                _NLMSGHDR.pack(_NLMSGHDR.size + len(request), _SOCK_DIAG_BY_FAMILY, flags, 1, 0) + request, (0, 0)
            )
            more = True
            while more:
                data = sock.recv(_READ_SIZE)
                more = dump
                for kind, start, end in netlink_messages(data):
                    if kind == _NLMSG_DONE:
                        return
                    yield data, start, end
    except OSError as error:
        if error.errno == errno.ENOENT and not dump:  # there is no such socket
            return
        raise ForkdError(f"the kernel does not list its sockets (sock_diag): {error.strerror}") from None


def netlink_messages(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Type, beginning and end of each message in one read. Raises OSError for an error message, or a wrong length."""
    position = 0
    while position + _NLMSGHDR.size <= len(data):
        length, kind, _, _, _ = _NLMSGHDR.unpack_from(data, position)
        if not _NLMSGHDR.size <= length <= len(data) - position:
            raise OSError(errno.EBADMSG, os.strerror(errno.EBADMSG))
        if kind == _NLMSG_ERROR:
            (number,) = _INT32.unpack_from(data, position + _NLMSGHDR.size)
            raise OSError(-number, os.strerror(-number))
        yield kind, position + _NLMSGHDR.size, position + length
        position += (length + 3) & ~3
