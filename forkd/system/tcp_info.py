"""What the kernel knows of a TCP connection: `struct tcp_info` of linux/tcp.h, by getsockopt(TCP_INFO) or sock_diag(7).

It has grown over the kernel's versions at its end alone. What an older kernel leaves out reads as zero.
"""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

#: The states of a TCP socket (net/tcp_states.h).
ESTABLISHED, SYN_SENT, SYN_RECV, FIN_WAIT1, FIN_WAIT2, TIME_WAIT, CLOSE, CLOSE_WAIT, LAST_ACK, LISTEN, CLOSING = range(
    1, 12
)

_ENDED_BY_PEER = (CLOSE_WAIT, LAST_ACK, CLOSING, TIME_WAIT)

_FORM = struct.Struct("=B7x 16x 2I 12x I 4x 2I 8x I 48x 2Q 8x I 52x 2Q")
_ZEROS = bytes(_FORM.size)


class TcpInfo(NamedTuple):
    """A part of it, in the kernel's own units.

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
        return self.bytes_received - (self.state in _ENDED_BY_PEER)

    @property
    def sent(self) -> int:
        """Bytes of data that were sent, each once."""
        return self.bytes_sent - self.bytes_retrans

    @classmethod
    def parse(cls, data: bytes) -> TcpInfo:
        """From the struct's bytes, of whatever length."""
        return cls._make(_FORM.unpack_from(data if len(data) >= _FORM.size else data + _ZEROS))


def read_tcp_info(sock: socket.socket) -> TcpInfo | None:
    """What the kernel knows of a socket's connection (tcp(7), TCP_INFO); None where it is none of TCP's, or is gone."""
    try:
        return TcpInfo.parse(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FORM.size))
    except OSError:
        return None
