"""From YAML and command-line options to `Settings`, with every mistake found in one pass, each with line and column.

The YAML is read as a graph of nodes, never constructed into objects: nodes know their line and column, keep duplicate
keys, and leave scalars as the text that was written. What the command line says is put into that graph
(`apply_override`), and plain settings that are handed over (`serialize`) become one, so one walker reads them all. The
pure-Python composer is used on purpose: on deep nesting it raises, where libyaml's crashes.

Last comes what settings must agree on among themselves (`disagreements`). Whether an address can be bound or a handler
imported is not known here; `forkd check` adds that to a `LoadResult`.
"""

from __future__ import annotations

import bisect
import difflib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from forkd.config.fields import Kind, ListOf, MappingOf, Option, default_of, make_section, options
from forkd.config.listener import Listener, address_disagreements, refused_by_servers
from forkd.config.settings import Settings
from forkd.config.values import ARGUMENT, PROGRAM_TEXT, UNIX, ScalarKind
from forkd.errors import ConfigError, Problem

#: Bytes of a settings file at most.
MAX_FILE_SIZE = 1 << 20

Keys = tuple[str | int, ...]

#: The keys of a mistake, and what it is.
Mistake = tuple[Keys, str]

_STR, _SEQ, _MAP = (f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))

#: The beginning of keys at the top level that are for nothing but anchors, as in Docker's Compose files.
_IGNORED = "x-"

#: Settings that merge keys may bring in, in all.
_MOST_MERGED = 10_000

#: Values that are read, and mistakes that are told; aliases make many of few bytes.
_MOST_VALUES = 100_000
_MOST_PROBLEMS = 1000

_MERGE = "tag:yaml.org,2002:merge"

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}

_INVALID = object()

#: Where settings belong, for one that stands elsewhere.
_SECTIONS: dict[str, type] = {"at the top level": Settings, "in an item of listen": Listener}


class _TooMuch(Exception):
    """There is more than is read: where, and of what."""


@dataclass(slots=True)
class LoadResult:
    """What reading settings has found.

    Attributes:
        settings: what could be read; a wrong value has its default.
        problems: all mistakes, in the order of the file.
        order: file, line and column of each problem.
        listeners: for each of the settings' listeners its number in the file's sequence; wrong ones are left out.
        marks: where each setting is in the file, by its keys.
    """

    settings: Settings = field(default_factory=lambda: Settings(listen=()))
    problems: list[Problem] = field(default_factory=list)
    order: list[tuple[str, int, int]] = field(default_factory=list)
    listeners: list[int] = field(default_factory=list)
    marks: dict[Keys, yaml.Mark] = field(default_factory=dict)

    def valid_settings(self) -> Settings:
        """The settings. Raises ConfigError with every problem found, if there is any."""
        if self.problems:
            raise ConfigError(self.problems)
        return self.settings

    def add_problem(self, message: str, *keys: str | int) -> None:
        """Adds a problem of a setting, such as one that shows only when it is tried."""
        self.add_problem_at(self.marks.get(keys) or mark_without_file(_dotted(keys)), f"{_dotted(keys)}: {message}")

    def check_size(self, mark: yaml.Mark) -> None:
        """Raises _TooMuch where more is found than anybody reads; `mark` is where."""
        if len(self.problems) > _MOST_PROBLEMS:
            raise _TooMuch(mark, f"there are over {_MOST_PROBLEMS} mistakes before this; the rest was not read")
        if len(self.marks) > _MOST_VALUES:
            raise _TooMuch(mark, f"there are over {_MOST_VALUES} values, those of aliases counted each time")

    def add_problem_at(self, mark: yaml.Mark, message: str) -> None:
        """Adds a problem in its place in the order of the file."""
        position = mark.name, mark.line, mark.column
        at = bisect.bisect_right(self.order, position)
        self.order.insert(at, position)
        self.problems.insert(at, Problem(_position(mark), message))


@dataclass(frozen=True, slots=True)
class SettingOverride:
    """One setting given on the command line.

    Attributes:
        key: dotted, as in `log.level`; `listen.backlog` means every listener, `listen.0.backlog` the first.
        value: the text of a scalar, `[a, b]` or `{a: b}` as YAML has them, or what YAML would hold there.
        where: the option as the user typed it, for messages.
    """

    key: str
    value: str | Sequence[Mapping[str, str]]
    where: str


