"""Messages on the wire: any chunking gives the same messages, and what is no message is refused however it comes."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.wire import LARGEST, Decoder, Message, WireError, encode

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5)


def decoded(chunks: list[bytes]) -> list[Message]:
    decoder = Decoder()
    return [message for chunk in chunks for message in decoder.feed(chunk)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Data in portions, cut at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(messages=MESSAGES, places=st.lists(st.integers(0, 10**6), max_size=20))
def test_any_chunking_gives_the_same_messages(messages: list[dict[str, Any]], places: list[int]) -> None:
    data = b"".join(map(encode, messages))
    assert decoded(cut(data, places)) == messages
    assert decoded([bytes([byte]) for byte in data]) == messages


@given(message=st.dictionaries(st.text(), VALUES, max_size=4))
def test_a_message_is_one_line_however_many_are_in_it(message: dict[str, Any]) -> None:
    data = encode(message)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert data.isascii()


def test_a_message_comes_with_its_last_byte_and_not_before() -> None:
    decoder = Decoder()
    assert decoder.feed(b'{"a": 1}') == []
    assert decoder.feed(b'\n{"b"') == [{"a": 1}]
    assert decoder.feed(b"") == []
    assert decoder.feed(b": 2}\n") == [{"b": 2}]


GARBAGE = {
    "words": b"hello\n",
    "nothing": b"\n",
    "half": b'{"a": \n',
    "two": b"{} {}\n",
    "list": b"[1]\n",
    "number": b"1\n",
    "null": b"null\n",
    "string": b'"a"\n',
    "bytes": b'{"a": "\xff"}\n',
    "nul": b"{\0}\0\n",
    "brackets": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "braces": b'{"a": ' * 100_000 + b"\n",
    "digits": b'{"a": ' + b"9" * 5000 + b"}\n",
}


@pytest.mark.parametrize("size", [1 << 20, 65536, 997], ids=["at once", "by 64 KiB", "by 997"])
@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_message_is_refused(name: str, size: int) -> None:
    data = GARBAGE[name]
    with pytest.raises(WireError):
        decoded([data[start : start + size] for start in range(0, len(data), size)])


def line_of(size: int) -> bytes:
    """A message of so many bytes, its line feed not counted."""
    return json.dumps({"a": "x" * (size - len('{"a": ""}'))}).encode() + b"\n"


@pytest.mark.parametrize("chunk", [LARGEST * 2, 65536, LARGEST], ids=["at once", "by 64 KiB", "by the bound"])
def test_a_message_of_the_largest_size_passes_and_one_of_a_byte_more_does_not(chunk: int) -> None:
    fits, over = line_of(LARGEST), line_of(LARGEST + 1)
    assert len(decoded([fits[start : start + chunk] for start in range(0, len(fits), chunk)])) == 1
    with pytest.raises(WireError, match=str(LARGEST)):
        decoded([over[start : start + chunk] for start in range(0, len(over), chunk)])


def test_a_line_without_an_end_is_refused_as_soon_as_it_is_too_long() -> None:
    decoder = Decoder()
    assert decoder.feed(b"x" * LARGEST) == []
    with pytest.raises(WireError):
        decoder.feed(b"x")


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_any_bytes_are_messages_or_a_wire_error(chunks: list[bytes]) -> None:
    try:
        messages = decoded(chunks)
    except WireError:
        return
    assert all(isinstance(message, dict) for message in messages)
