"""Handlers that are `async def handle(reader, writer)`: asyncio's streams over forkd's transport.

Through ProtocolServer, as a worker hosts them: what they read and write, how long the connection lives, and what
becomes of it, and of the counts, when the handler raises, is cancelled, or its client is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from forkd.serve.accept.acceptor import ConnectionStats
from forkd.serve.deadlines import Deadlines
from forkd.serve.stream.coroutine import StreamsHandler, streams_factory
from forkd.serve.stream.server import ProtocolServer, common_name
from forkd.serve.stream.transport import ServerContext
from forkd.system.scoreboard import Field, Row
from tests.support.processes import DEADLINE
from tests.support.transport_contract import MUCH, Kit, SocketPair, descriptors, read_exactly, read_to_end, tcp_pair


class Host:
    """Serves connections by a streams handler, and counts them as a worker does."""

    def __init__(self) -> None:
        self.row = Row.unshared()
        self.stats = ConnectionStats(self.row, self)
        self.kit = Kit("forkd", on_error=self.stats.failed)
        self.context = ServerContext(self.kit.poll_loop, self.stats, Deadlines(self.kit.loop))
        self.ended: asyncio.Future[None] = self.kit.loop.create_future()
        self.tasks: list[asyncio.Task[None]] = []

    def connection_closed(self) -> None:
        """Nothing waits for it here."""

    def serve(self, handle: StreamsHandler, pair: SocketPair = socket.socketpair) -> socket.socket:
        """A new connection's peer; the last of `tasks` is the handler's, and `ended` is done when that is."""
        self.ended = ended = self.kit.loop.create_future()

        async def watched(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            self.tasks.append(task)
            task.add_done_callback(lambda _: ended.set_result(None))
            await handle(reader, writer)

        async def accept() -> None:
            self.stats.opened()
            factory = streams_factory(watched, self.kit.poll_loop, self.context.handler_tasks)
            ProtocolServer(self.context, factory)(ours, "")

        ours, peer = self.kit.pair(pair)
        peer.settimeout(DEADLINE)
        self.kit.run(accept())
        return peer

    @property
    def counts(self) -> tuple[int, int, int]:
        """Accepted, closed, errors."""
        return self.row[Field.ACCEPTED], self.row[Field.CLOSED], self.row[Field.ERRORS]

    def until_ended(self) -> None:
        self.kit.run(self.ended)
        self.kit.turn()


@pytest.fixture
def host() -> Iterator[Host]:
    before = descriptors()
    host = Host()
    kit = host.kit
    yield host
    kit.close()
    gc.collect()  # a task that was forgotten says so now
    assert kit.reported == []
    assert kit.poll_loop.selector.served == {}
    assert host.stats.active == 0
    assert host.context.handler_tasks == set()
    assert descriptors() == before


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(100):
        writer.write(data)
        await writer.drain()


def test_a_handler_reads_and_writes(host: Host) -> None:
    peer = host.serve(echo)
    for line in (b"one", b"two" * 1000, b"three"):
        peer.sendall(line)
        assert host.kit.in_thread(read_exactly, peer, len(line)) == line
    peer.shutdown(socket.SHUT_WR)
    assert host.kit.in_thread(peer.recv, 1) == b""
    host.until_ended()
    assert host.counts == (1, 1, 0)


def test_many_connections_are_served_side_by_side(host: Host) -> None:
    peers = [host.serve(echo, tcp_pair) for _ in range(20)]
    for number, peer in enumerate(peers):
        peer.sendall(b"%d" % number)
    answers = [host.kit.in_thread(peer.recv, 10) for peer in reversed(peers)]
    assert answers == [b"%d" % number for number in reversed(range(20))]
    for peer in peers:
        peer.close()
    host.kit.turn()
    host.until_ended()
    assert host.counts == (20, 20, 0)


def test_readline_and_readuntil_work_across_packets(host: Host) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readline())
        writer.write(await reader.readuntil(b";"))
        writer.write(await reader.readexactly(4))

    peer = host.serve(handle)
    for piece in (b"a li", b"ne\nand", b" more;12", b"34"):
        peer.sendall(piece)
        host.kit.turn()
    assert host.kit.in_thread(read_to_end, peer) == b"a line\nand more;1234"
    host.until_ended()


def test_the_handlers_end_closes_after_everything_is_sent(host: Host) -> None:
    async def handle(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(MUCH))

    peer = host.serve(handle)
    host.until_ended()
    assert host.counts == (1, 0, 0)
    assert len(host.kit.in_thread(read_to_end, peer)) == MUCH
    host.kit.turn()
    assert host.counts == (1, 1, 0)


def test_drain_waits_for_a_slow_reader(host: Host) -> None:
    drained = []

    async def handle(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(MUCH))
        await writer.drain()
        drained.append(writer.transport.get_write_buffer_size())

    peer = host.serve(handle)
    host.kit.turn()
    host.kit.in_thread(read_exactly, peer, MUCH // 2)
    host.kit.turn()
    assert drained == []
    assert len(host.kit.in_thread(read_to_end, peer)) == MUCH // 2
    host.until_ended()
    assert drained[0] <= 16 * 1024


def test_a_reader_that_is_not_read_stops_the_client(host: Host) -> None:
    """The stream's limit pauses the transport, so what the client sends stays with the kernel and then with it."""
    begin = host.kit.loop.create_future()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await begin
        writer.write(b"%d" % len(await reader.readexactly(MUCH)))

    peer = host.serve(handle)
    sending = host.kit.loop.run_in_executor(None, peer.sendall, bytes(MUCH))
    host.kit.turn()
    assert not sending.done()
    begin.set_result(None)
    assert host.kit.in_thread(read_to_end, peer) == b"%d" % MUCH
    host.kit.run(sending)
    host.until_ended()