def load_settings(
    path: Path | None, overrides: Iterable[SettingOverride] = (), base: dict[str, Any] | None = None
) -> Settings:
    """Settings from a file (or from nothing) and the command line.

    Args:
        path: the YAML file, or None.
        overrides: settings from the command line, applied in order.
        base: settings that hold where neither says anything, such as the name that the file's own name gives.

    Raises:
        ConfigError: with every problem found.
    """
    return read_settings(path, overrides, base).valid_settings()


def read_settings(
    path: Path | None, overrides: Iterable[SettingOverride] = (), base: dict[str, Any] | None = None
) -> LoadResult:
    """As `load_settings`, but returns what could be read beside the problems: `forkd stop` must work for a daemon whose
    file was broken since.
    """
    result = LoadResult()
    root = _parse_yaml(path, result) if path else None
    if result.problems:
        result.settings = Settings(listen=(), **(base or {}))
        return result
    if root is None:
        root = empty_mapping(str(path or "settings"))
    _Merging(result).walk(root)
    for override in overrides:
        try:
            apply_override(root, override)
        except ValueError as error:
            result.add_problem_at(mark_without_file(override.where), str(error))
            if isinstance(error, _NotYaml):  # of the others too little is known then, as with a file that is not YAML
                result.settings = Settings(listen=(), **(base or {}))
                return result
    read_graph(root, result, base or {})
    return result


def read_graph(root: yaml.Node, result: LoadResult, base: dict[str, Any]) -> None:
    """Reads settings from a graph of nodes, of whatever origin, into `result`; `base` is as in `load_settings`."""
    try:
        values = _read_section(root, Settings, (), result, base)
    except _TooMuch as found:
        result.add_problem_at(*found.args)
        result.settings = Settings(listen=(), **base)
        return
    _check_listeners(values.get("listen", ()), result)
    result.listeners = [index for index, item in enumerate(values.get("listen", ())) if item is not _INVALID]
    for key, value in values.items():
        if type(value) is tuple:
            values[key] = tuple(item for item in value if item is not _INVALID)
    result.settings = Settings(**{"listen": (), **values})
    for keys, message in disagreements(result.settings):
        match keys:
            case ("listen", int(number), *more):
                result.add_problem(message, "listen", result.listeners[number], *more)
            case _:
                result.add_problem(message, *keys)


# The file and the command line as a graph of nodes


def _parse_yaml(path: Path, result: LoadResult) -> yaml.MappingNode | None:
    try:
        # A named pipe would be waited for, by a running master too. One of this process's own, as `<(command)` of a
        # shell is, has no other name than that of its descriptor.
        if stat.S_ISFIFO(path.stat().st_mode) and not os.path.realpath(path).startswith("/proc/"):
            result.add_problem_at(mark_without_file(str(path)), "is a named pipe; name a file")
            return None
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_SIZE + 1)
    except OSError as error:
        result.add_problem_at(mark_without_file(str(path)), f"can't be read: {error.strerror}")
        return None
    if len(data) > MAX_FILE_SIZE:
        result.add_problem_at(
            mark_without_file(str(path)), f"is over {MAX_FILE_SIZE} bytes, which no settings file needs"
        )
        return None
    try:
        loader = yaml.SafeLoader(data)
        loader.name = str(path)
        root = loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark or mark_without_file(str(path))
        result.add_problem_at(mark, _why_not_yaml(error, data))
        return None
    except _UNREADABLE as error:
        result.add_problem_at(mark_without_file(str(path)), _why_not_yaml(error, data))
        return None
    if root is None:  # an empty file, or comments alone
        return None
    return root if _is_mapping(root, (), result) else None


#: What reading YAML may raise: ValueError and OverflowError for escapes that mean nothing.
_UNREADABLE = (yaml.YAMLError, ValueError, OverflowError, RecursionError)


