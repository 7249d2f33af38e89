"""The parts of one payload: what arrives in any order is put together, and what is missing is sent again in time."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from forkd.rdp.packets import AHEAD, PART, parts_of
from forkd.rdp.timers import FIRST_WINDOW, LARGEST_WINDOW, SILENT_WINDOW, Timers
from forkd.rdp.transfer import Incoming, Outgoing

EXACT = Timers(ack_random_factor=1.0)


def outgoing(parts: int) -> Outgoing:
    return Outgoing(bytes(parts * PART), EXACT, Random(1))


@given(st.integers(0, 30 * PART), st.randoms(use_true_random=False))
def test_parts_in_any_order_and_repeated_make_the_payload(length: int, random: Random) -> None:
    payload = random.randbytes(length)
    incoming, order = Incoming(length), [*range(parts_of(length))] * 2
    random.shuffle(order)
    seen: set[int] = set()
    for part in order:
        incoming.add(part, payload[part * PART : (part + 1) * PART])
        seen.add(part)
        first = incoming.first_missing
        named = {*range(first)} | {first + 1 + bit for bit in range(AHEAD) if incoming.ahead >> bit & 1}
        assert named == seen
    assert incoming.whole
    assert incoming.payload() == payload


def test_a_part_that_no_acknowledgement_can_name_is_dropped() -> None:
    incoming = Incoming(100 * PART)
    incoming.add(AHEAD + 1, bytes(PART))
    assert incoming.ahead == 0
    incoming.add(AHEAD, bytes(PART))
    assert incoming.ahead == 1 << (AHEAD - 1)


def test_window_grows_by_what_is_acknowledged_up_to_its_bound() -> None:
    out, sent = outgoing(1000), 0
    while not out.done:
        parts = out.send(0.0)
        assert len(parts) <= LARGEST_WINDOW
        sent += len(parts)
        out.acknowledge(0.0, sent, 0)
    assert (sent, out.window, out.deadline) == (1000, LARGEST_WINDOW, None)


def test_part_is_sent_again_when_three_later_ones_have_arrived() -> None:
    out = outgoing(100)
    assert out.send(0) == [*range(FIRST_WINDOW)]
    out.acknowledge(0.1, 0, 0b011)
    assert 0 not in out.send(0.1)
    out.acknowledge(0.1, 0, 0b111)  # lost: the window becomes smaller than what is still under way
    assert out.send(0.1) == []
    out.acknowledge(0.1, 0, 0b11111)
    assert out.send(0.1)[0] == 0


def test_parts_are_sent_again_in_a_small_window_after_silence() -> None:
    out = outgoing(100)
    out.send(0)
    assert out.deadline == EXACT.ack_timeout
    out.expire(1.9)
    assert out.send(1.9) == []
    out.expire(2)
    assert out.send(2) == [*range(SILENT_WINDOW)]
    assert out.deadline == 2 + 2 * EXACT.ack_timeout


def test_retransmission_time_follows_the_measured_round_trip() -> None:
    out = outgoing(2)
    out.send(0)
    out.expire(2)
    assert out.send(2) == [0, 1]
    assert out.acknowledge(2.5, 1, 0)
    assert out.deadline == 2.5 + EXACT.ack_timeout  # a part that was sent twice is not measured
    out = outgoing(100)
    out.send(0)
    out.acknowledge(0.4, 1, 0)
    assert out.deadline == 0.4 + 0.4 + 4 * 0.2  # RFC 6298, (2.2)


def test_silent_path_is_given_up_as_late_as_an_unmeasured_one() -> None:
    out = outgoing(100)
    out.send(0)
    out.acknowledge(0.01, 1, 0)
    now = 0.01
    while not out.exhausted:
        out.send(now)
        assert out.deadline is not None
        assert out.deadline > now
        now = out.deadline
        out.expire(now)
    assert 62 <= now <= 62 + 32.1
    out.revive()
    assert out.send(now) == [1, 2]


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_acknowledgement_of_unsent_parts_is_ignored(first_missing: int, ahead: int) -> None:
    out = outgoing(100)
    out.send(0)
    believed = out.acknowledge(0.1, first_missing, ahead)
    if first_missing + ahead.bit_length() > FIRST_WINDOW:
        assert not believed
    assert not out.done
