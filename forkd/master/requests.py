"""What the control socket may ask of the master, and the answers that come later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from forkd.config.units import MOST_WORKERS
from forkd.errors import BootError
from forkd.master.control import Reply
from forkd.master.plan import GRACE
from forkd.signals import Order
from forkd.states import Mode
from forkd.wire import Message

#: The answer to a request that had to wait, or None while it is not yet time.
Outcome = Callable[[], Message | None]


class Asked(Protocol):
    """What a master offers to those who ask."""

    mode: Mode
    wanted: int
    last_failure: BootError | None

    @property
    def drain_timeout(self) -> float:
        """In seconds."""

    def order(self, order: Order, source: str) -> None:
        """Does what a signal would."""

    def scale(self, wanted: int, source: str) -> None:
        """Wants another number of workers."""

    def settled(self) -> bool:
        """Whether there are just the workers that are wanted, and all serve."""

    def status(self) -> dict[str, Any]:
        """Its state, fit for JSON."""


class Requests:
    """Answers requests.

    Args:
        master: whom they ask.
    """

    def __init__(self, master: Asked) -> None:
        self._master = master
        self._waiting: list[tuple[Reply, Outcome]] = []

    def answer(self, message: Message, reply: Reply) -> None:
        """Answers one request, now or when `settle` finds that its time has come."""
        verb = message.get("verb")
        if verb == "status":
            reply({"ok": True, "status": self._master.status()})
        elif verb == "stop":
            self._stop(reply, now=message.get("now") is True)
        elif verb == "scale":
            self._scale(message.get("workers"), reply)
        else:
            reply({"ok": False, "error": f"this daemon knows no {str(verb)[:100]!r}"})

    def settle(self) -> None:
        """Answers those whose time has come; called at each turn of the master's loop."""
        waiting, self._waiting = self._waiting, []
        for reply, outcome in waiting:
            answer = outcome()
            if answer is None:
                self._waiting.append((reply, outcome))
            else:
                reply(answer)

    def _stop(self, reply: Reply, *, now: bool) -> None:
        master = self._master
        master.order(Order.QUIT if now else Order.STOP, "forkd stop")
        reply({"ok": True, "within": master.drain_timeout + 2 * GRACE})
        self._waiting.append((reply, lambda: {"ok": True} if master.mode is Mode.OVER else None))

    def _scale(self, wanted: object, reply: Reply) -> None:
        master = self._master
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= MOST_WORKERS:
            reply({"ok": False, "error": f"the number of workers is from 1 to {MOST_WORKERS}"})
            return
        if master.mode is not Mode.RUNNING:
            reply({"ok": False, "error": f"the daemon is {master.mode.value}"})
            return
        master.scale(wanted, "forkd scale")
        known = master.last_failure

        def outcome() -> Message | None:
            if master.wanted != wanted or master.mode is not Mode.RUNNING:
                return {"ok": False, "error": f"the daemon is {master.mode.value} and wants {master.wanted} workers"}
            if master.last_failure is not known:
                return {"ok": False, "error": str(master.last_failure)}
            return {"ok": True, "workers": wanted} if master.settled() else None

        self._waiting.append((reply, outcome))
