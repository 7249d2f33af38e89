"""The settings described for others: a JSON Schema for editors, a reference page for readers. Both from `options`."""

from __future__ import annotations

from typing import Any

from forkd.config.declare import ListOf, Needs, Option, default_of, options
from forkd.config.options import Settings
from forkd.config.units import Kind


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft-07, which editors' YAML support reads) of a settings file."""
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "forkd settings", **_object(Settings)}


def _object(section: type) -> dict[str, Any]:
    known = options(section)
    properties = {}
    for name, option in known.items():
        described = {**_schema(option.kind), "description": option.doc}
        if isinstance(option.kind, Kind) and not option.required and default_of(section, name) is not None:
            described["default"] = _default(option.kind, default_of(section, name))
        properties[name] = described
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
        "required": [name for name, option in known.items() if option.required],
    }


def _schema(kind: Kind[Any] | ListOf | type) -> dict[str, Any]:
    if isinstance(kind, Kind):
        return dict(kind.schema)
    if isinstance(kind, ListOf):
        return {"type": "array", "items": _schema(kind.item), "minItems": int(not isinstance(kind.item, Kind))}
    return _object(kind)


def _default(kind: Kind[Any], value: Any) -> Any:
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
        if isinstance(kind, ListOf) and not isinstance(kind.item, Kind):
            rows += _rows(kind.item, f"{key}[].", needs)
        elif not isinstance(kind, Kind | ListOf):
            rows += _rows(kind, f"{key}.", needs)
    return rows


def _kind_name(kind: Kind[Any] | ListOf | type) -> str:
    if isinstance(kind, Kind):
        return kind.name
    if isinstance(kind, ListOf):
        return f"sequence of {kind.item.name}" if isinstance(kind.item, Kind) else "sequence"
    return "section"


def _default_text(section: type, name: str, option: Option) -> str:
    if option.required:
        return "required"
    if not isinstance(option.kind, Kind):
        return ""
    word = option.kind.text(default_of(section, name))
    return f"`{word}`" if word else ""