def test_a_half_closed_client_gets_its_answer(host: Host) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read()
        await asyncio.sleep(0)
        writer.write(request.upper())

    peer = host.serve(handle)
    peer.sendall(b"request")
    peer.shutdown(socket.SHUT_WR)
    assert host.kit.in_thread(read_to_end, peer) == b"REQUEST"
    host.until_ended()
    assert host.counts == (1, 1, 0)


def test_write_eof_and_wait_closed(host: Host) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines([b"all ", b"of it"])
        writer.write_eof()
        got.append(await reader.read())
        writer.close()
        await writer.wait_closed()
        got.append("closed")

    got: list[object] = []
    peer = host.serve(handle)
    assert host.kit.in_thread(read_to_end, peer) == b"all of it"
    peer.sendall(b"thanks")
    peer.close()
    host.until_ended()
    assert got == [b"thanks", "closed"]


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), OSError(errno.EIO, "odd"), TimeoutError(), EOFError()], ids=repr
)
def test_a_handler_that_raises_is_reported_and_ends(host: Host, error: Exception) -> None:
    async def handle(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(MUCH))
        raise error

    peer = host.serve(handle)
    host.until_ended()
    reported = host.kit.take_reported()
    assert [context["exception"] for context in reported] == [error]
    assert reported[0]["transport"] is not None
    assert host.counts == (1, 1, 1)
    assert len(read_to_end(peer)) < MUCH


def test_an_incomplete_read_is_the_handlers_to_deal_with(host: Host) -> None:
    async def handle(reader: asyncio.StreamReader, _: Any) -> None:
        await reader.readexactly(100)

    peer = host.serve(handle)
    peer.sendall(b"short")
    peer.close()
    host.until_ended()
    assert [type(context["exception"]) for context in host.kit.take_reported()] == [asyncio.IncompleteReadError]
    assert host.counts == (1, 1, 1)


@pytest.mark.parametrize("where", ["read", "drain"])
def test_a_clients_reset_within_the_handler_is_no_error(host: Host, where: str) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if where == "read":
            await reader.read()
        else:
            while True:
                writer.write(bytes(MUCH))
                await writer.drain()

    peer = host.serve(handle, tcp_pair)
    host.kit.turn()
    reset(peer)
    host.until_ended()
    assert host.counts == (1, 1, 0)


