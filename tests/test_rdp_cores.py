"""The two state machines of reliable requests in simulated time: every timer, and the loss of each packet in turn."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lossy import PEER, Network

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
    Refusal,
    State,
    decode,
    encode,
)  # fmt: skip
from forkd.rdp.responder import Responder
from forkd.rdp.timers import Limits, Timers

EXACT = Timers(ack_random_factor=1.0)
LONG = bytes(range(256)) * 20  # five parts


def test_the_derived_times_are_those_of_rfc_7252() -> None:
    timers = Timers()
    assert (timers.max_transmit_span, timers.max_transmit_wait, timers.exchange_lifetime) == (45.0, 93.0, 247.0)


@pytest.mark.parametrize(
    "wrong", [{"ack_timeout": 0}, {"ack_random_factor": 0.5}, {"max_retransmit": -1}, {"patience": 0}]
)
def test_timers_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Timers(**wrong)  # type: ignore[arg-type]


def test_a_small_exchange_is_three_packets_and_is_then_remembered_for_the_lifetime() -> None:
    network = Network()
    network.request(7, b"hello")
    network.run(1)
    assert network.answers() == {7: b"hello"}
    assert [packet[1] for _, _, packet in network.trace] == [REQUEST, ANSWER, TAKEN]
    network.run(1 + network.timers.exchange_lifetime - 2)
    assert len(network.responder) == 1
    network.run()
    assert len(network.responder) == 0
    assert network.now < 2 * network.timers.exchange_lifetime


def test_a_request_is_sent_again_after_twice_the_time_each_and_given_up() -> None:
    network = Network(lambda _sender, _packet: [], timers=EXACT)
    network.request(7, b"hello")
    network.run()
    assert [at for at, _ in network.sent("client")] == [0, 2, 6, 14, 30]
    (ended,) = network.ended
    assert (ended.answer, ended.reason, ended.tries, ended.seconds) == (None, None, 5, 62)


@given(st.integers(0, 10_000))
def test_the_first_try_gets_between_one_and_one_and_a_half_times_the_time(seed: int) -> None:
    network = Network(lambda _sender, _packet: [], seed=seed)
    network.request(7, b"hello")
    network.run()
    times = [at for at, _ in network.sent("client")]
    assert 2 <= times[1] <= 3
    assert times == pytest.approx([0, times[1], 3 * times[1], 7 * times[1], 15 * times[1]])


def test_an_answer_that_takes_longer_is_announced_and_the_request_not_sent_again() -> None:
    network = Network(takes=20.0, timers=EXACT)
    network.request(7, b"hello")
    network.run(19.9)
    assert network.sent("server")[0] == (pytest.approx(0.51), RECEIVED)
    assert [kind for _, kind in network.sent("client")].count(REQUEST) == 1
    network.run(60)
    assert network.answers() == {7: b"hello"}
    assert network.ran == {7: 1}


def test_a_server_that_dies_after_it_has_acknowledged_is_given_up_and_its_successor_runs_nothing() -> None:
    network = Network(takes=1e9, timers=EXACT)
    network.request(7, b"hello")
    network.run(5)
    network.responder = Responder(network.timers, network.limits, Random(3), b"another secret")
    network.run(network.timers.exchange_lifetime)
    (ended,) = network.ended
    assert (ended.answer, ended.tries) == (None, 5)
    assert network.ran == {7: 1}


def test_a_request_of_several_parts_survives_a_server_that_dies_before_it_is_whole() -> None:
    network = Network(timers=EXACT)
    dropped = [0]

    def fate(sender: str, packet: bytes) -> list[float]:
        dropped[0] += sender == "client" and packet[1] == REQUEST and decode(packet).part == 3  # type: ignore[union-attr]
        return (
            []
            if dropped[0] == 1 and sender == "client" and packet[1] == REQUEST and decode(packet).part == 3
            else [0.01]
        )  # type: ignore[union-attr]

    network.fate = fate
    network.request(7, LONG)
    network.run(0.1)
    assert network.ran == {}
    network.responder = Responder(network.timers, network.limits, Random(3), b"another secret")
    network.run(60)
    assert network.answers() == {7: LONG}


@pytest.mark.parametrize("patience", [None, 20.0])
def test_a_handler_that_never_ends_does_not_hold_the_client_beyond_the_bound(patience: float | None) -> None:
    network = Network(takes=1e9, timers=Timers(patience=patience))
    network.request(7, b"hello")
    network.run(1000)
    (ended,) = network.ended
    assert (ended.answer, ended.reason, ended.seconds) == (None, None, pytest.approx(patience or 247))
    assert max(at for at, _ in network.sent("client")) < (patience or 247)


@pytest.mark.parametrize("payload", [b"hello", LONG])
@pytest.mark.parametrize("takes", [0.0, 3.0])
def test_each_packet_lost_in_turn_or_repeated_late_changes_nothing(payload: bytes, takes: float) -> None:
    plain = Network(takes=takes)
    plain.request(7, payload)
    plain.run(60)
    for number in range(len(plain.trace)):
        for fate in ([], [0.01, 0.01], [0.01, 30.0], [1.5]):
            count = iter(range(10**6))
            network = Network(lambda _s, _p, n=number, f=fate, c=count: f if next(c) == n else [0.01], takes=takes)  # type: ignore[misc]
            network.request(7, payload)
            network.run(90)
            assert network.answers() == {7: payload}, (number, fate)
            assert network.ran == {7: 1}, (number, fate)
            network.run()
            assert len(network.responder) == 0


@pytest.mark.parametrize("kind", [ANSWER, TAKEN])
def test_a_kind_that_never_arrives_does_not_make_the_handler_run_again(kind: int) -> None:
    network = Network(lambda _sender, packet: [] if packet[1] == kind else [0.01])
    network.request(7, b"hello")
    network.run()
    assert network.ran == {7: 1}
    assert network.answers() == {7: None if kind == ANSWER else b"hello"}
    assert len(network.responder) == 0


def test_a_failure_ends_the_request_at_once_and_is_told_again_when_it_was_lost() -> None:
    count = iter(range(100))
    network = Network(
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

    network = Network(fate)
    payload = random.randbytes(1 << 20)
    network.request(7, payload)
    network.run(network.timers.bound)
    assert network.answers() == {7: payload}
    assert network.ended[0].seconds < 60


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**32), st.sampled_from([0.0, 0.3, 5.0]))
def test_whatever_the_network_does_a_handler_runs_at_most_once_and_everyone_ends(
    draw: st.DataObject, seed: int, takes: float
) -> None:
    loss, twice, late = (draw.draw(st.floats(0, 0.6)) for _ in range(3))
    random = Random(seed)

    def fate(_sender: str, _packet: bytes) -> list[float]:
        copies = (random.random() >= loss) + (random.random() < twice)
        return [random.uniform(0, 20.0 if random.random() < late * 0.2 else 0.05) for _ in range(copies)]

    network = Network(fate, takes=takes, seed=seed)
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


def test_a_spoofed_request_is_never_answered_with_more_than_three_times_its_bytes() -> None:
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


def test_a_long_request_costs_nothing_before_the_peer_has_shown_that_it_is_there() -> None:
    responder = server()
    packets, request = responder.receive(0, single(7, LONG), PEER)
    (challenge,) = map(decode, packets)
    assert isinstance(challenge, State)
    assert (challenge.kind, challenge.first_missing, challenge.prove) == (RECEIVED, 0, True)
    assert (request, len(responder)) == (None, 0)
    responder.receive(0, single(7, LONG, challenge.token + 1), PEER)
    assert len(responder) == 0
    responder.receive(0, single(7, LONG, challenge.token), ("192.0.2.2", 4711))
    assert len(responder) == 0
    responder.receive(0, single(7, LONG, challenge.token), PEER)
    assert len(responder) == 1


def test_at_the_bound_new_requests_are_refused_and_nothing_is_forgotten() -> None:
    responder = server(exchanges=4)
    asked = []
    for id in range(1, 6):
        packets, request = responder.receive(0, single(id), PEER)
        if id > 2:  # half full: who has not shown that it is there is asked to
            (challenge,) = map(decode, packets)
            assert isinstance(challenge, State)
            packets, request = responder.receive(0, single(id, token=challenge.token), PEER)
        asked.append(packets if request is None else request.id)
    assert asked == [1, 2, 3, 4, [encode(Refusal(5, BUSY))]]
    for id in range(1, 5):
        assert responder.receive(1, single(id), PEER)[1] is None


def test_at_the_bound_of_answers_kept_new_requests_are_refused_until_one_is_taken() -> None:
    responder = server(answers=100)
    _, request = responder.receive(0, single(1, bytes(100)), PEER)
    assert request is not None
    ((packet, _),) = responder.answer(0, request.key, bytes(100))
    assert responder.receive(0, single(2), PEER)[0] == [encode(Refusal(2, BUSY))]
    responder.receive(0, encode(State(TAKEN, 1, decode(packet).token, 1, 0)), PEER)  # type: ignore[union-attr]
    assert responder.receive(0, single(2), PEER)[1] is not None


@pytest.mark.parametrize(("limits", "same"), [({"arriving": 8000}, False), ({"arriving_per_host": 8000}, True)])
def test_requests_that_arrive_are_bounded_and_given_back_when_they_stop(limits: dict[str, int], same: bool) -> None:
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


def test_what_is_too_large_is_refused_by_either_side() -> None:
    assert server(request=4).receive(0, single(7), PEER)[0] == [encode(Refusal(7, TOO_LARGE))]
    network = Network(handler=lambda _: bytes(17 << 20))
    network.request(7, b"hello")
    network.run(5)
    assert network.ended[0].reason == TOO_LARGE


def test_a_server_that_drains_takes_no_new_request_and_finishes_what_is_there() -> None:
    network = Network(takes=1.0)
    network.request(7, b"old")
    network.run(0.5)
    network.responder.draining = True
    network.request(8, b"new")
    network.run(5)
    assert network.answers() == {7: b"old"}
    assert network.ran == {7: 1}
    assert network.responder.unfinished == 0


@pytest.mark.parametrize("lost", [False, True])
def test_an_answer_of_several_parts_is_unfinished_until_it_is_taken_or_was_tried_enough(lost: bool) -> None:
    network = Network(lambda sender, _: [] if lost and network.ran and sender == "client" else [0.01])
    network.request(7, LONG)
    network.run(0.045)
    assert network.ran == {7: 1}
    assert network.responder.unfinished == 1
    network.run(network.timers.max_transmit_wait + 1)
    assert network.responder.unfinished == 0
    assert network.answers() == {7: LONG}


def test_a_repeated_request_has_its_answer_repeated_at_once_and_is_remembered_from_then_on() -> None:
    responder = server()
    _, request = responder.receive(0, single(7), PEER)
    assert request is not None
    ((answer, _),) = responder.answer(0, request.key, b"hi")
    assert responder.receive(0.1, single(7), PEER) == ([answer], None)
    assert responder.receive(200, single(7), PEER) == ([answer], None)
    responder.expire(200 + EXACT.exchange_lifetime - 1)
    assert responder.receive(200 + EXACT.exchange_lifetime - 1, single(7), PEER) == ([answer], None)


def test_who_does_not_know_the_token_takes_no_answer_and_shows_nothing() -> None:
    responder = server()
    _, request = responder.receive(0, single(7), PEER)
    assert request is not None
    (question,) = [decode(packet) for packet, _ in responder.answer(0, request.key, LONG)]
    assert isinstance(question, State)
    assert question.prove
    assert responder.receive(0, encode(State(TAKEN, 7, question.token ^ 1, 0, 0)), PEER) == ([], None)
    packets, _ = responder.receive(0, encode(State(TAKEN, 7, question.token, 0, 0)), PEER)
    assert [decode(packet).kind for packet in packets] == [ANSWER] * 5  # type: ignore[union-attr]


def test_a_part_of_another_length_or_of_another_server_is_not_mixed_in() -> None:
    network = Network()
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


def test_a_server_without_the_request_does_not_lead_its_client_astray_from_the_one_that_runs_it() -> None:
    network = Network(takes=3.0)
    network.request(7, b"hello")
    network.run(1)
    assert network.requester.receive(1, encode(State(RECEIVED, 7, 12345, 0, 0, prove=True))) == ([], [])
    network.run(10)
    assert network.answers() == {7: b"hello"}


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_neither_side_minds_what_strangers_send(found: list[bytes]) -> None:
    network = Network()
    network.request(7, b"hello")
    for data in found:
        assert network.responder.receive(0, data, ("192.0.2.7", 7)) == ([], None)
        assert network.requester.receive(0, data) == ([], [])
    network.run(1)
    assert network.answers() == {7: b"hello"}
