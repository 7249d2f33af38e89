"""What there is by HTTP: `/live`, `/ready`, `/metrics`, `/status.json`, and `/`, the page for people, which asks for
`/history.json` and `/clients.json` as well.

A page that takes time to make is kept for ten times as long as it took, so however many ask, the master spends a tenth
of its time on it at most.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

from forkd.errors import ForkdError
from forkd.master.admin.history import History
from forkd.master.admin.metrics import Metrics
from forkd.master.admin.page import BODY, HTML, POLICY
from forkd.master.state import DaemonState
from forkd.master.status import client_count, clients_of, why_not_ready
from forkd.system.client_list import list_clients

log = logging.getLogger("forkd.admin")

TEXT, JSON = "text/plain; charset=utf-8", "application/json"

#: Clients of connections that are told of, the oldest; and with how many none is, as the master would have to stop for
#: too long to find them: some 10 microseconds for each.
MOST_OLDEST = 50
MOST_LISTED = 2000

#: What stands before the path where a client asks as it would ask a proxy (RFC 9112, section 3.2.2).
_SERVER = re.compile(rb"\Ahttps?://[^/?]*", re.IGNORECASE)

#: For how many times as long as it took to make a page is kept, and for how many seconds at most.
_KEPT_FOR = 10
_MOST_KEPT = 1.0


class Told(Protocol):
    """The master, as far as it is told of."""

    state: DaemonState

    def status(self) -> dict[str, Any]:
        """Its state, fit for JSON."""


@dataclass(frozen=True, slots=True)
class Page:
    """An answer."""

    status: HTTPStatus
    body: bytes
    content_type: str = TEXT
    headers: tuple[tuple[bytes, bytes], ...] = ()


_FAILED = Page(HTTPStatus.INTERNAL_SERVER_ERROR, b"it can't be told; see the log\n")
_NOT_FOUND = Page(
    HTTPStatus.NOT_FOUND, b"there are /live, /ready, /metrics, /status.json, /history.json, /clients.json and /\n"
)


class Pages:
    """All pages.

    Args:
        master: what they tell of.
        metrics: its metrics.
        history: its last ten minutes.
    """

    def __init__(self, master: Told, metrics: Metrics, history: History) -> None:
        self._master = master
        self._metrics_of = metrics
        self._history = history
        self._kept: dict[str, tuple[float, Page]] = {}

    def find(self, target: bytes, accept: str) -> Page:
        """The page at a request's target, for a client that accepts these types of content."""
        path = _SERVER.sub(b"", target).partition(b"?")[0] or b"/"
        return self._made(path.decode("latin-1"), lambda: self._find(path, accept))

    def _find(self, path: bytes, accept: str) -> Page:
        match path:
            case b"/live":
                return Page(HTTPStatus.OK, b"live\n")  # the loop turns: it has answered
            case b"/ready":
                return self._readiness()
            case b"/metrics":
                return self._metrics(accept)
            case b"/status.json":
                return self._keep("status", lambda: _json(self._status()))
            case b"/history.json":
                return self._keep("history", lambda: _json(self._history.tell()))
            case b"/clients.json":
                return self._keep("clients", lambda: _json(_oldest_clients(self._master.state)))
            case b"/":
                return Page(HTTPStatus.OK, BODY, HTML, ((b"Content-Security-Policy", POLICY),))
            case _:
                return _NOT_FOUND

    def _status(self) -> dict[str, Any]:
        """The master's, with the memory of workers as the metrics have it."""
        told = self._master.status()
        memory = self._metrics_of.memory_of(one["pid"] for one in told["workers"])
        for one in told["workers"]:
            one["rss"], one["pss"] = memory[one["pid"]]
        return told

    def _readiness(self) -> Page:
        why_not = why_not_ready(self._master.state)
        if why_not:
            return Page(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {why_not}\n".encode())
        return Page(HTTPStatus.OK, b"ready\n")

    def _metrics(self, accept: str) -> Page:
        from forkd.master.admin.exposition import encoder_for  # noqa: PLC0415 (it is there for this alone)

        encode, content_type = encoder_for(accept)
        return self._keep(
            f"metrics {content_type}", lambda: Page(HTTPStatus.OK, encode(self._metrics_of.collect()), content_type)
        )

    def _keep(self, name: str, make: Callable[[], Page]) -> Page:
        """A page that was kept, or a new one."""
        began = time.monotonic()
        until, page = self._kept.get(name, (0.0, _NOT_FOUND))
        if began < until:
            return page
        page = self._made(name, make)
        cost = time.monotonic() - began
        self._kept[name] = began + min(_KEPT_FOR * cost, _MOST_KEPT), page
        return page

    def _made(self, name: str, make: Callable[[], Page]) -> Page:
        """A page, or one that says that it can't be made."""
        try:
            return make()
        except Exception:  # (a master's event: what is told of the daemon is not to end it)
            log.exception("admin: %s can't be told", name.partition(" ")[0], extra={"listener": "admin"})
            return _FAILED


def _json(told: dict[str, Any]) -> Page:
    return Page(HTTPStatus.OK, json.dumps(told).encode() + b"\n", JSON)


def _oldest_clients(state: DaemonState) -> dict[str, Any]:
    """The clients that have been connected for longest: their number in all, some of them, and why there are none."""
    total = client_count(state)
    told: dict[str, Any] = {"total": total, "clients": [], "why_none": ""}
    if total > MOST_LISTED:
        told["why_none"] = f"more than {MOST_LISTED} clients: `forkd clients` lists them"
        return told
    try:
        found = list_clients(state.generation.settings.name, clients_of(state), state.board.regions.descriptor)
    except (ForkdError, OSError) as error:
        told["why_none"] = str(error)
        return told
    told["clients"] = sorted(found, key=lambda one: -(one["age"] or 0))[:MOST_OLDEST]
    return told
