"""Reliable requests whose handler counts how often it ran for each."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter

from forkd.rdp import ReliableDatagram, Timers, request_id

#: Short times, for a path of milliseconds that loses much; the clients in the tests have the same.
TIMERS = Timers(ack_timeout=0.05, max_retransmit=8, max_latency=5.0, acknowledge_after=0.02, rto_minimum=0.02)
_ran: Counter[tuple[object, int]] = Counter()


async def handle(payload: bytes, peer: object) -> bytes:
    """The payload after its digest; `count` tells how many requests ran, and how often at most."""
    if payload == b"count":
        return json.dumps([len(_ran), max(_ran.values(), default=0)]).encode()
    _ran[peer, request_id()] += 1
    if payload == b"fail":
        raise RuntimeError("as it was asked to")
    if payload[:1] == b"\0":
        await asyncio.sleep(0.06)  # longer than an acknowledgement waits, and than a client's first try
    return hashlib.sha256(payload).digest() + payload


def service() -> ReliableDatagram:
    return ReliableDatagram(handle, timers=TIMERS)
