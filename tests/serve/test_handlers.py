"""Importing handlers: every form is told apart, and whatever the user's code does at import becomes one sentence, with
the traceback of that code where there is one.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import ConnectionLimits, Listener, Tls
from forkd.errors import HandlerError
from forkd.serve.handlers import add_to_path, load_handler, make_handler

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

def decorated(function):
    @functools.wraps(function)
    def call(*given):
        return function(*given)
    return call

wrapped = decorated(handle)

def not_async(reader, writer):
    pass

async def yields(reader, writer):
    yield 1

class Awaits(asyncio.Protocol):
    async def data_received(self, data):
        pass

    async def shutdown(self):
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
        ("wrapped", "streams"),
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
        ("NeedsLimit", "auto", "is called without arguments, but: missing a required argument: 'limit'"),
        ("needs_loop", "auto", "is called without arguments, but: missing a required argument: 'loop'"),
        ("not_async", "auto", "is called without arguments, but: missing a required argument: 'reader'"),
        (
            "Server.handle",
            "auto",
            "it is a method, and wants an object: write served = Server() in the module, and name",
        ),
        ("one", "auto", "is called with a reader and a writer, but: too many positional arguments"),
        ("three", "auto", "is called with a reader and a writer, but: missing a required argument: 'more'"),
        ("half", "auto", "is called with a reader and a writer, but: too many positional arguments"),
        ("Chat", "streams", "is called with a reader and a writer, but: too many positional arguments"),
        ("handle", "protocol", "is called without arguments, but: missing a required argument: 'reader'"),
        (
            "Plain",
            "auto",
            "forkd does not host the class Plain; it hosts an asyncio.Protocol or asyncio.DatagramProtocol class",
        ),
        (
            "Datagrams",
            "auto",
            "is an asyncio.DatagramProtocol, but at unix:@x come connections, which need an asyncio.P",
        ),
        (
            "number",
            "auto",
            "is an int, which is not callable; forkd hosts an asyncio.Protocol or asyncio.DatagramProtocol class",
        ),
        ("nothing", "auto", "is a NoneType, which is not callable"),
        ("yields", "auto", "has a yield, and so does nothing when it is called"),
        ("yields", "streams", "has a yield, and so does nothing when it is called"),
        ("Awaits", "auto", "its data_received is async def, which nothing awaits; write it with def"),
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
def test_a_missing_module_is_told_with_where_it_was_sought(package: Callable[..., str], missing: str) -> None:
    module = missing.replace("NAME", package())
    error = refusal(f"{module}:X")
    absent = module if missing.startswith("NAME") else "no_such_module_here"
    assert f"there is no module {absent!r}; looked for in /" in str(error)
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
def test_a_failed_import_is_told_with_the_users_traceback(
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


def test_a_missing_import_is_told_with_the_line_that_wants_it(package: Callable[..., str], tmp_path: Path) -> None:
    name = package(chat="from . import rooms\n", rooms="\nimport no_such_module_here\n")
    error = refusal(f"{name}.chat:Chat")
    assert "importing" in str(error)
    assert f'File "{tmp_path / name / "rooms.py"}", line 2' in error.details


def test_a_missing_sibling_module_is_told_with_its_line(package: Callable[..., str], tmp_path: Path) -> None:
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
def test_an_attribute_that_raises_is_a_handler_error(package: Callable[..., str], raising: str) -> None:
    name = package(chat=f"def __getattr__(name):\n    raise {raising}\n")
    assert "Chat" in str(refusal(f"{name}.chat:Chat"))


def test_a_keyboard_interrupt_in_an_import_is_passed_on(package: Callable[..., str]) -> None:
    name = package(chat="raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        load(f"{name}.chat:Chat")


def test_the_python_path_comes_first_in_its_order_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/old", "/b"])
    add_to_path([Path("/a"), Path("/b"), Path("/c")])
    add_to_path([Path("/a")])
    assert [sys.path.count(directory) for directory in ("/a", "/b", "/c", "/old")] == [1, 1, 1, 1]
    assert sys.path.index("/a") < sys.path.index("/b") < sys.path.index("/c") < sys.path.index("/old")


def test_a_class_without_a_signature_is_accepted() -> None:
    assert load("asyncio:Protocol").target is asyncio.Protocol
    assert load("builtins:min", "streams").form == "streams"


WITH_ARGUMENTS = """\
import asyncio

class Room(asyncio.Protocol):
    def __init__(self, name, members=1):
        self.name, self.members = name, members

async def talk(reader, writer, room):
    pass

class Datagrams(asyncio.DatagramProtocol):
    pass

def make(name):
    asyncio.get_running_loop()
    return lambda: Room(name)

def make_streams():
    async def serve(reader, writer):
        pass
    return serve

def make_nothing():
    pass

def make_object():
    return Room("x")

async def make_later():
    pass

def make_none():
    return 5

def fail():
    raise RuntimeError("no database")
