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

from forkd.config import units
from forkd.config.scales import Rate
from forkd.config.units import Kind

DIGITS = st.integers(0, 10**6).map(str)
NUMBERS = st.one_of(DIGITS, st.tuples(DIGITS, st.integers(0, 999).map(lambda n: f"{n:03}")).map(".".join))
DOTTED = st.lists(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), min_size=1, max_size=3).map(".".join)
PORTS = st.integers(0, 65535)


def joined(*parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.tuples(*parts).map("".join)


#: Every kind, with texts that it reads.
READABLE: dict[str, tuple[Kind[Any], st.SearchStrategy[str]]] = {
    "workers": (units.WORKERS, st.one_of(st.just("auto"), st.integers(1, units.MOST_WORKERS).map(str))),
    "whole number": (units.integer(-7, 10**9), st.integers(-7, 10**9).map(str)),
    "choice": (units.choice("red", "green"), st.sampled_from(["red", "green"])),
    "duration": (
        units.DURATION,
        st.lists(joined(NUMBERS, st.sampled_from(["ms", "s", "m", "h", "d"])), min_size=1, max_size=4).map("".join),
    ),
    "size": (units.SIZE, joined(NUMBERS, st.sampled_from(["", "B", "KB", "MB", "GB", "KiB", "MiB", "GiB", " KiB"]))),
    "rate": (units.RATE, joined(st.integers(1, 10**9 - 1).map(str), st.sampled_from(["/s", "/m", "/h", "/d"]))),
    "deadline": (units.DEADLINE, st.sampled_from(["off", "0", "0s", "1m", "1.5h", "250ms"])),
    "percentage": (
        units.PERCENT,
        joined(st.one_of(st.just("100"), st.floats(0, 99.999).map(lambda number: f"{number:f}")), st.just("%")),
    ),
    "boolean": (units.BOOLEAN, st.sampled_from(["true", "True", "YES", "on", "false", "No", "off"])),
    "mode": (units.MODE, joined(st.sampled_from(["", "0o"]), st.integers(0, 0o7777).map(lambda mode: f"{mode:04o}"))),
    "text": (units.TEXT, st.text(min_size=1).filter(str.isprintable)),
    "path": (units.PATH, joined(st.sampled_from(["/", "", "~/"]), DOTTED)),
    "log target": (units.LOG_TARGET, st.one_of(st.just("stderr"), joined(st.just("/"), DOTTED))),
    "name": (units.NAME, st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)),
    "handler": (units.HANDLER, joined(DOTTED, st.just(":"), DOTTED)),
    "address": (
        units.ADDRESS,
        st.one_of(
            joined(st.sampled_from(["tcp://[::1]:", "tcp://127.0.0.1:", "tcp://localhost:"]), PORTS.map(str)),
            joined(st.sampled_from(["unix:/", "unix:@"]), DOTTED),
        ),
    ),
}


