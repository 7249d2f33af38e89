"""Many clients at the same time, from addresses of their own: which of them are served, and what the others hear."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType
from typing import Self

from clients import endpoint
from processes import PATIENCE


@dataclass(slots=True)
class Storm:
    """Clients of an echo, each of which says a word as soon as it is connected, and stays.

    Attributes:
        waiting: those that have neither been served nor turned away yet.
        served: those that heard their word.
        refused: what the others heard before the end, with resets as None.
    """

    waiting: set[socket.socket] = field(default_factory=set)
    served: list[socket.socket] = field(default_factory=list)
    refused: list[bytes | None] = field(default_factory=list)
    _words: dict[socket.socket, bytes] = field(default_factory=dict)

    def rise(self, address: str, origins: Iterable[str]) -> Self:
        """Connects one client from each of these hosts, all at once."""
        family, where = endpoint(address)
        for host in origins:
            sock = socket.socket(family, socket.SOCK_STREAM)
            self.waiting.add(sock)
            sock.setblocking(False)
            sock.bind((host, 0))
            sock.connect_ex(where)
        return self

    def settle(self, served: int = -1, seconds: float = PATIENCE) -> Self:
        """Waits until each has been served or turned away, or, if that is given, until so many are served."""
        deadline = monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            for sock in self.waiting:
                selector.register(sock, selectors.EVENT_READ if sock in self._words else selectors.EVENT_WRITE)
            while self.waiting and len(self.served) != served:
                assert monotonic() < deadline, f"{len(self.waiting)} wait, {len(self.served)} are served"
                for key, _ in selector.select(deadline - monotonic()):
                    sock: socket.socket = key.fileobj  # type: ignore[assignment]
                    if sock not in self._words:
                        self._words[sock] = b""
                        selector.modify(sock, selectors.EVENT_READ)
                        self._say(sock)
                    elif self._hear(sock):
                        selector.unregister(sock)
        return self

    def _say(self, sock: socket.socket) -> None:
        with contextlib.suppress(ConnectionError):  # turned away already, of which the reading tells
            sock.send(b"!")

    def _hear(self, sock: socket.socket) -> bool:
        """Whether it is clear what has become of it."""
        try:
            data = sock.recv(4096)
        except ConnectionResetError:
            self._words[sock] = b"reset"
            data = b""
        heard = self._words[sock] = self._words[sock] + data
        if heard == b"!":
            self.served.append(sock)
        elif data:
            return False
        else:
            self.refused.append(None if heard == b"reset" else heard)
            sock.close()
        self.waiting.discard(sock)
        return True

    def leave(self, count: int = -1) -> None:
        """Closes so many of those that are served; all, and those that wait, if it is not given."""
        gone = self.served[: len(self.served) if count < 0 else count]
        for sock in (*gone, *(self.waiting if count < 0 else ())):
            sock.close()
        self.served = self.served[len(gone) :]
        if count < 0:
            self.waiting.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
