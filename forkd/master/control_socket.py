"""The control socket: where the command line asks things of the master. Served by the master's one loop.

`ControlSocket` takes in clients, queues their requests for `take_requests`, and sends replies; what a request means is
the concern of `commands`. Only the master's own user and root are let in, and the members of `control_group` where
there is one, whatever the socket file's mode says. A client that does not read, floods or sends no JSON loses its
connection and nothing else. At most one request of each is answered a turn, and where there are too many clients, the
one that was silent for longest makes room for the next.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE, BaseSelector
from typing import Protocol

from forkd.config.address import Address
from forkd.errors import ForkdError
from forkd.messages import AcceptedReply, ErrorReply, JsonObject, Reply
from forkd.system.channel import Channel, ChannelClosed, peer_groups, peer_uid
from forkd.system.listeners import find_holder
from forkd.system.unix_paths import OwnedPath, bind_path

log = logging.getLogger("forkd.control")

#: Clients at a time.
MOST_CLIENTS = 32

#: Requests of one client that wait; one that sends more is closed.
MOST_REQUESTS = 32

#: The fields of records about clients, of which a flood is told in short.
_ABOUT = {"listener": "control socket"}


class ControlClient(Protocol):
    """A client of the control socket, which waits for replies.

    Attributes:
        is_owner: whether it is the daemon's own user, or root.
    """

    is_owner: bool

    def reply(self, reply: Reply, descriptors: Sequence[int] = ()) -> None:
        """Sends a reply, with copies of these descriptors; to a client that has gone it does nothing."""

    def fileno(self) -> int:
        """The connection's descriptor; -1 when the client has gone."""

    def keep(self) -> None:
        """Has the connection stay where there are too many, however long its client is silent."""


class _Client:
    """A connected client."""

    def __init__(self, control: ControlSocket, channel: Channel) -> None:
        self._control = control
        self.channel = channel
        self.due = 0  # its requests whose outcome it has not been told
        self.heard_at = time.monotonic()
        self.is_kept = False
        self.is_owner = True

    def reply(self, reply: Reply, descriptors: Sequence[int] = ()) -> None:
        self._control.send(self, reply, descriptors)

    def fileno(self) -> int:
        return self.channel.fileno()

    def keep(self) -> None:
        self.is_kept = True


