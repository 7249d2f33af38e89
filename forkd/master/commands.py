"""Answers the requests of the control socket, at once or when what was asked for has come about.

`Requests.answer` checks a request and has the master act. `Requests.answer_waiting`, called at each turn of the
master's loop, replies to the clients whose outcome is there by then. The outcome of a reload is told by `reload`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable
from math import inf
from typing import Any, Protocol

from forkd.config.values import parse_network
from forkd.errors import system_reason
from forkd.master.control_socket import ControlClient
from forkd.master.plan import GRACE, STACKS
from forkd.master.spawn import Worker
from forkd.master.state import DaemonState
from forkd.master.status import clients_of, peers_of
from forkd.master.workers import DRAINING_SECONDS
from forkd.messages import (
    AcceptedReply,
    ClientsRequest,
    DiffRequest,
    DoneReply,
    DrainRequest,
    ErrorReply,
    HandOverRequest,
    InvalidMessage,
    JsonObject,
    KillCommand,
    KilledReply,
    KillRequest,
    PeersCommand,
    PeersReply,
    PeersRequest,
    ReloadRequest,
    Reply,
    ResumeRequest,
    ScaledReply,
    ScaleRequest,
    StatusReply,
    StatusRequest,
    StopRequest,
    UpgradeRequest,
    decode_request,
)
from forkd.signals import Command
from forkd.states import MasterState
from forkd.system.scoreboard import open_read_only

log = logging.getLogger("forkd.master")

_MOST_PEERS = 4000  # of datagram sockets in one reply: so many fit into `messages.LARGEST`
_MOST_CLOSED = 1 << 20  # connections that a worker may claim to have closed

_IN_FOREGROUND = (
    "it runs in the foreground, and whatever started it would lose it: restart it there (by its supervisor, or the "
    "container), or use `forkd upgrade`, which keeps the process"
)

#: The reply to a request that had to wait, or None while it is not yet time.
Outcome = Callable[[], Reply | None]


class MasterActions(Protocol):
    """What the master does for the control socket's clients."""

    state: DaemonState

    def obey(self, command: Command, source: str) -> None:
        """Does what a signal would ask for."""

    def drain(self, *, drained: bool, source: str) -> None:
        """Has balancers told that they should send no clients from now on, or that they should again."""

    def scale(self, wanted: int, source: str) -> str:
        """Wants another number of workers; or why that can't be."""

    def change(self, verb: str, client: ControlClient | None = None) -> None:
        """Reloads or upgrades, or tells what a reload would change."""

    def hand_over(self, client: ControlClient) -> None:
        """Lends the lock and the listeners to another master."""

    def status(self) -> dict[str, Any]:
        """Its state, fit for JSON."""


