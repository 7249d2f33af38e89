"""The plain form: nothing is lost in it, and nothing that is handed over brings more than settings or a ConfigError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.config.serialize import ORIGIN, from_plain, to_plain
from forkd.config.settings import Log, Settings
from forkd.errors import ConfigError
from tests.support.strategies import SETTINGS

LISTENER = {"address": "unix:/x", "handler": "a:b"}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def handed_over(found: Settings) -> Settings:
    return from_plain(json.loads(json.dumps(to_plain(found))))


def mistakes(plain: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        from_plain(plain)
    assert {problem.where for problem in caught.value.problems} == {ORIGIN}
    return [problem.message for problem in caught.value.problems]


def listening(**others: Any) -> Settings:
    return Settings(listen=(Listener(address=Address("unix", path="/x"), handler="a:b"),), **others)


@settings(deadline=None)
@given(found=SETTINGS)
def test_plain_form_arrives_as_it_was(found: Settings) -> None:
    assert handed_over(found) == found


def scalars(plain: Any) -> list[Any]:
    """What a plain form holds that is neither a mapping nor a list; keys too."""
    if isinstance(plain, dict):
        return [*plain, *(inner for value in plain.values() for inner in scalars(value))]
    return [inner for value in plain for inner in scalars(value)] if isinstance(plain, list) else [plain]


DEFAULTS = {
    "kind": "auto",
    "args": {},
    "factory": "false",
    "wait": "false",
    "threads": "8",
    "command": [],
    "environment": {},
    "backlog": "4096",
    "freebind": "false",
    "timeouts": {"first_byte": "1m", "idle": "10m", "write": "1m", "lifetime": "off"},
    "keepalive": {"idle": "1m", "interval": "10s", "count": "6", "heartbeat": "off"},
    "multicast": [],
    "socket": {
        "nodelay": "true",
        "quickack": "false",
        "busy_poll": "0s",
        "send_buffer": "0B",
        "receive_buffer": "0B",
        "linger": "2s",
    },
    "tls": {"names": [], "client": "none", "alpn": [], "min_version": "1.2", "handshake": "10s"},
    "limits": {"connections": "0", "per_worker": "0", "per_ip": "0", "over": "wait", "write_buffer": "64MiB"},
    "allow": [],
    "deny": [],
    "proxy_protocol": [],
}


@settings(deadline=None)
@given(found=SETTINGS)
def test_the_plain_form_is_mappings_lists_and_text_alone(found: Settings) -> None:
    assert {type(scalar) for scalar in scalars(to_plain(found))} == {str}


def test_plain_form_has_every_set_setting_as_in_a_file() -> None:
    assert to_plain(listening(workers=3, run_directory=Path("/run/x"))) == {
        "name": "echo",
        "mode": "pool",
        "workers": "3",
        "listen": [{**LISTENER, **DEFAULTS}],
        "python_path": [],
        "preload": "false",
        "run_directory": "/run/x",
        "groups": [],
        "rlimits": {},
        "boot_timeout": "1m",
        "stall_timeout": "30s",
        "drain_timeout": "30s",
        "drain_spread": "0s",
        "stop_delay": "0s",
        "orphans": "end",
        "give_up_after": "off",
        "admin": {"address": [], "allow": [], "ready_workers": "1"},
        "recycle": {"connections": "0", "age": "0s", "memory": "0B", "jitter": "10%"},
        "once": {"from": [], "adopt": "false"},
        "log": {"level": "info", "format": "text", "to": "stderr", "access": "false"},
    }


def test_default_is_handed_over_to_another_version_too() -> None:
    assert {**to_plain(listening()), "boot_timeout": "5s"} == to_plain(listening(boot_timeout=5.0))


def test_setting_missing_from_an_older_version_has_its_default() -> None:
    assert from_plain({"listen": [LISTENER]}) == listening()


@pytest.mark.parametrize("path", ["/[x]", "/[]", "/#", "/a, /b", "/~", "/a/../b", "//a", "/stderr", "/ ", "/'"])
def test_an_odd_path_is_no_other_path(path: str) -> None:
    found = listening(python_path=(Path(path),), working_directory=Path(path), log=Log(to=Path(path)))
    assert to_plain(found)["python_path"] == [path]
    assert handed_over(found) == found


@pytest.mark.parametrize("owner", ["[x]", "[]", "#", "0", "~", "null", "yes", "&a", "*a", "!x", " ", "a: b"])
def test_an_odd_owner_is_no_other_owner(owner: str) -> None:
    listener = Listener(address=Address("unix", path="/[x]"), handler="a:b", owner=owner, group=owner)
    assert handed_over(Settings(listen=(listener,))).listen == (listener,)


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        (None, ["expected settings as `key: value`, found nothing"]),
        (7, ["expected settings as `key: value`, found an int, not text"]),
        ("listen", ["expected settings as `key: value`, found 'listen'"]),
        ([], ["expected settings as `key: value`, found a sequence"]),
        ({}, ["listen: is missing; the listeners, each with its own handler"]),
        ({"listen": []}, ["listen: is empty; a daemon needs a listener"]),
        ({"listen": {}}, ["listen: expected a sequence, found a mapping"]),
        ({"listen": None}, ["listen: expected a sequence, found nothing"]),
        ({"listen": "[]"}, ["listen: expected a sequence, found '[]'"]),
        ({"listen": [LISTENER, 7]}, ["listen[1]: expected settings as `key: value`, found an int, not text"]),
        ({"listen": [LISTENER, LISTENER]}, ["listen[1].address: unix:/x is the address of listen[0] already"]),
        ({"listen": [{"address": "80"}]}, ["listen[0].address: '80' is not", "listen[0].handler: is missing"]),
        ({"listen": [{**LISTENER, "backlog": 7}]}, ["listen[0].backlog: expected a whole number, found an int"]),
        ({"listen": [{**LISTENER, "owner": ["x"]}]}, ["listen[0].owner: expected a text, found a sequence"]),
        ({"listen": [{**LISTENER, "limits": []}]}, ["listen[0].limits: expected settings as `key: value`, found a"]),
    ],
)
def test_wrong_structure_is_told_with_its_key(plain: object, said: list[str]) -> None:
    found = mistakes(plain)
    assert [line[: len(sentence)] for line, sentence in zip(found, said, strict=True)] == said


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("wokers", "4", "wokers: unknown setting; did you mean 'workers'?"),
        (7, "4", "an int, not text: unknown setting; there are name"),
        ("workers", 4, "workers: expected a whole number or auto, found an int, not text"),
        ("workers", 0, "workers: expected a whole number or auto, found an int, not text"),
        ("workers", None, "workers: expected a whole number or auto, found nothing"),
        ("workers", "", "workers: has no value; expected a whole number or auto"),
        ("workers", b"4", "workers: expected a whole number or auto, found a bytes, not text"),
        pytest.param(
            "workers", 10**5000, "workers: expected a whole number or auto, found an int, not text", id="long"
        ),
        ("workers", "four", "workers: 'four' is not a whole number"),
        ("preload", True, "preload: expected a true or false, found a bool, not text"),
        ("boot_timeout", 0.5, "boot_timeout: expected a duration, found a float, not text"),
        ("name", ["x"], "name: expected a name, found a sequence"),
        ("log", "info", "log: expected settings as `key: value`, found 'info'"),
        ("log", {"level": "loud"}, "log.level: 'loud' is not one of debug, info, warning, error"),
        ("recycle", {"jiter": "1%"}, "jiter: unknown setting; did you mean 'jitter'?"),
        ("python_path", "/a", "python_path: expected a sequence, found '/a'"),
        ("python_path", "[/a]", "python_path: expected a sequence, found '[/a]'"),
        ("python_path", ["/a", 7], "python_path[1]: expected a path, found an int, not text"),
        ("python_path", ["/a", ["/b"]], "python_path[1]: expected a path, found a sequence"),
        ("python_path", ["/a", "\n"], "python_path[1]: '\\n' is not a line of printable text"),
    ],
)
def test_a_wrong_value_is_told_with_its_key(key: object, value: object, said: str) -> None:
    found = mistakes({"listen": [LISTENER], key: value})
    assert [line[: len(said)] for line in found] == [said]


def test_all_mistakes_are_told_at_once() -> None:
    assert len(mistakes({"workers": "no", "python_path": [1, "/a", 2], "log": {"level": 1, "to": 2}})) == 6


def test_endless_nesting_is_a_mistake() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert mistakes({"listen": [LISTENER], "python_path": endless}) == ["is nested too deeply"]


@settings(deadline=None)
@given(found=SETTINGS, key=st.sampled_from(list(to_plain(listening()))), junk=JSON, inner=st.booleans())
def test_input_of_any_kind_is_settings_or_a_config_error(found: Settings, key: str, junk: Any, inner: bool) -> None:
    plain = to_plain(found)
    place = plain[key] if inner else plain
    if isinstance(place, dict):
        place[key if place is plain else next(iter(place), "nofile")] = junk
    elif isinstance(place, list):
        place.append(junk)
    for handed in (plain, junk):
        try:
            result = from_plain(handed)
        except ConfigError as error:
            assert error.problems  # noqa: PT017 (either outcome is right)
        else:
            assert handed_over(result) == result
