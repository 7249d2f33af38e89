"""A control socket that serves, with clients that wait with its selector, for the tests of it.

A test goes on when something has happened and at no other time.
"""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import cast

from forkd.master.control_socket import ControlClient, ControlSocket
from forkd.messages import JsonObject, Reply
from tests.support.processes import DEADLINE


class Client:
    """A client: what it has heard, and whether it was sent away."""

    def __init__(self, fixture: ControlFixture) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        fixture.stack.callback(self.sock.close)
        self.sock.connect(str(fixture.path))
        self.sock.setblocking(False)
        self.heard = b""
        self.gone = False
        self._selector = fixture.selector
        self._selector.register(self.sock, selectors.EVENT_READ, lambda mask: self._hear())

    def _hear(self) -> None:
        data = b""
        with suppress(ConnectionResetError):
            data = self.sock.recv(1 << 16)
        self.heard += data
        if not data:
            self.gone = True
            self.deaf()

    def deaf(self) -> None:
        """Reads nothing more."""
        self._selector.unregister(self.sock)

    def say(self, message: JsonObject) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    @property
    def answers(self) -> list[JsonObject]:
        return [json.loads(line) for line in self.heard.splitlines()]

    def leave(self) -> None:
        self.deaf()
        self.sock.close()


class ControlFixture:
    """A control socket that serves, and everything that waits with its selector."""

    def __init__(self, path: Path, stack: ExitStack, *, descriptor: int = -1, beside: bool = False) -> None:
        self.path = path
        self.stack = stack
        self.selector = stack.enter_context(selectors.DefaultSelector())
        self.control = ControlSocket(path, self.selector, descriptor=descriptor, beside=beside)
        stack.callback(self.control.close)
        self.later: list[ControlClient] = []
        self.control.serve()

    def answer(self, request: JsonObject, client: ControlClient) -> None:
        """Echoes; keeps some for later."""
        if request.get("later"):
            self.later.append(client)
        else:
            # The socket carries any object; no reply has room for an echo.
            client.reply(cast(Reply, {"ok": True, "echo": request, "filling": "x" * request.get("size", 0)}))

    def until(self, condition: Callable[[], object]) -> None:
        """Serves until the condition holds, which must be so after something happens."""
        while not condition():
            asked = self.control.has_requests()
            events = self.selector.select(0 if asked else DEADLINE)
            assert events or asked, "nothing happens any more"
            for key, mask in events:
                key.data(mask)
            for request, client in self.control.take_requests():
                self.answer(request, client)

    def later_from(self, client: Client) -> ControlClient:
        """The master's side of a client whose request is kept for later."""
        before = len(self.later)
        client.say({"later": True})
        self.until(lambda: len(self.later) > before)
        return self.later[-1]

    def client(self) -> Client:
        return Client(self)

    def ask(self, client: Client, message: JsonObject) -> JsonObject:
        """One request and its answer."""
        before = len(client.heard)
        client.say(message)
        self.until(lambda: client.heard.endswith(b"\n") and len(client.heard) > before)
        return client.answers[-1]
