"""Importing handlers: every form is told apart, and whatever the user's code does at import becomes one sentence, with
the traceback of that code where there is one.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.errors import HandlerError
from forkd.serve.handlers.load import add_to_path, load_handler

NUMBERS = itertools.count()

FORMS = """\
import asyncio
import functools

class Chat(asyncio.Protocol):
    class Inner(asyncio.Protocol):
        pass

class Buffered(asyncio.BufferedProtocol):
    pass

class WithDefaults(asyncio.Protocol):
    def __init__(self, limit=1, *rest, **more):
        pass

class NeedsLimit(asyncio.Protocol):
    def __init__(self, limit):
        pass

def factory():
    return Chat()

def needs_loop(loop):
    return Chat()

make = functools.partial(NeedsLimit, 5)
short = lambda: Chat()

class Factory:
    def __call__(self):
        return Chat()

instance = Factory()

async def handle(reader, writer):
    pass

async def one(reader):
    pass

async def three(reader, writer, more):
    pass

async def loose(*streams, **more):
    pass

async def bound_to(limit, reader, writer):
    pass

partly = functools.partial(bound_to, 5)
half = functools.partial(bound_to, 5, 6)

class Server:
    async def __call__(self, reader, writer):
        pass

    async def handle(self, reader, writer):
        pass

server = Server()

def not_async(reader, writer):
    pass

class Plain:
    pass

class Datagrams(asyncio.DatagramProtocol):
    pass

