"""The control socket: where the command line asks things of the master. Served by the master's one loop.

One JSON object a request, one a reply. Only the master's own user and root are listened to, whatever the socket file's
mode says. A client that does not read, floods or talks nonsense loses its connection and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector
from typing import Protocol

from forkd.errors import ForkdError
from forkd.system.channel import Channel, ChannelClosed, peer_uid
from forkd.system.paths import take_path
from forkd.wire import Message

log = logging.getLogger("forkd.control")

#: Clients at a time; more wait in the backlog.
MOST_CLIENTS = 32


class Reply(Protocol):
    """Sends a reply to one request, at any later time; to a client that has gone it does nothing."""

    def __call__(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Sends it, with copies of these descriptors."""

    def fileno(self) -> int:
        """The client's descriptor; -1 when it has gone."""


class _Client:
    """One client, which is also how to reply to it."""

    def __init__(self, control: ControlSocket, channel: Channel) -> None:
        self._control = control
        self.channel = channel

    def __call__(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        self._control.send(self, message, descriptors)

    def fileno(self) -> int:
        return self.channel.fileno()


Answer = Callable[[Message, Reply], None]


class ControlSocket:
    """The socket and its clients.

    Args:
        path: where; whoever listens there already must be dead, which the pid file's lock has shown, or is to be
            succeeded.
        selector: the master's; each descriptor's data is what to call when it is ready.
        descriptor: of the listening socket, where another image of this master has made it; -1: make it.
        beside: make it beside the one that is there, which serves until `take_place`.

    Raises:
        ForkdError: it can't be bound.
    """

    def __init__(self, path: Path, selector: BaseSelector, *, descriptor: int = -1, beside: bool = False) -> None:
        self._path = path
        self._selector = selector
        self._clients: set[_Client] = set()
        self._answer: Answer = lambda message, reply: None
        self._made = path.with_name(f"{path.name}.new") if beside else path
        if descriptor >= 0:
            self._sock = socket.socket(fileno=descriptor)
        else:
            self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                take_path(self._sock, str(self._made), 0o600)
                self._sock.listen(MOST_CLIENTS)
            except OSError as error:
                self._sock.close()
                why = "it is a symbolic link; remove it" if self._made.is_symlink() else error.strerror or error
                raise ForkdError(f"can't make the control socket {self._made}: {why}") from None
        self._inode = self._inode_there()
        self._sock.setblocking(False)
        # Given up for a moment when there is no other descriptor for a client, who would else be ready for ever.
        self._reserve = os.open(os.devnull, os.O_RDONLY)

    def _inode_there(self) -> int:
        """The inode of the socket file; 0 where somebody has removed it."""
        with contextlib.suppress(FileNotFoundError):
            return self._made.lstat().st_ino
        return 0

    @property
    def displaced(self) -> bool:
        """Whether another master's socket stands where this one was."""
        return self._inode_there() not in (0, self._inode)

    def take_place(self) -> None:
        """Puts the socket where it belongs; whoever's was there is asked nothing any more. Raises OSError."""
        self._made.rename(self._path)
        self._made = self._path

    def fileno(self) -> int:
        """The listening descriptor."""
        return self._sock.fileno()

    def serve(self, answer: Answer) -> None:
        """Lets clients in from now on; `answer` gets each request, and what to reply with."""
        self._answer = answer
        self._selector.register(self._sock, EVENT_READ, lambda mask: self._accept())

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # or it has gone again
        uid = peer_uid(sock)
        if uid not in (0, os.geteuid()):
            log.warning("refused user %d on the control socket", uid)
            sock.close()
            return
        self._admit(sock)

    def adopt(self, descriptor: int) -> Reply:
        """Takes in a client of another image of this master, who waits for a reply; how to send it."""
        return self._admit(socket.socket(fileno=descriptor))

    def _admit(self, sock: socket.socket) -> _Client:
        client = _Client(self, Channel(sock))
        self._clients.add(client)
        self._selector.register(client, EVENT_READ, lambda mask: self._ready(client, mask))
        if len(self._clients) >= MOST_CLIENTS:
            self._selector.unregister(self._sock)
        return client

    def _turn_away(self) -> None:
        os.close(self._reserve)
        with contextlib.suppress(OSError):
            self._sock.accept()[0].close()
        self._reserve = os.open(os.devnull, os.O_RDONLY)

    def _ready(self, client: _Client, mask: int) -> None:
        try:
            if mask & EVENT_WRITE:
                client.channel.flush()
            if mask & EVENT_READ:
                for message in client.channel.receive():
                    self._answer(message, client)
        except ChannelClosed:
            self._drop(client)
        else:
            self._watch(client)

    def send(self, client: _Client, message: Message, descriptors: Sequence[int]) -> None:
        """Sends a reply; to a client that has gone it does nothing."""
        if client not in self._clients:
            return
        try:
            if descriptors:
                client.channel.send_with(message, descriptors)
            else:
                client.channel.send(message)
        except ChannelClosed:
            self._drop(client)
        else:
            self._watch(client)

    def _watch(self, client: _Client) -> None:
        key = self._selector.get_map().get(client) if client in self._clients else None
        events = EVENT_READ | EVENT_WRITE * client.channel.waiting
        if key is not None and key.events != events:
            self._selector.modify(client, events, key.data)

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._selector.unregister(client)
        client.channel.close()
        if len(self._clients) == MOST_CLIENTS - 1:
            self._selector.register(self._sock, EVENT_READ, lambda mask: self._accept())

    def close(self) -> None:
        """Closes everything in this process; for a forked child, which leaves the file to the master."""
        for client in self._clients:
            client.channel.close()
        self._clients.clear()
        if self._sock.fileno() >= 0:
            os.close(self._reserve)
        self._sock.close()

    def remove(self) -> None:
        """Removes the socket file, if it is still this socket's. The clients' end of file comes with the end of the
        process, when all is done.
        """
        if self._inode and self._inode_there() == self._inode:
            self._made.unlink()
        self._sock.close()
