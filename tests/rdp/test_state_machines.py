"""The two state machines of reliable requests in simulated time: every timer, and the loss of each packet in turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.rdp.packets import (
    ANSWER,
    BUSY,
    FAILED,
    PART,
    RECEIVED,
    REFUSED,
    REQUEST,
    TAKEN,
    TOO_LARGE,
    Data,
    ExchangeState,
    Refusal,
    decode,
    encode,
)  # fmt: skip
from forkd.rdp.requester import RequestEnded, Requester
from forkd.rdp.responder import Request, Responder
from forkd.rdp.timers import LARGEST, DeadlineHeap, Limits, Timers

EXACT = Timers(ack_random_factor=1.0)
LONG = bytes(range(256)) * 20  # five parts

PEER = ("192.0.2.1", 4711)
#: What the network does with a packet: the delay of each copy that arrives. Called with the sender and the packet.
Fate = Callable[[str, bytes], list[float]]


def prompt(_sender: str, _packet: bytes) -> list[float]:
    return [0.01]


class LossyNetwork:
    """One client, one server, and a network in simulated time that loses, repeats and reorders packets between them.

    `run` goes from event to event until nothing is left to do.

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
        self.ended: list[RequestEnded] = []
        self.trace: list[tuple[float, str, bytes]] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def new_server(self) -> Responder:
        return Responder(self.timers, self.limits, Random(2), b"secret")

    def request(self, id: int, payload: bytes) -> None:
        self.send("client", self.requester.start(self.now, id, payload))

    def send(self, sender: str, packets: list[bytes]) -> None:
        for packet in packets:
            self.trace.append((self.now, sender, packet))
            for delay in self.fate(sender, packet):
                receive = self._client_receives if sender == "server" else self._server_receives
                self._later(delay, partial(receive, packet))

    def answers(self) -> dict[int, bytes | None]:
        assert len({one.id for one in self.ended}) == len(self.ended)
        return {one.id: one.answer for one in self.ended}

    def sent(self, sender: str) -> list[tuple[float, int]]:
        """When which kind of packet was sent."""
        return [(at, packet[1]) for at, by, packet in self.trace if by == sender]

    def run(self, until: float = float("inf"), *, steps: int = 200_000) -> None:
        for _ in range(steps):
            at, step = self._next()
            if at > until or at == float("inf"):
                self.now = until if until < float("inf") else self.now
                return
            self.now = max(self.now, at)
            step()
        raise AssertionError("it never ends")

    def _later(self, delay: float, step: Callable[[], None]) -> None:
        self._count += 1
        heappush(self._events, (self.now + delay, self._count, step))

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
        _, _, step = heappop(self._events)
        step()

    def _client_receives(self, packet: bytes) -> None:
        packets, ended = self.requester.receive(self.now, packet)
        self.ended += ended
        self.send("client", packets)

    def _server_receives(self, packet: bytes) -> None:
        packets, request = self.responder.receive(self.now, packet, PEER)
        self.send("server", packets)
        if request is not None:
            self.ran[request.id] += 1
            self._later(self.takes, partial(self._handler_ends, request))

    def _handler_ends(self, request: Request) -> None:
        answer = self.handler(request.payload)
        if answer is None:
            packets = self.responder.fail(self.now, request.key)
        else:
            packets = self.responder.answer(self.now, request.key, answer)
        self.send("server", [packet for packet, _ in packets])


def test_the_derived_times_are_those_of_rfc_7252() -> None:
    timers = Timers()
    assert (timers.max_transmit_span, timers.max_transmit_wait, timers.exchange_lifetime) == (45.0, 93.0, 247.0)


@pytest.mark.parametrize(
    "wrong", [{"ack_timeout": 0}, {"ack_random_factor": 0.5}, {"max_retransmit": -1}, {"patience": 0}]
)
def test_timers_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Timers(**wrong)  # type: ignore[arg-type]


