"""The master's own addresses: the admin endpoint and the agent check, served by the master's one loop; and statsd.

`AdminServer` listens on the services of the generation that serves, takes clients in, and closes those that are too
many or too late. It never waits: each client is on the master's selector. What a client is answered is the concern of
`http` and `agent`.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Sequence
from selectors import EVENT_READ, BaseSelector
from typing import TypeVar

from forkd.config.settings import AGENT
from forkd.master.admin.agent import agent_line
from forkd.master.admin.client import Client
from forkd.master.admin.history import History
from forkd.master.admin.metrics import Metrics
from forkd.master.admin.pages import Pages, Told
from forkd.master.admin.statsd import StatsdSender
from forkd.system.listeners import BoundListener

log = logging.getLogger("forkd.admin")

#: Clients at a time.
MOST_CLIENTS = 64

#: Clients that are taken in at a time, before others have their turn.
_AT_A_TIME = 16

#: Seconds until what has failed is tried again.
_AGAIN = 10.0

#: The fields of records about clients, of which a flood is told in short.
_ABOUT = {"listener": "admin"}

T = TypeVar("T")
D = TypeVar("D")


class AdminServer:
    """All of it.

    Args:
        master: what is told of.
        selector: the master's; each descriptor's data is what to call when it is ready.
    """

    def __init__(self, master: Told, selector: BaseSelector) -> None:
        self._master = master
        self._selector = selector
        metrics = Metrics(master.state)
        self._history = History(master.state)
        self._pages = Pages(master, metrics, self._history)
        self._statsd = StatsdSender(master.state, metrics)
        self._clients: set[Client] = set()
        # By the socket that the generation has: the copy that is listened on here, which nothing else closes.
        self._listening: dict[socket.socket, socket.socket] = {}
        # Closed for a moment when there is no other descriptor for a client, which would otherwise be ready for ever.
        self._reserve = os.open(os.devnull, os.O_RDONLY)

    def advance(self, now: float) -> float | None:
        """Listens where it should by now, and closes the clients that are late; when to look again, None for never."""
        state = self._master.state
        self._listen([] if state.superseded or state.control.beside else state.generation.services)
        for client in [client for client in self._clients if client.deadline <= now]:
            self._drop(client)
        push_at = self._try("statsd", lambda: self._statsd.advance(now), now + _AGAIN)
        sample_at = None
        if state.generation.settings.admin.address:
            sample_at = self._try("history", lambda: self._history.advance(now), now + _AGAIN)
        deadlines = [client.deadline for client in self._clients]
        deadlines += [when for when in (push_at, sample_at) if when is not None]
        return min(deadlines, default=None)

    def finish(self) -> None:
        """At the daemon's end: sends what is to be sent."""
        self._try("statsd", self._statsd.push, None)

    def _try(self, what: str, call: Callable[[], T], otherwise: D) -> T | D:
        """What a call returns; or something else where it raises: what is told of the daemon is not to end it."""
        try:
            return call()
        except Exception:  # (a master's event)
            log.exception("admin: %s can't be told", what, extra=_ABOUT)
            return otherwise

    def _listen(self, services: Sequence[BoundListener]) -> None:
        wanted = {sock: bound for bound in services for sock in bound.sockets}
        if wanted.keys() == self._listening.keys():
            return
        for sock in [sock for sock in self._listening if sock not in wanted]:
            copy = self._listening.pop(sock)
            self._selector.unregister(copy)
            copy.close()
        for sock in [sock for sock in wanted if sock not in self._listening]:
            copy = self._listening[sock] = sock.dup()
            copy.setblocking(False)
            self._selector.register(copy, EVENT_READ, lambda mask, sock=sock: self._accept(sock))
            log.info("%s listens on %s", wanted[sock].listener.handler, wanted[sock].address)

    def _accept(self, sock: socket.socket) -> None:
        role = next(
            (bound.listener.handler for bound in self._master.state.generation.services if sock in bound.sockets), None
        )
        for _ in range(_AT_A_TIME):
            copy = self._listening.get(sock)
            if copy is None or role is None:
                return
            try:
                connection, peer = copy.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._turn_away(copy)
                return  # or none waits
            connection.setblocking(False)
            client = self._agent(connection) if role == AGENT else self._http(connection, peer)
            if client is not None:
                self._admit(client)

    def _agent(self, connection: socket.socket) -> Client:
        return Client(connection, agent_line(self._master.state))

    def _http(self, connection: socket.socket, peer: object) -> Client | None:
        try:
            from forkd.master.admin.http import HttpClient  # noqa: PLC0415 (loaded where admin is set)
        except ImportError as error:  # removed while an upgrade replaced the image
            log.error("admin: %s can't be imported", error.name, extra=_ABOUT)
            connection.close()
            return None
        networks = self._master.state.generation.settings.admin.allow
        allowed = True
        if networks and isinstance(peer, tuple):
            address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
            allowed = any(address in network for network in networks)
        return HttpClient(connection, self._pages, allowed=allowed)

    def _admit(self, client: Client) -> None:
        if len(self._clients) >= MOST_CLIENTS:
            log.warning("admin: %d clients; closed the one that was silent for longest", MOST_CLIENTS, extra=_ABOUT)
            self._drop(min(self._clients, key=lambda one: (not one.idle, one.deadline)))
        self._clients.add(client)
        self._selector.register(client, client.events, lambda mask: self._ready(client))

    def _turn_away(self, listening: socket.socket) -> None:
        os.close(self._reserve)
        with contextlib.suppress(OSError):
            listening.accept()[0].close()
        self._reserve = os.open(os.devnull, os.O_RDONLY)

    def _ready(self, client: Client) -> None:
        if client not in self._clients:  # closed by an event before this one in the same round
            return
        if not self._try("an answer", client.ready, otherwise=False):
            self._drop(client)
            return
        key = self._selector.get_key(client)
        if key.events != client.events:
            self._selector.modify(client, client.events, key.data)

    def _drop(self, client: Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client)
        client.close()

    def close(self) -> None:
        """In a forked child: closes all of it."""
        for client in self._clients:
            client.close()
        for copy in self._listening.values():
            copy.close()
        self._statsd.close()
        os.close(self._reserve)
