"""The settings described: a JSON Schema for editors, a reference page for readers, both made from the declarations.

`forkd schema` prints them.
"""

from __future__ import annotations

from typing import Any

from forkd.config.fields import Kind, ListOf, MappingOf, Needs, Option, default_of, options
from forkd.config.settings import Settings
from forkd.config.values import ScalarKind


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft-07, which editors' YAML support reads) of a settings file."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "forkd settings", **_object(Settings)}


def _object(section: type) -> dict[str, Any]:
    known = options(section)
    properties = {}
    either = [{"required": [one]} for name, option in known.items() if option.unless for one in (name, option.unless)]
    for name, option in known.items():
        described = {**_schema(option.kind), "description": option.doc}
        if isinstance(option.kind, ScalarKind) and not option.required and default_of(section, name) is not None:
            described["default"] = _default(option.kind, default_of(section, name))
        properties[name] = described
    ignored: dict[str, Any] = {"patternProperties": {"^x-": {}}} if section is Settings else {}
    return {
        "type": "object",
        **ignored,
        "additionalProperties": False,
        "properties": properties,
        "required": [name for name, option in known.items() if option.required and not option.unless],
        **({"anyOf": either} if either else {}),
    }


def _schema(kind: Kind) -> dict[str, Any]:
    if isinstance(kind, ScalarKind):
        return dict(kind.schema)
    if isinstance(kind, ListOf):
        least = int(not isinstance(kind.item, ScalarKind))
        several = {"type": "array", "items": _schema(kind.item), "minItems": least}
        return {"anyOf": [_schema(kind.item), several]} if kind.or_one else several
    if isinstance(kind, MappingOf):
        names = {f"^{kind.names}$": dict(kind.item.schema)}
        return {"type": "object", "patternProperties": names, "additionalProperties": False}
    return _object(kind)


def _default(kind: ScalarKind[Any], value: Any) -> Any:
    """A default as it would be written in JSON."""
    return value if kind.schema.get("type") in ("integer", "boolean") else kind.show(value)


def reference_page() -> str:
    """The reference page of all settings, in Markdown: a table for each section."""
    head = "| setting | kind | default | changed by | what it is |"
    return "\n".join(["# Settings", "", head, "| --- | --- | --- | --- | --- |", *_rows(Settings, "")]) + "\n"


def _rows(section: type, prefix: str, around: Needs = Needs.RELOAD) -> list[str]:
    """The rows of one section; `around` is what a change of the section itself needs."""
    rows = []
    for name, option in options(section).items():
        kind, key, needs = option.kind, prefix + name, max(around, option.needs)
        default = _default_text(section, name, option)
        rows.append(f"| `{key}` | {_kind_name(kind)} | {default} | {needs.value} | {option.doc} |")
        if isinstance(kind, ListOf) and not isinstance(kind.item, ScalarKind):
            rows += _rows(kind.item, f"{key}[].", needs)
        elif not isinstance(kind, ScalarKind | ListOf | MappingOf):
            rows += _rows(kind, f"{key}.", needs)
    return rows


def _kind_name(kind: Kind) -> str:
    if isinstance(kind, ScalarKind):
        return kind.name
    if isinstance(kind, MappingOf):
        return kind.name
    if isinstance(kind, ListOf):
        if not isinstance(kind.item, ScalarKind):
            return "sequence"
        return f"{f'{kind.item.name}, or ' if kind.or_one else ''}sequence of {kind.item.name}"
    return "section"


def _default_text(section: type, name: str, option: Option) -> str:
    if option.required:
        return "required"
    if not isinstance(option.kind, ScalarKind):
        return ""
    word = option.kind.text(default_of(section, name))
    return f"`{word}`" if word else ""