def test_small_exchange_is_three_packets_and_is_remembered() -> None:
    network = LossyNetwork()
    network.request(7, b"hello")
    network.run(1)
    assert network.answers() == {7: b"hello"}
    assert [packet[1] for _, _, packet in network.trace] == [REQUEST, ANSWER, TAKEN]
    network.run(1 + network.timers.exchange_lifetime - 2)
    assert len(network.responder) == 1
    network.run()
    assert len(network.responder) == 0
    assert network.now < 2 * network.timers.exchange_lifetime


def test_request_is_sent_again_after_twice_the_time_each() -> None:
    network = LossyNetwork(lambda _sender, _packet: [], timers=EXACT)
    network.request(7, b"hello")
    network.run()
    assert [at for at, _ in network.sent("client")] == [0, 2, 6, 14, 30]
    (ended,) = network.ended
    assert (ended.answer, ended.reason, ended.tries, ended.seconds) == (None, None, 5, 62)


@given(st.integers(0, 10_000))
def test_first_try_gets_up_to_one_and_a_half_times_the_time(seed: int) -> None:
    network = LossyNetwork(lambda _sender, _packet: [], seed=seed)
    network.request(7, b"hello")
    network.run()
    times = [at for at, _ in network.sent("client")]
    assert 2 <= times[1] <= 3
    assert times == pytest.approx([0, times[1], 3 * times[1], 7 * times[1], 15 * times[1]])


def test_slow_answer_is_announced_and_its_request_sent_once() -> None:
    network = LossyNetwork(takes=20.0, timers=EXACT)
    network.request(7, b"hello")
    network.run(19.9)
    at, kind = network.sent("server")[0]
    assert at == pytest.approx(0.51)
    assert kind == RECEIVED
    assert [kind for _, kind in network.sent("client")].count(REQUEST) == 1
    network.run(60)
    assert network.answers() == {7: b"hello"}
    assert network.ran == {7: 1}


def test_server_that_dies_after_its_acknowledgement_is_given_up() -> None:
    network = LossyNetwork(takes=1e9, timers=EXACT)
    network.request(7, b"hello")
    network.run(5)
    network.responder = Responder(network.timers, network.limits, Random(3), b"another secret")
    network.run(network.timers.exchange_lifetime)
    (ended,) = network.ended
    assert (ended.answer, ended.tries) == (None, 5)
    assert network.ran == {7: 1}


def test_request_in_parts_survives_the_death_of_its_server() -> None:
    network = LossyNetwork(timers=EXACT)
    dropped = [0]

    def fate(sender: str, packet: bytes) -> list[float]:
        found = decode(packet)
        if sender == "client" and isinstance(found, Data) and found.part == 3:
            dropped[0] += 1
            return [] if dropped[0] == 1 else [0.01]
        return [0.01]

    network.fate = fate
    network.request(7, LONG)
    network.run(0.1)
    assert network.ran == {}
    network.responder = Responder(network.timers, network.limits, Random(3), b"another secret")
    network.run(60)
    assert network.answers() == {7: LONG}


@pytest.mark.parametrize("patience", [None, 20.0])
def test_handler_that_never_ends_holds_no_client_beyond_bound(patience: float | None) -> None:
    network = LossyNetwork(takes=1e9, timers=Timers(patience=patience))
    network.request(7, b"hello")
    network.run(1000)
    (ended,) = network.ended
    assert (ended.answer, ended.reason) == (None, None)
    assert ended.seconds == pytest.approx(patience or 247)
    assert max(at for at, _ in network.sent("client")) < (patience or 247)


@pytest.mark.parametrize("payload", [b"hello", LONG])
@pytest.mark.parametrize("takes", [0.0, 3.0])
def test_packets_lost_in_turn_or_repeated_late_change_nothing(payload: bytes, takes: float) -> None:
    plain = LossyNetwork(takes=takes)
    plain.request(7, payload)
    plain.run(60)
    for number in range(len(plain.trace)):
        for fate in ([], [0.01, 0.01], [0.01, 30.0], [1.5]):
            count = iter(range(10**6))
            network = LossyNetwork(lambda _s, _p, n=number, f=fate, c=count: f if next(c) == n else [0.01], takes=takes)  # type: ignore[misc]
            network.request(7, payload)
            network.run(90)
            assert network.answers() == {7: payload}, (number, fate)
            assert network.ran == {7: 1}, (number, fate)
            network.run()
            assert len(network.responder) == 0