class ControlSocket:
    """The socket and its clients.

    Args:
        path: where; a process that listens there already must be dead, which the pid file's lock has shown, or is to be
            succeeded.
        selector: the master's; each descriptor's data is what to call when it is ready.
        descriptor: of the listening socket, where another image of this master has made it; -1: make it.
        beside: make it beside the one that is there, which serves until `take_place`.

    Raises:
        ForkdError: it can't be bound.
    """

    def __init__(self, path: Path, selector: BaseSelector, *, descriptor: int = -1, beside: bool = False) -> None:
        self._path = path
        self._group: int | None = None
        self._selector = selector
        self._clients: set[_Client] = set()
        self._requests: list[tuple[JsonObject, _Client]] = []
        made = path.with_name(f"{path.name}.new") if beside else path
        # Closed for a moment when there is no other descriptor for a client, which would otherwise be ready for ever.
        self._reserve = os.open(os.devnull, os.O_RDONLY)
        self._sock = socket.socket(fileno=descriptor) if descriptor >= 0 else _listen_at(made)
        self._file = OwnedPath(made, None)
        self._file.inode = self._file.there()
        self._sock.setblocking(False)

    @property
    def displaced(self) -> bool:
        """Whether another master's socket stands where this one was."""
        return self._file.there() not in (None, self._file.inode)

    @property
    def beside(self) -> bool:
        """Whether it is still beside another master's."""
        return self._file.path != self._path

    def share(self, group: int | None) -> None:
        """Lets the members of a group in too, by its id; None: nobody but the own user and root. Raises OSError."""
        if group is None and self._group is None:
            return
        self._group, path = group, self._file.path
        if group is not None and path.stat().st_gid != group:
            os.chown(path, -1, group)
        path.chmod(0o600 if group is None else 0o660)

    def take_place(self) -> None:
        """Puts the socket where it belongs, in the place of another master's. Raises OSError."""
        self._file.path.rename(self._path)
        self._file.path = self._path

    def restore(self) -> bool:
        """Makes the path again if something has removed it; whether it had. Raises ForkdError."""
        if self._file.there() is not None:
            return False
        sock = _listen_at(self._file.path)
        sock.setblocking(False)
        waits = self._sock in self._selector.get_map()
        if waits:
            self._selector.unregister(self._sock)
        self._sock.close()
        self._sock = sock
        if waits:
            self.serve()
        self._file.inode = self._file.there()
        if self._group is not None:
            self.share(self._group)
        return True

    def fileno(self) -> int:
        """The listening descriptor."""
        return self._sock.fileno()

    def serve(self) -> None:
        """Lets clients in from now on."""
        self._selector.register(self._sock, EVENT_READ, lambda mask: self._accept())

    def take_requests(self) -> list[tuple[JsonObject, ControlClient]]:
        """The next request of each client that has read what it was told, with the client. Others wait for the next
        call, so that a flood of them holds up nothing else.
        """
        taken: dict[_Client, JsonObject] = {}
        waiting = []
        for request, client in self._requests:
            if client in taken or not self._may_ask(client):
                waiting.append((request, client))
            else:
                taken[client] = request
        self._requests = waiting
        return [(request, client) for client, request in taken.items()]

    def has_requests(self) -> bool:
        """Whether `take_requests` has some."""
        return any(self._may_ask(client) for _, client in self._requests)

    def _may_ask(self, client: _Client) -> bool:
        return client not in self._clients or not client.channel.has_unsent

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return  # or the client has gone again
        uid, owner = peer_uid(sock), True
        if uid not in (0, os.geteuid()):
            owner = False
            if self._group is None or self._group not in peer_groups(sock):
                log.warning("control socket: user %d refused", uid, extra=_ABOUT)
                sock.close()
                return
        self._admit(sock).is_owner = owner

    def adopt(self, descriptor: int, *, due: int = 0) -> ControlClient:
        """Takes in a client of another image of this master, which waits for so many replies."""
        client = self._admit(socket.socket(fileno=descriptor))
        client.due = due
        return client

    def _admit(self, sock: socket.socket) -> _Client:
        if len(self._clients) >= MOST_CLIENTS:
            self._make_room()
        client = _Client(self, Channel(sock))
        self._clients.add(client)
        self._selector.register(client, EVENT_READ, lambda mask: self._ready(client, mask))
        return client

    def _make_room(self) -> None:
        """Closes the connection of a client that waits for nothing, or else of any; the one silent for longest."""
        others = [client for client in self._clients if not client.is_kept]
        log.warning(
            "control socket: %d clients; closed the one that was silent for longest", len(self._clients), extra=_ABOUT
        )
        self._drop(min(others, key=lambda client: (client.due > 0, client.heard_at)))

    def hand_over(self, waiting: Collection[int]) -> list[int]:
        """Called before another image of this master goes on: the descriptors of all clients that it is to serve. One
        that is due a reply which that image would not know of gets an error.

        Args:
            waiting: descriptors of clients whose outcome the other image will tell.
        """
        for client in list(self._clients):
            if client.due and client.fileno() not in waiting:
                client.reply(ErrorReply("an upgrade has begun; ask again"))
        return [client.fileno() for client in self._clients]

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
                self._receive(client)
        except ChannelClosed:
            self._drop(client)
        else:
            self._watch(client)

    def _receive(self, client: _Client) -> None:
        """Queues what a client asks. Raises ChannelClosed, also for one that asks too much at once."""
        requests = client.channel.receive()
        client.heard_at = time.monotonic()
        client.due += len(requests)
        self._requests += [(request, client) for request in requests]
        if sum(one is client for _, one in self._requests) > MOST_REQUESTS:
            self._requests = [(request, one) for request, one in self._requests if one is not client]
            text = "control socket: closed a client that sent more than %d requests at once"
            log.warning(text, MOST_REQUESTS, extra=_ABOUT)
            raise ChannelClosed("too many requests")

    def send(self, client: _Client, reply: Reply, descriptors: Sequence[int]) -> None:
        """Sends a reply; to a client that has gone it does nothing."""
        if client not in self._clients:
            return
        client.due -= not isinstance(reply, AcceptedReply)
        try:
            if descriptors:
                client.channel.send_with_descriptors(reply, descriptors)
            else:
                client.channel.send(reply)
        except ChannelClosed:
            self._drop(client)
        else:
            self._watch(client)

    def _watch(self, client: _Client) -> None:
        key = self._selector.get_map().get(client) if client in self._clients else None
        events = EVENT_READ | EVENT_WRITE * client.channel.has_unsent
        if key is not None and key.events != events:
            self._selector.modify(client, events, key.data)

    def _drop(self, client: _Client) -> None:
        if client not in self._clients:
            return
        self._clients.discard(client)
        self._selector.unregister(client)
        client.channel.close()

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
        self._file.remove()
        self._sock.close()


def _in_the_way(path: Path) -> str:
    """What is at the path of a control socket that is to be made, and what to do."""
    if not path.is_socket():
        return "there is a file that is no socket; remove it, or set run_directory to another"
    holder = find_holder(Address("unix", path=str(path)))
    return f"{holder or 'a process'} listens there; end it, or set run_directory to another"


def _listen_at(path: Path) -> socket.socket:
    """A socket that listens at a path. Raises ForkdError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        bind_path(sock, str(path), 0o600)
        sock.listen(4 * MOST_CLIENTS)
    except OSError as error:
        sock.close()
        why = error.strerror or str(error)
        if os.path.islink(path):
            why = "it is a symbolic link; remove it"
        elif error.errno == errno.EADDRINUSE:
            why = _in_the_way(path)
        raise ForkdError(f"can't make the control socket {path}: {why}") from None
    return sock