class Requests:
    """Answers requests.

    Args:
        master: what carries them out.
    """

    def __init__(self, master: MasterActions) -> None:
        self._master = master
        self._waiting: list[tuple[ControlClient, Outcome]] = []
        self._drains_by = inf  # after a restart: until when workers are waited for that take clients yet
        self._successor: ControlClient | None = None  # starts the master that is to succeed this one

    @property
    def succession(self) -> bool:
        """Whether another master is being started to succeed this one."""
        return self._successor is not None and self._successor.fileno() >= 0

    def answer(self, found: JsonObject, client: ControlClient) -> None:
        """Answers one request, now or when `answer_waiting` finds that its time has come."""
        try:
            request = decode_request(found)
        except InvalidMessage as error:
            client.reply(ErrorReply(str(error)))
            return
        match request:
            case StatusRequest():
                client.reply(StatusReply(self._master.status()))
            case StopRequest():
                self._stop(request, client)
            case ReloadRequest() | UpgradeRequest() | DiffRequest():
                self._change(request.KIND[1], client)
            case HandOverRequest():
                self._hand_over(client)
            case ScaleRequest(workers):
                self._scale(workers, client)
            case DrainRequest() | ResumeRequest():
                self._drain(client, drained=isinstance(request, DrainRequest))
            case ClientsRequest():
                self._clients(client)
            case PeersRequest():
                self._peers(client)
            case KillRequest():
                self._kill(request, client)

    def answer_waiting(self) -> float | None:
        """Answers those whose time has come; called at each turn of the master's loop.

        Returns:
            When it is to be called again at the latest; None for no need.
        """
        if self._successor is not None and self._successor.fileno() < 0:
            self._successor = None
            if self._master.state.control.displaced:  # it died when all was done but the last request
                self._master.state.superseded = True
                if (
                    self._master.state.master_state is MasterState.RUNNING
                ):  # else it would be the second stop, which cuts clients
                    self._master.obey(Command.STOP, "another master in its place")
        waiting, self._waiting = self._waiting, []
        for client, outcome in waiting:
            reply = outcome()
            if reply is None:
                self._waiting.append((client, outcome))
            else:
                client.reply(reply)
        return self._drains_by if self._waiting and self._drains_by < inf else None

    def _stop(self, request: StopRequest, client: ControlClient) -> None:
        master = self._master
        master.state.superseded = request.succeeded
        source = "forkd restart" if request.succeeded else "forkd stop"
        master.obey(Command.QUIT if request.now else Command.STOP, source)
        accepted = AcceptedReply(master.state.stop_timeout)
        if request.succeeded:  # this reply ends the command, after which the new code alone takes clients
            self._drains_by = time.monotonic() + DRAINING_SECONDS
            self._waiting.append((client, lambda: accepted if self._drains() else None))
        else:
            client.reply(accepted)
        self._waiting.append((client, lambda: DoneReply() if master.state.master_state is MasterState.OVER else None))

    def _drains(self) -> bool:
        """Whether no worker takes clients any more, or has stood still for so long that it takes none either."""
        if time.monotonic() < self._drains_by and self._master.state.pool.take_clients():
            return False
        self._drains_by = inf
        return True

    def _change(self, verb: str, client: ControlClient) -> None:
        # Twice: the one that is under way, and this one.
        within = 4 * self._master.state.generation.settings.boot_timeout + 4 * (GRACE + STACKS)
        client.reply(AcceptedReply(within))
        self._master.change(verb, client)

    def _hand_over(self, client: ControlClient) -> None:
        state, change = self._master.state.master_state, self._master.status().get("change")
        # What has started this process would see it end, and take the daemon for stopped, or start a second one.
        if not client.is_owner:
            client.reply(ErrorReply("only the daemon's own user and root may restart it; reload or upgrade it"))
        elif self._master.state.notifier.has_manager:
            client.reply(ErrorReply("a service manager runs it; use `systemctl restart`, or `forkd upgrade`"))
        elif not self._master.state.launch.detached:
            client.reply(ErrorReply(_IN_FOREGROUND))
        elif state is not MasterState.RUNNING:
            client.reply(ErrorReply(f"the daemon is {state.value}"))
        elif change or self.succession:
            client.reply(ErrorReply(f"another change is under way: {change or 'restart'}"))
        else:
            self._successor = client
            client.keep()
            self._master.hand_over(client)

    def _scale(self, wanted: int, client: ControlClient) -> None:
        master, state = self._master, self._master.state
        if state.master_state is not MasterState.RUNNING:
            client.reply(ErrorReply(f"the daemon is {state.master_state.value}"))
            return
        if why_not := master.scale(wanted, "forkd scale"):
            client.reply(ErrorReply(why_not))
            return
        known = state.last_failure

        def outcome() -> Reply | None:
            if state.wanted != wanted or state.master_state is not MasterState.RUNNING:
                return ErrorReply(f"the daemon is {state.master_state.value} and wants {state.wanted} workers")
            if state.last_failure is not known:
                return ErrorReply(str(state.last_failure))
            return ScaledReply(wanted) if state.all_serve() else None

        self._waiting.append((client, outcome))

    def _drain(self, client: ControlClient, *, drained: bool) -> None:
        state = self._master.state.master_state
        if state is not MasterState.RUNNING:
            client.reply(ErrorReply(f"the daemon is {state.value}"))
        elif self.succession:  # the other master would know nothing of it
            client.reply(ErrorReply("a restart is under way"))
        else:
            self._master.drain(drained=drained, source="forkd drain" if drained else "forkd resume")
            client.reply(DoneReply())

    def _clients(self, client: ControlClient) -> None:
        """Tells what it takes to find the clients without the workers: which processes and listeners are meant, and
        where in the regions' memory, which can only be read by the descriptor that goes with it, each worker writes.
        """
        found = clients_of(self._master.state)
        try:
            reader = open_read_only(self._master.state.board.regions.descriptor)
        except OSError as error:  # no such memory, or no descriptor left
            log.warning("can't show since when clients are here: %s", system_reason(error))
            client.reply(found)
            return
        try:
            client.reply(found, [reader])
        finally:
            os.close(reader)

    def _peers(self, client: ControlClient) -> None:
        """Tells the recent peers of datagram sockets, which the workers alone know."""
        question = self._master.state.pool.ask(PeersCommand())
        slots = {one.pid: one.slot for one in question.asked}

        def outcome() -> Reply | None:
            if not question.is_over():
                return None
            found = [one for pid, claim in question.answers.items() for one in peers_of(slots[pid], pid, claim)]
            return PeersReply(found[:_MOST_PEERS], _named(question.missing()))

        self._waiting.append((client, outcome))

    def _kill(self, request: KillRequest, client: ControlClient) -> None:
        try:
            command = _kill_command(request)
        except ValueError as error:
            client.reply(ErrorReply(str(error)[:200]))
            return
        question = self._master.state.pool.ask(command)
        meant = command.network or f"ID {command.cookie}"
        log.info("closing the clients of %s, by forkd clients", meant)

        def outcome() -> Reply | None:
            if not question.is_over():
                return None
            counts = (found for found in question.answers.values() if isinstance(found, int))
            closed = sum(min(max(count, 0), _MOST_CLOSED) for count in counts)
            return KilledReply(closed, _named(question.missing()))

        self._waiting.append((client, outcome))


def _named(workers: Iterable[Worker]) -> list[JsonObject]:
    return [{"slot": one.slot, "pid": one.pid} for one in workers]


def _kill_command(request: KillRequest) -> KillCommand:
    """What the workers are to find and to close. Raises ValueError."""
    if request.network is not None:
        return KillCommand(network=str(parse_network(request.network)))
    if request.cookie is not None:
        return KillCommand(cookie=request.cookie)
    raise ValueError("the ID of a connection is wanted, or a network")
