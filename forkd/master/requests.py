"""What the control socket may ask of the master, and the answers that come later."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from forkd.config.units import MOST_WORKERS, parse_network
from forkd.master.change import DIFF, RELOAD, UPGRADE
from forkd.master.control import Reply
from forkd.master.plan import GRACE, STACKS
from forkd.master.questions import Question
from forkd.master.report import peers_of, whereabouts
from forkd.master.spawn import Worker
from forkd.master.state import State
from forkd.signals import Order
from forkd.states import Mode
from forkd.system.memory import read_only
from forkd.wire import Message

log = logging.getLogger("forkd.master")

_MOST_PEERS = 4000  # of datagrams, of whom one answer can tell (`wire.LARGEST`)
_MOST = 1 << 20  # clients that a worker may claim to have closed

#: The answer to a request that had to wait, or None while it is not yet time.
Outcome = Callable[[], Message | None]


class Asked(Protocol):
    """What a master offers to those who ask."""

    state: State

    def order(self, order: Order, source: str) -> None:
        """Does what a signal would."""

    def scale(self, wanted: int, source: str) -> str:
        """Wants another number of workers; or why that can't be."""

    def change(self, verb: str, reply: Reply | None = None) -> None:
        """Reloads or upgrades, or tells what a reload would change."""

    def hand_over(self, reply: Reply) -> None:
        """Lends the lock and the listeners to another master."""

    def status(self) -> dict[str, Any]:
        """Its state, fit for JSON."""

    def ask_workers(self, what: Message) -> Question:
        """Asks all workers a question."""


