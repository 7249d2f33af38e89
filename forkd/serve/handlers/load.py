"""Imports handlers and tells their forms apart. Nothing else imports the user's code."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.config.options import Settings
from forkd.errors import HandlerError
from forkd.serve.handlers.reach import obstacles

Form = Literal["protocol", "streams", "datagram"]

_FORMS = "an asyncio.Protocol or asyncio.DatagramProtocol class or factory, or async def handle(reader, writer)"


_STREAM = "an asyncio.Protocol, or async def handle(reader, writer)"
_DATAGRAM = "an asyncio.DatagramProtocol"
_NAMES = {"protocol": "an asyncio.Protocol", "streams": "a streams coroutine", "datagram": _DATAGRAM}


class Handler(NamedTuple):
    """A handler and its form."""

    form: Form
    target: Any


def add_to_path(directories: Sequence[Path]) -> None:
    """Has handlers imported from these directories first."""
    first = list(dict.fromkeys(map(str, directories)))
    sys.path[:] = first + [entry for entry in sys.path if entry not in first]


def import_handlers(settings: Settings, addresses: Sequence[Address] = ()) -> Iterator[Handler | HandlerError]:
    """Each listener's handler, or why it can't be had; in the process that is to keep what is imported.

    Args:
        settings: which.
        addresses: where the listeners really listen, as far as that is known.
    """
    add_to_path(settings.python_path or [Path.cwd()])
    for listener, address in zip_longest(settings.listen, addresses):
        try:
            yield load_handler(listener, address)
        except HandlerError as error:
            yield error


def load_handler(listener: Listener, address: Address | None = None) -> Handler:
    """Imports a listener's handler.

    Args:
        listener: whose.
        address: where it really listens; None: where its settings say.

    Raises:
        HandlerError: it can't be imported, with the traceback of the user's code; or it is of no form that is hosted,
            or of one that its address is not served by.
    """
    target = _import(listener.handler)
    address = address or listener.address
    form = listener.kind if listener.kind != "auto" else _form(target, listener.handler, address)
    if address.scheme != "fd" and (form == "datagram") is not address.takes_datagrams:
        what, wanted = ("datagrams", _DATAGRAM) if address.takes_datagrams else ("connections", _STREAM)
        raise HandlerError(
            f"{listener.handler} is {_NAMES[form]}, and at {listener.address} come {what}; they want {wanted}"
        )
    if form == "datagram":
        _check_call(target, listener.handler, "a DatagramProtocol class or factory is called with nothing")
        return Handler("datagram", target)
    if form == "streams":
        _check_call(target, listener.handler, "a streams handler is called with a reader and a writer", None, None)
        return Handler("streams", target)
    _check_call(target, listener.handler, "a protocol class or factory is called with nothing")
    return Handler("protocol", target)


def _import(name: str) -> Any:
    module_name, _, path = name.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (the handler's border: an import may raise anything, SystemExit too)
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            hint = "; it is looked for in the current directory, python_path and where Python keeps its packages"
            hint += obstacles(sys.path)
            raise HandlerError(f"{name}: there is no module {error.name!r}{hint}") from None
        why = _summary(error) + (obstacles(sys.path) if isinstance(error, ModuleNotFoundError) else "")
        raise HandlerError(f"{name}: importing {module_name} failed: {why}", _traceback(error)) from None
    for part in path.split("."):
        try:
            target = getattr(target, part)
        except AttributeError as error:
            raise HandlerError(f"{name}: {_summary(error)}") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border: a module may make its attributes lazily)
            raise HandlerError(f"{name}: looking up {part} failed: {_summary(error)}", _traceback(error)) from None
    return target


def _summary(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def _traceback(error: BaseException) -> str:
    """The traceback from the user's first line on: how forkd came to import it tells nobody anything."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and _is_machinery(frame.tb_frame.f_code.co_filename):
        frame = frame.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frame)))


def _is_machinery(filename: str) -> bool:
    return filename in (__file__, importlib.__file__) or filename.startswith("<frozen importlib")


def _form(target: Any, name: str, address: Address) -> Form:
    """What a handler is; of one that may be two things, such as a factory, what its address wants."""
    if inspect.isclass(target):
        forms: list[Form] = []
        if issubclass(target, asyncio.Protocol | asyncio.BufferedProtocol):
            forms.append("protocol")
        if issubclass(target, asyncio.DatagramProtocol):
            forms.append("datagram")
        if forms:
            return "datagram" if "datagram" in forms and address.takes_datagrams else forms[0]
        raise HandlerError(f"{name}: forkd does not host the class {target.__qualname__}; it hosts {_FORMS}")
    if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None)):  # noqa: B004
        return "streams"
    if callable(target):
        return "datagram" if address.takes_datagrams else "protocol"
    raise HandlerError(f"{name} is a {type(target).__name__}, which nobody can call; forkd hosts {_FORMS}")


def _check_call(target: Any, name: str, manner: str, *arguments: object) -> None:
    try:
        inspect.signature(target).bind(*arguments)
    except TypeError as error:
        raise HandlerError(f"{name}: {manner}, but: {error}") from None
    except ValueError:  # a callable in C that does not tell its signature
        return
