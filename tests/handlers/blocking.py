"""Handlers that block: functions of a socket and an address, and request handlers of socketserver."""

from __future__ import annotations

import logging
import os
import socket
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Coroutine
from http.server import BaseHTTPRequestHandler
from typing import Any

from forkd.drain import draining

log = logging.getLogger("blocking")

may_return = threading.Event()


def echo(sock: socket.socket, address: Any) -> None:
    """Sends back what comes."""
    while data := sock.recv(65536):
        sock.sendall(data)


def sends(sock: socket.socket, address: Any) -> None:
    """Sends for as long as it is read."""
    while True:
        sock.sendall(bytes(10_000))


def echo_and_close(sock: socket.socket, address: Any) -> None:
    """The same, and closes the socket."""
    with sock:
        echo(sock, address)


class Lines(socketserver.StreamRequestHandler):
    """Sends back each line, with a word before it."""

    def handle(self) -> None:
        where = self.server.server_address
        assert where == self.request.getsockname()
        for line in self.rfile:
            self.wfile.write(b"> " + line)


class Pages(BaseHTTPRequestHandler):
    """Serves one page, over connections that last."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = f"{self.path} for {self.client_address[0]}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        log.info(format, *args)


def ends(sock: socket.socket, address: Any) -> None:
    """Does what its client says: one word."""
    word = sock.recv(100).decode().strip()
    if word == "raise":
        raise ValueError("as told")
    if word == "exit":
        sys.exit(7)
    if word == "write":  # more than the client's buffers take
        while True:
            sock.sendall(bytes(1 << 16))
    if word == "close":  # with something unread
        sock.sendall(b"last word")
        sock.close()
        sock = socket.socket()  # which gets its number
        sock.close()
    if word == "work":  # that its client is not to wait for
        sock.sendall(b"last word")
        sock.close()
        may_return.wait(20)
    if word == "done":
        may_return.set()
    if word == "wait":
        sock.sendall(b"waiting")
        sock.recv(100)
        sock.sendall(b"drains" if draining() else b"end")
    if word == "fork":
        if os.fork() == 0:
            sock.sendall(b"child")
            sys.exit(0)
        os.wait()
    if word == "sleep":  # whatever becomes of its client
        time.sleep(1)


def busy(sock: socket.socket, address: Any) -> None:
    """Says which process it is, and waits for its client's end."""
    sock.sendall(b"%d\n" % os.getpid())
    while sock.recv(100):
        pass


def who(sock: socket.socket, address: Any) -> None:
    """Says who the client is, and what it has said."""
    sock.sendall(f"{address} ".encode() + sock.recv(100))


def much(sock: socket.socket, address: Any) -> None:
    """Sends much, by the call that its client names."""
    call = sock.recvfrom(100)[0].decode()
    data = bytes(1_000_000)
    if call == "sendfile":
        with tempfile.TemporaryFile() as file:
            file.write(data)
            sock.sendfile(file)
    else:
        getattr(sock, call)(data)


def forgets_await(sock: socket.socket, address: Any) -> Coroutine[Any, Any, None]:
    """Makes a coroutine, and runs nothing."""

    async def serve() -> None:
        sock.sendall(b"never")

    return serve()