def _why_not_yaml(error: Exception, data: bytes, hint: str = "") -> str:
    """What is wrong with text that can't be read as YAML, and what to do: `hint`, where nothing better is known."""
    if isinstance(error, RecursionError):
        return "is nested too deeply"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"not YAML: {str(error).splitlines()[0]}"
    if "\\t" in str(error.problem):
        hint = "; YAML is indented by spaces, not tabs"
    if error.problem_mark is not None and _is_bare_address(data, error.problem_mark):
        hint = "; within braces an address with brackets is put in quotes, as in {address: 'tcp://[::1]:7007'}"
    return f"not YAML: {error.problem or error.context}{hint}"


class _NotYaml(ValueError):
    """A value of the command line can't be read."""


class _Merging:
    """Puts what merge keys (`<<`, as YAML 1.1 has them) bring into each mapping of a graph, behind its own settings;
    once into each, however many aliases lead to it. `result` gets the mistakes.
    """

    def __init__(self, result: LoadResult) -> None:
        self._result = result
        self._seen: set[int] = set()
        self._open: set[int] = set()  # those that are being worked at
        self._left = _MOST_MERGED

    def walk(self, node: yaml.Node) -> None:
        """Merges in a node and in all below it."""
        if id(node) in self._seen:
            return
        self._seen.add(id(node))
        self._open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            self._merge(node)
            for _, value in node.value:
                self.walk(value)
        elif isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self.walk(item)
        self._open.discard(id(node))

    def _merge(self, node: yaml.MappingNode) -> None:
        merges = [pair for pair in node.value if pair[0].tag == _MERGE]
        if not merges:
            return
        node.value = [pair for pair in node.value if pair[0].tag != _MERGE]
        known = {key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        for key, value in merges:
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self.walk(source)
                if wrong := self._obstacle(source):
                    self._result.add_problem_at(key.start_mark, f"<<: {wrong}")
                    continue
                pairs = [pair for pair in source.value if isinstance(pair[0], yaml.ScalarNode)]
                node.value += [pair for pair in pairs if pair[0].value not in known]
                known |= {name.value for name, _ in pairs}

    def _obstacle(self, source: yaml.Node) -> str:
        """What keeps a node from being merged into another one."""
        if not isinstance(source, yaml.MappingNode):
            return f"expected an alias of settings, as in <<: *NAME, found {_describe(source)}"
        if id(source) in self._open:
            return "is an alias of what it stands in"
        self._left -= len(source.value)
        return "" if self._left >= 0 else f"all merge keys together bring in more than {_MOST_MERGED} settings"


def _is_bare_address(data: bytes, mark: yaml.Mark) -> bool:
    """Whether the line of a mark has an IPv6 address in a flow mapping, without quotes."""
    lines = data.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else b""
    return re.search(rb"[{,].*[\s:](tcp|udp)://\[", line) is not None


def apply_override(root: yaml.MappingNode, override: SettingOverride) -> None:
    """Puts an override's value into the graph, in the place of what is there.

    Raises:
        ValueError: there is no section to put it into.
    """
    mark = mark_without_file(override.where)
    value = _override_node(override, mark)
    *path, last = override.key.split(".")
    sections: list[yaml.MappingNode] = [root]
    for index, part in enumerate(path):
        if index and re.fullmatch(r"[0-9]{1,4}", part):  # an item of the sequence that the part before it means
            sections = sections[int(part) : int(part) + 1]
        else:
            sections = [inner for section in sections for inner in _sections_at(section, part, mark)]
    if not sections:
        raise ValueError(f"there is no {'.'.join(path)} to set it in")
    for section in sections:
        section.value = [pair for pair in section.value if pair[0].value != last]
        section.value.append((yaml.ScalarNode(_STR, last, mark, mark), value))


def _override_node(override: SettingOverride, mark: yaml.Mark) -> yaml.Node:
    """A value as the command line means it: text in brackets is a sequence, and in braces a mapping where a setting can
    be one; other text is itself, or the one value of a sequence. Raises ValueError.
    """
    value, kind = override.value, _kind_at(override.key)
    if not isinstance(value, str):
        return node_of(value, mark)
    is_scalar, of_scalars = isinstance(kind, ScalarKind), isinstance(kind, ListOf) and isinstance(kind.item, ScalarKind)
    text = value if is_scalar else value.strip()
    special = r"""['"]""" if is_scalar or of_scalars else r"""['"{}]"""
    match text[:1] + text[-1:]:
        case "[]" if not re.search(special, text):  # it needs fewer quotes than YAML wants
            return node_of([item.strip() for item in text[1:-1].split(",") if item.strip()], mark)
        case "[]" if not is_scalar or kind is ARGUMENT:
            return _flow_node(text, mark)
        case "{}" if not is_scalar and not of_scalars:  # elsewhere braces are text
            return _flow_node(text, mark)
    return node_of([value] if of_scalars else value, mark)


def _kind_at(key: str) -> Kind | None:
    """The kind that a setting is declared with; None where there is none, of which the walker tells."""
    kind: Kind | None = Settings
    for part in key.split("."):
        section = kind.item if isinstance(kind, ListOf) else kind
        if isinstance(section, MappingOf):
            kind = section.item
        elif isinstance(section, type) and not part.isdecimal():
            found = options(section).get(part)
            kind = found.kind if found is not None else None
    return kind


def _flow_node(text: str, mark: yaml.Mark) -> yaml.Node:
    """The graph of a sequence or mapping, all of which is from where `mark` says. Raises ValueError."""
    try:
        root: yaml.Node = yaml.SafeLoader(text).get_single_node() or node_of(text, mark)  # (it has brackets, so is one)
    except _UNREADABLE as error:
        hint = "; put each value that has more than letters in quotes"
        raise _NotYaml(_why_not_yaml(error, text.encode(errors="surrogateescape"), hint)) from None
    left = [root]
    while left:
        node = left.pop()
        if node.start_mark is mark:  # an alias of what was here before
            continue
        node.start_mark = node.end_mark = mark
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            left += chain.from_iterable(node.value)
    return root


def _sections_at(section: yaml.MappingNode, part: str, mark: yaml.Mark) -> list[yaml.MappingNode]:
    """The sections that a part of a key names in a section: one, made if it is not there, or all of a sequence."""
    at = next((at for at, (key, _) in enumerate(section.value) if key.value == part), None)
    if at is None:
        found: yaml.Node = yaml.MappingNode(_MAP, [], mark, mark)
        section.value.append((yaml.ScalarNode(_STR, part, mark, mark), found))
    else:
        key, value = section.value[at]
        found = _own_copy(value)
        section.value[at] = key, found
    items = found.value if isinstance(found, yaml.SequenceNode) else [found]
    return [item for item in items if isinstance(item, yaml.MappingNode)]


def _own_copy(node: yaml.Node) -> yaml.Node:
    """A section, or a sequence of sections, for one place alone: several aliases may lead to it."""
    if isinstance(node, yaml.MappingNode):
        return yaml.MappingNode(node.tag, [*node.value], node.start_mark, node.end_mark)
    if isinstance(node, yaml.SequenceNode):
        items = [_own_copy(item) if isinstance(item, yaml.MappingNode) else item for item in node.value]
        return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
    return node


def node_of(value: object, mark: yaml.Mark) -> yaml.Node:
    """The graph that a file with this value would be read as: mappings, lists and text.

    Anything else becomes a node of no kind, which the walker finds wrong wherever it is.
    """
    if isinstance(value, Mapping):
        pairs = [(node_of(key, mark), node_of(item, mark)) for key, item in value.items()]
        return yaml.MappingNode(_MAP, pairs, mark, mark)
    if isinstance(value, list | tuple):
        return yaml.SequenceNode(_SEQ, [node_of(item, mark) for item in value], mark, mark)
    kind = yaml.ScalarNode if isinstance(value, str) else yaml.Node
    return kind(_STR, value, mark, mark)


def empty_mapping(name: str) -> yaml.MappingNode:
    """A mapping without settings, for overrides; `name` says where it is from."""
    return yaml.MappingNode(_MAP, [], mark_without_file(name), mark_without_file(name))


def mark_without_file(name: str) -> yaml.Mark:
    """A mark for what is in no file: `name` alone says where it is from."""
    return yaml.Mark(name, 0, -1, -1, None, 0)


# From the graph to values


def _read_section(
    node: yaml.Node, section: type, keys: Keys, result: LoadResult, base: dict[str, Any]
) -> dict[str, Any]:
    """The values of one section, by setting; what is missing has its default, what is wrong too."""
    known = options(section)
    values: dict[str, Any] = {}
    seen: dict[str, yaml.Mark] = {}
    if not _is_mapping(node, keys, result):
        return values
    _check_tag(node, {_MAP}, keys, result)
    for key_node, value_node in node.value:
        result.check_size(key_node.start_mark)
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) and key_node.tag in _PLAIN_TAGS else None
        if key not in known:
            if section is Settings and key is not None and key.startswith(_IGNORED):
                continue
            if _check_tag(key_node, _PLAIN_TAGS | {_MAP, _SEQ}, keys, result):
                result.add_problem_at(
                    key_node.start_mark, _unknown_setting(_describe(key_node) if key is None else key, section)
                )
        elif key in seen:
            result.add_problem_at(key_node.start_mark, f"{key}: given twice; the first is at {_position(seen[key])}")
        else:
            seen[key] = key_node.start_mark
            result.marks[*keys, key] = value_node.start_mark
            found = _read_value(value_node, known[key].kind, (*keys, key), result)
            if found is not _INVALID:
                values[key] = found
            elif key in base:
                values[key] = base[key]
    for key, option in known.items():
        if key not in seen and key in base:
            values[key] = base[key]
        elif key not in seen and option.required and option.unless not in seen:
            result.add_problem_at(node.start_mark, f"{_dotted((*keys, key))}: is missing; {_first_sentence(option)}")
    return values


