"""What the master asks of its workers, and what this one answers.

A question comes on the channel as `{"order": NAME, "number": N, …}`, and its answer goes back as `{"event": "answer",
"number": N, "found": …}`. Each kind of question is a row of `QUESTIONS`: a function of the loop and the question, which
returns what it found, fit for JSON; it must not wait, as the clients do meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from forkd.config.units import parse_network
from forkd.ended import Killed
from forkd.serve.datagrams import Datagrams
from forkd.serve.ending import transports_of
from forkd.serve.loop import PollLoop
from forkd.serve.networks import Networks, shown
from forkd.serve.transport import Transport
from forkd.wire import Message

#: Peers of datagram sockets that are told of at most: so many fit into an answer.
MOST_PEERS = 300


class Served(NamedTuple):
    """What a worker serves, as far as it is asked about."""

    loop: PollLoop
    datagrams: Datagrams


def answer(served: Served, question: Message) -> Message | None:
    """The answer to what the master asks; None where it is no question that is known here."""
    ask = QUESTIONS.get(question.get("order", ""))
    return None if ask is None else {"event": "answer", "number": question["number"], "found": ask(served, question)}


def peers(served: Served, question: Message) -> list[list[Any]]:
    """The latest peers of the datagram sockets: of each the listener, the address, how many seconds ago it was first
    and last heard of, and how many datagrams have come from it and gone to it.
    """
    now = served.loop.time()
    found = [(listener, one) for listener, recent in served.datagrams.recent() for one in recent]
    found.sort(key=lambda each: each[1].last, reverse=True)
    return [
        [listener, shown(one.peer), round(now - one.first, 3), round(now - one.last, 3), one.received, one.sent]
        for listener, one in found[:MOST_PEERS]
    ]


def kill(served: Served, question: Message) -> int:
    """Ends the connection that the kernel calls `cookie`, or all from the addresses of `network`; how many."""
    if "network" in question:
        networks = Networks([parse_network(question["network"])])
        doomed = [transport for transport in transports_of(served.loop) if _is_of(transport, networks)]
    else:
        doomed = [transport for transport in transports_of(served.loop) if _is_called(transport, question["cookie"])]
    for transport in doomed:
        transport.end(Killed("by an operator"))
    return len(doomed)


def _is_of(transport: Transport, networks: Networks) -> bool:
    return not transport.is_over and networks.has(transport.peer)


def _is_called(transport: Transport, cookie: int) -> bool:
    return not transport.is_over and transport.cookie == cookie


#: By name.
QUESTIONS: Mapping[str, Callable[[Served, Message], object]] = {"kill": kill, "peers": peers}