"""


def listener(name: str, **more: Any) -> Listener:
    return Listener(**{"address": parse_address("unix:@x"), "handler": name, **more})


def make(found: Listener) -> Any:
    async def called() -> Any:
        return make_handler(load_handler(found), found, found.address)

    return asyncio.run(called())


def test_arguments_are_given_at_each_call(package: Callable[..., str]) -> None:
    name = package(forms=WITH_ARGUMENTS)
    room = make(listener(f"{name}.forms:Room", args={"name": "hall", "members": 7})).target()
    assert (room.name, room.members) == ("hall", 7)
    found = make(listener(f"{name}.forms:talk", args={"room": 5}))
    assert (found.form, found.target.keywords) == ("streams", {"room": 5})


def test_an_argument_that_is_a_reference_is_what_it_names(package: Callable[..., str]) -> None:
    name = package(forms=WITH_ARGUMENTS)
    args = {"name": f"{name}.forms:Room", "members": ["os:sep", "\\os:sep", "plain"]}
    room = make(listener(f"{name}.forms:Room", args=args)).target()
    assert room.name is sys.modules[f"{name}.forms"].Room
    assert room.members == ["/", "os:sep", "plain"]


def test_a_wrong_reference_is_told_with_its_argument(package: Callable[..., str]) -> None:
    name = package(forms=WITH_ARGUMENTS)
    with pytest.raises(HandlerError) as caught:
        load_handler(listener(f"{name}.forms:Room", args={"name": f"{name}.forms:Hall"}))
    assert str(caught.value).startswith(f"args.name: {name}.forms:Hall: module '{name}.forms' has no attribute 'Hall'")
    assert str(caught.value).endswith(f"; if it is a text, write '\\{name}.forms:Hall' in single quotes")


@pytest.mark.parametrize(
    ("attribute", "args", "said"),
    [
        (
            "Room",
            {"nmae": "x"},
            "missing a required argument: 'name'; give what it wants: args: {nmae: ..., name: ...}",
        ),
        (
            "Room",
            {"members": 3},
            "missing a required argument: 'name'; give what it wants: args: {members: ..., name: ",
        ),
        ("talk", {}, "missing a required argument: 'room'"),
    ],
)
def test_wrong_arguments_are_refused_with_why(
    package: Callable[..., str], attribute: str, args: dict[str, Any], said: str
) -> None:
    with pytest.raises(HandlerError, match=re.escape(said)):
        load_handler(listener(f"{package(forms=WITH_ARGUMENTS)}.forms:{attribute}", args=args))


@pytest.mark.parametrize(
    ("attribute", "args", "form"), [("make", {"name": "x"}, "protocol"), ("make_streams", {}, "streams")]
)
def test_a_factory_is_called_in_the_running_loop(
    package: Callable[..., str], attribute: str, args: dict[str, Any], form: str
) -> None:
    found = make(listener(f"{package(forms=WITH_ARGUMENTS)}.forms:{attribute}", args=args, factory=True))
    assert found.form == form


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("make", "is called with args and nothing else, but: missing a required argument: 'name'"),
        ("make_nothing", "what NAME:make_nothing has made is a NoneType, which is not callable; forkd hosts"),
        ("make_object", "what NAME:make_object has made is one object of Room, and each client needs its own"),
        ("make_later", "what NAME:make_later has made is a coroutine; a factory is written with def, not async def"),
        ("Datagrams", "what NAME:Datagrams has made is one object of Datagrams, and each client needs its own"),
        ("make_none", "what NAME:make_none has made is an int, which is not callable"),
        ("fail", "NAME:fail: the factory failed: RuntimeError: no database"),
    ],
)
def test_a_factory_that_makes_no_handler_is_told_so(package: Callable[..., str], attribute: str, said: str) -> None:
    name = f"{package(forms=WITH_ARGUMENTS)}.forms"
    with pytest.raises(HandlerError, match=re.escape(said.replace("NAME", name))) as caught:
        make(listener(f"{name}:{attribute}", factory=True))
    if attribute == "fail":
        assert ", in fail\n" in caught.value.details
        assert "make_handler" not in caught.value.details


BLOCKING_FORMS = """\
import functools
import socketserver
from http.server import SimpleHTTPRequestHandler

class Lines(socketserver.StreamRequestHandler):
    pass

class Packets(socketserver.DatagramRequestHandler):
    pass

def handle(sock, address):
    pass

def with_room(sock, address, room):
    pass

class Server:
    def handle(self, sock, address, more=None):
        pass

server = Server()
files = functools.partial(SimpleHTTPRequestHandler, directory="/srv")

def factory(first=1, second=2):
    pass

async def serve(sock, address):
    pass

def yields(sock, address):
    yield 1

class Waits(socketserver.StreamRequestHandler):
    async def handle(self):
        pass

class Application:
    def __call__(self, environ, start_response):
        return []