def _read_value(node: yaml.Node, kind: Kind, keys: Keys, result: LoadResult) -> Any:
    if isinstance(kind, ScalarKind):
        return _read_scalar(node, kind, keys, result)
    if isinstance(kind, MappingOf):
        return _read_mapping(node, kind, keys, result)
    if isinstance(kind, ListOf):
        if kind.or_one and isinstance(node, yaml.ScalarNode):
            node = yaml.SequenceNode(_SEQ, [node], node.start_mark, node.end_mark)
        if not isinstance(node, yaml.SequenceNode):
            hint = f"; write [{_items(node.value)}]" if _is_plain(node, kind) else ""
            result.add_problem_at(
                node.start_mark, f"{_dotted(keys)}: expected a sequence, found {_describe(node)}{hint}"
            )
            return _INVALID
        _check_tag(node, {_SEQ}, keys, result)
        found = []
        for index, item in enumerate(node.value):
            result.check_size(item.start_mark)
            result.marks[*keys, index] = item.start_mark
            found.append(_read_value(item, kind.item, (*keys, index), result))
        if not found and keys == ("listen",):
            result.add_problem_at(node.start_mark, "listen: is empty; a daemon needs a listener")
        # Of the listeners each keeps its number.
        return tuple(item for item in found if item is not _INVALID or keys == ("listen",))
    values = _read_section(node, kind, keys, result, {})
    lacks = [
        key
        for key, option in options(kind).items()
        if option.required and key not in values and option.unless not in values
    ]
    return _INVALID if lacks else make_section(kind, values)


