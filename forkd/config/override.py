"""Settings from the command line, grafted into the graph of nodes that the file was read as: one walker reads both."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml

_STR, _SEQ, _MAP = (f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))


@dataclass(frozen=True, slots=True)
class Override:
    """One setting given on the command line.

    Attributes:
        key: dotted, as in `log.level`; `listen.backlog` means every listener, `listen.0.backlog` the first.
        value: the text of a scalar (or of a sequence of them, `[a, b]`), or what YAML would hold there.
        where: the option as the user typed it, for messages.
    """

    key: str
    value: str | Sequence[Mapping[str, str]]
    where: str


def made_mark(name: str) -> yaml.Mark:
    """A mark for what stands in no file: `name` alone says where it is from."""
    return yaml.Mark(name, 0, -1, -1, None, 0)


def empty_mapping(name: str) -> yaml.MappingNode:
    """A mapping without settings, to graft into; `name` says where it is from."""
    return yaml.MappingNode(_MAP, [], made_mark(name), made_mark(name))


def graft(root: yaml.MappingNode, override: Override) -> None:
    """Puts an override's value into the graph, in the place of whatever stands there.

    Raises:
        ValueError: there is nothing to put it into.
    """
    mark = made_mark(override.where)
    value = node_of(_typed(override.value), mark)
    *path, last = override.key.split(".")
    sections: list[yaml.MappingNode] = [root]
    for index, part in enumerate(path):
        if index and re.fullmatch(r"[0-9]{1,4}", part):  # an item of the sequence that the part before it means
            sections = sections[int(part) : int(part) + 1]
        else:
            sections = [inner for section in sections for inner in _inside(section, part, mark)]
    if not sections:
        raise ValueError(f"there is no {'.'.join(path)} to set it in")
    for section in sections:
        section.value = [pair for pair in section.value if pair[0].value != last]
        section.value.append((yaml.ScalarNode(_STR, last, mark, mark), value))


def node_of(value: object, mark: yaml.Mark) -> yaml.Node:
    """The graph that a file which holds `value` would be read as: mappings, lists and text.

    Anything else becomes a node of no kind, which the walker finds wrong wherever it stands.
    """
    if isinstance(value, Mapping):
        pairs = [(node_of(key, mark), node_of(item, mark)) for key, item in value.items()]
        return yaml.MappingNode(_MAP, pairs, mark, mark)
    if isinstance(value, list | tuple):
        return yaml.SequenceNode(_SEQ, [node_of(item, mark) for item in value], mark, mark)
    kind = yaml.ScalarNode if isinstance(value, str) else yaml.Node
    return kind(_STR, value, mark, mark)


def _typed(value: str | Sequence[Mapping[str, str]]) -> object:
    """A value as the command line means it: text in brackets is a sequence, other text itself."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        return [item.strip() for item in value[1:-1].split(",") if item.strip()]
    return value


def _inside(section: yaml.MappingNode, part: str, mark: yaml.Mark) -> list[yaml.MappingNode]:
    """The sections that a part of a key means inside a section: one, made if it is not there, or all of a sequence."""
    found = next((value for key, value in section.value if key.value == part), None)
    if found is None:
        found = yaml.MappingNode(_MAP, [], mark, mark)
        section.value.append((yaml.ScalarNode(_STR, part, mark, mark), found))
    items = found.value if isinstance(found, yaml.SequenceNode) else [found]
    return [item for item in items if isinstance(item, yaml.MappingNode)]
