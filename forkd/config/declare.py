"""How settings are declared: the words that `options` is written in, and what others read of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from typing import Any, TypeVar

from forkd.config.units import Kind

T = TypeVar("T")

_KEY = "option"


class Needs(Enum):
    """What the change of a setting needs before it holds in a daemon that runs, the least first."""

    RELOAD = "reload"
    UPGRADE = "upgrade"
    RESTART = "restart"

    def __lt__(self, other: Needs) -> bool:
        order = list(Needs)
        return order.index(self) < order.index(other)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A sequence of scalars, or of sections."""

    item: Kind[Any] | type


@dataclass(frozen=True, slots=True)
class Option:
    """What is declared of one setting.

    Attributes:
        kind: how its value is read: a scalar's `Kind`, a section's class, or a `ListOf` either.
        doc: one line for the reference page.
        required: whether the file must give it.
        needs: what a change of it needs; what is in a section or a sequence needs at least as much.
    """

    kind: Kind[Any] | ListOf | type
    doc: str
    required: bool = False
    needs: Needs = Needs.RELOAD


def option(kind: Kind[Any] | ListOf, doc: str, default: Any = MISSING, *, needs: Needs = Needs.RELOAD) -> Any:
    """A field for one setting; one without a default has to be given."""
    metadata = {_KEY: Option(kind, doc, required=default is MISSING, needs=needs)}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
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


def made_of(section: Callable[..., T], values: Mapping[str, Any]) -> T:
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
