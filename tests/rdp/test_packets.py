"""The packets of reliable requests: what is refused, what survives, and that docs/rdp.md tells the truth."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.rdp import packets
from forkd.rdp.packets import (
    ANSWER,
    PART,
    RECEIVED,
    REQUEST,
    TAKEN,
    BadPacket,
    Data,
    ExchangeState,
    Refusal,
    decode,
    encode,
    parts_of,
)  # fmt: skip
from tests.support.paths import CHECKOUT

PAGE = CHECKOUT / "docs" / "rdp.md"
WORDS = st.integers(0, 2**64 - 1)


@st.composite
def data(draw: st.DrawFn) -> Data:
    length = draw(st.integers(0, 4 * PART))
    part = draw(st.integers(0, parts_of(length) - 1))
    size = PART if part < parts_of(length) - 1 else length - part * PART
    return Data(draw(st.sampled_from([REQUEST, ANSWER])), draw(WORDS), draw(WORDS), length, part, bytes(size))


states = st.builds(
    ExchangeState, st.sampled_from([RECEIVED, TAKEN]), WORDS, WORDS, st.integers(0, 2**32 - 1), WORDS, st.booleans()
)
every = st.one_of(data(), states, st.builds(Refusal, WORDS, st.integers(1, 3)))


@given(every)
def test_packet_that_is_encoded_can_be_decoded(packet: Data | ExchangeState | Refusal) -> None:
    encoded = encode(packet)
    assert decode(encoded) == packet
    assert len(encoded) <= packets.LARGEST_PACKET


@given(st.one_of(st.binary(max_size=100), st.binary(max_size=60).map(lambda rest: b"\xf1" + rest)))
def test_random_bytes_are_refused_or_a_packet_of_those_bytes(found: bytes) -> None:
    try:
        packet = decode(found)
    except BadPacket:
        return
    assert encode(packet) == found


@given(every, st.data())
def test_a_packet_that_was_changed_is_another_one_or_refused(
    packet: Data | ExchangeState | Refusal, draw: st.DataObject
) -> None:
    encoded = bytearray(encode(packet))
    position = draw.draw(st.integers(0, len(encoded) - 1))
    encoded[position] ^= draw.draw(st.integers(1, 255))
    try:
        changed = decode(bytes(encoded))
    except BadPacket:
        return
    assert changed != packet
    assert encode(changed) == bytes(encoded)


@given(every, st.data())
def test_a_packet_cut_or_lengthened_is_refused(packet: Data | ExchangeState | Refusal, draw: st.DataObject) -> None:
    encoded = encode(packet)
    cut = encoded[: draw.draw(st.integers(0, len(encoded) - 1))]
    for wrong in (cut, encoded + b"\0"):
        with pytest.raises(BadPacket):
            decode(wrong)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (b"", "mark"),
        (b"\xf2\x01", "mark"),
        (b"\xf1\x06", "kind 6"),
        (b"\xf1\x00", "kind 0"),
        (encode(Refusal(1, 3))[:-1] + b"\4", "reason 4"),
        (encode(ExchangeState(TAKEN, 1, 2, 3, 4))[:-1] + b"\2", "flags 0x2"),
        (encode(Data(REQUEST, 1, 0, 5, 0, b"four")), "part 0 of 5"),
        (encode(Data(REQUEST, 1, 0, 5, 1, b"")), "part 1 of 5"),
    ],
)
def test_refusal_says_why(found: bytes, why: str) -> None:
    with pytest.raises(BadPacket, match=why):
        decode(found)


EXAMPLES: dict[str, Data | ExchangeState | Refusal] = {
    "request": Data(REQUEST, 0x0123456789ABCDEF, 0, 5, 0, b"hello"),
    "received": ExchangeState(RECEIVED, 0x0123456789ABCDEF, 0xFEDCBA9876543210, 1, 0, prove=True),
    "answer": Data(ANSWER, 0x0123456789ABCDEF, 0xFEDCBA9876543210, 2, 0, b"hi"),
    "taken": ExchangeState(TAKEN, 0x0123456789ABCDEF, 0xFEDCBA9876543210, 2, 0b101),
    "refused": Refusal(0x0123456789ABCDEF, packets.BUSY),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_page_has_examples_that_the_code_sends(name: str) -> None:
    found = re.search(rf"^Example `{name}`.*?\n```\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found, f"docs/rdp.md has no example of {name}"
    assert bytes.fromhex(found[1]) == encode(EXAMPLES[name])


def test_the_page_has_each_kind_with_its_number() -> None:
    page = PAGE.read_text()
    for name in EXAMPLES:
        assert f"### {name}, kind {getattr(packets, name.upper())}\n" in page


def test_a_part_fits_an_ipv6_path_of_the_least_size() -> None:
    assert packets.LARGEST_PACKET + 40 + 8 <= 1280