@pytest.mark.parametrize("kind", [ANSWER, TAKEN])
def test_kind_that_never_arrives_makes_no_handler_run_again(kind: int) -> None:
    network = LossyNetwork(lambda _sender, packet: [] if packet[1] == kind else [0.01])
    network.request(7, b"hello")
    network.run()
    assert network.ran == {7: 1}
    assert network.answers() == {7: None if kind == ANSWER else b"hello"}
    assert len(network.responder) == 0


def test_failure_ends_the_request_and_is_sent_again_if_lost() -> None:
    count = iter(range(100))
    network = LossyNetwork(
        lambda _sender, packet: [] if packet[1] == REFUSED and next(count) == 0 else [0.01], handler=lambda _: None
    )
    network.request(7, b"hello")
    network.run(10)
    assert [(one.reason, one.answer) for one in network.ended] == [(FAILED, None)]
    assert network.ran == {7: 1}


def test_a_megabyte_over_a_lossy_path_of_50_ms_takes_seconds() -> None:
    random = Random(5)

    def fate(_sender: str, _packet: bytes) -> list[float]:
        return [] if random.random() < 0.2 else [0.025 + random.random() * 0.005]

    network = LossyNetwork(fate)
    payload = random.randbytes(1 << 20)
    network.request(7, payload)
    network.run(network.timers.bound)
    assert network.answers() == {7: payload}
    assert network.ended[0].seconds < 60


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 5.0]))
def test_handler_runs_at_most_once_on_any_network(draw: st.DataObject, seed: int, takes: float) -> None:
    loss, twice, late = (draw.draw(st.floats(0, 0.6)) for _ in range(3))
    random = Random(seed)

    def fate(_sender: str, _packet: bytes) -> list[float]:
        copies = (random.random() >= loss) + (random.random() < twice)
        return [random.uniform(0, 20.0 if random.random() < late * 0.2 else 0.05) for _ in range(copies)]

    network = LossyNetwork(fate, takes=takes, seed=seed)
    wanted = {id: id.to_bytes(8) * draw.draw(st.sampled_from([0, 1, 150, 151, 700])) for id in range(1, 5)}
    for id, payload in wanted.items():
        network.request(id, payload)
    network.run(network.timers.bound + 1)
    answers = network.answers()
    assert answers.keys() == wanted.keys()
    assert all(answer in {None, wanted[id]} for id, answer in answers.items())
    assert max(network.ran.values(), default=0) <= 1
    network.run()
    assert len(network.responder) == 0


def server(**limits: int) -> Responder:
    return Responder(EXACT, Limits(**limits), Random(1), b"secret")


def single(id: int, payload: bytes = b"hello", token: int = 0) -> bytes:
    return encode(Data(REQUEST, id, token, len(payload), 0, payload[:PART]))


def test_spoofed_request_gets_at_most_three_times_its_bytes() -> None:
    for answer in (b"", bytes(100), bytes(1000), bytes(5000)):
        for repeats in (1, 2, 30):
            responder, sent, received, now = server(), 0, 0, 0.0
            for _ in range(repeats):
                packet = single(7)
                received += len(packet)
                packets, request = responder.receive(now, packet, PEER)
                sent += sum(map(len, packets))
                if request:
                    sent += sum(len(packet) for packet, _ in responder.answer(now, request.key, answer))
                assert sent <= 3 * received
            while (deadline := responder.deadline) is not None:
                now = deadline
                sent += sum(len(packet) for packet, _ in responder.expire(now))
            assert sent <= 3 * received


def test_long_request_costs_nothing_before_the_peer_is_proven() -> None:
    responder = server()
    packets, request = responder.receive(0, single(7, LONG), PEER)
    (challenge,) = map(decode, packets)
    assert isinstance(challenge, ExchangeState)
    assert (challenge.kind, challenge.first_missing, challenge.prove) == (RECEIVED, 0, True)
    assert (request, len(responder)) == (None, 0)
    responder.receive(0, single(7, LONG, challenge.token + 1), PEER)
    assert len(responder) == 0
    responder.receive(0, single(7, LONG, challenge.token), ("192.0.2.2", 4711))
    assert len(responder) == 0
    responder.receive(0, single(7, LONG, challenge.token), PEER)
    assert len(responder) == 1


