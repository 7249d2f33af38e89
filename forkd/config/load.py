"""From YAML and command-line options to `Settings`, with every mistake found in one pass.

The YAML is read as a graph of nodes, never constructed into objects: nodes know their line and column, keep duplicate
keys, and leave scalars as the text that was written. What the command line says is grafted into that graph, and what
is handed over (`plain`) becomes one, so one walker reads them all. The pure-Python composer is used on purpose: on deep
nesting it raises, where libyaml's crashes.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from forkd.config.agree import mistakes
from forkd.config.declare import ListOf, Option, default_of, made_of, options
from forkd.config.listener import Listener
from forkd.config.options import Settings
from forkd.config.override import Override, empty_mapping, graft, made_mark
from forkd.config.units import Kind
from forkd.errors import ConfigError, Problem

#: Bytes of a settings file at most.
LARGEST = 1 << 20

Keys = tuple[str | int, ...]

_SEQ, _MAP = "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"
_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}


@dataclass(slots=True)
class Loaded:
    """What one reading has found.

    Attributes:
        settings: what could be read; the default stands in for what is wrong.
        problems: all mistakes, in the order of the file.
        listeners: where in the file's sequence each of the settings' listeners stands; wrong ones are left out.
    """

    settings: Settings = field(default_factory=lambda: Settings(listen=()))
    problems: list[Problem] = field(default_factory=list)
    order: list[tuple[str, int, int]] = field(default_factory=list)  # of the problems: file, line and column
    listeners: list[int] = field(default_factory=list)
    places: dict[Keys, yaml.Mark] = field(default_factory=dict)

    def sound(self) -> Settings:
        """The settings, if nothing is wrong; else raises ConfigError with every problem found."""
        if self.problems:
            raise ConfigError(self.problems)
        return self.settings

    def add(self, message: str, *keys: str | int) -> None:
        """Adds a problem of a setting, found by who tried what it says."""
        self.problem(self.places.get(keys) or made_mark(_name(keys)), f"{_name(keys)}: {message}")

    def problem(self, mark: yaml.Mark, message: str) -> None:
        place = mark.name, mark.line, mark.column
        at = bisect.bisect_right(self.order, place)
        self.order.insert(at, place)
        self.problems.insert(at, Problem(_where(mark), message))


def load_settings(
    path: Path | None, overrides: Iterable[Override] = (), base: dict[str, Any] | None = None
) -> Settings:
    """Settings from a file (or from nothing) and the command line.

    Args:
        path: the YAML file, or None.
        overrides: settings from the command line, applied in order.
        base: settings that hold where neither says anything, such as the name that the file's own name gives.

    Raises:
        ConfigError: with every problem found.
    """
    return read_settings(path, overrides, base).sound()


def read_settings(path: Path | None, overrides: Iterable[Override] = (), base: dict[str, Any] | None = None) -> Loaded:
    """As `load_settings`, but with what could be read and the problems beside it: `forkd stop` must work for a daemon
    whose file has been broken since.
    """
    reading = Loaded()
    root = _compose(path, reading) if path else None
    if reading.problems:
        reading.settings = Settings(listen=(), **(base or {}))
        return reading
    if root is None:
        root = empty_mapping(str(path or "settings"))
    for override in overrides:
        try:
            graft(root, override)
        except ValueError as error:
            reading.problem(made_mark(override.where), str(error))
    read_graph(root, reading, base or {})
    return reading


def read_graph(root: yaml.Node, reading: Loaded, base: dict[str, Any]) -> None:
    """Settings from a graph of nodes, whatever it was made of, into `reading`; `base` as in `load_settings`."""
    values = _section(root, Settings, (), reading, base)
    _check_listeners(values.get("listen", ()), reading)
    reading.listeners = [index for index, item in enumerate(values.get("listen", ())) if item is not _WRONG]
    for key, value in values.items():
        if isinstance(value, tuple):
            values[key] = tuple(item for item in value if item is not _WRONG)
    reading.settings = Settings(**{"listen": (), **values})
    for keys, message in mistakes(reading.settings):
        match keys:
            case ("listen", int(number), *more):
                reading.add(message, "listen", reading.listeners[number], *more)
            case _:
                reading.add(message, *keys)


def _where(mark: yaml.Mark) -> str:
    return f"{mark.name}:{mark.line + 1}:{mark.column + 1}" if mark.line >= 0 else mark.name


def _compose(path: Path, reading: Loaded) -> yaml.MappingNode | None:
    try:
        with path.open("rb") as stream:
            data = stream.read(LARGEST + 1)
    except OSError as error:
        reading.problem(made_mark(str(path)), f"can't be read: {error.strerror}")
        return None
    if len(data) > LARGEST:
        reading.problem(made_mark(str(path)), f"is over {LARGEST} bytes, which no settings file needs")
        return None
    try:
        loader = yaml.SafeLoader(data)
        loader.name = str(path)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or made_mark(str(path))
        hint = "; YAML is indented by spaces, not tabs" if "\\t" in str(error.problem) else ""
        reading.problem(mark, f"not YAML: {error.problem or error.context}{hint}")
        return None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter two: escapes that stand for nothing
        reading.problem(made_mark(str(path)), f"not YAML: {str(error).splitlines()[0]}")
        return None
    except RecursionError:
        reading.problem(made_mark(str(path)), "is nested too deeply")
        return None
    if root is None:  # an empty file, or comments alone
        return None
    return root if _is_mapping(root, (), reading) else None


def _what(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a sequence"
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "nothing"
    return "nothing" if node.value is None else f"{_a(type(node.value).__name__)}, not text"


def _is_mapping(node: yaml.Node, keys: Keys, reading: Loaded) -> TypeGuard[yaml.MappingNode]:
    """Whether a node can hold settings, and a problem if not."""
    if not isinstance(node, yaml.MappingNode):
        of = f"{_name(keys)}: " if keys else ""
        reading.problem(node.start_mark, f"{of}expected settings as `key: value`, found {_what(node)}")
    return isinstance(node, yaml.MappingNode)


def _section(node: yaml.Node, section: type, keys: Keys, reading: Loaded, base: dict[str, Any]) -> dict[str, Any]:
    """The values of one section, by setting; what is missing has its default, what is wrong too."""
    known = options(section)
    values: dict[str, Any] = {}
    seen: dict[str, yaml.Mark] = {}
    if not _is_mapping(node, keys, reading):
        return values
    _check_tag(node, {_MAP}, keys, reading)
    for key_node, value_node in node.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) and key_node.tag in _PLAIN_TAGS else None
        if key not in known:
            if _check_tag(key_node, _PLAIN_TAGS | {_MAP, _SEQ}, keys, reading):
                reading.problem(key_node.start_mark, _unknown(_what(key_node) if key is None else key, known))
        elif key in seen:
            reading.problem(key_node.start_mark, f"{key}: given twice; the first is at {_where(seen[key])}")
        else:
            seen[key] = key_node.start_mark
            reading.places[*keys, key] = value_node.start_mark
            found = _value(value_node, known[key].kind, (*keys, key), reading)
            if found is not _WRONG:
                values[key] = found
            elif key in base:
                values[key] = base[key]
    for key, option in known.items():
        if key not in seen and key in base:
            values[key] = base[key]
        elif key not in seen and option.required:
            reading.problem(node.start_mark, f"{_name((*keys, key))}: is missing; {_first_sentence(option)}")
    return values


_WRONG = object()


def _value(node: yaml.Node, kind: Kind[Any] | ListOf | type, keys: Keys, reading: Loaded) -> Any:
    if isinstance(kind, Kind):
        return _scalar(node, kind, keys, reading)
    if isinstance(kind, ListOf):
        if not isinstance(node, yaml.SequenceNode):
            reading.problem(node.start_mark, f"{_name(keys)}: expected a sequence, found {_what(node)}")
            return _WRONG
        _check_tag(node, {_SEQ}, keys, reading)
        found = []
        for index, item in enumerate(node.value):
            reading.places[*keys, index] = item.start_mark
            found.append(_value(item, kind.item, (*keys, index), reading))
        if not found and keys == ("listen",):
            reading.problem(node.start_mark, "listen: is empty; a daemon needs a listener")
        return tuple(found)
    values = _section(node, kind, keys, reading, {})
    lacks = [key for key, option in options(kind).items() if option.required and key not in values]
    return _WRONG if lacks else made_of(kind, values)


def _scalar(node: yaml.Node, kind: Kind[Any], keys: Keys, reading: Loaded) -> Any:
    name = _name(keys)
    if not isinstance(node, yaml.ScalarNode):
        reading.problem(node.start_mark, f"{name}: expected {_a(kind.name)}, found {_what(node)}")
    elif not _check_tag(node, _PLAIN_TAGS, keys, reading):
        return _WRONG
    elif not node.value and node.style is None:
        reading.problem(node.start_mark, f"{name}: has no value; expected {_a(kind.name)}")
    else:
        try:
            return kind.parse(node.value)
        except ValueError as error:
            reading.problem(node.start_mark, f"{name}: {error}")
    return _WRONG


def _check_tag(node: yaml.Node, known: set[str], keys: Keys, reading: Loaded) -> bool:
    """Whether a node has a tag of plain YAML, and a problem if not. A tag never makes anything here."""
    if node.tag not in known:
        reading.problem(node.start_mark, f"{_name(keys)}: tags such as {node.tag} have no meaning here")
    return node.tag in known


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _name(keys: Keys) -> str:
    """`listen[0].limits` for ("listen", 0, "limits")."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".") or "the file"


def _unknown(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"{key}: unknown setting; {meant}"


def _first_sentence(option: Option) -> str:
    return option.doc[0].lower() + option.doc[1:].rstrip(".")


def _check_listeners(listeners: Sequence[Listener], reading: Loaded) -> None:
    """What no single value shows: two listeners on one address, file options where there is no file."""
    at: dict[str, int] = {}
    for index, listener in enumerate(listeners):
        if listener is _WRONG:
            continue
        place = reading.places.get(("listen", index, "address"), made_mark("listen"))
        text = str(listener.address)
        if text in at and (listener.address.port or not listener.address.host):
            reading.problem(place, f"listen[{index}].address: {text} stands at listen[{at[text]}] already")
        at.setdefault(text, index)
        if listener.address.is_unix and not listener.address.abstract:
            continue
        for key in ("mode", "owner", "group"):
            if getattr(listener, key) != default_of(Listener, key):
                mark = reading.places.get(("listen", index, key), place)
                reading.problem(mark, f"listen[{index}].{key}: means a unix socket's path, and {text} has none")
