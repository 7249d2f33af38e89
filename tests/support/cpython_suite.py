"""CPython's own tests of asyncio, run over forkd's loop and transport.

    python -m tests.support.cpython_suite forkd|compiled MODULE

Both ends of each connection that a test makes on the loop have a transport of forkd's, and its streams are forkd's.
Prints a line for each test that
has failed, then how many were run. They need `test.test_asyncio`, which Debian has in libpython3.11-testsuite.
"""

from __future__ import annotations

import asyncio
import re
import sys
import unittest
from asyncio import sslproto
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

from forkd.serve.loop import PollLoop
from forkd.serve.stream.coroutine import StreamReader, StreamWriter
from tests.support.network_namespaces import leave_network
from tests.support.transport_contract import RecordingObserver, twin

#: The modules, and which tests of each are about connections on one loop, by words in their names: others make the same
#: ones over other selectors.
MODULES = {
    "test_buffered_proto": (r"\.BufferedProtocolSelectorTests\.",),
    "test_events": (r"\.EPollEventLoopTests\.", "connect|server|accept"),
    "test_sendfile": (r"\.EPollEventLoopTests\.",),
    "test_server": (r"\.(SelectorStartServerTests|TestServer2)\.",),
    "test_streams": (r"\.StreamTests\.",),
}


class Observer(RecordingObserver):
    """Tells the server that a connection of its own has ended."""

    def __init__(self, server: Any) -> None:
        super().__init__()
        self.server = server
        self.arguments: tuple[Any, ...] = ()

    def attach(self, transport: Any) -> None:
        if self.server is not None:
            self.arguments = (transport,) if sys.version_info >= (3, 13) else ()
            self.server._attach(*self.arguments)

    def closed(self) -> None:
        super().closed()
        if self.server is not None:
            self.server._detach(*self.arguments)


class SuiteLoop(PollLoop):
    """A loop whose connections are all forkd's."""

    kind = "forkd"

    def __init__(self) -> None:
        super().__init__(selector=twin(self.kind)[0])
        self.stopped_twice = False

    def stop(self) -> None:
        """Stops the next run as well, if this one is stopping already.

        A test runs the loop until it has a connection, then until that has ended, which stops it. forkd tells of an end
        in the round that reads it, asyncio a round later: with a quick client the first run would take both stops.
        """
        self.stopped_twice = self._stopping  # type: ignore[attr-defined]  # the stub lacks it
        super().stop()

    def run_forever(self) -> None:
        if self.stopped_twice:
            self.stop()
        super().run_forever()

    def _make_socket_transport(
        self, sock: Any, protocol: Any, waiter: Any = None, *, extra: Any = None, server: Any = None
    ) -> Any:
        peer = (extra or {}).get("peername")
        with suppress(OSError):
            peer = peer or sock.getpeername()
        observer = Observer(server)
        transport = twin(self.kind)[1](self, sock, protocol, peer, observer)
        observer.attach(transport)
        self.call_soon(transport.start)
        if waiter is not None:
            self.call_soon(lambda: waiter.cancelled() or waiter.set_result(None))
        return transport

    def _make_ssl_transport(
        self, rawsock: Any, protocol: Any, sslcontext: Any, waiter: Any = None, *, server_side: bool = False,
        server_hostname: Any = None, extra: Any = None, server: Any = None, **timeouts: Any,
    ) -> Any:  # fmt: skip
        over: Any = sslproto.SSLProtocol(
            self,
            protocol,
            sslcontext,
            waiter,
            server_side,
            server_hostname,
            **timeouts,
        )
        self._make_socket_transport(rawsock, over, extra=extra, server=server)
        return over._app_transport


class SuitePolicy(asyncio.DefaultEventLoopPolicy):
    """Has the tests make such loops."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return SuiteLoop()


def cases(module: ModuleType, patterns: Sequence[str]) -> Iterator[unittest.TestCase]:
    """The tests of a module in whose names all of these are found."""
    for case in vars(module).values():
        if isinstance(case, type) and issubclass(case, unittest.TestCase):
            makers = {name: lambda _: SuiteLoop() for name in ("create_event_loop", "new_loop") if hasattr(case, name)}
            here = type(case.__name__, (case,), makers)
            for name in unittest.defaultTestLoader.getTestCaseNames(here):
                if all(re.search(pattern, f".{case.__name__}.{name}") for pattern in patterns):
                    yield here(name)


def main(kind: str, name: str) -> None:
    """Runs the tests of a module over a twin of forkd's."""
    # They want a port of all addresses and try six times. Clients of forkd's own tests come from many addresses, and
    # leave so many ports in TIME_WAIT at these that none of six may be free.
    with suppress(OSError):
        leave_network()
    SuiteLoop.kind = kind
    for module in (asyncio, asyncio.streams):
        vars(module).update(StreamReader=StreamReader, StreamWriter=StreamWriter)
    asyncio.set_event_loop_policy(SuitePolicy())
    tests = import_module(f"test.test_asyncio.{name}")
    result = unittest.TextTestRunner().run(unittest.TestSuite(cases(tests, MODULES[name])))
    for test, _ in [*result.errors, *result.failures]:
        print(test.id())
    print(result.testsRun)


if __name__ == "__main__":
    main(*sys.argv[1:])