def test_new_requests_are_refused_at_the_bound_of_exchanges() -> None:
    responder = server(exchanges=4)
    asked = []
    for id in range(1, 6):
        packets, request = responder.receive(0, single(id), PEER)
        if id > 2:  # half full: a peer that is not proven is asked for the token
            (challenge,) = map(decode, packets)
            assert isinstance(challenge, ExchangeState)
            packets, request = responder.receive(0, single(id, token=challenge.token), PEER)
        asked.append(packets if request is None else request.id)
    assert asked == [1, 2, 3, 4, [encode(Refusal(5, BUSY))]]
    for id in range(1, 5):
        assert responder.receive(1, single(id), PEER)[1] is None


def test_new_requests_are_refused_at_the_bound_of_answers() -> None:
    responder = server(answers=100)
    _, request = responder.receive(0, single(1, bytes(100)), PEER)
    assert request is not None
    ((packet, _),) = responder.answer(0, request.key, bytes(100))
    assert responder.receive(0, single(2), PEER)[0] == [encode(Refusal(2, BUSY))]
    responder.receive(0, encode(ExchangeState(TAKEN, 1, decode(packet).token, 1, 0)), PEER)  # type: ignore[union-attr]
    assert responder.receive(0, single(2), PEER)[1] is not None


@pytest.mark.parametrize(("limits", "same"), [({"arriving": 8000}, False), ({"arriving_per_host": 8000}, True)])
def test_arriving_requests_are_bounded_and_forgotten_in_time(limits: dict[str, int], same: bool) -> None:
    responder = server(**limits)

    def arrive(id: int, peer: tuple[str, int], now: float) -> list[bytes]:
        (challenge,) = map(decode, responder.receive(now, single(id, LONG), peer)[0])
        return responder.receive(now, single(id, LONG, challenge.token), peer)[0]  # type: ignore[union-attr]

    other = (PEER[0], 1) if same else ("192.0.2.9", 1)
    assert decode(arrive(1, PEER, 0)[0]).first_missing == 1  # type: ignore[union-attr]
    assert arrive(2, other, 0) == [encode(Refusal(2, BUSY))]
    responder.expire(EXACT.max_transmit_wait)
    assert len(responder) == 0
    assert decode(arrive(2, other, 100)[0]).first_missing == 1  # type: ignore[union-attr]


def test_too_large_payload_is_refused_by_either_side() -> None:
    assert server(request=4).receive(0, single(7), PEER)[0] == [encode(Refusal(7, TOO_LARGE))]
    network = LossyNetwork(handler=lambda _: bytes(17 << 20))
    network.request(7, b"hello")
    network.run(5)
    assert network.ended[0].reason == TOO_LARGE


def test_draining_server_finishes_and_takes_no_new_request() -> None:
    network = LossyNetwork(takes=1.0)
    network.request(7, b"old")
    network.run(0.5)
    network.responder.draining = True
    network.request(8, b"new")
    network.run(5)
    assert network.answers() == {7: b"old"}
    assert network.ran == {7: 1}
    assert network.responder.unfinished == 0


@pytest.mark.parametrize("lost", [False, True])
def test_answer_in_parts_is_unfinished_until_taken_or_given_up(lost: bool) -> None:
    network = LossyNetwork(lambda sender, _: [] if lost and network.ran and sender == "client" else [0.01])
    network.request(7, LONG)
    network.run(0.045)
    assert network.ran == {7: 1}
    assert network.responder.unfinished == 1
    network.run(network.timers.max_transmit_wait + 1)
    assert network.responder.unfinished == 0
    assert network.answers() == {7: LONG}


