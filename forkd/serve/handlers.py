"""Handlers: imports what the settings name, and recognizes its form. Nothing else imports the user's code.

A handler is an `asyncio.Protocol` (form "protocol"), an `async def handle(reader, writer)` ("streams"), a request
handler class of `socketserver`, a `def handle(sock, address)` ("function"), a whole server that is started with the
listening sockets ("server") or an `asyncio.DatagramProtocol` ("datagram"); classes and factories alike, with the
arguments that the settings give. A factory of handlers is called later, by `make_handler` (until then it has the form
"factory"). Hooks are functions that a worker calls at its beginning and at its end. All this is imported inside the
running loop, but where `preload` has the master import it.

One that is of none of these, does not fit its listener's address, or can't be imported is refused with a sentence that
says why, and with the traceback of the user's own code. Workers, `forkd once`, `preload` and the checks of a settings
file all come by here.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import importlib
import inspect
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

from forkd import worker
from forkd.config.address import Address
from forkd.config.listener import Listener, refused_by_servers
from forkd.config.settings import Settings
from forkd.config.values import is_reference
from forkd.errors import HandlerError
from forkd.serve.import_paths import obstacles
from forkd.serve.loop import PollLoop

T = TypeVar("T")

Form = Literal["protocol", "streams", "socketserver", "function", "datagram", "server", "program", "factory"]

#: Forms whose handlers run in threads.
BLOCKING: Collection[Form] = ("socketserver", "function")

_STREAM = (
    "an asyncio.Protocol, async def handle(reader, writer), a socketserver.BaseRequestHandler, "
    "def handle(sock, address), or a server with async def serve(sockets)"
)
_DATAGRAM = "an asyncio.DatagramProtocol"
_NAMES = {
    "protocol": "an asyncio.Protocol",
    "streams": "a streams coroutine",
    "socketserver": "a socketserver request handler",
    "function": "a function of a socket and an address",
    "datagram": _DATAGRAM,
    "server": "a whole server",
}
_FORMS = (
    "an asyncio.Protocol or asyncio.DatagramProtocol class or factory, async def handle(reader, writer), "
    "a socketserver.BaseRequestHandler class, def handle(sock, address), or a server: async def serve(sockets), or an "
    "object or class with such a method"
)

#: How each form is called, and with how many arguments beside those of the settings.
_CALLS: Mapping[str, tuple[str, int]] = {
    "protocol": ("a protocol class or factory is called without arguments", 0),
    "streams": ("a streams handler is called with a reader and a writer", 2),
    "socketserver": ("a socketserver handler is called with a socket, an address and a server", 3),
    "function": ("a function that serves a client is called with a socket and an address", 2),
    "datagram": ("a DatagramProtocol class or factory is called without arguments", 0),
    "server": ("what makes a whole server is called with the list of its listening sockets", 1),
    "server class": ("a server's class is called with args and nothing else", 0),
    "factory": ("a factory is called with args and nothing else", 0),
    "hook": ("setup and teardown are called without arguments", 0),
}

_HERE = os.path.dirname(__file__) + os.sep

#: How asyncio, and what is built on it, says that a loop runs where one was to be started; or that none runs.
_LOOP_RUNS = (
    "from a running event loop",
    "loop is already running",
    "another loop is running",
    "already running asyncio",
)
_NO_LOOP = ("no running event loop", "no current event loop")

#: The methods that a server may be started by, and the arguments by which such a method takes sockets, all or the one.
_ENTRIES = ("serve", "start", "start_serving", "serve_forever", "add_sockets")
_ALL_SOCKETS, _ONE_SOCKET = "sockets", "sock"

#: A class of which an object gives itself when it is called, and so would be taken for what makes protocols.
_AIOHTTP = "aiohttp.web_app.Application"

_PROTOCOL_METHODS = ("connection_made", "data_received", "datagram_received", "buffer_updated")

#: What asyncio calls of a protocol, and awaits nothing of.
_CALLBACKS = (
    *_PROTOCOL_METHODS,
    "connection_lost",
    "eof_received",
    "error_received",
    "get_buffer",
    "pause_writing",
    "resume_writing",
)


class Handler(NamedTuple):
    """A handler and its form."""

    form: Form
    target: Any


class Hook(NamedTuple):
    """A function that is called at a worker's beginning or at its end.

    Attributes:
        owner: the place of its listener in the settings; -1: the daemon's.
        kind: `setup` or `teardown`, as in the settings.
        name: what the settings name.
        call: the function.
    """

    owner: int
    kind: str
    name: str
    call: Callable[[], object]

    @property
    def about(self) -> str:
        """What errors call it."""
        return f"{self.kind} {self.name}"


class ServerEntry(NamedTuple):
    """How a whole server is started with its listening sockets.

    Attributes:
        method: of its object; empty: it is a function, which gets them as its first argument.
        keyword: the argument by which a method gets them.
        takes_one: whether it takes one socket, and not a list.
        is_class: whether its object is yet to be made.
    """

    method: str
    keyword: str = ""
    takes_one: bool = False
    is_class: bool = False


class ImportFailure(NamedTuple):
    """Why a module can't be imported, and the traceback of the user's own code, if any."""

    reason: str
    details: str


def import_handlers(settings: Settings, addresses: Sequence[Address] = ()) -> Iterator[Handler | Hook | HandlerError]:
    """Each listener's handler, then each hook in the order of `hook_names`, or why it can't be had; in the process that
    is to keep what is imported. Where that is to serve, its loop runs: what a module makes may want it.

    Args:
        settings: what names them.
        addresses: where the listeners really listen, as far as that is known.
    """
    add_to_path(settings.python_path or [Path.cwd()])
    failed: dict[str, ImportFailure] = {}
    for listener, address in zip_longest(settings.listen, addresses):
        try:
            yield load_handler(listener, address, failed)
        except HandlerError as error:
            yield error
    for owner, kind, name in hook_names(settings):
        try:
            yield _load_hook(owner, kind, name, failed)
        except HandlerError as error:
            yield error


def import_all(settings: Settings, addresses: Sequence[Address] = ()) -> tuple[list[Handler], list[Hook]]:
    """As `import_handlers`; raises HandlerError for the first that can't be had."""
    handlers, hooks = list[Handler](), list[Hook]()
    for found in import_handlers(settings, addresses):
        if isinstance(found, HandlerError):
            raise found
        if isinstance(found, Hook):
            hooks.append(found)
        else:
            handlers.append(found)
    return handlers, hooks


