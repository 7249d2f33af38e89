"""The client's side of a connection for blocking code: calls on any connected stream socket that never get stuck.

    with connect("tcp://127.0.0.1:7007", timeout=5) as sock:
        send_all(sock, b"hello\\n", timeout=5)
        line = recv_until(sock, b"\\n", timeout=5)

Each call has one deadline for all that it does, which it keeps by poll(2) whatever the socket's own timeout or blocking
mode is; those are left as they are. What is received is never more than was asked for, so the calls mix with each other
and with the socket's own methods. TLS sockets (ssl.SSLSocket) work as well; one of those is for one thread at a time.

Errors of the connection itself (ConnectionResetError and other OSErrors) are raised as the system reports them.

There is one module: `blocking`.
"""

from forkd.client.blocking import (
    LIMIT,
    EndOfStream,
    LimitExceeded,
    ReceiveTimeout,
    SendTimeout,
    connect,
    recv_exactly,
    recv_until,
    send_all,
)

__all__ = [
    "LIMIT",
    "EndOfStream",
    "LimitExceeded",
    "ReceiveTimeout",
    "SendTimeout",
    "connect",
    "recv_exactly",
    "recv_until",
    "send_all",
]