def test_repeated_request_has_its_answer_repeated_at_once() -> None:
    responder = server()
    _, request = responder.receive(0, single(7), PEER)
    assert request is not None
    ((answer, _),) = responder.answer(0, request.key, b"hi")
    assert responder.receive(0.1, single(7), PEER) == ([answer], None)
    assert responder.receive(200, single(7), PEER) == ([answer], None)
    responder.expire(200 + EXACT.exchange_lifetime - 1)
    assert responder.receive(200 + EXACT.exchange_lifetime - 1, single(7), PEER) == ([answer], None)


def test_peer_without_the_token_takes_no_answer() -> None:
    responder = server()
    _, request = responder.receive(0, single(7), PEER)
    assert request is not None
    (question,) = [decode(packet) for packet, _ in responder.answer(0, request.key, LONG)]
    assert isinstance(question, ExchangeState)
    assert question.prove
    assert responder.receive(0, encode(ExchangeState(TAKEN, 7, question.token ^ 1, 0, 0)), PEER) == ([], None)
    packets, _ = responder.receive(0, encode(ExchangeState(TAKEN, 7, question.token, 0, 0)), PEER)
    assert [decode(packet).kind for packet in packets] == [ANSWER] * 5  # type: ignore[union-attr]


def test_part_of_another_length_or_server_is_not_mixed_in() -> None:
    network = LossyNetwork()
    (challenge,) = map(decode, network.responder.receive(0, single(7, LONG), PEER)[0])
    token = challenge.token  # type: ignore[union-attr]
    network.responder.receive(0, single(7, LONG, token), PEER)
    assert network.responder.receive(0, single(7, LONG + b"!", token), PEER) == ([], None)
    network.requester.start(0, 8, b"hello")
    parts = [encode(Data(ANSWER, 8, 5, PART + 1, number, bytes(size))) for number, size in [(0, PART), (1, 1)]]
    assert len(network.requester.receive(0, parts[0])[0]) == 1
    for token, length in [(6, PART + 1), (5, PART + 2)]:
        other = encode(Data(ANSWER, 8, token, length, 1, bytes(length - PART)))
        assert network.requester.receive(0, other) == ([], [])
    packets, (ended,) = network.requester.receive(0, parts[1])
    assert ended.answer == bytes(PART + 1)
    assert network.requester.receive(1, parts[1]) == (packets, [])  # repeated: acknowledged again


def test_server_without_the_request_does_not_mislead_its_client() -> None:
    network = LossyNetwork(takes=3.0)
    network.request(7, b"hello")
    network.run(1)
    assert network.requester.receive(1, encode(ExchangeState(RECEIVED, 7, 12345, 0, 0, prove=True))) == ([], [])
    network.run(10)
    assert network.answers() == {7: b"hello"}


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_packets_of_strangers_are_ignored_by_both_sides(found: list[bytes]) -> None:
    network = LossyNetwork()
    network.request(7, b"hello")
    for data in found:
        assert network.responder.receive(0, data, ("192.0.2.7", 7)) == ([], None)
        assert network.requester.receive(0, data) == ([], [])
    network.run(1)
    assert network.answers() == {7: b"hello"}


def proven(responder: Responder, id: int, peer: object, now: float = 0) -> list[bytes] | Request:
    """What a server says to the request of a peer that shows the token when it is asked for it; or the request."""
    packets, request = responder.receive(now, single(id), peer)
    if request is None and isinstance(challenge := decode(packets[0]), ExchangeState):
        packets, request = responder.receive(now, single(id, token=challenge.token), peer)
    return packets if request is None else request


def test_spoofed_requests_cost_next_to_nothing() -> None:
    responder = server(unproven=10)
    ran = 0
    for number in range(1000):
        packets, request = responder.receive(0, single(number), (f"10.0.{number // 250}.{number % 250}", 4711))
        if request is None:
            assert [decode(packet).prove for packet in packets] == [True]  # type: ignore[union-attr]
        else:
            ran += 1
            responder.answer(0, request.key, b"hi")
    assert (ran, len(responder)) == (10, 10)
    request = proven(responder, 7, PEER)  # type: ignore[assignment]
    assert isinstance(request, Request)
    ((answer, _),) = responder.answer(0, request.key, b"hi")
    assert responder.receive(0, encode(ExchangeState(TAKEN, 7, decode(answer).token, 1, 0)), PEER) == ([], None)  # type: ignore[union-attr]
    later = EXACT.exchange_lifetime
    responder.expire(later)
    assert responder.receive(later, single(8), ("10.0.9.9", 1))[1]  # there is room again


