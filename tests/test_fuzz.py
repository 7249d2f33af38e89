"""Whatever strangers send to forkd or write into its files, made at random: nothing is raised but what is told.

A few examples of each are tried by `make test`. `make fuzz` goes on with all of them for ten minutes in turn, and keeps
what has failed in a directory, from where it is tried first the next time; FORKD_FUZZ_SECONDS and FORKD_FUZZ_DATABASE
choose others. `make soak` does so, too.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.database import DirectoryBasedExampleDatabase

from forkd.config.loader import LoadResult, empty_mapping, node_of, read_graph
from forkd.config.serialize import to_plain
from forkd.framing import FixedSizeFraming, Framing, LengthPrefixFraming, LineFraming, MessageTooLong
from forkd.messages import (
    _FORMS,
    _KINDS,
    InvalidMessage,
    JsonLines,
    JsonObject,
    MalformedLine,
    StatusReply,
    decode_command,
    decode_event,
    decode_launch,
    decode_reply,
    decode_request,
    encode,
)
from forkd.rdp.packets import ANSWER, RECEIVED, REQUEST, TAKEN, Data, ExchangeState
from forkd.rdp.packets import encode as encode_packet
from forkd.rdp.requester import Requester
from forkd.rdp.responder import Responder
from forkd.rdp.timers import Limits, Timers
from forkd.serve.accept.proxy_protocol import MOST_BYTES, SIGNATURE, Malformed, parse_datagram, parse_header
from tests.master.test_commands import Asking
from tests.support.strategies import SETTINGS

SECONDS = float(os.environ.get("FORKD_FUZZ_SECONDS", "600"))
DATABASE = os.environ.get("FORKD_FUZZ_DATABASE", ".fuzz")

#: What is tried, by name: what makes a test of it that has these settings.
TARGETS: dict[str, Callable[[settings], Callable[[], None]]] = {}


def target(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        TARGETS[function.__name__] = lambda how: how(given(**strategies)(function))
        return function

    return register


PORTIONS = st.lists(st.integers(1, 40), max_size=20)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
WORDS = ["", "x", "10.0.0.0/8", "\u0436", "\udc80", "\x1b[0m"]
VALUES = LEAVES | st.sampled_from(
    [*WORDS, [], {}, [[]], [{}], ["x"], [1, {"x": []}], {"x": {}}, {"": [None]}, -1, 1 << 64, float("inf"), True]
)
FIELDS = sorted({name for names in _FORMS.values() for name in names})
OBJECTS = st.builds(
    lambda kind, rest: {**rest, kind[0]: kind[1]},
    st.sampled_from(sorted(_KINDS, key=str)),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), VALUES, max_size=5),
)


def portions(data: bytes, sizes: list[int]) -> list[bytes]:
    found = []
    for size in sizes:
        found.append(data[:size])
        data = data[size:]
    return [*found, data]


@st.composite
def damaged(draw: st.DrawFn, good: st.SearchStrategy[bytes]) -> bytes:
    """What is right but for some bytes."""
    data = bytearray(draw(good))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            at = draw(st.integers(0, len(data) - 1))
            data[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(data)


LINES = st.lists(damaged(OBJECTS.map(encode)) | st.binary(max_size=40), max_size=6).map(b"".join)


def as_status(found: JsonObject) -> object:
    return decode_reply(found, StatusReply)


@target(data=LINES, sizes=PORTIONS)
def messages(data: bytes, sizes: list[int]) -> None:
    lines = JsonLines()
    found: list[JsonObject] = []
    with suppress(MalformedLine):
        for portion in portions(data, sizes):
            found += lines.feed(portion)
    for one in found:
        for decode in (decode_request, decode_command, decode_event, decode_launch, as_status):
            with suppress(InvalidMessage):
                decode(one)


@target(requests=st.lists(OBJECTS, max_size=6))
def control_requests(requests: list[JsonObject]) -> None:
    asking = Asking()
    for request in requests:
        plain = json.loads(json.dumps({**request, "verb": request.get("verb", "status")}))
        if plain["verb"] != "clients":  # of which the master that plays here has none
            for reply in asking.ask(plain):
                encode(reply)
        asking.requests.answer_waiting()


KEYS = st.sampled_from(["<<", "x-a", "listen", "limits", "address", "workers", "log", "to"]) | st.text(max_size=5)
PLAIN = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@st.composite
def settings_with_mistakes(draw: st.DrawFn) -> Any:
    """Settings of which some values are anything."""
    plain: Any = to_plain(draw(SETTINGS))
    for key in draw(st.lists(st.sampled_from(sorted(plain)), max_size=3)):
        plain[key] = draw(PLAIN)
    return plain


@target(plain=settings_with_mistakes() | PLAIN)
def settings_files(plain: Any) -> None:
    result = LoadResult()
    mark = empty_mapping("fuzz").start_mark
    read_graph(node_of(plain, mark), result, {})
    assert result.problems or result.valid_settings()


HEADERS = st.builds(
    lambda command, family, rest: SIGNATURE + bytes([command, family]) + len(rest).to_bytes(2, "big") + rest,
    st.sampled_from([0x20, 0x21, 0x2F, 0x11]),
    st.sampled_from([0, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32]),
    st.binary(max_size=260),
)
FIRST_LINES = st.builds(
    lambda family, words: " ".join(["PROXY", family, *words]).encode() + b"\r\n",
    st.sampled_from(["TCP4", "TCP6", "UNKNOWN", "UDP4", ""]),
    st.lists(st.sampled_from(["127.0.0.1", "::1", "0", "65536", "-1", "1.2.3", "::ffff:1.2.3.4", "%", ""]), max_size=5),
)


@target(data=damaged(HEADERS) | damaged(FIRST_LINES) | st.binary(max_size=300), rest=st.binary(max_size=20))
def proxy_headers(data: bytes, rest: bytes) -> None:
    for parse in (parse_header, parse_datagram):
        with suppress(Malformed):
            parse(data + rest)
    with suppress(Malformed):
        header = parse_header(data)
        assert header is None or header.length <= min(len(data), MOST_BYTES + len(SIGNATURE))


NUMBERS = st.integers(0, 2**64 - 1) | st.integers(0, 3)
PARTS = st.builds(
    lambda kind, id, key, length: Data(kind, id, key, length, 0, bytes(length)),
    *(st.sampled_from([REQUEST, ANSWER]), NUMBERS, NUMBERS, st.integers(0, 1000)),
)
STATES = st.builds(
    ExchangeState,
    *(st.sampled_from([RECEIVED, TAKEN]), NUMBERS, NUMBERS, st.integers(0, 2**32 - 1), NUMBERS, st.booleans()),
)
PACKETS = (PARTS | STATES).map(encode_packet)


@target(data=st.lists(damaged(PACKETS) | st.binary(max_size=60), max_size=10), answer=st.binary(max_size=3000))
def reliable_datagrams(data: list[bytes], answer: bytes) -> None:
    limits = Limits(exchanges=3, arriving=4000)
    responder = Responder(Timers(), limits, Random(1), b"secret")
    requester = Requester(Timers(), 4000, Random(1))
    requester.start(0.0, 1, b"x" * 3000)
    for number, one in enumerate(data):
        now = number * 10.0
        _, request = responder.receive(now, one, ("127.0.0.1", number % 2))
        if request is not None:
            responder.answer(now, request.key, answer)
        responder.expire(now)
        requester.receive(now, one)
        requester.expire(now)
        assert len(responder) <= limits.exchanges
    for state in (responder, requester):
        while state.deadline is not None and state.deadline < 1e6:
            state.expire(state.deadline + 1e-6)


FRAMINGS: list[Callable[[], Framing]] = [
    lambda: LineFraming(b"\r\n", 12),
    lambda: FixedSizeFraming(5),
    lambda: LengthPrefixFraming(2, "big", 30),
]


@target(which=st.sampled_from(FRAMINGS), data=st.binary(max_size=200), sizes=PORTIONS)
def framings(which: Callable[[], Framing], data: bytes, sizes: list[int]) -> None:
    outcomes = []
    for pieces in ([data], portions(data, sizes)):
        framing, found = which(), list[bytes]()
        try:
            for piece in pieces:
                framing.feed(piece)
                while (message := framing.next_message()) is not None:
                    found.append(message)
        except MessageTooLong:
            found.append(b"too long")
        outcomes.append(found)
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_a_few_examples(name: str) -> None:
    TARGETS[name](settings(max_examples=30, suppress_health_check=[*HealthCheck]))()


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 600)
def test_fuzz_goes_on_for_long() -> None:
    database = DirectoryBasedExampleDatabase(DATABASE)
    often = settings(max_examples=100, database=database, suppress_health_check=[*HealthCheck], print_blob=True)
    end = time.monotonic() + SECONDS
    rounds, tests = 0, [make(often) for make in TARGETS.values()]
    while time.monotonic() < end:
        tests[rounds % len(tests)]()
        rounds += 1
    assert rounds >= len(tests), "not each had its turn"
    print(f"{rounds} rounds of 100 examples; what has failed is kept in {DATABASE}")
