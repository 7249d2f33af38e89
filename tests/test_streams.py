"""Handlers that are `async def handle(reader, writer)`: asyncio's streams over forkd's transport.

Through ProtocolServer, as a worker hosts them: what they read and write, how long the connection lives, and what
becomes of it, and of the counts, when the handler raises, is cancelled, or its client is gone.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import socket
import struct

import pytest
from contract import DEADLINE, MUCH, Kit, descriptors, read_exactly, read_to_end, tcp_pair

from forkd.serve.accept import Tally
from forkd.serve.handlers.protocol import ProtocolServer
from forkd.serve.handlers.streams import streams_factory
from forkd.system.scoreboard import Field, Row


class Host:
    """Serves connections by a streams handler, and counts them as a worker does."""

    def __init__(self, kit):
        self.kit = kit
        self.row = Row.of_nobody()
        self.tally = Tally(self.row)
        kit.loop.on_error = self.tally.failed
        self.running = set()
        self.ended = self.task = None

    def serve(self, handle, pair=socket.socketpair):
        """A new connection's peer; `task` is the handler's, and `ended` is done when that is."""
        self.ended = ended = self.kit.loop.create_future()

        async def watched(reader, writer):
            self.task = asyncio.current_task()
            self.task.add_done_callback(lambda _: ended.set_result(None))
            return await handle(reader, writer)

        async def accept():
            self.tally.opened()
            factory = streams_factory(watched, self.kit.loop, self.running)
            ProtocolServer(self.kit.loop, factory, self.tally, 0)(ours, "")

        ours, peer = self.kit.pair(pair)
        peer.settimeout(DEADLINE)
        self.kit.run(accept())
        return peer

    @property
    def counts(self):
        """Accepted, closed, errors."""
        return self.row[Field.ACCEPTED], self.row[Field.CLOSED], self.row[Field.ERRORS]

    def until_ended(self):
        self.kit.run(self.ended)
        self.kit.turn()


@pytest.fixture
def host():
    before = descriptors()
    kit = Kit("forkd")
    host = Host(kit)
    yield host
    kit.close()
    gc.collect()  # a task that was forgotten says so now
    assert kit.reported == []
    assert kit.loop.selector.served == {}
    assert host.tally.active == 0
    assert host.running == set()
    assert descriptors() == before


def reset(peer):
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


async def echo(reader, writer):
    while data := await reader.read(100):
        writer.write(data)
        await writer.drain()


def test_a_handler_reads_and_writes(host):
    peer = host.serve(echo)
    for line in (b"one", b"two" * 1000, b"three"):
        peer.sendall(line)
        assert host.kit.in_thread(read_exactly, peer, len(line)) == line
    peer.shutdown(socket.SHUT_WR)
    assert host.kit.in_thread(peer.recv, 1) == b""
    host.until_ended()
    assert host.counts == (1, 1, 0)


def test_many_connections_are_served_side_by_side(host):
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


def test_readline_and_readuntil_work_across_packets(host):
    async def handle(reader, writer):
        writer.write(await reader.readline())
        writer.write(await reader.readuntil(b";"))
        writer.write(await reader.readexactly(4))

    peer = host.serve(handle)
    for piece in (b"a li", b"ne\nand", b" more;12", b"34"):
        peer.sendall(piece)
        host.kit.turn()
    assert host.kit.in_thread(read_to_end, peer) == b"a line\nand more;1234"
    host.until_ended()


def test_the_handlers_end_closes_after_everything_is_sent(host):
    async def handle(_, writer):
        writer.write(bytes(MUCH))

    peer = host.serve(handle)
    host.until_ended()
    assert host.counts == (1, 0, 0)
    assert len(host.kit.in_thread(read_to_end, peer)) == MUCH
    host.kit.turn()
    assert host.counts == (1, 1, 0)


def test_drain_waits_for_a_slow_reader(host):
    drained = []

    async def handle(_, writer):
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


def test_a_reader_that_is_not_read_stops_the_client(host):
    """The stream's limit pauses the transport, so what the client sends stays with the kernel and then with it."""
    begin = host.kit.loop.create_future()

    async def handle(reader, writer):
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


