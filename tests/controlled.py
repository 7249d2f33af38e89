"""A control socket that serves, with clients that wait with its selector, for the tests of it.

A test goes on when something has happened and at no other time.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from forkd.master.control import ControlSocket, Reply
from forkd.wire import Message

PATIENCE = 20.0  # seconds in which something must happen


class Client:
    """A client: what it has heard, and whether it was sent away."""

    def __init__(self, place: Place) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        place.stack.callback(self.sock.close)
        self.sock.connect(str(place.path))
        self.sock.setblocking(False)
        self.heard = b""
        self.gone = False
        self._selector = place.selector
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

    def say(self, message: Message) -> None:
        self.sock.sendall(json.dumps(message).encode() + b"\n")

    @property
    def answers(self) -> list[Message]:
        return [json.loads(line) for line in self.heard.splitlines()]

    def leave(self) -> None:
        self.deaf()
        self.sock.close()


class Place:
    """A control socket that serves, and everything that waits with its selector."""

    def __init__(self, path: Path, stack: ExitStack, *, descriptor: int = -1, beside: bool = False) -> None:
        self.path = path
        self.stack = stack
        self.selector = stack.enter_context(selectors.DefaultSelector())
        self.control = ControlSocket(path, self.selector, descriptor=descriptor, beside=beside)
        stack.callback(self.control.close)
        self.later: list[Reply] = []
        self.control.serve(self.answer)

    def answer(self, message: Message, reply: Reply) -> None:
        """Echoes; keeps some for later."""
        if message.get("later"):
            self.later.append(reply)
        else:
            reply({"ok": True, "echo": message, "filling": "x" * message.get("size", 0)})

    def until(self, condition: Callable[[], object]) -> None:
        """Serves until the condition holds, which must be so after something happens."""
        while not condition():
            events = self.selector.select(PATIENCE)
            assert events, "nothing happens any more"
            for key, mask in events:
                key.data(mask)

    def later_from(self, client: Client) -> Reply:
        """The reply to a request that is kept for later."""
        before = len(self.later)
        client.say({"later": True})
        self.until(lambda: len(self.later) > before)
        return self.later[-1]

    def client(self) -> Client:
        return Client(self)

    def ask(self, client: Client, message: Message) -> Message:
        """One request and its answer."""
        before = len(client.heard)
        client.say(message)
        self.until(lambda: client.heard.endswith(b"\n") and len(client.heard) > before)
        return client.answers[-1]


def in_child(work: Callable[[], None]) -> int:
    """Forks a process that does this and nothing else; its pid. Its exit status says whether it went well."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    finally:
        if status:
            sys.excepthook(*sys.exc_info())
        os._exit(status)


def went_well(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
