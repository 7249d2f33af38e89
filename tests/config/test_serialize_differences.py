"""What differs between two settings: that nothing is missed or made up, and how each difference is told."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.config.address import parse_address
from forkd.config.fields import Needs, option, options, section
from forkd.config.listener import ConnectionLimits, Listener
from forkd.config.serialize import Difference, differences, to_plain
from forkd.config.settings import Log, Recycle, Settings
from forkd.config.values import integer
from tests.support.strategies import SETTINGS, fitting, of_its_own

NAMES = list(options(Settings))


def listener(address: str, handler: str = "a:b", **others: Any) -> Listener:
    return Listener(address=parse_address(address), handler=handler, **others)


def daemon(*listeners: Listener, **others: Any) -> Settings:
    return Settings(listen=listeners or (listener("unix:/x"),), **others)


def told(old: Settings, new: Settings) -> list[str]:
    return [str(difference) for difference in differences(old, new)]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Settings, Settings]:
    """Two settings that have some of their values and of their listeners in common."""
    old, other = draw(SETTINGS), draw(SETTINGS)
    listeners = []
    for index, one in enumerate(draw(st.permutations(old.listen))):
        like = replace(other.listen[index % len(other.listen)], address=one.address)
        listeners += draw(st.sampled_from([[], [one], [replace(one, limits=like.limits)], [fitting(like)]]))
    taken = {of_its_own(one) for one in listeners}
    listeners += [one for one in other.listen if of_its_own(one) not in taken]
    new = replace(other, **{name: getattr(old, name) for name in draw(st.sets(st.sampled_from(NAMES)))})
    return old, replace(new, listen=draw(st.sampled_from([tuple(listeners) or old.listen, old.listen])))


def comparable(found: Settings) -> dict[str, Any]:
    """The plain form with the listeners in the order of their addresses, those of one address as they stand."""
    plain = to_plain(found)
    return {**plain, "listen": sorted(plain["listen"], key=lambda one: str(one["address"]))}


@settings(deadline=None)
@given(found=SETTINGS)
def test_nothing_differs_from_itself(found: Settings) -> None:
    assert differences(found, found) == []


@settings(deadline=None)
@given(pair=pairs())
def test_differences_exist_if_and_only_if_plain_forms_differ(pair: tuple[Settings, Settings]) -> None:
    old, new = pair
    assert (differences(old, new) != []) == (comparable(old) != comparable(new))


@settings(deadline=None)
@given(pair=pairs())
def test_the_way_back_has_the_same_differences_turned_round(pair: tuple[Settings, Settings]) -> None:
    old, new = pair
    there = [(one.key, one.old, one.new, one.needs) for one in differences(old, new)]
    back = [(one.key, one.new, one.old, one.needs) for one in differences(new, old)]
    assert sorted(there, key=repr) == sorted(back, key=repr)


@settings(deadline=None)
@given(pair=pairs())
def test_differences_are_in_the_order_of_declaration(
    pair: tuple[Settings, Settings],
) -> None:
    found = differences(*pair)
    assert [one for one in found if one.old == one.new] == []
    order = [NAMES.index(one.key.partition(" ")[0].partition(".")[0]) for one in found]
    assert order == sorted(order)


@settings(deadline=None)
@given(found=SETTINGS, data=st.data())
def test_the_order_of_listeners_is_no_difference(found: Settings, data: st.DataObject) -> None:
    unlike = tuple({str(one.address): one for one in found.listen}.values())
    shuffled = tuple(data.draw(st.permutations(unlike)))
    assert differences(replace(found, listen=unlike), replace(found, listen=shuffled)) == []


@settings(deadline=None)
@given(pair=pairs())
def test_listener_added_or_removed_differs_from_its_settings(pair: tuple[Settings, Settings]) -> None:
    """Even where its address could be read as another address and a setting's name."""
    old, new = ({of_its_own(one): one for one in found.listen if one.address.scheme == "unix"} for found in pair)
    lines = [line for line in told(*pair) if line.startswith(("listen unix:", "listen 'unix:"))]
    added = [line for line in lines if ": added, handler " in line]
    removed = [line for line in lines if line.endswith(": removed")]
    assert (len(added), len(removed)) == (len(new.keys() - old.keys()), len(old.keys() - new.keys()))