@pytest.mark.parametrize("name", READABLE)
@given(data=st.data())
def test_what_is_shown_is_read_again_as_the_same_value(name: str, data: st.DataObject) -> None:
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
        (units.DURATION, "9" * 400 + "s"),
        (units.SIZE, "9" * 400),
        (units.RATE, "9" * 400 + "/s"),
        (units.PATH, "~no-such-user-here/x"),
        (units.LOG_TARGET, "~no-such-user-here/x"),
        (units.ADDRESS, "unix:/\udc80"),
    ],
    ids=["duration", "size", "rate", "path", "log", "address"],
)
def test_what_has_no_finite_meaning_is_refused(kind: Kind[Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        kind.parse(text)
    assert "codec can't" not in str(caught.value)


@pytest.mark.parametrize("text", ["0.01ms", "0.0000001s", "0.00001ms"])
def test_the_shortest_duration_is_shown_as_one_that_is_read_again(text: str) -> None:
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
        units.PATH.parse(text)
    assert units.PATH.parse("/x") == Path("/x")


def test_a_relative_path_has_no_meaning_where_the_current_directory_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(ValueError, match="'x' is relative to the current directory, which is gone"):
        units.PATH.parse("x")
    assert units.PATH.parse("/x") == Path("/x")


@pytest.mark.parametrize("size", [2**53 + 1, 2**62 + 1])
def test_a_size_is_exact_to_the_byte(size: int) -> None:
    assert units.parse_size(f"{size}B") == size


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (units.DURATION, "250ms", 0.25),
        (units.DURATION, "30s", 30.0),
        (units.DURATION, "1.5m", 90.0),
        (units.DURATION, "1h30m", 5400.0),
        (units.DURATION, "2d", 172800.0),
        (units.DURATION, "0", 0.0),
        (units.SIZE, "512", 512),
        (units.SIZE, "512B", 512),
        (units.SIZE, "10MB", 10_000_000),
        (units.SIZE, "64KiB", 65536),
        (units.SIZE, "64 KiB", 65536),
        (units.SIZE, "1.5GiB", 3 << 29),
        (units.RATE, "20/s", Rate(20, 1)),
        (units.RATE, "90/m", Rate(90, 60)),
        (units.DEADLINE, "off", 0.0),
        (units.DEADLINE, "0", 0.0),
        (units.DEADLINE, "1m", 60.0),
        (units.PERCENT, "10%", 0.1),
        (units.PERCENT, "2.5%", 0.025),
        (units.PERCENT, "0%", 0.0),
        (units.PERCENT, "100.0%", 1.0),
        (units.BOOLEAN, "Yes", True),
        (units.BOOLEAN, "off", False),
        (units.MODE, "0660", 0o660),
        (units.MODE, "660", 0o660),
        (units.MODE, "0o600", 0o600),
        (units.MODE, "1777", 0o1777),
        (units.WORKERS, "auto", None),
        (units.WORKERS, "512", 512),
        (units.LOG_TARGET, "stderr", None),
        (units.PATH, "/a/../b", Path("/a/../b")),
        (units.PATH, "a", Path.cwd() / "a"),
        (units.PATH, "~", Path.home()),
        (units.NAME, "x" * 64, "x" * 64),
        (units.HANDLER, "a.b:C.d", "a.b:C.d"),
    ],
)
def test_a_text_means_its_value(kind: Kind[Any], text: str, value: object) -> None:
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
        (units.DEADLINE.show, 0.0, "off"),
        (units.DEADLINE.show, 90.0, "90s"),
        (units.show_percent, 0, "0%"),
        (units.show_percent, 0.1, "10%"),
        (units.show_percent, 0.07, "7%"),
        (units.show_percent, 0.125, "12.5%"),
        (units.show_percent, 1.0, "100%"),
        (units.MODE.show, 0o60, "0060"),
        (units.WORKERS.show, None, "auto"),
    ],
)
def test_a_value_is_shown_in_its_largest_fitting_unit(show: Any, value: object, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(
    ("kind", "text", "wanted"),
    [
        (units.DURATION, "30", "did you mean 30s?"),
        (units.DURATION, "30 s", "a number with ms, s, m, h or d"),
        (units.DURATION, "-1s", "a number with ms, s, m, h or d"),
        (units.DURATION, "1e3s", "as in 30s or 1h30m"),
        (units.DURATION, "30s\n", "a number with ms, s, m, h or d"),
        (units.DURATION, "nan", "is not a duration"),
        (units.SIZE, "64K", "B, KB, MB, GB, KiB, MiB, GiB, as in 64KiB"),
        (units.SIZE, "-1", "is not a size"),
        (units.SIZE, "1_000", "is not a size"),
        (units.RATE, "20", "a whole number per s, m, h or d, as in 20/s"),
        (units.PERCENT, "10", "did you mean 10%?"),
        (units.PERCENT, "500", "is not a percentage"),
        (units.PERCENT, "10 %", "write 0% to 100%, as in 10%"),
        (units.PERCENT, "101%", "write 0% to 100%"),
        (units.PERCENT, "100.1%", "write 0% to 100%"),
        (units.PERCENT, "-1%", "write 0% to 100%"),
        (units.PERCENT, "1٤%", "is not a percentage"),
        (units.PERCENT, "10%\n", "is not a percentage"),
        (units.BOOLEAN, "1", "is not true or false"),
        (units.MODE, "rw-rw----", "three or four octal digits, as in 0660"),
        (units.MODE, "0680", "three or four octal digits"),
        (units.MODE, "0x1ff", "three or four octal digits"),
        (units.WORKERS, "0", "is not from 1 to 512"),
        (units.WORKERS, "513", "is not from 1 to 512"),
        (units.WORKERS, "four", "is not a whole number"),
        (units.WORKERS, "4.0", "is not a whole number"),
        (units.WORKERS, "٤", "is not a whole number"),
        (units.WORKERS, "9" * 5000, "is not a whole number"),
        (units.choice("red", "green"), "blue", "is not one of red, green"),
        (units.NAME, "../x", "up to 64 letters, digits, dots, dashes and underscores"),
        (units.NAME, "x" * 65, "up to 64 letters"),
        (units.NAME, "x\n", "up to 64 letters"),
        (units.HANDLER, "chat.server", "write module:attribute, as in chat.server:ChatProtocol"),
        (units.HANDLER, "chat:", "write module:attribute"),
        (units.HANDLER, "chat:1st", "write module:attribute"),
        (units.HANDLER, "chat server:X", "write module:attribute"),
        (units.TEXT, "", "a line of printable text"),
        (units.TEXT, "a\nb", "a line of printable text"),
        (units.PATH, "/a\x1bb", "a line of printable text"),
    ],
)
def test_a_refusal_names_what_was_written_and_what_was_wanted(kind: Kind[Any], text: str, wanted: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        kind.parse(text)
    assert wanted in str(caught.value)
    assert text[:20] in str(caught.value) or repr(text)[1:-1] in str(caught.value)