def _read_mapping(node: yaml.Node, kind: MappingOf, keys: Keys, result: LoadResult) -> Any:
    """Scalars by names of the user's own; where they may be of several types, also lists of them."""
    if not _is_mapping(node, keys, result):
        return _INVALID
    _check_tag(node, {_MAP}, keys, result)
    found: dict[str, Any] = {}
    for name_node, value_node in node.value:
        result.check_size(name_node.start_mark)
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else _describe(name_node)
        if not re.fullmatch(kind.names, name, re.ASCII):
            result.add_problem_at(name_node.start_mark, f"{_dotted(keys)}: {name[:80]!r} is not a name")
        elif name in found:
            result.add_problem_at(name_node.start_mark, f"{_dotted((*keys, name))}: given twice")
        else:
            result.marks[*keys, name] = value_node.start_mark
            found[name] = _read_item(value_node, kind.item, (*keys, name), result)
    return _INVALID if _INVALID in found.values() else found


def _read_item(node: yaml.Node, kind: ScalarKind[Any], keys: Keys, result: LoadResult) -> Any:
    if kind is not ARGUMENT:
        return _read_scalar(node, kind, keys, result)
    if isinstance(node, yaml.SequenceNode):
        _check_tag(node, {_SEQ}, keys, result)
        items = []
        for index, item in enumerate(node.value):
            result.check_size(item.start_mark)
            result.marks[*keys, index] = item.start_mark
            items.append(_read_scalar(item, ARGUMENT, (*keys, index), result))
        return _INVALID if _INVALID in items else items
    # What is in quotes is a text, whatever it looks like.
    return node.value if getattr(node, "style", None) and node.tag == _STR else _read_scalar(node, kind, keys, result)


