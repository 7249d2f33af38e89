"""Handlers are imported, and factories called, inside the worker's running loop: what can be made there at module
level, and what is said where a module runs a loop of its own, or where there is none to run in.
"""

from __future__ import annotations

import time

import pytest

from tests.support.daemon import Harness
from tests.support.needs import needs_package

MAIN = """
import asyncio


async def handle(reader, writer):
    writer.write(b"hello")


async def main():
    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    await server.serve_forever()


"""

#: How programs start by themselves.
STARTS = {
    "run": "asyncio.run(main())",
    "runner": "with asyncio.Runner() as runner: runner.run(main())",
    "own loop": "loop = asyncio.new_event_loop(); loop.run_until_complete(main())",
    "current loop": "asyncio.get_event_loop().run_forever()",
}


@pytest.mark.parametrize("start", STARTS)
def test_module_that_runs_a_loop_is_refused_at_once(harness: Harness, start: str) -> None:
    (harness.directory / "program.py").write_text(f"{MAIN}{STARTS[start]}\n")
    daemon = harness.daemon(target="program:handle", workers=1)
    began = time.monotonic()
    result = daemon.command("start")
    assert time.monotonic() - began < 30  # of the minute that a boot may take
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert said.startswith("forkd: worker 1 could not boot: program:handle: importing program failed: RuntimeError: ")
    assert (
        "; a worker's loop runs already: write how the program starts by itself under if __name__ == '__main__'" in said
    )
    assert 'program.py", line ' in result.stderr
    daemon.expect("could not boot: program:handle: importing program failed")


LOOPED = """
import asyncio

assert asyncio.get_event_loop() is asyncio.get_running_loop()
lock, beginning = asyncio.Lock(), asyncio.get_running_loop().create_future()


async def begin():
    beginning.set_result(b"begun")


task = asyncio.create_task(begin())


async def handle(reader, writer):
    async with lock:
        writer.write(await beginning)
"""


def test_module_may_use_the_loop_that_serves_it(harness: Harness) -> None:
    (harness.directory / "looped.py").write_text(LOOPED)
    daemon = harness.daemon(target="looped:handle", workers=1)
    assert daemon.command("check").returncode == 0
    daemon.start()
    assert harness.connect(daemon).recv(100) == b"begun"
    assert daemon.command("upgrade").returncode == 0


@pytest.mark.parametrize("wants", ["asyncio.get_running_loop()", "asyncio.get_event_loop()"])
def test_preloaded_module_that_wants_a_loop_is_refused(harness: Harness, wants: str) -> None:
    (harness.directory / "looped.py").write_text(f"{MAIN}loop = {wants}\n")
    daemon = harness.daemon(target="looped:handle", workers=1, settings=("preload=true",))
    result = daemon.command("start")
    assert result.returncode == 1
    said = result.stderr.splitlines()[-1]
    assert "; no worker's loop runs here: make this in a factory or in setup, or set preload: false" in said


AIOHTTP = """
from aiohttp import web


async def hello(request):
    return web.Response(text="hello from aiohttp")


handler = web.Server(hello)
"""

AUTOBAHN = """
from autobahn.asyncio.websocket import WebSocketServerFactory, WebSocketServerProtocol


class Echo(WebSocketServerProtocol):
    def onMessage(self, payload, isBinary):
        self.sendMessage(payload[::-1], isBinary)


handler = WebSocketServerFactory()
handler.protocol = Echo
"""

TWISTED = """
import asyncio

from twisted.internet import asyncioreactor

asyncioreactor.install()

from twisted.internet import reactor, task


async def handler(reader, writer):
    later = task.deferLater(reactor, 0.01, lambda: b"hello from twisted")
    writer.write(await later.asFuture(asyncio.get_running_loop()))
"""

GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
FRAME = b"\x81\x83\0\0\0\0abc"  # a masked text; its answer is not masked


@pytest.mark.parametrize(
    ("package", "module", "asked", "answer"),
    [
        ("aiohttp", AIOHTTP, GET, b"\r\n\r\nhello from aiohttp"),
        ("autobahn", AUTOBAHN, UPGRADE + FRAME, b"\x81\x03cba"),
        ("twisted", TWISTED, b"", b"hello from twisted"),
    ],
    ids=["aiohttp", "autobahn", "twisted"],
)
def test_library_that_wants_the_loop_at_import_serves(
    harness: Harness, package: str, module: str, asked: bytes, answer: bytes
) -> None:
    needs_package(package)
    (harness.directory / "libraries.py").write_text(module)
    daemon = harness.daemon(target="libraries:handler", workers=1).start()
    with harness.connect(daemon) as client:
        client.sendall(asked)
        heard = b""
        while answer not in heard:
            piece = client.recv(65536)
            assert piece, heard
            heard += piece
    daemon.wait_clients(0)
    assert daemon.status()["totals"]["errors"] == 0
