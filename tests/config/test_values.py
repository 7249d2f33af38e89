"""The kinds of values: what each reads, refuses and shows again.

The properties hold for every kind alike: what is shown is read again as the same value, and whatever a user may write
is either read or refused by a ValueError whose sentence says what was wanted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd import MOST_WORKERS
from forkd.config import units, values
from forkd.config.units import Rate
from forkd.config.values import ScalarKind

DIGITS = st.integers(0, 10**6).map(str)
NUMBERS = st.one_of(DIGITS, st.tuples(DIGITS, st.integers(0, 999).map(lambda n: f"{n:03}")).map(".".join))
DOTTED = st.lists(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=3).map(".".join)
PORTS = st.integers(0, 65535)


def joined(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map("".join)


#: Every kind, with texts that it reads.
READABLE: dict[str, tuple[ScalarKind[Any], st.SearchStrategy[str]]] = {
    "workers": (values.WORKERS, st.one_of(st.just("auto"), st.integers(1, MOST_WORKERS).map(str))),
    "whole number": (values.integer(-7, 10**9), st.integers(-7, 10**9).map(str)),
    "choice": (values.choice("red", "green"), st.sampled_from(["red", "green"])),
    "duration": (
        values.DURATION,
        st.lists(joined(NUMBERS, st.sampled_from(["ms", "s", "m"])), min_size=1, max_size=4).map("".join),
    ),
    "size": (values.SIZE, joined(NUMBERS, st.sampled_from(["", "B", "KB", "MB", "GB", "KiB", "MiB", "GiB", " KiB"]))),
    "rate": (values.RATE, joined(st.integers(1, 10**9 - 1).map(str), st.sampled_from(["/s", "/m", "/h", "/d"]))),
    "deadline": (values.DEADLINE, st.sampled_from(["off", "0", "0s", "1m", "1.5h", "250ms"])),
    "percentage": (
        values.PERCENT,
        joined(st.one_of(st.just("100"), st.floats(0, 99.999).map(lambda number: f"{number:f}")), st.just("%")),
    ),
    "boolean": (values.BOOLEAN, st.sampled_from(["true", "True", "YES", "on", "false", "No", "off"])),
    "mode": (values.MODE, joined(st.sampled_from(["", "0o"]), st.integers(0, 0o7777).map(lambda mode: f"{mode:04o}"))),
    "text": (values.TEXT, st.text(min_size=1).filter(str.isprintable)),
    "path": (values.PATH, joined(st.sampled_from(["/", "", "~/"]), DOTTED)),
    "log target": (values.LOG_TARGET, st.one_of(st.just("stderr"), joined(st.just("/"), DOTTED))),
    "name": (values.NAME, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
    "handler": (values.HANDLER, joined(DOTTED, st.just(":"), DOTTED)),
    "address": (
        values.ADDRESS,
        st.one_of(
            joined(st.sampled_from(["tcp://[::1]:", "tcp://127.0.0.1:", "tcp://localhost:"]), PORTS.map(str)),
            joined(st.sampled_from(["unix:/", "unix:@"]), DOTTED),
        ),
    ),
}


@pytest.mark.parametrize("name", READABLE)
@given(data=st.data())
def test_shown_value_is_read_again_as_the_same(name: str, data: st.DataObject) -> None:
    kind, texts = READABLE[name]
    value = kind.parse(data.draw(texts))
    assert kind.parse(kind.show(value)) == value


@pytest.mark.parametrize("name", READABLE)
@given(text=st.one_of(st.text(), st.text(alphabet="0123456789.smhdKiBG/:%~@-[] o")))
def test_any_text_is_read_or_refused_by_a_value_error(name: str, text: str) -> None:
    kind, _ = READABLE[name]
    try:
        value = kind.parse(text)
    except ValueError:
        return
    assert kind.parse(kind.show(value)) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (values.DURATION, "9" * 400 + "s"),
        (values.SIZE, "9" * 400),
        (values.RATE, "9" * 400 + "/s"),
        (values.PATH, "~no-such-user-here/x"),
        (values.LOG_TARGET, "~no-such-user-here/x"),
        (values.ADDRESS, "unix:/\udc80"),
    ],
    ids=["duration", "size", "rate", "path", "log", "address"],
)
def test_infinite_value_is_refused(kind: ScalarKind[Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        kind.parse(text)
    assert "codec can't" not in str(caught.value)


@pytest.mark.parametrize("text", ["0.01ms", "0.0000001s", "0.00001ms"])
def test_shortest_duration_is_shown_so_that_it_is_read_again(text: str) -> None:
    seconds = units.parse_duration(text)
    assert units.parse_duration(units.show_duration(seconds)) == seconds


@given(fraction=st.floats(0, 1))
def test_a_fraction_is_exact_as_a_percentage(fraction: float) -> None:
    assert units.parse_percent(units.show_percent(fraction)) == fraction


@pytest.mark.parametrize("text", [".", "x", "~", "~/x"])
def test_a_path_that_could_not_be_shown_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    odd = tmp_path / "two\nlines"
    odd.mkdir()
    monkeypatch.chdir(odd)
    monkeypatch.setenv("HOME", str(odd))
    with pytest.raises(ValueError, match=r"two.*lines.* is not a line of printable text"):
        values.PATH.parse(text)
    assert values.PATH.parse("/x") == Path("/x")


def test_relative_path_needs_a_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match="'x' is relative to the current directory, which is gone"):
        values.PATH.parse("x")
    assert values.PATH.parse("/x") == Path("/x")


@pytest.mark.parametrize("size", [2**53 + 1, 2**62 + 1])
def test_a_size_is_exact_to_the_byte(size: int) -> None:
    assert units.parse_size(f"{size}B") == size


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (values.DURATION, "250ms", 0.25),
        (values.DURATION, "30s", 30.0),
        (values.DURATION, "1.5m", 90.0),
        (values.DURATION, "1h30m", 5400.0),
        (values.DURATION, "2d", 172800.0),
        (values.DURATION, "0", 0.0),
        (values.SIZE, "512", 512),
        (values.SIZE, "512B", 512),
        (values.SIZE, "10MB", 10_000_000),
        (values.SIZE, "64KiB", 65536),
        (values.SIZE, "64 KiB", 65536),
        (values.SIZE, "1.5GiB", 3 << 29),
        (values.RATE, "20/s", Rate(20, 1)),
        (values.RATE, "90/m", Rate(90, 60)),
        (values.DEADLINE, "off", 0.0),
        (values.DEADLINE, "0", 0.0),
        (values.DEADLINE, "1m", 60.0),
        (values.FAILURES, "off", 0),
        (values.FAILURES, "20", 20),
        (values.PERCENT, "10%", 0.1),
        (values.PERCENT, "2.5%", 0.025),
        (values.PERCENT, "0%", 0.0),
        (values.PERCENT, "100.0%", 1.0),
        (values.BOOLEAN, "Yes", True),
        (values.BOOLEAN, "off", False),
        (values.MODE, "0660", 0o660),
        (values.MODE, "660", 0o660),
        (values.MODE, "0o600", 0o600),
        (values.MODE, "1777", 0o1777),
        (values.WORKERS, "auto", None),
        (values.WORKERS, "512", 512),
        (values.LOG_TARGET, "stderr", None),
        (values.PATH, "/a/../b", Path("/a/../b")),
        (values.PATH, "a", Path.cwd() / "a"),
        (values.PATH, "~", Path.home()),
        (values.NAME, "x" * 64, "x" * 64),
        (values.HANDLER, "a.b:C.d", "a.b:C.d"),
    ],
)
def test_a_text_means_its_value(kind: ScalarKind[Any], text: str, value: object) -> None:
    assert kind.parse(text) == value


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (units.show_duration, 0, "0s"),
        (units.show_duration, 86400.0, "1d"),
        (units.show_duration, 5400.0, "90m"),
        (units.show_duration, 0.25, "250ms"),
        (lambda text: units.show_duration(units.parse_duration(text)), "9ms", "9ms"),
        (lambda text: units.show_duration(units.parse_duration(text)), "1.013s", "1013ms"),
        (units.show_size, 0, "0B"),
        (units.show_size, 1000, "1000B"),
        (units.show_size, 64 << 20, "64MiB"),
        (units.show_rate, Rate(90, 60), "90/m"),
        (units.show_rate, Rate(20, 1), "20/s"),
        (values.DEADLINE.show, 0.0, "off"),
        (values.DEADLINE.show, 90.0, "90s"),
        (values.FAILURES.show, 0, "off"),
        (values.FAILURES.show, 20, "20"),
        (units.show_percent, 0, "0%"),
        (units.show_percent, 0.1, "10%"),
        (units.show_percent, 0.07, "7%"),
        (units.show_percent, 0.125, "12.5%"),
        (units.show_percent, 1.0, "100%"),
        (values.MODE.show, 0o60, "0060"),
        (values.WORKERS.show, None, "auto"),
    ],
)
def test_a_value_is_shown_in_its_largest_fitting_unit(show: Any, value: object, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        (values.DURATION, "30", "did you mean 30s?"),
        (values.DURATION, "30 s", "a number with ms, s, m, h or d"),
        (values.DURATION, "-1s", "a number with ms, s, m, h or d"),
        (values.DURATION, "1e3s", "as in 30s or 1h30m"),
        (values.DURATION, "30s\n", "a number with ms, s, m, h or d"),
        (values.DURATION, "nan", "is not a duration"),
        (values.SIZE, "64K", "B, KB, MB, GB, KiB, MiB, GiB, as in 64KiB"),
        (values.SIZE, "-1", "is not a size"),
        (values.SIZE, "1_000", "is not a size"),
        (values.RATE, "20", "a whole number per s, m, h or d, as in 20/s"),
        (values.PERCENT, "10", "did you mean 10%?"),
        (values.PERCENT, "500", "is not a percentage"),
        (values.PERCENT, "10 %", "write 0% to 100%, as in 10%"),
        (values.PERCENT, "101%", "write 0% to 100%"),
        (values.PERCENT, "100.1%", "write 0% to 100%"),
        (values.PERCENT, "-1%", "write 0% to 100%"),
        (values.PERCENT, "1٤%", "is not a percentage"),
        (values.PERCENT, "10%\n", "is not a percentage"),
        (values.BOOLEAN, "1", "is not true or false"),
        (values.MODE, "rw-rw----", "three or four octal digits, as in 0660"),
        (values.MODE, "0680", "three or four octal digits"),
        (values.MODE, "0x1ff", "three or four octal digits"),
        (values.WORKERS, "0", "is not from 1 to 512"),
        (values.FAILURES, "0", "is not from 1 to 1000000"),
        (values.WORKERS, "513", "is not from 1 to 512"),
        (values.WORKERS, "four", "is not a whole number"),
        (values.WORKERS, "4.0", "is not a whole number"),
        (values.WORKERS, "٤", "is not a whole number"),
        (values.WORKERS, "9" * 5000, "is not a whole number"),
        (values.choice("red", "green"), "blue", "is not one of red, green"),
        (values.NAME, "../x", "up to 64 letters, digits, dots, dashes and underscores"),
        (values.NAME, "x" * 65, "up to 64 letters"),
        (values.NAME, "x\n", "up to 64 letters"),
        (values.HANDLER, "chat.server", "write module:attribute, as in chat.server:ChatProtocol"),
        (values.HANDLER, "chat:", "write module:attribute"),
        (values.HANDLER, "chat:1st", "write module:attribute"),
        (values.HANDLER, "chat server:X", "write module:attribute"),
        (values.TEXT, "", "a line of printable text"),
        (values.TEXT, "a\nb", "a line of printable text"),
        (values.PATH, "/a\x1bb", "a line of printable text"),
    ],
)
def test_a_refusal_names_what_was_written_and_what_was_wanted(kind: ScalarKind[Any], text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        kind.parse(text)
    assert wanted in str(caught.value)
    assert text[:20] in str(caught.value) or repr(text)[1:-1] in str(caught.value)
