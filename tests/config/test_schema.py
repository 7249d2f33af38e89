"""The JSON Schema and the reference page: valid, complete, and of one mind with the loader on what may be
written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from forkd.config.fields import ListOf, Needs, default_of, option, options, section
from forkd.config.loader import read_settings
from forkd.config.schema import json_schema, reference_page
from forkd.config.settings import Settings
from forkd.config.values import ScalarKind, integer
from tests.support.paths import CHECKOUT

EXAMPLES = CHECKOUT / "etc" / "forkd"

LISTENER = "address: 'unix:/tmp/x', handler: 'a:b'"


def every_setting(section: type = Settings, prefix: str = "") -> Iterator[tuple[str, str, type]]:
    """Key as the reference page writes it, last name, section; for every setting there is."""
    for name, declared in options(section).items():
        yield prefix + name, name, section
        if isinstance(declared.kind, ListOf) and isinstance(declared.kind.item, type):
            yield from every_setting(declared.kind.item, f"{prefix}{name}[].")
        elif isinstance(declared.kind, type):
            yield from every_setting(declared.kind, f"{prefix}{name}.")


SETTINGS = list(every_setting())


def described(section: type) -> dict[str, Any]:
    """The part of the schema that is about a section."""
    for key, _, found in SETTINGS:
        if found is section:
            node = json_schema()
            for part in key.split(".")[:-1]:
                node = node["properties"][part.removesuffix("[]")]
                node = node.get("items", node)
            return dict(node["properties"])
    raise LookupError(section)


def test_the_schema_is_valid_draft_07() -> None:
    schema = json_schema()
    Draft7Validator.check_schema(schema)
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"


@pytest.mark.parametrize(("key", "name", "section"), SETTINGS)
def test_settings_are_in_the_schema_with_valid_defaults(key: str, name: str, section: type) -> None:
    found = described(section)[name]
    assert found["description"] == options(section)[name].doc
    if "default" in found:
        assert Draft7Validator(found).is_valid(found["default"]), (key, found["default"])
        kind = options(section)[name].kind
        assert isinstance(kind, ScalarKind)
        assert kind.parse(str(found["default"])) == default_of(section, name)


@pytest.mark.parametrize(("key", "name", "section"), SETTINGS)
def test_every_setting_has_its_row_on_the_reference_page(key: str, name: str, section: type) -> None:
    rows = [line for line in reference_page().splitlines() if line.startswith(f"| `{key}` |")]
    assert len(rows) == 1
    assert rows[0].endswith(f" | {options(section)[name].doc} |")
    assert rows[0].replace("\\|", "").count("|") == 6
    assert ("| required |" in rows[0]) == options(section)[name].required
    assert f" | {options(section)[name].needs.value} | " in rows[0]


@dataclass(frozen=True, kw_only=True)
class Within:
    light: int = option(integer(0, 9), "Light.", 1)
    heavy: int = option(integer(0, 9), "Heavy.", 2, needs=Needs.RESTART)


@dataclass(frozen=True, kw_only=True)
class Around:
    inner: Within = section(Within, "Inner.", needs=Needs.UPGRADE)
    last: int = option(integer(0, 9), "Last.", 3)


def test_page_shows_at_least_what_the_section_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.config.schema.Settings", Around)
    assert reference_page().splitlines()[4:] == [
        "| `inner` | section |  | upgrade | Inner. |",
        "| `inner.light` | whole number | `1` | upgrade | Light. |",
        "| `inner.heavy` | whole number | `2` | restart | Heavy. |",
        "| `last` | whole number | `3` | reload | Last. |",
    ]


def test_the_example_has_every_setting() -> None:
    lines = (EXAMPLES / "example.yaml").read_text().splitlines()
    words = {line.strip().lstrip("#- ").partition(":")[0] for line in lines}
    text = "\n".join(lines)
    assert [key for key, name, _ in SETTINGS if name not in words and f"{name}: " not in text] == []


def test_example_files_are_right_for_schema_and_loader() -> None:
    files = sorted(EXAMPLES.glob("*.yaml"))
    assert {"echo.yaml", "example.yaml"} <= {path.name for path in files}
    validator = Draft7Validator(json_schema())
    for path in files:
        assert [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text()))] == []
        assert read_settings(path).problems == []


def agree(tmp_path: Path, text: str) -> bool:
    """Whether the loader and the schema allow a text; that they are of one mind."""
    path = tmp_path / "f.yaml"
    path.write_text(text)
    loads = not read_settings(path).problems
    assert Draft7Validator(json_schema()).is_valid(yaml.safe_load(text)) == loads, text
    return loads


RIGHT = """
name: chat
workers: auto
workers: 4
boot_timeout: 100ms
boot_timeout: 1h30m
drain_timeout: 250ms
stall_timeout: 0
preload: true
preload: yes
recycle: {connections: 100000, age: 24h, memory: 500MiB, jitter: 10%}
recycle: {connections: 0, age: 0, memory: 0, jitter: 0%}
recycle: {jitter: 100%}
recycle: {jitter: 2.5%}
recycle: {}
mode: pool
mode: once
once: {timeout: 30s, from: [10.0.0.0/8, '::1', 192.168.7.9], adopt: true, fd: 7, pid_file: /run/x}
once: {rendezvous: 'tcp://[::1]:7'}
once: {}
python_path: [/a, b]
log: {level: debug, format: json, to: stderr}
log: {to: /var/log/x}
log: {}
admin: {address: 'tcp://127.0.0.1:9101', allow: [10.0.0.0/8], ready_workers: 2}
admin: {address: 9101}
admin: {address: [9101, 'unix:/run/x']}
admin: {address: 'unix:/run/x', mode: 0660}
admin: {}
agent: tcp://127.0.0.1:9102
statsd: 127.0.0.1:8125
control_group: adm
"""
RIGHT_OF_A_LISTENER = """
backlog: 1
mode: 0660
mode: '660'
owner: root
kind: streams
limits: {write_buffer: 64KiB}
limits: {write_buffer: 0}
limits: {}
"""
WRONG = """
workers: no
workers: 0
workers: 513
wokers: 4
name: bad name
name:
boot_timeout: 30
boot_timeout: soon
drain_timeout: 22:22
stall_timeout: never
preload: 1
preload: [a]
recycle: 24h
recycle: {connections: -1}
recycle: {connections: 1000000001}
recycle: {age: 24}
recycle: {memory: 500M}
recycle: {jitter: 10}
recycle: {jitter: 0.1}
recycle: {jitter: 101%}
recycle: {jitter: 0x1%}
recycle: {jiter: 1%}
mode: twice
once: true
once: {timeout: 30}
once: {from: 10.0.0.0/8}
once: {from: [localhost]}
once: {from_: []}
once: {fd: -1}
once: {rendezvous: 'unix:/tmp/x'}
python_path: /srv
log: info
log:
log: {level: loud}
log: {format: xml}
log: {to: }
admin: 9101
admin: {address: 'udp://127.0.0.1:9101'}
admin: {address: {}}
admin: {ready_workers: 0}
agent: fd:web
statsd: 127.0.0.1
control_group: [adm]
"""
WRONG_OF_A_LISTENER = """
backlog: 0
backlog: many
backlog: 65536
mode: rw
kind: thread
limits: {write_buffer: 64K}
limits: {write_buffer: -1}
limits: {wirte_buffer: 1}
limits: 64KiB
"""
WRONG_WHOLE = """
{}
[a]
listen: nothing
listen: []
listen: [a]
listen: [{address: 'unix:@x'}]
listen: [{handler: 'a:b'}]
listen: [{address: '127.0.0.1:80', handler: 'a:b'}]
listen: [{address: 'unix:@x', handler: chat}]
listen: [{address: 'unix:@x', handler: [a]}]
"""


def texts(lines: str, form: str = "LINE") -> list[str]:
    """Settings files, each with one of the lines in it."""
    return [form.replace("LINE", line) for line in lines.strip().splitlines()]


WITH_LINE = f"listen: [{{{LISTENER}}}]\nLINE"
OF_A_LISTENER = f"listen: [{{{LISTENER}, LINE}}]"


@pytest.mark.parametrize("text", texts(RIGHT, WITH_LINE) + texts(RIGHT_OF_A_LISTENER, OF_A_LISTENER))
def test_schema_allows_what_the_loader_reads(tmp_path: Path, text: str) -> None:
    assert agree(tmp_path, text)


@pytest.mark.parametrize(
    "text", texts(WRONG, WITH_LINE) + texts(WRONG_OF_A_LISTENER, OF_A_LISTENER) + texts(WRONG_WHOLE)
)
def test_schema_refuses_what_the_loader_refuses(tmp_path: Path, text: str) -> None:
    assert not agree(tmp_path, text)