def test_peers_that_prove_their_address_leave_room_for_others() -> None:
    responder = server(unproven=1)
    for number in range(100):
        request = proven(responder, number, PEER)
        assert isinstance(request, Request)
        responder.receive(0, single(number, token=request.key), PEER)
    assert responder.receive(0, single(1), ("192.0.2.9", 1))[1]


@pytest.mark.parametrize(
    ("addresses", "other"),
    [
        (["192.0.2.1"], "192.0.2.2"),
        (["2001:db8::1", "2001:db8::2:0:0:1"], "2001:db8:0:1::1"),
        (["::ffff:192.0.2.1", "192.0.2.1"], "::ffff:192.0.2.2"),
        (["fe80::1%eth0"], "fe80:0:0:1::1%eth0"),
    ],
)
@pytest.mark.parametrize("taken", [False, True])
def test_one_host_leaves_room_for_the_others(addresses: list[str], other: str, taken: bool) -> None:
    responder = server(exchanges=1000)
    accepted = 0
    for number in range(1200):
        peer = (addresses[number % len(addresses)], number)
        request = proven(responder, number, peer)
        if isinstance(request, Request):
            accepted += 1
            if taken:
                responder.answer(0, request.key, b"hi")
                responder.receive(0, encode(ExchangeState(TAKEN, number, request.key, 1, 0)), peer)
        else:
            assert request == [encode(Refusal(number, BUSY))]
    assert accepted == len(responder) == 800
    assert isinstance(proven(responder, 7, (other, 7)), Request)


def test_answers_that_one_host_does_not_take_leave_room() -> None:
    responder = server(answers=1_000_000)
    for number in range(300):
        request = proven(responder, number, PEER)
        if isinstance(request, Request):
            responder.answer(0, request.key, bytes(8000))
    assert 75 <= len(responder) <= 85
    other = proven(responder, 7, ("192.0.2.9", 1))
    assert isinstance(other, Request)
    responder.fail(0, other.key)
    later = 2 * EXACT.exchange_lifetime
    responder.expire(later)
    assert len(responder) == 0
    assert isinstance(proven(responder, 1, PEER, later), Request)


def test_request_that_dribbles_is_forgotten_in_the_end() -> None:
    responder = server()
    (challenge,) = map(decode, responder.receive(0, single(7, LONG), PEER)[0])
    first = single(7, LONG, challenge.token)  # type: ignore[union-attr]
    now = 0.0
    while now < EXACT.exchange_lifetime:
        responder.receive(now, first, PEER)
        now += 60
        responder.expire(now)
    assert len(responder) == 0


@pytest.mark.parametrize("taken", [False, True])
def test_what_is_due_at_once_is_done_in_slices(taken: bool) -> None:
    responder = server()
    for number in range(5000):
        request = proven(responder, number, PEER)
        assert isinstance(request, Request)
        responder.answer(0, request.key, b"hi")
        token = request.key if taken else 0
        responder.receive(0, encode(ExchangeState(TAKEN, number, token, 1, 0)), PEER)
    assert len(responder) == 5000
    now, calls = 2 * EXACT.exchange_lifetime, 0
    while len(responder):
        before, calls = len(responder), calls + 1
        assert responder.deadline is not None
        assert responder.deadline <= now
        responder.expire(now)
        assert before - len(responder) <= 1000
    assert calls >= 5


def test_deadlines_of_what_is_over_take_no_memory() -> None:
    deadlines = DeadlineHeap()
    for key in range(10_000):
        deadlines.set(key, 1000.0 + key)
        if key % 100:
            deadlines.forget(key)
    assert len(deadlines._heap) < 1500
    assert [*deadlines.due(1e9)] == [*range(0, 10_000, 100)]
