"""How settings are declared: a dataclass for each section, each field of which is an `option` or a `section`.

`settings` and `listener` declare by these; the loader, the schema and the differences read what was declared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

from forkd.config.values import ScalarKind

T = TypeVar("T")

_KEY = "option"


class Needs(Enum):
    """What a changed setting needs before it holds in a running daemon, the least first."""

    RELOAD = "reload"
    UPGRADE = "upgrade"
    RESTART = "restart"

    def __lt__(self, other: Needs) -> bool:
        order = list(Needs)
        return order.index(self) < order.index(other)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A sequence of scalars, or of sections.

    Attributes:
        item: their kind, or class.
        or_one: whether a single scalar may be written without brackets.
    """

    item: ScalarKind[Any] | type
    or_one: bool = False


@dataclass(frozen=True, slots=True)
class MappingOf:
    """Scalars by names of the user's own.

    Attributes:
        item: their kind.
        names: a regular expression for the names.
        name: what the reference page calls it.
    """

    item: ScalarKind[Any]
    names: str
    name: str


Kind = ScalarKind[Any] | ListOf | MappingOf | type


@dataclass(frozen=True, slots=True)
class Option:
    """The declaration of one setting.

    Attributes:
        kind: how its value is read: a scalar's `ScalarKind`, a section's class, a `ListOf` one of
            them, or a `MappingOf`.
        doc: one line for the reference page.
        required: whether the file must give it.
        unless: the setting that it is not required beside; empty: none.
        needs: what a change of it needs; whatever is in a section or a sequence needs at least as much.
    """

    kind: Kind
    doc: str
    required: bool = False
    needs: Needs = Needs.RELOAD
    unless: str = ""


def option(
    kind: ScalarKind[Any] | ListOf | MappingOf,
    doc: str,
    default: Any = MISSING,
    *,
    needs: Needs = Needs.RELOAD,
    unless: str = "",
) -> Any:
    """A field for one setting; one without a default has to be given, or another one in its place (`unless`)."""
    required = default is MISSING or bool(unless)
    metadata = {_KEY: Option(kind, doc, required=required, needs=needs, unless=unless)}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(kind: type, doc: str, *, needs: Needs = Needs.RELOAD) -> Any:
    """A field for a section, by its class."""
    return field(default_factory=kind, metadata={_KEY: Option(kind, doc, needs=needs)})


def options(section: type) -> dict[str, Option]:
    """The settings of a section: name to declaration, in the order of declaration."""
    return {_name(f): f.metadata[_KEY] for f in fields(section)}


def _name(declared: Field[Any]) -> str:
    """A setting's name: the field's, which has an underscore at its end where Python has reserved the word."""
    return declared.name.removesuffix("_")


def value_of(section: Any, name: str) -> Any:
    """The value that a section, an instance of its class, has for a setting."""
    return getattr(section, next(f.name for f in fields(section) if _name(f) == name))


def make_section(section: Callable[..., T], values: Mapping[str, Any]) -> T:
    """A section, by its class, made of its settings' values by name; those that are missing have their default."""
    return section(**{f.name: values[_name(f)] for f in fields(section) if _name(f) in values})  # type: ignore[arg-type]


def default_of(section: type, name: str) -> Any:
    """The default of a section's setting; raises KeyError where it has none."""
    known: Mapping[str, Field[Any]] = {_name(f): f for f in fields(section)}
    declared = known[name]
    if declared.default_factory is not MISSING:
        factory: Callable[[], Any] = declared.default_factory
        return factory()
    if declared.default is MISSING:
        raise KeyError(name)
    return declared.default