class Requests:
    """Answers requests.

    Args:
        master: whom they ask.
    """

    def __init__(self, master: Asked) -> None:
        self._master = master
        self._waiting: list[tuple[Reply, Outcome]] = []
        self._heir: Reply | None = None  # who starts the master that is to succeed this one

    @property
    def succession(self) -> bool:
        """Whether another master is being started to succeed this one."""
        return self._heir is not None and self._heir.fileno() >= 0

    def answer(self, message: Message, reply: Reply) -> None:
        """Answers one request, now or when `settle` finds that its time has come."""
        verb = message.get("verb")
        if verb == "status":
            reply({"ok": True, "status": self._master.status()})
        elif verb == "stop":
            self._stop(reply, now=message.get("now") is True, succeeded=message.get("succeeded") is True)
        elif verb in (RELOAD, UPGRADE, DIFF):
            # Twice: the one that is under way, and this one.
            reply(
                {"ok": True, "within": 4 * self._master.state.generation.settings.boot_timeout + 4 * (GRACE + STACKS)}
            )
            self._master.change(verb, reply)
        elif verb == "hand over":
            self._hand_over(reply)
        elif verb == "scale":
            self._scale(message.get("workers"), reply)
        elif verb == "clients":
            self._clients(reply)
        elif verb == "peers":
            self._peers(reply)
        elif verb == "kill":
            self._kill(message, reply)
        else:
            reply({"ok": False, "error": f"this daemon knows no {str(verb)[:100]!r}"})

    def settle(self) -> None:
        """Answers those whose time has come; called at each turn of the master's loop."""
        if self._heir is not None and self._heir.fileno() < 0:
            self._heir = None
            if self._master.state.control.displaced:  # it died when all was done but to tell us
                self._master.state.succeeded = True
                if self._master.state.mode is Mode.RUNNING:  # else a second order would cut the clients
                    self._master.order(Order.STOP, "another master in its place")
        waiting, self._waiting = self._waiting, []
        for reply, outcome in waiting:
            answer = outcome()
            if answer is None:
                self._waiting.append((reply, outcome))
            else:
                reply(answer)

    def _clients(self, reply: Reply) -> None:
        """Tells what one needs to look for the clients oneself: which processes and listeners are meant, and where in
        the regions' memory, which can only be read by the descriptor that goes with it, each worker writes.
        """
        found: Message = {"ok": True, **whereabouts(self._master.state)}
        try:
            reader = read_only(self._master.state.board.regions.descriptor)
        except OSError as error:  # no such memory, or no descriptor left
            log.warning("can't show since when clients are here: %s", error)
            reply(found)
            return
        try:
            reply(found, [reader])
        finally:
            os.close(reader)

    def _peers(self, reply: Reply) -> None:
        """Tells who has sent datagrams of late, which the workers alone know."""
        asked = self._master.ask_workers({"order": "peers"})
        slots = {one.pid: one.slot for one in asked.asked}

        def outcome() -> Message | None:
            if not asked.is_over():
                return None
            found = [one for pid, claim in asked.found.items() for one in peers_of(slots[pid], pid, claim)]
            return {"ok": True, "peers": found[:_MOST_PEERS], "silent": _named(asked.missing())}

        self._waiting.append((reply, outcome))

    def _kill(self, message: Message, reply: Reply) -> None:
        try:
            question = _kill_question(message)
        except ValueError as error:
            reply({"ok": False, "error": str(error)[:200]})
            return
        asked = self._master.ask_workers(question)
        whom = question.get("network") or f"ID {question['cookie']}"
        log.info("has the workers close the clients of %s, by forkd clients", whom)

        def outcome() -> Message | None:
            if not asked.is_over():
                return None
            closed = sum(min(max(found, 0), _MOST) for found in asked.found.values() if isinstance(found, int))
            return {"ok": True, "closed": closed, "silent": _named(asked.missing())}

        self._waiting.append((reply, outcome))

    def _stop(self, reply: Reply, *, now: bool, succeeded: bool) -> None:
        master = self._master
        master.state.succeeded = succeeded
        master.order(Order.QUIT if now else Order.STOP, "forkd restart" if succeeded else "forkd stop")
        reply({"ok": True, "within": master.state.drain_timeout + 2 * (GRACE + STACKS)})
        self._waiting.append((reply, lambda: {"ok": True} if master.state.mode is Mode.OVER else None))

    def _hand_over(self, reply: Reply) -> None:
        mode, change = self._master.state.mode, self._master.status().get("change")
        if mode is not Mode.RUNNING:
            reply({"ok": False, "error": f"the daemon is {mode.value}"})
        elif change or self.succession:
            reply({"ok": False, "error": f"another change is under way: {change or 'restart'}"})
        elif self._master.state.notifier.listened_to:
            # It would see this process end, and take the daemon for stopped.
            reply({"ok": False, "error": "a service manager runs it; use `systemctl restart`, or an upgrade"})
        else:
            self._heir = reply
            self._master.hand_over(reply)

    def _scale(self, wanted: object, reply: Reply) -> None:
        master, state = self._master, self._master.state
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= MOST_WORKERS:
            reply({"ok": False, "error": f"the number of workers is from 1 to {MOST_WORKERS}"})
            return
        if state.mode is not Mode.RUNNING:
            reply({"ok": False, "error": f"the daemon is {state.mode.value}"})
            return
        if why_not := master.scale(wanted, "forkd scale"):
            reply({"ok": False, "error": why_not})
            return
        known = state.last_failure

        def outcome() -> Message | None:
            if state.wanted != wanted or state.mode is not Mode.RUNNING:
                return {"ok": False, "error": f"the daemon is {state.mode.value} and wants {state.wanted} workers"}
            if state.last_failure is not known:
                return {"ok": False, "error": str(state.last_failure)}
            return {"ok": True, "workers": wanted} if state.settled() else None

        self._waiting.append((reply, outcome))


def _named(workers: Iterable[Worker]) -> list[Message]:
    return [{"slot": one.slot, "pid": one.pid} for one in workers]


def _kill_question(message: Message) -> Message:
    """What the workers are asked to find and to close. Raises ValueError."""
    cookie, network = message.get("cookie"), message.get("network")
    if isinstance(network, str):
        return {"order": "kill", "network": str(parse_network(network))}
    if isinstance(cookie, int) and 0 < cookie < 1 << 64:
        return {"order": "kill", "cookie": cookie}
    raise ValueError("the ID of a connection is wanted, or a network")
