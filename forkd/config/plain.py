"""Settings in a plain form, to be handed over: to the next forkd over an exec, from a helper process to the master.

It is fit for JSON: mappings, lists and text alone, each value as the text that would stand in a file. What comes in is
not trusted, since another version or another process made it: the walker that reads files reads it, and a mistake is a
ConfigError.
"""

from __future__ import annotations

from typing import Any

from forkd.config.declare import ListOf, options, value_of
from forkd.config.load import Loaded, read_graph
from forkd.config.options import Settings
from forkd.config.override import made_mark, node_of
from forkd.config.units import Kind
from forkd.errors import ConfigError, Problem

WHERE = "the handed-over settings"


def to_plain(settings: Settings) -> dict[str, Any]:
    """All settings by name, defaults too; what is unset and has no word for that is left out."""
    plain: dict[str, Any] = _plain(settings, type(settings))
    return plain


def from_plain(plain: object) -> Settings:
    """The settings that `to_plain` made `plain` of.

    Raises:
        ConfigError: with every problem found; keys that this version doesn't know are problems.
    """
    reading = Loaded()
    try:
        graph = node_of(plain, made_mark(WHERE))
    except RecursionError:
        raise ConfigError([Problem(WHERE, "is nested too deeply")]) from None
    read_graph(graph, reading, {})
    return reading.sound()


def _plain(value: Any, kind: Kind[Any] | ListOf | type) -> Any:
    if isinstance(kind, Kind):
        return kind.text(value)
    if isinstance(kind, ListOf):
        return [_plain(item, kind.item) for item in value]
    known = {name: _plain(value_of(value, name), option.kind) for name, option in options(kind).items()}
    return {name: plain for name, plain in known.items() if plain is not None}