def _read_scalar(node: yaml.Node, kind: ScalarKind[Any], keys: Keys, result: LoadResult) -> Any:
    name = _dotted(keys)
    if not isinstance(node, yaml.ScalarNode):
        result.add_problem_at(node.start_mark, f"{name}: expected {_with_article(kind.name)}, found {_describe(node)}")
    elif not _check_tag(node, _PLAIN_TAGS, keys, result):
        return _INVALID
    elif not node.value and node.style is None and kind is not PROGRAM_TEXT:
        result.add_problem_at(node.start_mark, f"{name}: has no value; expected {_with_article(kind.name)}")
    else:
        try:
            return kind.parse(node.value)
        except ValueError as error:
            result.add_problem_at(node.start_mark, f"{name}: {error}")
    return _INVALID


def _is_mapping(node: yaml.Node, keys: Keys, result: LoadResult) -> TypeGuard[yaml.MappingNode]:
    """Whether a node can hold settings, and a problem if not."""
    if not isinstance(node, yaml.MappingNode):
        of = f"{_dotted(keys)}: " if keys else ""
        result.add_problem_at(node.start_mark, f"{of}expected settings as `key: value`, found {_describe(node)}")
    return isinstance(node, yaml.MappingNode)


def _check_tag(node: yaml.Node, known: set[str], keys: Keys, result: LoadResult) -> bool:
    """Whether a node has a tag of plain YAML, and a problem if not. A tag never makes an object here."""
    if node.tag not in known:
        result.add_problem_at(node.start_mark, f"{_dotted(keys)}: tags such as {node.tag} have no meaning here")
    return node.tag in known


def _check_listeners(listeners: Sequence[Listener], result: LoadResult) -> None:
    """Mistakes between listeners: two on one address; and file options where there is no file."""
    at: dict[str, int] = {}
    for index, listener in enumerate(listeners):
        if listener is _INVALID:
            continue
        place = result.marks.get(("listen", index, "address"), mark_without_file("listen"))
        text = str(listener.address)
        if text in at and (listener.address.port or not listener.address.host):
            result.add_problem_at(
                place, f"listen[{index}].address: {text} is the address of listen[{at[text]}] already"
            )
        at.setdefault(text, index)
        if listener.address.is_unix and not listener.address.abstract:
            continue
        for key in ("mode", "owner", "group"):
            if getattr(listener, key) != default_of(Listener, key):
                mark = result.marks.get(("listen", index, key), place)
                result.add_problem_at(mark, f"listen[{index}].{key}: means a unix socket's path, and {text} has none")


# Words of messages


def _position(mark: yaml.Mark) -> str:
    return f"{mark.name}:{mark.line + 1}:{mark.column + 1}" if mark.line >= 0 else mark.name