def call_as_worker(settings: Settings, function: Callable[[], T]) -> T:
    """What a function returns that is called inside a running loop, where a worker has its handlers imported; for
    processes that only try whether they can be.
    """

    async def call() -> T:
        worker.begin(slot=1, name=settings.name, generation=1, loop=loop)
        return function()

    try:
        loop = PollLoop()
    except OSError:  # no descriptor is left, which whatever comes next will say better
        return function()
    with contextlib.closing(loop):
        return loop.run_until_complete(call())


def hook_names(settings: Settings) -> list[tuple[int, str, str]]:
    """The hooks that the settings name: owner, kind and name of each, as of `Hook`."""
    sections: list[Settings | Listener] = [settings, *settings.listen]
    return [
        (owner, kind, name)
        for owner, section in enumerate(sections, -1)
        for kind, name in (("setup", section.setup), ("teardown", section.teardown))
        if name is not None
    ]


def _load_hook(owner: int, kind: str, name: str, failed: dict[str, ImportFailure]) -> Hook:
    hook = Hook(owner, kind, name, _import(name, failed))
    if not callable(hook.call):
        raise HandlerError(f"{name} is {_a(type(hook.call).__name__)}, which is not callable; a {kind} is a function")
    made_from = inspect.unwrap(hook.call)
    if inspect.isasyncgenfunction(made_from) or inspect.isgeneratorfunction(made_from):
        raise HandlerError(f"{name} has a yield; write what comes before it as setup, and what comes after as teardown")
    _check_call(hook.call, name, "hook", {})
    return hook


def load_handler(
    listener: Listener, address: Address | None = None, failed: dict[str, ImportFailure] | None = None
) -> Handler:
    """Imports a listener's handler and what its arguments name, and finds its form.

    Args:
        listener: its settings.
        address: where it really listens; None: where its settings say.
        failed: the modules that could not be imported before, which are not tried again.

    Raises:
        HandlerError: it can't be imported, with the traceback of the user's code; or it is of no form that is hosted,
            or of one that its address is not served by.
    """
    if (name := listener.handler) is None:
        _check_command(listener)
        return Handler("program", listener.command)
    target = _import(name, {} if failed is None else failed)
    arguments = {name: _argument(name, value) for name, value in listener.args.items()}
    address = address or listener.address
    if not listener.factory:
        return _recognize(target, arguments, listener, address, name)
    _check_call(target, name, "factory", arguments)
    return Handler("factory", partial(target, **arguments))


