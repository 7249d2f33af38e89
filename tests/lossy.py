"""A network in simulated time that loses, repeats and reorders packets, between the two cores of `forkd.rdp`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from heapq import heappop, heappush
from random import Random

from forkd.rdp.requester import Ended, Requester
from forkd.rdp.responder import Responder
from forkd.rdp.timers import LARGEST, Limits, Timers

PEER = ("192.0.2.1", 4711)
#: What the network does with a packet: the delay of each copy that arrives. Called with the sender and the packet.
Fate = Callable[[str, bytes], list[float]]


def prompt(_sender: str, _packet: bytes) -> list[float]:
    return [0.01]


class Network:
    """One client and one server; `run` goes from event to event until nothing is left to do.

    Args:
        fate: what becomes of each packet.
        takes: how long the handler runs for a request.
        handler: what it answers; None fails.
    """

    def __init__(
        self,
        fate: Fate = prompt,
        *,
        timers: Timers | None = None,
        limits: Limits | None = None,
        takes: float = 0.0,
        handler: Callable[[bytes], bytes | None] = lambda payload: payload,
        seed: int = 1,
    ) -> None:
        self.fate, self.takes, self.handler = fate, takes, handler
        self.timers = timers or Timers()
        self.requester = Requester(self.timers, LARGEST, Random(seed))
        self.limits = limits or Limits()
        self.responder = self.new_server()
        self.now = 0.0
        self.ran: Counter[int] = Counter()
        self.ended: list[Ended] = []
        self.trace: list[tuple[float, str, bytes]] = []
        self._events: list[tuple[float, int, str, object]] = []
        self._count = 0

    def new_server(self) -> Responder:
        return Responder(self.timers, self.limits, Random(2), b"secret")

    def request(self, id: int, payload: bytes) -> None:
        self.send("client", self.requester.start(self.now, id, payload))

    def send(self, sender: str, packets: list[bytes]) -> None:
        for packet in packets:
            self.trace.append((self.now, sender, packet))
            for delay in self.fate(sender, packet):
                self._later(delay, f"from {sender}", packet)

    def answers(self) -> dict[int, bytes | None]:
        assert len({one.id for one in self.ended}) == len(self.ended)
        return {one.id: one.answer for one in self.ended}

    def sent(self, sender: str) -> list[tuple[float, int]]:
        """When which kind of packet was sent."""
        return [(at, packet[1]) for at, who, packet in self.trace if who == sender]

    def run(self, until: float = float("inf"), *, steps: int = 200_000) -> None:
        for _ in range(steps):
            at, step = self._next()
            if at > until or at == float("inf"):
                self.now = until if until < float("inf") else self.now
                return
            self.now = max(self.now, at)
            step()
        raise AssertionError("it never ends")

    def _later(self, delay: float, what: str, value: object) -> None:
        self._count += 1
        heappush(self._events, (self.now + delay, self._count, what, value))

    def _next(self) -> tuple[float, Callable[[], None]]:
        never = float("inf")
        choices: list[tuple[float, Callable[[], None]]] = [
            (self._events[0][0] if self._events else never, self._event),
            (never if self.requester.deadline is None else self.requester.deadline, self._client_expires),
            (never if self.responder.deadline is None else self.responder.deadline, self._server_expires),
        ]
        return min(choices, key=lambda choice: choice[0])

    def _client_expires(self) -> None:
        packets, ended = self.requester.expire(self.now)
        self.ended += ended
        self.send("client", packets)

    def _server_expires(self) -> None:
        self.send("server", [packet for packet, _ in self.responder.expire(self.now)])

    def _event(self) -> None:
        _, _, what, value = heappop(self._events)
        if what == "answered":
            key, payload = value  # type: ignore[misc]
            answer = self.handler(payload)
            done = (
                self.responder.fail(self.now, key) if answer is None else self.responder.answer(self.now, key, answer)
            )
            self.send("server", [packet for packet, _ in done])
        elif what == "from server":
            packets, ended = self.requester.receive(self.now, value)  # type: ignore[arg-type]
            self.ended += ended
            self.send("client", packets)
        else:
            packets, request = self.responder.receive(self.now, value, PEER)  # type: ignore[arg-type]
            self.send("server", packets)
            if request is not None:
                self.ran[request.id] += 1
                self._later(self.takes, "answered", (request.key, request.payload))
