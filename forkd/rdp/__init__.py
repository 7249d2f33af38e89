"""Requests over datagrams that get their answer, or an error that says how often and how long it was tried.

A server gives `ReliableDatagram(handler)` to a datagram listener; a client calls `RdpClient.request` (blocking) or
`AsyncRdpClient.request`. The wire format and the rules are in docs/rdp.md. Names are loaded when they are first used:
the blocking client loads no asyncio.

packets: the packets on the wire.
timers: when to send again and to forget, what to keep, and deadlines.
transfer: one payload's way in numbered parts.
requester: a client's requests, as a state machine without input, output or clock.
responder: a server's exchanges, likewise.
errors: what a request ends with when it has no answer.
client: the blocking client.
async_client: the client for asyncio.
server: a handler of requests as an asyncio.DatagramProtocol.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forkd.rdp.async_client import AsyncRdpClient as AsyncRdpClient
    from forkd.rdp.client import RdpClient as RdpClient
    from forkd.rdp.errors import Busy as Busy
    from forkd.rdp.errors import Failed as Failed
    from forkd.rdp.errors import GaveUp as GaveUp
    from forkd.rdp.errors import RdpError as RdpError
    from forkd.rdp.errors import TooLarge as TooLarge
    from forkd.rdp.server import ReliableDatagram as ReliableDatagram
    from forkd.rdp.server import request_id as request_id
    from forkd.rdp.timers import Limits as Limits
    from forkd.rdp.timers import Timers as Timers

_HOMES = {
    "AsyncRdpClient": "async_client",
    "RdpClient": "client",
    "Busy": "errors",
    "Failed": "errors",
    "GaveUp": "errors",
    "RdpError": "errors",
    "TooLarge": "errors",
    "ReliableDatagram": "server",
    "request_id": "server",
    "Limits": "timers",
    "Timers": "timers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
