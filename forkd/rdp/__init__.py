"""Requests over datagrams that get their answer, or an error that says how often and how long it was tried.

A server gives `ReliableDatagram(handler)` to a datagram listener; a client calls `RdpClient.request` (blocking) or
`AsyncRdpClient.request`. The wire format and the rules are in docs/rdp.md. The two state machines (`requester`,
`responder`) do no input or output and have no clock. Names are loaded when they are first used: the blocking client
loads no asyncio.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forkd.rdp.async_client import AsyncRdpClient as AsyncRdpClient
    from forkd.rdp.client import RdpClient as RdpClient
    from forkd.rdp.failures import Busy as Busy
    from forkd.rdp.failures import Failed as Failed
    from forkd.rdp.failures import GaveUp as GaveUp
    from forkd.rdp.failures import RdpError as RdpError
    from forkd.rdp.failures import TooLarge as TooLarge
    from forkd.rdp.protocol import ReliableDatagram as ReliableDatagram
    from forkd.rdp.protocol import request_id as request_id
    from forkd.rdp.timers import Limits as Limits
    from forkd.rdp.timers import Timers as Timers

_HOMES = {
    "AsyncRdpClient": "async_client",
    "RdpClient": "client",
    "Busy": "failures",
    "Failed": "failures",
    "GaveUp": "failures",
    "RdpError": "failures",
    "TooLarge": "failures",
    "ReliableDatagram": "protocol",
    "request_id": "protocol",
    "Limits": "timers",
    "Timers": "timers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