def _dotted(keys: Keys) -> str:
    """`listen[0].limits` for ("listen", 0, "limits")."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).removeprefix(".") or "the file"


def _describe(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a sequence"
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.value else "nothing"
    return "nothing" if node.value is None else f"{_with_article(type(node.value).__name__)}, not text"


def _is_plain(node: yaml.Node, kind: ListOf) -> bool:
    """Whether a node is one value where a sequence of them belongs."""
    plain = isinstance(node, yaml.ScalarNode) and node.style is None and bool(node.value)
    return plain and isinstance(kind.item, ScalarKind) and node.value[0] not in "[{"


def _items(text: str) -> str:
    """What was probably meant by a text where a sequence belongs."""
    return text if set(text) & set(",'\"\\") else ", ".join(text.split())


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _unknown_setting(key: str, here: type) -> str:
    known = list(options(here))
    home = next((place for place, section in _SECTIONS.items() if key in options(section)), None)
    if home is None:
        below = [place for place, section in _sections_below(here) if key in options(section)]
        anywhere = [place for place, section in _sections_below(Settings) if key in options(section)]
        home = " or ".join(below or anywhere)
    if key.startswith(_IGNORED):
        home = "at the top level"
    if home and key not in known:
        return f"{key}: unknown setting here; it belongs {home}"
    close = difflib.get_close_matches(key, known, n=1)
    meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
    return f"{key}: unknown setting; {meant}"


def _sections_below(section: type) -> Iterator[tuple[str, type]]:
    """The sections in a section, and where that is, in words."""
    for name, option in options(section).items():
        many = isinstance(option.kind, ListOf)
        kind = option.kind.item if isinstance(option.kind, ListOf) else option.kind
        if isinstance(kind, type):
            place = f"in {'an item of ' if many else ''}{name}"
            yield place, kind
            yield from ((f"{deeper} of{place.removeprefix('in')}", one) for deeper, one in _sections_below(kind))


def _first_sentence(option: Option) -> str:
    return option.doc[0].lower() + option.doc[1:].rstrip(".")


# What settings must agree on


def disagreements(settings: Settings) -> Iterator[Mistake]:
    """Where settings contradict each other, which no single value shows. A listener has its number in the settings."""
    for index, listener in enumerate(settings.listen):
        for keys, message in (
            *_form_disagreements(listener),
            *address_disagreements(listener),
            *_connection_disagreements(listener),
            *_tls_disagreements(listener),
        ):
            yield ("listen", index, *keys), message
    yield from _service_disagreements(settings)
    yield from _once_disagreements(settings)


def _form_disagreements(listener: Listener) -> Iterator[Mistake]:
    """Options that do not go with the form of the handler or the scheme of the address."""
    address, kind = listener.address, listener.kind
    if listener.handler is None and not (listener.command and listener.command[0]):
        yield ("command",), "names no program; write it and its arguments, as in command: [cat]"
    elif kind == "program" or listener.command or listener.wait:
        yield from _program_disagreements(listener)
    elif address.scheme != "fd" and kind != "auto" and (kind == "datagram") is not address.takes_datagrams:
        what, wanted = (
            ("datagrams", "kind: datagram, an asyncio.DatagramProtocol")
            if address.takes_datagrams
            else ("connections", "kind: protocol, streams, socketserver, function or server")
        )
        yield ("kind",), f"{kind} serves no {what}, which come to {address}; it wants {wanted}"
    if kind == "server":
        yield from refused_by_servers(listener)
    if listener.multicast and address.scheme != "udp":
        yield ("multicast",), f"groups are joined by udp listeners, and {address} is none"
    if listener.freebind and address.scheme not in ("tcp", "udp"):
        yield ("freebind",), f"is about tcp and udp addresses, and {address} is none"
    for name in ("directory", "environment"):
        if getattr(listener, name) and listener.handler is not None:
            yield (name,), "is for a command, and a handler in Python has the daemon's own; leave it out"


def _program_disagreements(listener: Listener) -> Iterator[Mistake]:
    """Options that do not go with a program, or with none."""
    if not listener.command:
        key, what = ("wait", "true") if listener.wait else ("kind", "program")
        yield (key,), f"{what} wants a command, as in command: [cat]"
        return
    if listener.kind not in ("auto", "program"):
        yield ("kind",), f"{listener.kind} is a handler's form, and a command is a program; leave it out"
    if listener.address.takes_datagrams and not listener.wait:
        yield ("command",), f"is started for each connection, and at {listener.address} come datagrams; set wait: true"
    if listener.wait:
        limits, told = (
            listener.limits,
            "can't hold for the clients of a program that has the socket itself (wait: true)",
        )
        for name in ("allow", "deny", "proxy_protocol"):
            if getattr(listener, name):
                yield (name,), told
        for name in ("connections", "per_worker", "per_ip", "rate_per_ip"):
            if getattr(limits, name):
                yield ("limits", name), told
        if listener.tls.cert is not None:
            yield ("tls",), told
    for name in ("handler", "args", "factory"):
        if getattr(listener, name):
            yield (name,), "is for handlers in Python, and a command is a program of its own; leave one of them out"


def _tls_disagreements(listener: Listener) -> Iterator[Mistake]:
    """Options of TLS that need another one, or connections."""
    tls = listener.tls
    if tls.cert is not None and listener.address.takes_datagrams:
        yield ("tls", "cert"), f"is for connections, and at {listener.address} there are only datagrams"
    for name in ("key", "names", "client_ca", "alpn", "ciphers"):
        if tls.cert is None and getattr(tls, name):
            yield ("tls", name), "needs tls.cert"
    if tls.client != "none" and tls.client_ca is None:
        yield ("tls", "client"), f"{tls.client} needs tls.client_ca, by which clients' certificates are verified"
    if tls.client == "none" and tls.client_ca is not None:
        yield ("tls", "client_ca"), "is of no use where tls.client is none; write client: optional or required"
    if tls.cert is not None and listener.limits.message is not None:
        yield ("limits", "message"), "is sent in the clear, and clients wait for TLS here; leave it out"
    if tls.min_version == "1.3" and tls.ciphers is not None:
        yield ("tls", "ciphers"), "is about TLS 1.2, which tls.min_version excludes"


def _connection_disagreements(listener: Listener) -> Iterator[Mistake]:
    """Options that count connections where there are only datagrams."""
    if listener.address.takes_datagrams:
        for name in ("connections", "per_worker", "per_ip", "message"):
            if getattr(listener.limits, name) and not (name == "per_ip" and listener.address.is_unix):
                yield ("limits", name), f"is for connections, and at {listener.address} there are only datagrams"


def _service_disagreements(settings: Settings) -> Iterator[Mistake]:
    """Addresses of the master's own that another one has, and options that none of them has a use for."""
    at = {str(one.address): f"listen[{index}].address" for index, one in enumerate(settings.listen)}
    for keys, listener in settings.services:
        address, text = listener.address, str(listener.address)
        if text in at and (address.port or not address.host):
            yield keys, f"{text} is the address of {at[text]} already"
        at.setdefault(text, _dotted(keys))
    paths = [one for one in settings.admin.address if one.is_unix and not one.abstract]
    if settings.admin.mode is not None and not paths:
        yield ("admin", "mode"), "means a unix socket's path, and there is none in admin.address"
    if settings.admin.allow and all(one.is_unix for one in settings.admin.address):
        yield ("admin", "allow"), "means the addresses that clients come from, and there is no tcp:// in admin.address"


