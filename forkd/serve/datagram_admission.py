"""Whose datagrams a listener takes, and on whose word: its networks, its rate of one address, and the proxies whose
headers are believed.
"""

from __future__ import annotations

from typing import Any

from forkd.serve.datagram_sending import Admit, Unwrap
from forkd.serve.gate import DENIED, Gate
from forkd.serve.loop import PollLoop
from forkd.serve.networks import Networks
from forkd.serve.proxy_protocol import Malformed, parse_datagram
from forkd.serve.refusal import Refusals
from forkd.system.bound import BoundListener
from forkd.system.counts import Ledger
from forkd.system.scoreboard import Row


class DatagramAdmission:
    """One listener's, in one worker.

    Args:
        bound: the listener.
        loop: the worker's loop.
        ledger: what the worker counts with the others.
        row: where it counts those that are refused.

    Attributes:
        admit: whether a datagram of this sender is taken; None: everybody's are.
        unwrap: takes the header off one that came by a proxy; None: none does.
    """

    def __init__(self, bound: BoundListener, loop: PollLoop, ledger: Ledger, row: Row) -> None:
        listener = bound.listener
        self._gate = Gate(listener, str(bound.address), ledger)
        self._proxies = Networks(listener.proxy_protocol)
        self._refusals = Refusals(loop, str(bound.address), None, row, ledger)
        asked = listener.allow or listener.deny or listener.limits.rate_per_ip is not None
        self.admit: Admit | None = self._admit if asked else None
        self.unwrap: Unwrap | None = self._unwrap if self._proxies else None

    def _admit(self, peer: Any) -> bool:
        if why := self._gate.admits(peer):
            self._refusals.note(peer, why)
        return not why

    def _unwrap(self, data: bytes, peer: Any) -> tuple[bytes, Any, Any] | None:
        """As `datagram.Unwrap`. Where proxies are named nobody else is heard, and nothing of them is parsed."""
        try:
            if self._proxies.has(peer):
                header, payload = parse_datagram(data)
                return payload, header.source or peer, header.destination
        except Malformed:  # the proxy is not set up for this, or somebody has its address
            pass
        self._refusals.note(peer, DENIED)
        return None
