"""Messages: any chunking gives the same objects, every message survives the way over a wire, and whatever else comes is
refused by one exception.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from forkd import MOST_WORKERS, messages
from forkd.messages import (
    LARGEST,
    InvalidMessage,
    JsonLines,
    JsonObject,
    MalformedLine,
    Message,
    encode,
    shorten,
    to_plain,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.lists(st.dictionaries(st.text(), VALUES, max_size=4), max_size=5)


def decoded(chunks: list[bytes]) -> list[JsonObject]:
    lines = JsonLines()
    return [found for chunk in chunks for found in lines.feed(chunk)]


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Data in portions, cut at these places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(objects=OBJECTS, places=st.lists(st.integers(0, 10**6), max_size=20))
def test_any_chunking_gives_the_same_messages(objects: list[JsonObject], places: list[int]) -> None:
    data = b"".join(map(encode, objects))
    assert decoded(cut(data, places)) == objects
    assert decoded([bytes([byte]) for byte in data]) == objects


@given(message=st.dictionaries(st.text(), VALUES, max_size=4))
def test_message_is_one_line_however_many_are_in_it(message: dict[str, Any]) -> None:
    data = encode(message)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert data.isascii()


def test_message_comes_with_its_last_byte_and_not_before() -> None:
    lines = JsonLines()
    assert lines.feed(b'{"a": 1}') == []
    assert lines.feed(b'\n{"b"') == [{"a": 1}]
    assert lines.feed(b"") == []
    assert lines.feed(b": 2}\n") == [{"b": 2}]


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
def test_line_that_is_no_object_is_refused(name: str, size: int) -> None:
    data = GARBAGE[name]
    with pytest.raises(MalformedLine):
        decoded([data[start : start + size] for start in range(0, len(data), size)])


def line_of(size: int) -> bytes:
    """A message of so many bytes, its line feed not counted."""
    return json.dumps({"a": "x" * (size - len('{"a": ""}'))}).encode() + b"\n"


@pytest.mark.parametrize("chunk", [LARGEST * 2, 65536, LARGEST], ids=["at once", "by 64 KiB", "by the bound"])
def test_message_of_the_largest_size_passes_and_no_larger(chunk: int) -> None:
    fits, over = line_of(LARGEST), line_of(LARGEST + 1)
    assert len(decoded([fits[start : start + chunk] for start in range(0, len(fits), chunk)])) == 1
    with pytest.raises(MalformedLine, match=str(LARGEST)):
        decoded([over[start : start + chunk] for start in range(0, len(over), chunk)])


def test_line_without_an_end_is_refused_once_it_is_too_long() -> None:
    lines = JsonLines()
    assert lines.feed(b"x" * LARGEST) == []
    with pytest.raises(MalformedLine):
        lines.feed(b"x")


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_bytes_of_any_kind_are_objects_or_a_malformed_line(chunks: list[bytes]) -> None:
    try:
        objects = decoded(chunks)
    except MalformedLine:
        return
    assert all(isinstance(found, dict) for found in objects)


# The classes

CLASSES: list[Any] = Message.__subclasses__()
DECODERS: dict[str, Callable[[JsonObject], object]] = {
    "verb": messages.decode_request,
    "order": messages.decode_command,
    "event": messages.decode_event,
    "launch": messages.decode_launch,
    "check": messages.decode_check,
}
TEXTS = st.text(st.characters())  # lone surrogates too
NUMBERS = st.integers(0, 2**63 - 1)
OBJECT = st.dictionaries(TEXTS, VALUES, max_size=3)
#: What each type that a field is declared with may hold.
HELD: dict[str, st.SearchStrategy[Any]] = {
    "bool": st.booleans(),
    "int": NUMBERS,
    "Number": NUMBERS,
    "WorkerCount": st.integers(1, MOST_WORKERS),
    "ExitStatus": st.integers(0, 255),
    "Cookie | None": st.none() | st.integers(1, 2**64 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False) | NUMBERS,
    "str": TEXTS,
    "str | None": st.none() | TEXTS,
    "object": VALUES,
    "dict[str, Any]": OBJECT,
    "list[str]": st.lists(TEXTS, max_size=3),
    "list[dict[str, Any]]": st.lists(OBJECT, max_size=2),
}
#: What none of these types but `object` is: of each kind of JSON value one that is wrong for the field.
WRONG: dict[str, list[object]] = {
    "bool": [None, 0, 1, "true", [], {}],
    "int": [None, True, 1.0, "1", [1], {}],
    "Number": [None, True, 1.0, "1", [1], {}, -1, 2**63],
    "WorkerCount": [None, True, 1.0, "1", [1], {}, 0, MOST_WORKERS + 1],
    "ExitStatus": [None, True, 1.0, "1", [1], {}, -1, 256],
    "Cookie | None": [True, 1.0, "1", [1], {}, 0, -1, 2**64],
    "float": [None, True, "1", [], {}, float("nan"), float("inf")],
    "str": [None, True, 1, ["x"], {}],
    "str | None": [True, 1, ["x"], {}],
    "object": [],
    "dict[str, Any]": [None, True, 1, "{}", []],
    "list[str]": [None, True, 1, "x", {}, [1], [None], ["x", 1]],
    "list[dict[str, Any]]": [None, True, 1, "x", {}, ["x"], [{}, []]],
}


def decode(kind: Any, found: JsonObject) -> object:
    """Decodes an object where a message of this class is expected."""
    key = kind.KIND[0]
    return messages.decode_reply(found, kind) if key == "ok" else DECODERS[key](found)


def made(kind: Any) -> st.SearchStrategy[Any]:
    """Messages of a class."""
    return st.builds(kind, **{name: HELD[declared] for name, declared in fields(kind).items()})


def fields(kind: Any) -> dict[str, str]:
    """The fields of a class: how each is declared."""
    return {name: declared for name, declared in kind.__annotations__.items() if "ClassVar" not in declared}


SHAPES = [(kind, name) for kind in CLASSES for name in fields(kind)]


@given(st.sampled_from(CLASSES).flatmap(made))
def test_message_of_any_class_survives_the_wire(message: Message) -> None:
    [found] = decoded([encode(message)])
    assert decode(type(message), found) == message
    assert decode(type(message), {**found, "of a later version": 1}) == message


def test_message_is_made_compared_and_kept_as_a_frozen_dataclass() -> None:
    event: Any = messages.AnswerEvent(9, found=3)
    assert (event.number, event.found) == (9, 3)
    assert event == messages.AnswerEvent(number=9, found=3)
    assert repr(event) == "AnswerEvent(number=9, found=3)"
    assert hash(event) == hash(messages.AnswerEvent(9, 3))
    assert event != messages.AnswerEvent(9)
    assert messages.DoneReply() != messages.DrainRequest()
    match event:
        case messages.AnswerEvent(number, found=found):
            assert (number, found) == (9, 3)
    assert event.replace(number=1) == messages.AnswerEvent(1, 3)
    with pytest.raises(AttributeError, match="AnswerEvent is not to be changed: number"):
        event.number = 10


@pytest.mark.parametrize("arguments", [((), {}), ((1, 2, 3), {}), ((1,), {"number": 1}), ((1,), {"nubmer": 1})])
def test_message_with_other_fields_can_not_be_made(arguments: tuple[tuple[int, ...], dict[str, int]]) -> None:
    given, named = arguments
    kind: Any = messages.AnswerEvent
    with pytest.raises(TypeError, match="AnswerEvent takes number, found"):
        kind(*given, **named)


def test_messages_cost_no_compilation_when_they_are_imported() -> None:
    """A dataclass of each would take longer than most commands need for the rest."""
    program = "import sys, forkd.messages; sys.exit('dataclasses' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_each_kind_on_the_wire_is_of_one_class() -> None:
    kinds = [kind.KIND for kind in CLASSES if kind.KIND[0] != "ok"]
    assert len(kinds) == len(set(kinds))
    assert {key for key, _ in kinds} == set(DECODERS)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (messages.StopRequest(now=True), b'{"verb":"stop","now":true,"succeeded":false}'),
        (messages.HandOverRequest(), b'{"verb":"hand over"}'),
        (messages.KillRequest(cookie=7), b'{"verb":"kill","cookie":7}'),
        (messages.KillCommand(network="::/0", number=9), b'{"order":"kill","network":"::/0","number":9}'),
        (messages.LogCommand(), b'{"order":"log"}'),
        (messages.FailedEvent("no module"), b'{"event":"failed","reason":"no module","details":""}'),
        (messages.AnswerEvent(9, 3), b'{"event":"answer","number":9,"found":3}'),
        (messages.StepChecked(1, "no module"), b'{"check":"step","step":1,"reason":"no module","details":""}'),
        (messages.ErrorReply("no"), b'{"ok":false,"error":"no","details":""}'),
        (messages.DoneReply(), b'{"ok":true}'),
        (messages.ScaledReply(3), b'{"ok":true,"workers":3}'),
    ],
)
def test_names_on_the_wire_stay_for_other_versions(message: Message, line: bytes) -> None:
    assert encode(message) == line + b"\n"


@pytest.mark.parametrize(("kind", "name"), SHAPES, ids=[f"{kind.__name__}.{name}" for kind, name in SHAPES])
@given(data=st.data())
def test_field_of_another_type_or_missing_is_refused(kind: Any, name: str, data: st.DataObject) -> None:
    found = to_plain(data.draw(made(kind)))
    for value in WRONG[fields(kind)[name]]:
        with pytest.raises(InvalidMessage, match=f"^{name}: .* is wanted$"):
            decode(kind, {**found, name: value})
    if not hasattr(kind, name):
        found.pop(name)
        with pytest.raises(InvalidMessage, match=f"^{name}: .* is wanted$"):
            decode(kind, found)


@pytest.mark.parametrize("key", DECODERS)
@pytest.mark.parametrize("name", [None, True, 1, 1.5, [], {}, ["ready"], {"event": "ready"}])
def test_kind_that_is_no_text_is_refused(key: str, name: object) -> None:
    for found in ({key: name}, {}, {"ok": True}):
        with pytest.raises(InvalidMessage, match=f"^{key}: text is wanted$"):
            DECODERS[key](found)


@pytest.mark.parametrize("key", DECODERS)
@given(name=TEXTS)
def test_kind_that_is_unknown_is_refused_in_few_words(key: str, name: str) -> None:
    assume((key, name) not in {kind.KIND for kind in CLASSES})
    with pytest.raises(InvalidMessage, match=f"^unknown {key} ") as caught:
        DECODERS[key]({key: name * 1000})
    assert len(str(caught.value)) <= 200


def test_reply_that_is_an_error_is_one_whatever_was_expected() -> None:
    for kind in CLASSES:
        if kind.KIND[0] == "ok":
            assert messages.decode_reply({"ok": False, "error": "no"}, kind) == messages.ErrorReply("no")
    for found in ({}, {"ok": False}, {"ok": 1, "workers": 3}, {"ok": "yes", "error": 3}):
        with pytest.raises(InvalidMessage):
            messages.decode_reply(found, messages.ScaledReply)


NAMES = st.sampled_from(sorted({str(kind.KIND[1]) for kind in CLASSES}))
KEYS = st.sampled_from(sorted({name for kind in CLASSES for name in fields(kind)} | {"ok"}))


@given(
    key=st.sampled_from(sorted(DECODERS)),
    name=NAMES | VALUES,
    more=st.dictionaries(KEYS, VALUES, max_size=6),
    expected=st.sampled_from([kind for kind in CLASSES if kind.KIND[0] == "ok"]),
)
def test_object_of_any_kind_is_a_message_or_invalid(key: str, name: object, more: JsonObject, expected: Any) -> None:
    with suppress(InvalidMessage):
        assert type(DECODERS[key]({key: name, **more})) in CLASSES
    with suppress(InvalidMessage):
        assert type(messages.decode_reply(more, expected)) in (expected, messages.ErrorReply)


def test_object_nested_to_the_limit_is_invalid_and_no_worse() -> None:
    for depth in range(100, 1000):
        deep = b"[" * depth + b"]" * depth
        try:
            [found] = decoded([b'{"event": ' + deep + b', "number": 1}\n'])
        except MalformedLine:
            continue
        with pytest.raises(InvalidMessage):
            messages.decode_event(found)


@given(text=st.text(st.characters() | st.sampled_from("\u0436\U0001f600\udc80\x1b\n")), size=st.integers(3, 100))
@example(text="0000", size=3)
def test_shortened_text_has_so_many_bytes_in_a_message(text: str, size: int) -> None:
    short = shorten(text, size)
    assert len(json.dumps(short)) - 2 <= size
    printable = text.encode(errors="backslashreplace").decode()
    assert short == printable or (short.endswith("...") and printable.startswith(short[:-3]))


def test_message_in_small_portions_is_looked_at_once() -> None:
    line, lines = line_of(LARGEST), JsonLines()
    before = time.process_time()
    found = [one for start in range(0, len(line), 64) for one in lines.feed(line[start : start + 64])]
    assert len(found) == 1
    assert time.process_time() - before < 4  # it took 20 s where each portion had all of it searched and copied
