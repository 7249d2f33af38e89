"""Clients of the master's own addresses: the admin endpoint, by HTTP, and the agent check."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Mapping
from typing import NamedTuple

from tests.support.clients import dial
from tests.support.daemon import Daemon


class Answer(NamedTuple):
    """What was answered."""

    status: int
    headers: Mapping[str, str]
    body: str


class Connection(http.client.HTTPConnection):
    """A connection to an address as forkd writes it."""

    def __init__(self, address: str) -> None:
        super().__init__("localhost")
        self.address = address

    def connect(self) -> None:
        self.sock: socket.socket = dial(self.address)

    def ask(self, path: str, method: str = "GET", accept: str = "*/*", body: bytes | None = None) -> Answer:
        self.request(method, path, body, {"Accept": accept})
        with self.getresponse() as response:
            return Answer(response.status, dict(response.getheaders()), response.read().decode())


def service_of(daemon: Daemon, role: str = "admin") -> str:
    """The address at which a daemon does this."""
    return next(str(one["address"]) for one in daemon.status()["services"] if one["role"] == role)


def ask(where: Daemon | str, path: str, method: str = "GET", accept: str = "*/*") -> Answer:
    """What an admin endpoint answers, on a connection of its own."""
    connection = Connection(where if isinstance(where, str) else service_of(where))
    try:
        return connection.ask(path, method, accept)
    finally:
        connection.close()


def check(where: Daemon | str) -> str:
    """What an agent check gets."""
    with dial(where if isinstance(where, str) else service_of(where, "agent")) as sock, sock.makefile("rb") as lines:
        return lines.read().decode()
