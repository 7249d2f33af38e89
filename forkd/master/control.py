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
from collections.abc import Callable
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector

from forkd.errors import ForkdError
from forkd.system.channel import Channel, ChannelClosed, peer_uid
from forkd.system.sockets import take_path
from forkd.wire import Message

log = logging.getLogger("forkd.control")

#: Clients at a time; more wait in the backlog.
MOST_CLIENTS = 32

#: Sends the reply to one request, at any later time; to a client that has gone it does nothing.
Reply = Callable[[Message], None]
Answer = Callable[[Message, Reply], None]


class ControlSocket:
    """The socket and its clients.

    Args:
        path: where; whoever listens there already must be dead, which the pid file's lock has shown.
        selector: the master's; each descriptor's data is what to call when it is ready.

    Raises:
        ForkdError: it can't be bound.
    """

    def __init__(self, path: Path, selector: BaseSelector) -> None:
        self._path = path
        self._selector = selector
        self._clients: set[Channel] = set()
        self._answer: Answer = lambda message, reply: None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            take_path(self._sock, str(path), 0o600)
            self._sock.listen(MOST_CLIENTS)
        except OSError as error:
            self._sock.close()
            raise ForkdError(f"can't make the control socket {path}: {error.strerror or error}") from None
        self._sock.setblocking(False)
        # Given up for a moment when there is no other descriptor for a client, who would else be ready for ever.
        self._reserve = os.open(os.devnull, os.O_RDONLY)

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
        client = Channel(sock)
        self._clients.add(client)
        self._selector.register(client, EVENT_READ, lambda mask: self._ready(client, mask))
        if len(self._clients) >= MOST_CLIENTS:
            self._selector.unregister(self._sock)

    def _turn_away(self) -> None:
        os.close(self._reserve)
        with contextlib.suppress(OSError):
            self._sock.accept()[0].close()
        self._reserve = os.open(os.devnull, os.O_RDONLY)

    def _ready(self, client: Channel, mask: int) -> None:
        try:
            if mask & EVENT_WRITE:
                client.flush()
            if mask & EVENT_READ:
                for message in client.receive():
                    self._answer(message, lambda reply: self._reply(client, reply))
        except ChannelClosed:
            self._drop(client)
        else:
            self._watch(client)

    def _reply(self, client: Channel, message: Message) -> None:
        if client not in self._clients:
            return
        try:
            client.send(message)
        except ChannelClosed:
            self._drop(client)
        else:
            self._watch(client)

    def _watch(self, client: Channel) -> None:
        key = self._selector.get_map().get(client) if client in self._clients else None
        events = EVENT_READ | EVENT_WRITE * client.waiting
        if key is not None and key.events != events:
            self._selector.modify(client, events, key.data)

    def _drop(self, client: Channel) -> None:
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._selector.unregister(client)
        client.close()
        if len(self._clients) == MOST_CLIENTS - 1:
            self._selector.register(self._sock, EVENT_READ, lambda mask: self._accept())

    def close(self) -> None:
        """Closes everything in this process; for a forked child, which leaves the file to the master."""
        for client in self._clients:
            client.close()
        self._clients.clear()
        if self._sock.fileno() >= 0:
            os.close(self._reserve)
        self._sock.close()

    def remove(self) -> None:
        """Removes the socket file. The clients' end of file comes with the end of the process, when all is done."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        self._sock.close()
