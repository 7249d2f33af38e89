"""Queries of the master, and what this worker answers.

A query comes on the channel with a number, and its answer goes back with the same number (`messages.AnswerEvent`). What
is found for it must be fit for JSON, and finding it must not block, as the clients wait meanwhile. `worker` calls
`answer` for each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from forkd.config.values import parse_network
from forkd.ended import Killed
from forkd.messages import AnswerEvent, KillCommand, PeersCommand, Query
from forkd.serve.accept.access import Networks, format_peer
from forkd.serve.datagram.server import DatagramServer
from forkd.serve.loop import PollLoop
from forkd.serve.stream.server import beginnings_of, transports_of

#: Peers of datagram sockets in an answer at most: so many fit into one.
MOST_PEERS = 300


class Served(NamedTuple):
    """What a worker serves, as far as queries are about it."""

    loop: PollLoop
    datagrams: DatagramServer


def answer(served: Served, query: Query) -> AnswerEvent:
    """The answer to what the master asks."""
    match query:
        case PeersCommand():
            found: object = peers(served)
        case KillCommand():
            found = kill(served, query)
    return AnswerEvent(query.number, found)


def peers(served: Served) -> list[list[Any]]:
    """The latest peers of the datagram sockets: of each the listener, the address, how many seconds ago it was first
    and last heard of, and how many datagrams have come from it and gone to it.
    """
    now = served.loop.time()
    found = [(listener, one) for listener, recent in served.datagrams.recent() for one in recent]
    found.sort(key=lambda each: each[1].last, reverse=True)
    return [
        [listener, format_peer(one.peer), round(now - one.first, 3), round(now - one.last, 3), one.received, one.sent]
        for listener, one in found[:MOST_PEERS]
    ]


def kill(served: Served, command: KillCommand) -> int:
    """Ends the connection that the kernel calls `cookie`, or all from the addresses of `network`; how many."""
    found = [*transports_of(served.loop), *beginnings_of(served.loop)]
    connections = [one for one in found if not one.is_over]
    if command.network is not None:
        networks = Networks([parse_network(command.network)])
        ending = [one for one in connections if networks.contains(one.peer)]
    else:
        ending = [one for one in connections if one.cookie == command.cookie]
    for one in ending:
        one.end(Killed("by an operator"))
    return len(ending)
