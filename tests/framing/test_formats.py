"""The framings by themselves: any chunking gives the same messages and the same end, whatever they are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.framing import (
    FixedSizeFraming,
    FixedSizeProtocol,
    Framing,
    LengthPrefixFraming,
    LengthPrefixProtocol,
    LineFraming,
    LineProtocol,
    MessageTooLong,
    formats,
)

SIZES = st.sampled_from([1, 2, 4, 8])
ORDERS = st.sampled_from(["big", "little"])
#: What makes each framing: few byte values and short delimiters, so that delimiters lie across chunks.
FRAMINGS: st.SearchStrategy[Callable[[], Framing]] = st.one_of(
    st.builds(
        lambda delimiter, limit, strip: lambda: LineFraming(delimiter, limit, strip_cr=strip),
        st.sampled_from([b"\n", b"\r\n", b"\n\n", b"aba", b"\0"]),
        st.integers(0, 12),
        st.booleans(),
    ),
    st.builds(lambda size: lambda: FixedSizeFraming(size), st.integers(1, 9)),
    st.builds(
        lambda size, order, limit: lambda: LengthPrefixFraming(size, order, limit), SIZES, ORDERS, st.integers(0, 300)
    ),
)
STREAMS = st.lists(st.sampled_from([b"\n", b"\r", b"a", b"b", b"\0", b"\1", b"\3"]), max_size=60).map(b"".join)
PLACES = st.lists(st.integers(0, 10**6), max_size=20)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


def outcome(framing: Framing, chunks: list[bytes]) -> tuple[list[bytes], str]:
    """The messages, and what is left of the stream or why it ended."""
    messages = []
    try:
        for chunk in chunks:
            framing.feed(chunk)
            while (message := framing.next_message()) is not None:
                messages.append(message)
    except MessageTooLong as error:
        return messages, str(error)
    return messages, repr(framing.take_unread())


@given(make=FRAMINGS, data=STREAMS, places=PLACES)
def test_any_chunking_gives_the_same_messages_and_the_same_end(
    make: Callable[[], Framing], data: bytes, places: list[int]
) -> None:
    whole = outcome(make(), [data])
    assert outcome(make(), cut(data, places)) == whole
    assert outcome(make(), [bytes([byte]) for byte in data]) == whole


@given(make=FRAMINGS, messages=st.lists(st.binary(max_size=12) | STREAMS, max_size=8), places=PLACES)
def test_encoded_messages_come_back_the_same(
    make: Callable[[], Framing], messages: list[bytes], places: list[int]
) -> None:
    sent, data = [], b""
    for message in messages:
        try:
            data += make().encode(message)
        except ValueError:
            continue
        sent.append(message)
    assert outcome(make(), cut(data, places)) == (sent, "b''")


@pytest.mark.parametrize(
    ("framing", "data", "messages"),
    [
        (LineFraming(), b"a\n\r\n\nb\r\nc\r", [b"a", b"", b"", b"b"]),
        (LineFraming(strip_cr=False), b"a\r\n\n", [b"a\r", b""]),
        (LineFraming(b"\0"), b"a\r\0\n\0", [b"a\r", b"\n"]),
        (LineFraming(b"\r\n"), b"a\nb\r\r\n\r\n", [b"a\nb\r", b""]),
        (LineFraming(limit=3), b"abc\r\nabc\n", [b"abc", b"abc"]),
        (FixedSizeFraming(2), b"abcde", [b"ab", b"cd"]),
        (LengthPrefixFraming(1), b"\0\0\1a\2b", [b"", b"", b"a"]),
        (LengthPrefixFraming(2, "little"), b"\1\0a\0\0", [b"a", b""]),
        (LengthPrefixFraming(8), bytes(7) + b"\2ab", [b"ab"]),
    ],
)
def test_the_messages_of_a_stream(framing: Framing, data: bytes, messages: list[bytes]) -> None:
    assert outcome(framing, [data])[0] == messages


@pytest.mark.parametrize(
    ("framing", "data", "length"),
    [
        (LineFraming(limit=3), b"abcd\n", None),
        (LineFraming(limit=3), b"abcde", None),
        (LineFraming(limit=0), b"a\n", None),
        (LengthPrefixFraming(4, limit=9), b"\0\0\0\x0a", 10),
        (LengthPrefixFraming(8, limit=9), b"\xff" * 8, (1 << 64) - 1),
    ],
)
def test_message_over_the_limit_is_refused_before_it_is_there(
    framing: Framing, data: bytes, length: int | None
) -> None:
    framing.feed(data)
    for _ in range(2):  # there is no way on
        with pytest.raises(MessageTooLong) as caught:
            framing.next_message()
        assert caught.value.length == length


def test_endless_line_is_refused_at_the_limit() -> None:
    framing = LineFraming(limit=100)
    framing.feed(b"x" * 101)  # the carriage return may be the next to come
    assert framing.next_message() is None
    framing.feed(b"x")
    with pytest.raises(MessageTooLong, match="a message of more than 100 bytes"):
        framing.next_message()


@pytest.mark.parametrize(
    ("framing", "message", "said"),
    [
        (LineFraming(limit=3), b"abcd", "at most 3"),
        (LineFraming(), b"a\nb", "has the delimiter"),
        (LineFraming(b"aba"), b"ab", "has the delimiter"),
        (LineFraming(), b"a\r", "carriage return"),
        (FixedSizeFraming(2), b"abc", "a message of 3 bytes, where each has 2"),
        (FixedSizeFraming(2), b"", "each has 2"),
        (LengthPrefixFraming(1), bytes(256), "at most 255"),
        (LengthPrefixFraming(4, limit=9), bytes(10), "at most 9"),
    ],
)
def test_message_that_does_not_fit_is_not_sent(framing: Framing, message: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        framing.encode(message)


@pytest.mark.parametrize(
    ("base", "wrong"),
    [
        (LineProtocol, {"delimiter": b""}),
        (LineProtocol, {"limit": -1}),
        (FixedSizeProtocol, {}),
        (FixedSizeProtocol, {"size": 0}),
        (LengthPrefixProtocol, {"prefix_size": 3}),
        (LengthPrefixProtocol, {"byte_order": "network"}),
        (LengthPrefixProtocol, {"limit": -1}),
    ],
)
def test_a_class_that_can_not_be_is_told_where_it_is_written(base: type, wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"limit|delimiter|size|length|order"):
        type("Mistaken", (base,), wrong)


class CountingBuffer(bytearray):
    """Counts the bytes that are searched in all buffers of this kind."""

    searched = 0

    def find(self, delimiter: bytes, start: int = 0) -> int:  # type: ignore[override]
        CountingBuffer.searched += len(self) - start
        return super().find(delimiter, start)


def test_a_line_that_comes_byte_by_byte_is_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "bytearray", CountingBuffer, raising=False)
    framing = LineFraming(b"\r\n", limit=20_000)
    for _ in range(20_000):
        framing.feed(b"x")
        assert framing.next_message() is None
    framing.feed(b"\r\n")
    assert framing.next_message() == b"x" * 20_000
    assert 20_000 < CountingBuffer.searched < 3 * 20_000


def test_unread_bytes_can_be_taken() -> None:
    framing = LineFraming()
    framing.feed(b"STARTTLS\nrest without an end")
    assert framing.next_message() == b"STARTTLS"
    assert framing.next_message() is None
    assert framing.take_unread() == b"rest without an end"
    framing.feed(b"\n")
    assert framing.next_message() == b""