def _check_command(listener: Listener) -> None:
    """Raises HandlerError where there is no such program. Where it is found is told by the PATH that it will have."""
    if not (program := "".join(listener.command[:1])):  # which is a mistake in the settings, told with them
        return
    if listener.directory is not None and not listener.directory.is_dir():
        raise HandlerError(f"directory: there is no directory {listener.directory}")
    path = os.fspath(listener.directory / program) if listener.directory is not None and "/" in program else program
    places = listener.environment.get("PATH") or os.environ.get("PATH", os.defpath)
    if shutil.which(path, path=places) is None:
        where = "" if "/" in program else f" in PATH ({places})"
        raise HandlerError(f"command: there is no program {program!r} that can be run{where}")


def make_handler(handler: Handler, listener: Listener, address: Address) -> Handler:
    """The handler that serves: of a factory what it makes, called in the running loop; else the same.

    Args:
        handler: as imported.
        listener: its settings.
        address: where it really listens.

    Raises:
        HandlerError: the factory has raised, with its traceback; or has made what is no handler.
    """
    if handler.form != "factory":
        return handler
    process = os.getpid()
    try:
        target = handler.target()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (the handler's border)
        end_if_forked(process, error)
        raise handler_error(f"{listener.handler}: the factory failed", error) from None
    name = f"what {listener.served_by} has made"
    if inspect.iscoroutine(target):
        target.close()
        raise HandlerError(f"{name} is a coroutine; a factory is written with def, not async def")
    return _recognize(target, {}, listener, address, name)


def _argument(name: str, value: Any) -> Any:
    """An argument as the handler gets it: what a reference stands for."""
    if isinstance(value, list):
        return [_argument(name, item) for item in value]
    if is_reference(value):
        try:
            return _import(value, {})
        except HandlerError as error:
            hint = f"; if it is a text, write '\\{value}' in single quotes"
            raise HandlerError(f"args.{name}: {error}{hint}", error.details) from None
    return value[1:] if isinstance(value, str) and is_reference(value[1:]) and value[0] == "\\" else value


def _recognize(target: Any, arguments: Mapping[str, Any], listener: Listener, address: Address, name: str) -> Handler:
    """The handler that `target` is, with these arguments; `name` is what errors call it."""
    form = _given(target, listener, name) if listener.kind != "auto" else _form(target, arguments, name, address)
    if address.scheme != "fd" and (form == "datagram") is not address.takes_datagrams:
        what, wanted = ("datagrams", _DATAGRAM) if address.takes_datagrams else ("connections", _STREAM)
        raise HandlerError(f"{name} is {_NAMES[form]}, but at {listener.address} come {what}, which need {wanted}")
    if form == "server":
        _check_server(target, name, arguments, listener)
    else:
        _check_body(target, name, form)
        _check_call(target, name, form, arguments)
    return Handler(form, partial(target, **arguments) if arguments else target)


def _check_body(target: Any, name: str, form: Form) -> None:
    """Raises HandlerError where calling it would run nothing of it."""
    called = _unwrapped(target)
    methods = {"socketserver": ("handle", "setup", "finish"), "protocol": _CALLBACKS, "datagram": _CALLBACKS}
    if inspect.isclass(called):
        for method in methods.get(form, ()):
            if inspect.iscoroutinefunction(getattr(called, method, None)):
                raise HandlerError(f"{name}: its {method} is async def, which nothing awaits; write it with def")
    elif form in ("function", "streams", "protocol", "datagram"):
        run = _hidden(called)
        if inspect.isgeneratorfunction(run) or inspect.isasyncgenfunction(run):
            raise HandlerError(f"{name} has a yield, and so does nothing when it is called")


def check_protocol(made: object, factory: Any, method: str = "data_received") -> Any:
    """What a protocol factory has returned. Only called can a factory show what it makes.

    Args:
        made: what it has returned.
        factory: the class or function.
        method: what its listener needs of a protocol that is one by its methods alone.

    Raises:
        HandlerError: that is no protocol.
    """
    if isinstance(made, asyncio.BaseProtocol) or (hasattr(made, method) and not inspect.isclass(made)):
        return made
    base = _DATAGRAM if method == "datagram_received" else "an asyncio.Protocol"
    what, hint = f"one object of {type(made).__name__}", "end it with return and a new protocol, as in return Shout()"
    if made is None:
        what = "None"
    elif inspect.isclass(made):
        what, hint = f"the class {made.__name__}", f"write return {made.__name__}(), with parentheses"
    elif inspect.iscoroutine(made):
        made.close()
        what, hint = "a coroutine", "write def, not async def"
    called = _unwrapped(factory)
    raise HandlerError(f"{getattr(called, '__qualname__', called)} returned {what}, not {base}; {hint}")


def add_to_path(directories: Sequence[Path]) -> None:
    """Has modules imported from these directories first. What a link leads to now it leads to for this process: a
    worker that imports something late does not get it from another release.
    """
    first = list(dict.fromkeys(map(os.path.realpath, directories)))
    sys.path[:] = first + [entry for entry in sys.path if entry not in first]


def _import(name: str, failed: dict[str, ImportFailure]) -> Any:
    module_name, _, path = name.partition(":")
    process = os.getpid()
    try:
        target: Any = None if module_name in failed else importlib.import_module(module_name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 (the handler's border: an import may raise anything, SystemExit too)
        end_if_forked(process, error)
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module_name}.".startswith(f"{error.name}."):
            failed[module_name] = ImportFailure(_missing_module(module_name, error.name), "")
        else:
            why = _summary(error) + (
                obstacles(sys.path) if isinstance(error, ModuleNotFoundError) else _loop_hint(error)
            )
            failed[module_name] = ImportFailure(f"importing {module_name} failed: {why}", user_traceback(error))
    if (failure := failed.get(module_name)) is not None:
        raise HandlerError(f"{name}: {failure.reason}", failure.details)
    for part in path.split("."):
        try:
            target = getattr(target, part)
        except AttributeError:
            raise HandlerError(f"{name}: {_missing_attribute(target, part)}") from None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (the handler's border: a module may make its attributes lazily)
            raise HandlerError(f"{name}: looking up {part} failed: {_summary(error)}", user_traceback(error)) from None
    return target


def _missing_module(module: str, missing: str) -> str:
    """Why a module can't be had: what was meant, or where it was looked for."""
    parent, _, last = missing.rpartition(".")
    if last == "py" and parent:
        return f"{missing!r} is a file's name; write the module's, as in {parent}:ATTRIBUTE"
    found = sys.modules.get(parent) if parent else None
    if found is not None and not hasattr(found, "__path__"):
        where = getattr(found, "__file__", None) or "built into Python"
        return f"there is no module {missing!r}: {parent} is {where}, a module and no package"
    here = Path(os.environ.get("PWD", "/"))
    if not parent and os.path.exists(here / "__init__.py") and here.name == missing:
        return (
            f"there is no module {missing!r} in {here}, which is the package itself; start from {here.parent}, or set "
            f"python_path to it"
        )
    places = ", ".join(entry or "." for entry in sys.path if not entry.endswith(".zip"))
    return f"there is no module {missing!r}; looked for in {places}; set python_path to where it is" + obstacles(
        sys.path
    )


def _missing_attribute(target: Any, part: str) -> str:
    """That a module or class has no such attribute: in which file, and which one was meant."""
    what = f"{type(target).__name__} {getattr(target, '__name__', type(target).__name__)!r}"
    file = getattr(target, "__file__", None)
    text = f"{what} has no attribute {part!r}" + (f" ({file})" if file else "")
    if inspect.ismodule(target) and target.__name__ in sys.stdlib_module_names:
        shadowed = [path for entry in sys.path if os.path.exists(path := Path(entry, f"{target.__name__}.py"))]
        own = next((path for path in shadowed if str(path) != file), None)
        if own is not None:
            return f"{text}: it is Python's own module, not {own}; give that file another name"
    known = [one for one in vars(target) if not one.startswith("_")] if hasattr(target, "__dict__") else []
    close = difflib.get_close_matches(part, known, n=1)
    return text + (f"; did you mean {close[0]!r}?" if close else "")


def end_if_forked(process: int, error: BaseException) -> None:
    """In a process that code of the user's has forked from this one: ends it by what that code has raised, as Python
    does. It is not to go on with its parent's loop.
    """
    if os.getpid() != process:
        if isinstance(error, SystemExit):
            raise error
        sys.excepthook(type(error), error, error.__traceback__)
        raise SystemExit(1)


def handler_error(what: str, error: BaseException) -> HandlerError:
    """That code of the user's has raised: what, why, and its traceback."""
    return HandlerError(f"{what}: {_summary(error)}{_loop_hint(error)}", user_traceback(error))


def _loop_hint(error: BaseException) -> str:
    """What to do about an exception that says that a loop runs, or that none does; empty for others."""
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    if any(words in text for words in _NO_LOOP):
        return "; no worker's loop runs here: make this in a factory or in setup, or set preload: false"
    if any(words in text for words in _LOOP_RUNS):
        return (
            "; a worker's loop runs already: write how the program starts by itself under if __name__ == '__main__', "
            "and await what clients need first in an async def that setup names"
        )
    return ""


def _summary(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip().partition("\n")[0]


def user_traceback(error: BaseException) -> str:
    """The traceback from the user's first line on: how forkd came to import it is of no interest."""
    frame: TracebackType | None = error.__traceback__
    while frame is not None and _is_machinery(frame.tb_frame.f_code.co_filename):
        frame = frame.tb_next
    return "".join(traceback.format_exception(error.with_traceback(frame)))


def _is_machinery(filename: str) -> bool:
    return filename == importlib.__file__ or filename.startswith((_HERE, "<frozen importlib"))


def server_entry(target: Any) -> ServerEntry | None:
    """How this is started, if it is a whole server. Of a function, which may be anything, the settings decide."""
    called = _unwrapped(target)
    is_class = inspect.isclass(called)
    if not inspect.isroutine(called):
        for method in _ENTRIES:
            names = [one.name for one in _parameters(getattr(called, method, None))]
            for keyword in (_ALL_SOCKETS, _ONE_SOCKET):
                if keyword in names:
                    return ServerEntry(method, keyword, keyword == _ONE_SOCKET, is_class)
    if is_class or not callable(target):
        return None
    return ServerEntry("", takes_one=[one.name for one in _parameters(target)][:1] == [_ONE_SOCKET])


def _parameters(function: Any) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _is_server(target: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether it is one without being said to be: by a method, or as a function that wants sockets alone."""
    if (entry := server_entry(target)) is None or entry.method:
        return entry is not None
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [one for one in _parameters(target) if one.default is one.empty and one.kind not in optional]
    names = [one.name for one in wanted if one.name not in arguments]
    return len(names) == 1 and names[0].startswith((_ALL_SOCKETS, "listen"))


def _check_server(target: Any, name: str, arguments: Mapping[str, Any], listener: Listener) -> None:
    """Raises HandlerError where it can't be started, or the settings say what can't hold for it."""
    entry = server_entry(target)
    if entry is None:
        methods = ", ".join(_ENTRIES)
        raise HandlerError(f"{name} is no whole server: it has no method that takes sockets ({methods})")
    if entry.method and not entry.is_class:
        if arguments:
            kind = type(target).__name__
            raise HandlerError(f"{name} is one object of {kind}, which takes no args; give the class {kind}, or none")
    else:
        _check_call(target, name, "server class" if entry.is_class else "server", arguments)
    if refused := "; ".join(f"{'.'.join(keys)} {why}" for keys, why in refused_by_servers(listener)):
        raise HandlerError(f"{name}: {refused}")


def _given(target: Any, listener: Listener, name: str) -> Form:
    """The form that the settings say. Raises HandlerError where it can't be that."""
    form: Form = listener.kind  # type: ignore[assignment]
    is_class, is_async = inspect.isclass(_unwrapped(target)), inspect.iscoroutinefunction(target)
    if form == "socketserver" and not _is_request_handler(_unwrapped(target)):
        raise HandlerError(f"{name} is not a socketserver.BaseRequestHandler class for connections")
    if form == "function" and (is_class or is_async):
        what = "a class" if is_class else "async, and such a function runs in a thread"
        raise HandlerError(f"{name} is {what}; kind: function wants def handle(sock, address)")
    return form


def _is_request_handler(target: object) -> bool:
    """Whether it is a socketserver request handler class for connections."""
    if (known := sys.modules.get("socketserver")) is None or not inspect.isclass(target):  # it would have imported it
        return False
    return issubclass(target, known.BaseRequestHandler) and not issubclass(target, known.DatagramRequestHandler)


def _is_coroutine_function(target: Any) -> bool:
    """Whether calling it gives a coroutine. Where it is called with a reader and a writer that may be hidden by a
    decorator (functools.wraps).
    """
    if inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(getattr(target, "__call__", None)):  # noqa: B004
        return True
    names = [one.name for one in _parameters(target)]
    return inspect.iscoroutinefunction(_hidden(target)) and names[:2] == ["reader", "writer"]


def _hidden(target: Any) -> Any:
    """What is behind its decorators."""
    try:
        return inspect.unwrap(target)
    except ValueError:  # an object that says so of itself
        return target


def _takes_socket(target: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a function wants to be called with a socket and an address, and can't be called without. One of a reader
    and a writer has forgotten its async; one of start_response is an application of WSGI.
    """
    try:
        signature = inspect.signature(target)
        signature.bind(None, None, **arguments)
    except (TypeError, ValueError):
        return False
    try:
        signature.bind(**arguments)
    except TypeError:
        first, second, *_ = [*signature.parameters, "", ""]
        return (first, second) != ("reader", "writer") and second != "start_response"
    return False


def _form(target: Any, arguments: Mapping[str, Any], name: str, address: Address) -> Form:
    """What a handler is; of one that may be two things, such as a factory, what its address wants."""
    given, target = target, _unwrapped(target)
    if _is_request_handler(target):
        return "socketserver"
    if inspect.isclass(target):
        return _form_of_class(target, name, address)
    if isinstance(target, asyncio.BaseProtocol):
        kind = type(target).__name__
        raise HandlerError(f"{name} is one object of {kind}, and each client needs its own; give the class {kind}")
    if _is_server(given, arguments):
        return "server"
    if any(f"{one.__module__}.{one.__qualname__}" == _AIOHTTP for one in type(target).__mro__):
        hint = "give async def serve(sockets), which makes an AppRunner and a SockSite for each of them"
        raise HandlerError(f"{name} is an application of aiohttp, which is served by a server; {hint}")
    if _is_coroutine_function(target):
        return "streams"
    if callable(target):
        if address.takes_datagrams:
            return "datagram"
        return "function" if _takes_socket(given, arguments) else "protocol"
    raise HandlerError(f"{name} is {_a(type(target).__name__)}, which is not callable; forkd hosts {_FORMS}")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _form_of_class(target: type, name: str, address: Address) -> Form:
    forms: list[Form] = []
    if issubclass(target, asyncio.Protocol | asyncio.BufferedProtocol):
        forms.append("protocol")
    if issubclass(target, asyncio.DatagramProtocol):
        forms.append("datagram")
    if forms:
        return "datagram" if "datagram" in forms and address.takes_datagrams else forms[0]
    if server_entry(target) is not None:
        return "server"
    base = "asyncio.DatagramProtocol" if hasattr(target, "datagram_received") else "asyncio.Protocol"
    if any(hasattr(target, one) for one in _PROTOCOL_METHODS):  # one that is a protocol by its methods alone
        hint = f"it has a protocol's methods: write class {target.__name__}({base})"
    else:
        hint = f"it hosts {_FORMS}"
    raise HandlerError(f"{name}: forkd does not host the class {target.__qualname__}; {hint}")


def _unwrapped(target: Any) -> Any:
    """What a functools.partial calls."""
    while isinstance(target, partial):
        target = target.func
    return target


def _check_call(target: Any, name: str, form: str, arguments: Mapping[str, Any]) -> None:
    manner, count = _CALLS[form]
    try:
        inspect.signature(target).bind(*[None] * count, **arguments)
    except TypeError as error:
        raise HandlerError(f"{name}: {manner}, but: {error}{_call_hint(target, name, arguments)}") from None
    except ValueError:  # a callable in C that does not tell its signature
        return


def _call_hint(target: Any, name: str, arguments: Mapping[str, Any]) -> str:
    """What to write instead of a handler that can't be called as it is."""
    if not callable(target):
        return ""
    wanted = [
        one.name
        for one in inspect.signature(target).parameters.values()
        if one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    ]
    if inspect.isclass(_unwrapped(target)):
        given = [*arguments, *(one for one in wanted if one not in arguments)]
        return f"; give what it wants: args: {{{', '.join(f'{one}: ...' for one in given)}}}"
    if wanted[:1] == ["self"] and "." in (method := name.rpartition(":")[2]):
        kind, _, method = method.rpartition(".")
        return f"; it is a method, and wants an object: write served = {kind}() in the module, and name served.{method}"
    if wanted == ["scope", "receive", "send"]:
        return "; an ASGI application is served by a server: handler: uvicorn:Server, args: {config: MODULE:CONFIG}"
    if wanted[1:] == ["start_response"]:
        return "; an application of WSGI is served by a server, such as hypercorn's: async def serve(sockets)"
    if wanted == ["reader", "writer"] and not inspect.iscoroutinefunction(target):
        return f"; a streams handler begins with async: async def {name.rpartition(':')[2]}({', '.join(wanted)})"
    return ""
