"""What differs between two settings: a reload decides by it, and tells it.

The plain forms are compared, so that whatever would be handed over otherwise is a difference, and nothing else is. A
listener is known by its address, wherever it stands in the file.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from forkd.config.declare import ListOf, Needs, options
from forkd.config.options import Settings
from forkd.config.plain import to_plain
from forkd.config.units import Kind

_LISTENER = r"listen ([^ ]+|'.*')"
_NEEDS = {Needs.RELOAD: "", Needs.UPGRADE: " (needs an upgrade)", Needs.RESTART: " (needs a restart)"}


@dataclass(frozen=True, slots=True)
class Difference:
    """One setting that is not as it was, or one listener that came or went.

    Attributes:
        key: dotted, as in `log.level`; `listen ADDRESS` of a listener, `listen ADDRESS limits.write_buffer` of one of
            its settings. An address with a space in it is quoted, so that only a setting makes a third word.
        old: the text that a file would have, a listener's handler; None where it was unset or not there.
        new: as `old`.
        needs: what brings the change about.
    """

    key: str
    old: str | None
    new: str | None
    needs: Needs

    def __str__(self) -> str:
        if re.fullmatch(_LISTENER, self.key):
            change = "removed" if self.new is None else f"added, handler {self.new}"
        else:
            change = " -> ".join("unset" if text is None else text for text in (self.old, self.new))
        return f"{self.key}: {change}{_NEEDS[self.needs]}"


def differences(old: Settings, new: Settings) -> list[Difference]:
    """What differs, in the order of declaration; of the listeners first those that were there before.

    Of several listeners on any free port of one host, the first is taken for the first, the second for the second.
    """
    return list(_section(type(old), to_plain(old), to_plain(new), "", Needs.RELOAD))


def _section(
    section: type, old: dict[str, Any], new: dict[str, Any], prefix: str, around: Needs
) -> Iterator[Difference]:
    """The differences within one section; `around` is what a change of the section itself needs."""
    for name, option in options(section).items():
        kind, key, needs = option.kind, prefix + name, max(around, option.needs)
        before, after = old.get(name), new.get(name)
        if isinstance(kind, ListOf) and not isinstance(kind.item, Kind):
            yield from _listeners(kind.item, old[name], new[name], needs)
        elif not isinstance(kind, Kind | ListOf):
            yield from _section(kind, old[name], new[name], f"{key}.", needs)
        elif before != after:
            yield Difference(key, _text(before), _text(after), needs)


def _listeners(
    section: type, old: list[dict[str, Any]], new: list[dict[str, Any]], needs: Needs
) -> Iterator[Difference]:
    before, after = _by_address(old), _by_address(new)
    for address, number in before | after:
        key, place = f"listen {_quoted(address)}", (address, number)
        if place not in after:
            yield Difference(key, before[place]["handler"], None, needs)
        elif place not in before:
            yield Difference(key, None, after[place]["handler"], needs)
        else:
            yield from _section(section, before[place], after[place], f"{key} ", needs)


def _by_address(listeners: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Listeners by their address and their number among those with the same."""
    seen: Counter[str] = Counter()
    found = {}
    for listener in listeners:
        address = listener["address"]
        found[address, seen[address]] = listener
        seen[address] += 1
    return found


def _text(value: str | list[str] | None) -> str | None:
    return f"[{', '.join(map(_quoted, value))}]" if isinstance(value, list) else value


def _quoted(text: str) -> str:
    return shlex.quote(text) if " " in text else text
