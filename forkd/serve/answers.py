"""What the master asks of its workers, and what this one answers.

A question comes on the channel as `{"order": NAME, "number": N, …}`, and its answer goes back as `{"event": "answer",
"number": N, "found": …}`. Each kind of question is a row of `QUESTIONS`: a function of the loop and the question, which
returns what it found, fit for JSON; it must not wait, as the clients do meanwhile. One that lists what only a worker
knows (the latest peers of a datagram socket, say) is another row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from forkd.config.units import parse_network
from forkd.ended import Killed
from forkd.serve.ending import transports_of
from forkd.serve.loop import PollLoop
from forkd.serve.networks import Networks
from forkd.serve.transport import Transport
from forkd.wire import Message


def answer(loop: PollLoop, question: Message) -> Message | None:
    """The answer to what the master asks; None where it is no question that is known here."""
    ask = QUESTIONS.get(question.get("order", ""))
    return None if ask is None else {"event": "answer", "number": question["number"], "found": ask(loop, question)}


def kill(loop: PollLoop, question: Message) -> int:
    """Ends the connection that the kernel calls `cookie`, or all from the addresses of `network`; how many."""
    if "network" in question:
        networks = Networks([parse_network(question["network"])])
        doomed = [transport for transport in transports_of(loop) if _is_of(transport, networks)]
    else:
        doomed = [transport for transport in transports_of(loop) if _is_called(transport, question["cookie"])]
    for transport in doomed:
        transport.end(Killed("by an operator"))
    return len(doomed)


def _is_of(transport: Transport, networks: Networks) -> bool:
    return not transport.is_over and networks.has(transport.peer)


def _is_called(transport: Transport, cookie: int) -> bool:
    return not transport.is_over and transport.cookie == cookie


#: By name.
QUESTIONS: Mapping[str, Callable[[PollLoop, Message], object]] = {"kill": kill}