def _once_disagreements(settings: Settings) -> Iterator[Mistake]:
    """Options of single-connection mode that contradict each other or the listener."""
    if settings.mode != "once":
        return
    if any(listener.wait for listener in settings.listen):
        yield ("listen", 0, "wait"), "is of daemons; in mode once a command is for one client"
    if len(settings.listen) > 1:
        yield ("listen",), f"mode once serves one client at one address, and here are {len(settings.listen)}"
    for keys in [keys for keys, _ in settings.services] + [("statsd",)] * (settings.statsd is not None):
        yield keys, "is of daemons; in mode once there is no master"
    once = settings.once
    if once.fd in (1, 2):
        yield ("once", "fd"), f"{once.fd} is where forkd's own output goes; take 0, or a number from 3 on"
    address = settings.listen[0].address if settings.listen else None
    if address is not None and address.takes_datagrams and settings.listen[0].proxy_protocol:
        yield ("listen", 0, "proxy_protocol"), "is of daemons where there are datagrams; in mode once no header is read"
    if once.from_ and address is not None and address.is_unix and UNIX not in settings.listen[0].proxy_protocol:
        yield ("once", "from"), f"means where a tcp client comes from, and {address} has none"
    if once.rendezvous is not None:
        yield from _rendezvous_disagreements(settings)


def _rendezvous_disagreements(settings: Settings) -> Iterator[Mistake]:
    """Options that do not go with a rendezvous."""
    once, address = settings.once, settings.listen[0].address if settings.listen else None
    if address is not None and address.scheme != "tcp":
        yield ("listen", 0, "address"), "a rendezvous is of two tcp addresses; write tcp://HOST:PORT"
    if once.rendezvous == address:
        yield ("once", "rendezvous"), f"{address} is our own address too; a socket would connect to itself"
    if settings.listen and settings.listen[0].freebind:
        yield ("listen", 0, "freebind"), "a rendezvous connects from its address, which has to be there"
    if once.adopt:
        yield ("once", "adopt"), "a rendezvous has no listener whose descriptor could be taken over; use once.fd"
    if once.from_:
        yield ("once", "from"), "a rendezvous is with its peer alone; leave it out"