number = 5
text = "x"
nothing = None
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Writes modules into a package of their own, and names it; they are forgotten at the end."""
    monkeypatch.syspath_prepend(tmp_path)
    known = set(sys.modules)
    name = f"handlers_{next(NUMBERS)}"

    def write(**modules: str) -> str:
        (tmp_path / name).mkdir()
        for module, text in {"__init__": "", **modules}.items():
            (tmp_path / name / f"{module}.py").write_text(text)
        return name

    yield write
    for module in set(sys.modules) - known:
        if module.partition(".")[0] == name:
            del sys.modules[module]


def load(name: str, kind: str = "auto") -> Any:
    return load_handler(Listener(address=parse_address("unix:@x"), handler=name, kind=kind))


def refusal(name: str, kind: str = "auto") -> HandlerError:
    with pytest.raises(HandlerError) as caught:
        load(name, kind)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("attribute", "form"),
    [
        ("Chat", "protocol"),
        ("Chat.Inner", "protocol"),
        ("Buffered", "protocol"),
        ("WithDefaults", "protocol"),
        ("factory", "protocol"),
        ("make", "protocol"),
        ("short", "protocol"),
        ("instance", "protocol"),
        ("handle", "streams"),
        ("loose", "streams"),
        ("partly", "streams"),
        ("server", "streams"),
        ("server.handle", "streams"),
    ],
)
def test_a_handler_is_imported_and_its_form_told(package: Callable[..., str], attribute: str, form: str) -> None:
    name = package(forms=FORMS)
    found = load(f"{name}.forms:{attribute}")
    assert found.form == form
    target: Any = sys.modules[f"{name}.forms"]
    for part in attribute.split("."):
        target = getattr(target, part)
    assert found.target == target


@pytest.mark.parametrize(
    ("attribute", "kind", "form"),
    [("factory", "protocol", "protocol"), ("not_async", "streams", "streams"), ("loose", "protocol", "protocol")],
)
def test_a_kind_that_is_given_holds(package: Callable[..., str], attribute: str, kind: str, form: str) -> None:
    assert load(f"{package(forms=FORMS)}.forms:{attribute}", kind).form == form


@pytest.mark.parametrize(
    ("attribute", "kind", "said"),
    [
        ("NeedsLimit", "auto", "is called with nothing, but: missing a required argument: 'limit'"),
        ("needs_loop", "auto", "is called with nothing, but: missing a required argument: 'loop'"),
        ("not_async", "auto", "is called with nothing, but: missing a required argument: 'reader'"),
        ("one", "auto", "is called with a reader and a writer, but: too many positional arguments"),
        ("three", "auto", "is called with a reader and a writer, but: missing a required argument: 'more'"),
        ("half", "auto", "is called with a reader and a writer, but: too many positional arguments"),
        ("Chat", "streams", "is called with a reader and a writer, but: too many positional arguments"),
        ("handle", "protocol", "is called with nothing, but: missing a required argument: 'reader'"),
        (
            "Plain",
            "auto",
            "forkd does not host the class Plain; it hosts an asyncio.Protocol or asyncio.DatagramProtocol class",
        ),
        (
            "Datagrams",
            "auto",
            "is an asyncio.DatagramProtocol, and at unix:@x come connections; they want an asyncio.P",
        ),
        (
            "number",
            "auto",
            "is a int, which nobody can call; forkd hosts an asyncio.Protocol or asyncio.DatagramProtocol class",
        ),
        ("nothing", "auto", "is a NoneType, which nobody can call"),
        ("number", "streams", "is not a callable object"),
        ("text", "protocol", "is not a callable object"),
        ("hadnle", "auto", "has no attribute 'hadnle'"),
        ("Chat.Outer", "auto", "has no attribute 'Outer'"),
        ("nothing.more", "auto", "has no attribute 'more'"),
    ],
)
def test_what_is_no_handler_is_refused_with_why(
    package: Callable[..., str], attribute: str, kind: str, said: str
) -> None:
    error = refusal(f"{package(forms=FORMS)}.forms:{attribute}", kind)
    assert said in str(error)
    assert error.details == ""


@pytest.mark.parametrize("missing", ["no_such_module_here", "no_such_module_here.chat", "NAME.no_such_module"])
def test_a_handler_whose_module_is_missing_is_told_where_it_is_looked_for(
    package: Callable[..., str], missing: str
) -> None:
    module = missing.replace("NAME", package())
    error = refusal(f"{module}:X")
    absent = module if missing.startswith("NAME") else "no_such_module_here"
    assert f"there is no module {absent!r}; it is looked for in the current directory, python_path and" in str(error)
    assert error.details == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_here", "ModuleNotFoundError: No module named 'no_such_module_here'"),
        ("from . import nothing_here", "ImportError: cannot import name 'nothing_here'"),
        ("from asyncio import no_such_thing", "ImportError: cannot import name 'no_such_thing'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise BaseException('odd')", "BaseException: odd"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import sys; sys.exit('go away')", "SystemExit: go away"),
        ("raise ValueError('of\\nseveral lines')", "ValueError: of"),
    ],
)
def test_an_import_that_fails_is_told_with_the_traceback_from_the_users_first_line(
    package: Callable[..., str], tmp_path: Path, text: str, said: str
) -> None:
    name = package(chat=f"import asyncio\n\ndef boot():\n    {text}\n\nboot()\n")
    error = refusal(f"{name}.chat:Chat")
    assert f"importing {name}.chat failed: {said}" in str(error)
    head, first, *_ = error.details.splitlines()
    assert head == "Traceback (most recent call last):"
    assert first == f'  File "{tmp_path / name / "chat.py"}", line 6, in <module>'
    assert said in error.details
    assert "importlib" not in error.details
    assert str(Path(load_handler.__code__.co_filename)) not in error.details


def test_a_module_that_is_missing_in_the_handlers_own_imports_is_told_with_the_line_that_wants_it(
    package: Callable[..., str], tmp_path: Path
) -> None:
    name = package(chat="from . import rooms\n", rooms="\nimport no_such_module_here\n")
    error = refusal(f"{name}.chat:Chat")
    assert "importing" in str(error)
    assert f'File "{tmp_path / name / "rooms.py"}", line 2' in error.details


def test_a_missing_module_of_the_handlers_own_package_is_told_with_the_line_that_wants_it(
    package: Callable[..., str], tmp_path: Path
) -> None:
    name = package(__init__="from . import chat\n")
    (tmp_path / name / "chat.py").write_text(f"import {name}.lobby\n")
    error = refusal(f"{name}:Chat")
    assert f"No module named '{name}.lobby'" in str(error)
    assert f'File "{tmp_path / name / "__init__.py"}", line 1' in error.details


def test_a_syntax_error_is_told_with_its_file_and_line(package: Callable[..., str], tmp_path: Path) -> None:
    name = package(chat="x = 1\ndef (\n")
    error = refusal(f"{name}.chat:Chat")
    assert "SyntaxError" in str(error)
    assert f'File "{tmp_path / name / "chat.py"}", line 2' in error.details
    assert "importlib" not in error.details


@pytest.mark.parametrize("raising", ["ImportError('lazy')", "RuntimeError('lazy')", "SystemExit(2)"])
def test_an_attribute_that_raises_when_it_is_looked_up_is_a_handler_error_too(
    package: Callable[..., str], raising: str
) -> None:
    name = package(chat=f"def __getattr__(name):\n    raise {raising}\n")
    assert "Chat" in str(refusal(f"{name}.chat:Chat"))


def test_a_keyboard_interrupt_during_an_import_is_no_fault_of_the_handler(package: Callable[..., str]) -> None:
    name = package(chat="raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(f"{name}.chat:Chat")


def test_the_python_path_comes_first_in_its_order_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/old", "/b"])
    add_to_path([Path("/a"), Path("/b"), Path("/c")])
    add_to_path([Path("/a")])
    assert [sys.path.count(directory) for directory in ("/a", "/b", "/c", "/old")] == [1, 1, 1, 1]
    assert sys.path.index("/a") < sys.path.index("/b") < sys.path.index("/c") < sys.path.index("/old")


def test_a_class_that_cannot_tell_its_signature_is_taken_at_its_word() -> None:
    assert load("asyncio:Protocol").target is asyncio.Protocol
    assert load("builtins:min", "streams").form == "streams"
