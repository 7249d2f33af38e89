"""Whole servers of asyncio's own: of each kind that forkd starts and stops, and some that go wrong."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

from forkd.drain import wait_draining


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while line := await reader.readline():
        writer.write(b"%d %s" % (os.getpid(), line))
    writer.close()


async def returned(sockets: list[socket.socket]) -> list[asyncio.Server]:
    """Returns what it has started."""
    return [await asyncio.start_server(_answer, sock=sock) for sock in sockets]


async def forever(sockets: list[socket.socket]) -> None:
    """Goes on until it is cancelled; its clients outlive it."""
    server = await asyncio.start_server(_answer, sock=sockets[0])
    try:
        await asyncio.get_running_loop().create_future()
    finally:
        server.close()
        Path("cancelled").touch()


async def taking_signals(sockets: list[socket.socket]) -> asyncio.Server:
    """Wants to end by signals itself, and does not."""
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        asyncio.get_running_loop().add_signal_handler(signum, lambda: None)
    return await asyncio.start_server(_answer, sock=sockets[0])


async def until_drain(sockets: list[socket.socket], said: str = "drained") -> None:
    """Goes on until the drain; takes its time then."""
    server = await asyncio.start_server(_answer, sock=sockets[0])
    await wait_draining()
    server.close()
    await asyncio.sleep(0.1)
    Path(said).touch()


async def on_unix(sockets: list[socket.socket]) -> asyncio.Server:
    """As a library does that is given a unix socket."""
    return await asyncio.start_unix_server(_answer, sock=sockets[0])


async def deaf(sockets: list[socket.socket]) -> None:
    """Accepts, and can't be told to stop."""
    await asyncio.start_server(_answer, sock=sockets[0])
    while True:
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if Path("let go").exists():
                raise


class Object:
    """A server as an object, which stops in its own time."""

    def __init__(self, greeting: str = "") -> None:
        self.greeting = greeting
        self.ended = asyncio.Event()

    async def serve(self, *, sockets: list[socket.socket]) -> None:
        """Serves until it is stopped."""
        server = await asyncio.start_server(self._greet, sock=sockets[0])
        await self.ended.wait()
        server.close()
        Path("stopped").touch()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self.greeting.encode())
        await _answer(reader, writer)

    async def stop(self) -> None:
        """Has it end."""
        self.ended.set()


def copied(sockets: list[socket.socket]) -> Any:
    """Accepts from a copy of the socket, in a thread: the kernel alone tells."""
    sock = socket.socket(fileno=os.dup(sockets[0].fileno()))
    sock.settimeout(0.1)
    ended = threading.Event()

    def accept() -> None:
        held = []
        while not ended.is_set():
            try:
                held.append(socket.socket(fileno=sock.accept()[0].detach()))
                held[-1].sendall(b"%d\n" % os.getpid())
            except TimeoutError:
                held = [one for one in held if not _has_ended(one)]
        sock.close()

    thread = threading.Thread(target=accept)
    thread.start()

    class Stop:
        def close(self) -> None:
            ended.set()
            thread.join()

    return Stop()


class Detached:
    """Accepts what it is given, and serves each connection by a socket object of its own."""

    def __init__(self) -> None:
        self.serving: set[asyncio.Task[None]] = set()

    def add_sockets(self, sockets: list[socket.socket]) -> None:
        """Serves them from now on."""
        self.sockets = sockets
        for sock in sockets:
            asyncio.get_running_loop().add_reader(sock, self._accept, sock)

    def stop(self) -> None:
        """Accepts no more."""
        for sock in self.sockets:
            asyncio.get_running_loop().remove_reader(sock)

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            taken = socket.socket(fileno=listening.accept()[0].detach())
            self.serving.add(asyncio.create_task(self._serve(taken)))

    async def _serve(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock)
        writer.write(b"%d\n" % os.getpid())
        await _answer(reader, writer)


async def forking(sockets: list[socket.socket]) -> asyncio.Server:
    """Forks a process that goes on, when a client says so."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            if line == b"fork\n" and os.fork() == 0:
                signal.pause()
                os._exit(0)
            writer.write(b"%d %s" % (os.getpid(), line))
        writer.close()

    return await asyncio.start_server(answer, sock=sockets[0])


def _has_ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        if sock.recv(100):
            return False
    except BlockingIOError:
        return False
    sock.close()
    return True


async def fails(sockets: list[socket.socket]) -> None:
    """Fails before it accepts."""
    raise ValueError("no database")


async def returns(sockets: list[socket.socket]) -> None:
    """Ends before it accepts."""


async def never(sockets: list[socket.socket]) -> None:
    """Does not come to accept."""
    await asyncio.get_running_loop().create_future()


async def gives_up(sockets: list[socket.socket]) -> None:
    """Fails when the file is there."""
    server = await asyncio.start_server(_answer, sock=sockets[0])
    while not Path("give up").exists():
        await asyncio.sleep(0.02)
    Path("give up").unlink()
    server.close()
    raise RuntimeError("out of ideas")