@pytest.mark.parametrize(
    ("old", "new", "key", "texts", "needs"),
    [
        ({"name": "a"}, {"name": "b"}, "name", ("a", "b"), Needs.RESTART),
        ({"workers": 2}, {"workers": None}, "workers", ("2", "auto"), Needs.RELOAD),
        ({"preload": False}, {"preload": True}, "preload", ("false", "true"), Needs.UPGRADE),
        ({}, {"working_directory": Path("/srv")}, "working_directory", (None, "/srv"), Needs.RESTART),
        ({"run_directory": Path("/run/x")}, {}, "run_directory", ("/run/x", None), Needs.RESTART),
        ({}, {"stall_timeout": 0.0}, "stall_timeout", ("30s", "0s"), Needs.RELOAD),
        ({}, {"log": Log(level="debug")}, "log.level", ("info", "debug"), Needs.RELOAD),
        ({}, {"log": Log(to=Path("/x"))}, "log.to", ("stderr", "/x"), Needs.RELOAD),
        ({}, {"recycle": Recycle(age=86400.0)}, "recycle.age", ("0s", "1d"), Needs.RELOAD),
        ({}, {"python_path": (Path("/a"), Path("/b"))}, "python_path", ("[]", "[/a, /b]"), Needs.RELOAD),
        (
            {"python_path": (Path("/a"), Path("/b"))},
            {"python_path": (Path("/a, /b"),)},
            "python_path",
            ("[/a, /b]", "['/a, /b']"),
            Needs.RELOAD,
        ),
    ],
)
def test_changed_setting_is_one_difference_as_in_a_file(
    old: dict[str, Any], new: dict[str, Any], key: str, texts: tuple[str | None, str | None], needs: Needs
) -> None:
    assert differences(daemon(**old), daemon(**new)) == [Difference(key, *texts, needs)]


def test_listeners_are_matched_by_address() -> None:
    old = daemon(listener("tcp://0.0.0.0:7000"), listener("unix:/x", backlog=7), listener("tcp://[::1]:0", "c:d"))
    new = daemon(
        listener("unix:@y", "shout:Shout"),
        listener("unix:/x", mode=0o660, limits=ConnectionLimits(write_buffer=0)),
        listener("tcp://0.0.0.0:7000", "e:f"),
    )
    assert differences(old, new) == [
        Difference("listen tcp://0.0.0.0:7000 handler", "a:b", "e:f", Needs.RELOAD),
        Difference("listen unix:/x backlog", "7", "4096", Needs.RELOAD),
        Difference("listen unix:/x mode", None, "0660", Needs.RELOAD),
        Difference("listen unix:/x limits.write_buffer", "64MiB", "0B", Needs.RELOAD),
        Difference("listen tcp://[::1]:0", "c:d", None, Needs.RELOAD),
        Difference("listen unix:@y", None, "shout:Shout", Needs.RELOAD),
    ]


def test_listeners_on_any_free_port_are_matched_in_their_order() -> None:
    first, second, third = (listener("tcp://127.0.0.1:0", handler) for handler in ("a:b", "c:d", "e:f"))
    other = listener("unix:/x")
    assert differences(daemon(first, other, second), daemon(other, first, second, third)) == [
        Difference("listen tcp://127.0.0.1:0", None, "e:f", Needs.RELOAD)
    ]
    assert differences(daemon(first, second), daemon(second)) == [
        Difference("listen tcp://127.0.0.1:0 handler", "a:b", "c:d", Needs.RELOAD),
        Difference("listen tcp://127.0.0.1:0", "c:d", None, Needs.RELOAD),
    ]


def test_each_difference_is_a_line_for_a_terminal() -> None:
    old = daemon(listener("tcp://0.0.0.0:7000"), listener("unix:/x"), listener("unix:/y mode"), workers=2)
    new = daemon(
        listener("tcp://0.0.0.0:7001", "shout:Shout"),
        listener("unix:/x", mode=0o600),
        listener("unix:/a b", "c:d"),
        name="chat",
        workers=4,
        preload=True,
        working_directory=Path("/srv"),
    )
    assert told(old, new) == [
        "name: echo -> chat (needs a restart)",
        "workers: 2 -> 4",
        "listen tcp://0.0.0.0:7000: removed",
        "listen unix:/x mode: unset -> 0600",
        "listen 'unix:/y mode': removed",
        "listen tcp://0.0.0.0:7001: added, handler shout:Shout",
        "listen 'unix:/a b': added, handler c:d",
        "preload: false -> true (needs an upgrade)",
        "working_directory: unset -> /srv (needs a restart)",
    ]
    assert told(daemon(listener("unix:/a b", mode=0o600)), daemon(listener("unix:/a b"))) == [
        "listen 'unix:/a b' mode: 0600 -> unset"
    ]


@dataclass(frozen=True, kw_only=True)
class Within:
    light: int = option(integer(0, 9), "Light.", 1)
    heavy: int = option(integer(0, 9), "Heavy.", 2, needs=Needs.RESTART)


@dataclass(frozen=True, kw_only=True)
class Around:
    inner: Within = section(Within, "Inner.", needs=Needs.UPGRADE)


def test_setting_needs_at_least_what_its_section_needs() -> None:
    changed: Any = Around(inner=Within(light=3, heavy=4))
    unchanged: Any = Around()
    assert differences(unchanged, changed) == [
        Difference("inner.light", "1", "3", Needs.UPGRADE),
        Difference("inner.heavy", "2", "4", Needs.RESTART),
    ]