def test_a_client_gone_before_the_handlers_end_is_no_error(host: Host) -> None:
    begin = host.kit.loop.create_future()

    async def handle(_: Any, writer: asyncio.StreamWriter) -> None:
        await begin
        writer.write(b"late")

    peer = host.serve(handle, tcp_pair)
    reset(peer)
    host.kit.turn()
    begin.set_result(None)
    host.until_ended()
    assert host.counts == (1, 1, 0)


def test_a_connection_of_the_handlers_own_that_fails_is_an_error(host: Host) -> None:
    """It has not to do with the client, though its exception is of the same kind."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

    async def handle(*_: Any) -> None:
        await asyncio.open_connection(*address)

    peer = host.serve(handle)
    host.until_ended()
    assert [type(context["exception"]) for context in host.kit.take_reported()] == [ConnectionRefusedError]
    assert host.counts == (1, 1, 1)
    assert read_to_end(peer) == b""


def test_a_cancelled_handler_ends_its_connection(host: Host) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"written before")
        try:
            await reader.read()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    seen: list[str] = []
    peer = host.serve(handle)
    host.kit.turn()
    assert host.context.handler_tasks == {*host.tasks}
    host.tasks[-1].cancel()
    host.until_ended()
    assert seen == ["cancelled"]
    assert read_to_end(peer) == b"written before"
    assert host.counts == (1, 1, 0)


def test_a_handler_may_clean_up_when_it_is_cancelled(host: Host) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.read()
        finally:
            writer.write(b"goodbye")
            await writer.drain()

    peer = host.serve(handle)
    host.kit.turn()
    host.tasks[-1].cancel()
    assert host.kit.in_thread(read_to_end, peer) == b"goodbye"
    host.until_ended()


def test_a_handler_that_closes_by_itself_and_goes_on(host: Host) -> None:
    async def handle(_: Any, writer: asyncio.StreamWriter) -> None:
        writer.write(b"done")
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0)
        after.append(writer.is_closing())

    after: list[bool] = []
    peer = host.serve(handle)
    assert host.kit.in_thread(read_to_end, peer) == b"done"
    host.until_ended()
    assert after == [True]
    assert host.counts == (1, 1, 0)


@pytest.mark.parametrize(
    ("names", "is_known"),
    [
        ([("127.0.0.1", 0)], True),
        ([("::1", 0)], True),
        (["\0one.forkd"], True),
        ([("0.0.0.0", 0)], False),
        ([("::", 0)], False),
        ([("127.0.0.1", 0), ("127.0.0.2", 0)], False),
        ([], False),
    ],
    ids=str,
)
def test_a_listeners_name_is_its_connections_own(names: list[Any], is_known: bool) -> None:
    with contextlib.ExitStack() as stack:
        listeners = []
        for name in names:
            family = socket.AF_UNIX if isinstance(name, str) else socket.AF_INET6 if ":" in name[0] else socket.AF_INET
            listeners.append(stack.enter_context(socket.socket(family)))
            listeners[-1].bind(name)
            listeners[-1].listen()
        found = common_name(listeners)
        assert (found is not None) == is_known
        if is_known:
            client = stack.enter_context(socket.socket(listeners[0].family))
            client.connect(listeners[0].getsockname())
            assert stack.enter_context(listeners[0].accept()[0]).getsockname() == found


def test_a_read_can_follow_one_that_was_cancelled(host: Host) -> None:
    found: list[object] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for read in (reader.read(9), reader.readline(), reader.readexactly(2)):
            task = asyncio.ensure_future(read)
            await asyncio.sleep(0)
            with pytest.raises(RuntimeError, match="already waiting"):
                await reader.read(1)
            task.cancel()
            found.extend(map(type, await asyncio.gather(task, return_exceptions=True)))
        writer.write(b"?")
        await writer.drain()
        found.append(await reader.readline())

    peer = host.serve(handle)
    assert host.kit.in_thread(peer.recv, 1) == b"?"
    peer.sendall(b"one\ntwo")
    host.until_ended()
    assert found == [asyncio.CancelledError] * 3 + [b"one\n"]