def test_a_half_closed_client_gets_its_answer(host):
    async def handle(reader, writer):
        request = await reader.read()
        await asyncio.sleep(0)
        writer.write(request.upper())

    peer = host.serve(handle)
    peer.sendall(b"request")
    peer.shutdown(socket.SHUT_WR)
    assert host.kit.in_thread(read_to_end, peer) == b"REQUEST"
    host.until_ended()
    assert host.counts == (1, 1, 0)


def test_write_eof_and_wait_closed(host):
    async def handle(reader, writer):
        writer.writelines([b"all ", b"of it"])
        writer.write_eof()
        got.append(await reader.read())
        writer.close()
        await writer.wait_closed()
        got.append("closed")

    got = []
    peer = host.serve(handle)
    assert host.kit.in_thread(read_to_end, peer) == b"all of it"
    peer.sendall(b"thanks")
    peer.close()
    host.until_ended()
    assert got == [b"thanks", "closed"]


@pytest.mark.parametrize(
    "error", [ValueError("wrong"), OSError(errno.EIO, "odd"), TimeoutError(), EOFError()], ids=repr
)
def test_a_handler_that_raises_is_counted_and_reported_and_its_connection_ends(host, error):
    async def handle(_, writer):
        writer.write(bytes(MUCH))
        raise error

    peer = host.serve(handle)
    host.until_ended()
    reported = host.kit.take_reported()
    assert [context["exception"] for context in reported] == [error]
    assert reported[0]["transport"] is not None
    assert host.counts == (1, 1, 1)
    assert len(read_to_end(peer)) < MUCH


def test_an_incomplete_read_is_the_handlers_to_deal_with(host):
    async def handle(reader, _):
        await reader.readexactly(100)

    peer = host.serve(handle)
    peer.sendall(b"short")
    peer.close()
    host.until_ended()
    assert [type(context["exception"]) for context in host.kit.take_reported()] == [asyncio.IncompleteReadError]
    assert host.counts == (1, 1, 1)


@pytest.mark.parametrize("where", ["read", "drain"])
def test_a_clients_reset_within_the_handler_is_no_error(host, where):
    async def handle(reader, writer):
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


def test_a_client_that_is_gone_before_the_handlers_end_is_no_error(host):
    begin = host.kit.loop.create_future()

    async def handle(_, writer):
        await begin
        writer.write(b"late")

    peer = host.serve(handle, tcp_pair)
    reset(peer)
    host.kit.turn()
    begin.set_result(None)
    host.until_ended()
    assert host.counts == (1, 1, 0)


def test_a_connection_of_the_handlers_own_that_fails_is_an_error(host):
    """It has not to do with the client, though its exception is of the same kind."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

    async def handle(*_):
        await asyncio.open_connection(*address)

    peer = host.serve(handle)
    host.until_ended()
    assert [type(context["exception"]) for context in host.kit.take_reported()] == [ConnectionRefusedError]
    assert host.counts == (1, 1, 1)
    assert read_to_end(peer) == b""


def test_a_cancelled_handler_ends_its_connection(host):
    async def handle(reader, writer):
        writer.write(b"written before")
        try:
            await reader.read()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    seen = []
    peer = host.serve(handle)
    host.kit.turn()
    assert host.running == {host.task}
    host.task.cancel()
    host.until_ended()
    assert seen == ["cancelled"]
    assert read_to_end(peer) == b"written before"
    assert host.counts == (1, 1, 0)


def test_a_handler_may_clean_up_when_it_is_cancelled(host):
    async def handle(reader, writer):
        try:
            await reader.read()
        finally:
            writer.write(b"goodbye")
            await writer.drain()

    peer = host.serve(handle)
    host.kit.turn()
    host.task.cancel()
    assert host.kit.in_thread(read_to_end, peer) == b"goodbye"
    host.until_ended()


def test_a_handler_that_closes_by_itself_and_goes_on(host):
    async def handle(_, writer):
        writer.write(b"done")
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0)
        after.append(writer.is_closing())

    after = []
    peer = host.serve(handle)
    assert host.kit.in_thread(read_to_end, peer) == b"done"
    host.until_ended()
    assert after == [True]
    assert host.counts == (1, 1, 0)