application = Application()
"""


@pytest.mark.parametrize(
    ("attribute", "args", "form"),
    [
        ("Lines", {}, "socketserver"),
        ("files", {}, "socketserver"),
        ("SimpleHTTPRequestHandler", {"directory": "/srv"}, "socketserver"),
        ("handle", {}, "function"),
        ("with_room", {"room": 5}, "function"),
        ("server.handle", {}, "function"),
        ("factory", {}, "protocol"),
        ("factory", {"first": 5}, "protocol"),
    ],
)
def test_handlers_that_block_are_told_apart(
    package: Callable[..., str], attribute: str, args: dict[str, Any], form: str
) -> None:
    assert load_handler(listener(f"{package(forms=BLOCKING_FORMS)}.forms:{attribute}", args=args)).form == form


@pytest.mark.parametrize(
    ("attribute", "kind", "said"),
    [
        ("Packets", "auto", "forkd does not host the class Packets; it hosts"),
        ("handle", "socketserver", "is not a socketserver.BaseRequestHandler class for connections"),
        ("Lines", "function", "is a class; kind: function wants def handle(sock, address)"),
        ("serve", "function", "is async, and such a function runs in a thread; kind: function wants def handle"),
        ("with_room", "auto", "is called without arguments, but: missing a required argument: 'sock'"),
        ("yields", "auto", "has a yield, and so does nothing when it is called"),
        ("Waits", "auto", "its handle is async def, which nothing awaits; write it with def"),
        ("application", "auto", "an application of WSGI is served by a server, such as hypercorn's"),
        ("with_room", "function", "is called with a socket and an address, but: missing a required argument: 'room'"),
    ],
)
def test_what_is_no_blocking_handler_is_refused_with_why(
    package: Callable[..., str], attribute: str, kind: str, said: str
) -> None:
    assert said in str(refusal(f"{package(forms=BLOCKING_FORMS)}.forms:{attribute}", kind))


def test_application_of_aiohttp_is_refused_with_what_serves_it(package: Callable[..., str]) -> None:
    site = package(site="from aiohttp import web\n\napp = web.Application()\n")
    said = "is an application of aiohttp, which is served by a server; give async def serve(sockets)"
    assert said in str(refusal(f"{site}.site:app"))


SERVERS = """\
import functools

async def serve(sockets):
    pass

async def with_app(sockets, app, port=0):
    pass

def start(listeners):
    pass

async def other(endpoints):
    pass

async def one(sock):
    pass

async def app(scope, receive, send):
    pass

class Server:
    def __init__(self, config=None):
        pass

    async def serve(self, sockets=None):
        pass

class Single:
    async def start(self, host=None, *, sock=None):
        pass

class Deaf:
    async def serve(self, port):
        pass

server = Server()
single = Single()
deaf = Deaf()
made = functools.partial(Server, 5)
"""


@pytest.mark.parametrize(
    ("attribute", "settings"),
    [
        ("serve", {}),
        ("with_app", {"args": {"app": 1}}),
        ("start", {}),
        ("other", {"kind": "server"}),
        ("one", {"kind": "server"}),
        ("Server", {}),
        ("Server", {"args": {"config": 1}}),
        ("Single", {}),
        ("server", {}),
        ("single", {}),
        ("made", {}),
    ],
)
def test_whole_servers_are_told_apart(package: Callable[..., str], attribute: str, settings: dict[str, Any]) -> None:
    name = f"{package(forms=SERVERS)}.forms:{attribute}"
    assert load_handler(listener(name, **settings)).form == "server"


@pytest.mark.parametrize(
    ("attribute", "settings", "said"),
    [
        ("other", {}, "a streams handler is called with a reader and a writer, but: too many positional arguments"),
        ("with_app", {"kind": "server"}, "called with the list of its listening sockets, but: missing a required"),
        ("Server", {"args": {"x": 1}}, "a server's class is called with args and nothing else, but: got an unexpected"),
        ("server", {"args": {"config": 1}}, "is one object of Server, which takes no args; give the class Server"),
        ("deaf", {"kind": "server"}, "is no whole server: it has no method that takes sockets (serve, start, "),
        ("Deaf", {}, "forkd does not host the class Deaf; it hosts"),
        (
            "app",
            {},
            "missing a required argument: 'send'; an ASGI application is served by a server: handler: uvicorn:",
        ),
        ("serve", {"tls": Tls(cert=Path("c.pem"))}, "tls.cert can't hold: a whole server makes its own TLS"),
        (
            "serve",
            {"limits": ConnectionLimits(per_ip=5)},
            "limits.per_ip can't hold: a whole server accepts its clients",
        ),
        (
            "serve",
            {"address": parse_address("udp://[::1]:7")},
            "is a whole server, but at udp://[::1]:7 come datagrams",
        ),
    ],
)
def test_what_is_no_whole_server_is_refused_with_why(
    package: Callable[..., str], attribute: str, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(HandlerError) as caught:
        load_handler(listener(f"{package(forms=SERVERS)}.forms:{attribute}", **settings))
    assert said in str(caught.value)
