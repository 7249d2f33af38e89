"""Settings in a plain form, to be handed over: to the next forkd over an exec, from a helper process to the master.

The form is fit for JSON: mappings, lists and text alone, each value as the text that would be in a file. What comes in
is not trusted, since another version or another process made it: the walker that reads files reads it, and a mistake is
a ConfigError.

`differences` is what a reload decides by, and shows. It compares the plain forms, so that whatever would be handed over
otherwise is a difference, and nothing else is. A listener is known by its address, wherever it is in the file.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forkd.config.fields import Kind, ListOf, MappingOf, Needs, options, value_of
from forkd.config.listener import Listener
from forkd.config.loader import LoadResult, mark_without_file, node_of, read_graph
from forkd.config.settings import Settings
from forkd.config.units import escape_controls
from forkd.config.values import ScalarKind
from forkd.errors import ConfigError, Problem

ORIGIN = "the handed-over settings"

_LISTENER_KEY = r"listen ([^ ]+|'.*')"
_NEEDS = {Needs.RELOAD: "", Needs.UPGRADE: " (needs an upgrade)", Needs.RESTART: " (needs a restart)"}


def to_plain(settings: Settings) -> dict[str, Any]:
    """All settings by name, defaults too; left out is what is unset and has no word for that."""
    plain: dict[str, Any] = _plain_value(settings, type(settings))
    return plain


def from_plain(plain: object) -> Settings:
    """The settings that `to_plain` made `plain` of.

    Raises:
        ConfigError: with every problem found; keys that this version doesn't know are problems.
    """
    result = LoadResult()
    try:
        graph = node_of(plain, mark_without_file(ORIGIN))
    except RecursionError:
        raise ConfigError([Problem(ORIGIN, "is nested too deeply")]) from None
    read_graph(graph, result, {})
    return result.valid_settings()


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting that has changed, or one listener that was added or removed.

    Attributes:
        key: dotted, as in `log.level`; `listen ADDRESS` of a listener, `listen ADDRESS limits.write_buffer` of one of
            its settings. An address with a space in it is quoted, so that only a setting makes a third word.
        old: the text that a file would have, or a listener's handler; None where it was unset or not there.
        new: likewise.
        needs: what the change needs before it holds.
    """

    key: str
    old: str | None
    new: str | None
    needs: Needs

    def __str__(self) -> str:
        if re.fullmatch(_LISTENER_KEY, self.key):
            change = "removed" if self.new is None else f"added, handler {self.new}"
        else:
            change = " -> ".join("unset" if text is None else text for text in (self.old, self.new))
        return f"{self.key}: {change}{_NEEDS[self.needs]}"


def differences(old: Settings, new: Settings) -> list[Difference]:
    """What differs, in the order of declaration; among the listeners first those that were there before.

    Of several listeners on any free port of one host, the first is taken for the first, the second for the second.
    """
    return list(_section_differences(type(old), to_plain(old), to_plain(new), "", Needs.RELOAD))


def _plain_value(value: Any, kind: Kind) -> Any:
    if isinstance(kind, ScalarKind):
        return kind.text(value)
    if isinstance(kind, ListOf):
        return [_plain_value(item, kind.item) for item in value]
    if isinstance(kind, MappingOf):
        return {name: kind.item.show(item) for name, item in value.items()}
    known = {name: _plain_value(value_of(value, name), option.kind) for name, option in options(kind).items()}
    return {name: plain for name, plain in known.items() if plain is not None}


def _section_differences(
    section: type, old: dict[str, Any], new: dict[str, Any], prefix: str, around: Needs
) -> Iterator[Difference]:
    """The differences within one section; `around` is what a change of the section itself needs."""
    for name, option in options(section).items():
        kind, key, needs = option.kind, prefix + name, max(around, option.needs)
        before, after = old.get(name), new.get(name)
        if isinstance(kind, ListOf) and kind.item is Listener:
            yield from _listener_differences(kind.item, old[name], new[name], needs)
        elif not isinstance(kind, ScalarKind | ListOf | MappingOf):
            yield from _section_differences(kind, old[name], new[name], f"{key}.", needs)
        elif before != after:
            yield Difference(key, _shown(before), _shown(after), needs)


def _listener_differences(
    section: type, old: list[dict[str, Any]], new: list[dict[str, Any]], needs: Needs
) -> Iterator[Difference]:
    before, after = _by_address(old), _by_address(new)
    for address, number in before | after:
        key, listener = f"listen {_quoted(address)}", (address, number)
        if listener not in after:
            yield Difference(key, _served_by(before[listener]), None, needs)
        elif listener not in before:
            yield Difference(key, None, _served_by(after[listener]), needs)
        else:
            yield from _section_differences(section, before[listener], after[listener], f"{key} ", needs)


def _served_by(listener: dict[str, Any]) -> str:
    return listener["handler"] if "handler" in listener else _in_one_line(listener["command"])


def _by_address(listeners: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Listeners by their address and their number among those with the same."""
    seen: Counter[str] = Counter()
    found = {}
    for listener in listeners:
        address = listener["address"]
        found[address, seen[address]] = listener
        seen[address] += 1
    return found


def _shown(value: Any) -> str | None:
    """A value as a file has it in one line; a scalar without quotes; None where it is unset."""
    return value if value is None or isinstance(value, str) else _in_one_line(value)


def _in_one_line(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{name}: {_in_one_line(item)}' for name, item in value.items())}}}"
    return f"[{', '.join(map(_in_one_line, value))}]" if isinstance(value, list) else _quoted(value)


def _quoted(text: str) -> str:
    return escape_controls(shlex.quote(text) if " " in text or not text else text)
