"""The order in which a protocol is told of what happens, and in which what it schedules then runs: asyncio's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from forkd import drain
from forkd.serve import loop
from forkd.serve.stream.coroutine import streams_factory
from tests.serve.stream.test_transport_closing import reset
from tests.support.transport_contract import (
    MUCH,
    AnyRecorder,
    BufferedRecorder,
    Kit,
    Recorder,
    RecorderClass,
    forkd_only,
    kits,
    read_to_end,
    tcp_pair,
)

kit = kits

RECORDERS = pytest.mark.parametrize("recorder", [Recorder, BufferedRecorder])

#: Tasks that nothing else would keep alive.
tasks: set[asyncio.Task[None]] = set()


@pytest.fixture(autouse=True)
def not_draining(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(drain._Worker, "drains", False)
    yield
    tasks.clear()


def schedules(name: str, before: Callable[[], object] = lambda: None) -> Callable[..., None]:
    """A hook that schedules a callback and a task, which note that they have run."""

    async def task(protocol: AnyRecorder) -> None:
        protocol.calls.append(f"task of {name}")

    def hook(protocol: AnyRecorder, *_: Any) -> None:
        before()
        loop = asyncio.get_running_loop()
        loop.call_soon(protocol.calls.append, f"callback of {name}")
        tasks.add(loop.create_task(task(protocol)))

    return hook


def scheduled(name: str) -> list[str]:
    return [name, f"callback of {name}", f"task of {name}"]


def noted(protocol: AnyRecorder) -> list[str]:
    """What was called, by the names that plain protocols have."""
    names = {"buffer_updated": "data_received"}
    return [names.get(name, name) for name in protocol.calls if name != "get_buffer"]


def send(peer: socket.socket) -> None:
    peer.sendall(b"x")


def end(peer: socket.socket) -> None:
    peer.shutdown(socket.SHUT_WR)


def send_and_end(peer: socket.socket) -> None:
    send(peer)
    end(peer)


@RECORDERS
@pytest.mark.parametrize(
    ("act", "told"),
    [
        (send, ["data_received"]),
        (end, ["eof_received"]),
        (send_and_end, ["data_received", "eof_received"]),
        (reset, []),
    ],
    ids=["data", "end", "data-end", "reset"],
)
def test_what_a_call_has_scheduled_runs_before_the_next_call(
    kit: Kit, recorder: RecorderClass, act: Callable[[socket.socket], None], told: list[str]
) -> None:
    _, peer = ends = kit.pair(tcp_pair)
    hooks = {name: schedules(name) for name in ("data_received", "buffer_updated", "eof_received")}
    if recorder is BufferedRecorder:
        hooks["buffer_updated"] = schedules("data_received")
    protocol = recorder(kit, connection_made=schedules("connection_made", lambda: act(peer)), **hooks)
    transport, _ = kit.connect(protocol, lambda: ends)
    if told == ["data_received"]:
        kit.until(lambda: "data_received" in noted(protocol))
        kit.turn()
        transport.abort()
    kit.until(lambda: protocol.lost)
    calls = [call for name in ["connection_made", *told] for call in scheduled(name)]
    assert noted(protocol) == [*calls, "connection_lost"]


def test_data_comes_before_room_to_write(kit: Kit) -> None:
    protocol = Recorder(kit)
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    peer.sendall(b"x")
    kit.in_thread(peer.recv, 1 << 20, socket.MSG_WAITALL)
    kit.until(lambda: "resume_writing" in protocol.calls or protocol.received)
    assert protocol.calls[:3] == ["connection_made", "pause_writing", "data_received"]
    transport.abort()


@forkd_only
def test_the_end_of_what_is_unsent_waits_for_what_is_scheduled(kit: Kit) -> None:
    protocol = Recorder(kit, resume_writing=schedules("resume_writing"))
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    transport.close()
    assert len(kit.in_thread(read_to_end, peer)) == MUCH
    kit.until(lambda: protocol.lost)
    assert protocol.calls == ["connection_made", "pause_writing", *scheduled("resume_writing"), "connection_lost"]


@forkd_only
def test_a_turn_cut_short_leaves_the_order_as_it_is(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SLICE", 0.0)  # each callback takes all of its turn's time
    protocol = Recorder(kit, data_received=schedules("data_received", lambda: peer.sendall(b"x")))
    transport, peer = kit.connect(protocol)
    peer.sendall(b"x")
    kit.until(lambda: len(protocol.received) == 5)
    transport.abort()
    assert protocol.calls[:9] == ["connection_made", *scheduled("data_received") * 4][:9]


@forkd_only
def test_a_late_client_is_heard_behind_what_is_scheduled(kit: Kit) -> None:
    drain.begin()
    protocol = Recorder(kit, connection_made=schedules("connection_made"))
    protocol.shutdown = lambda: protocol.called("shutdown")  # type: ignore[attr-defined]
    transport, _ = kit.connect(protocol, first=b"x")
    kit.until(lambda: "shutdown" in protocol.calls)
    assert protocol.calls == [*scheduled("connection_made"), "data_received", "shutdown"]
    transport.abort()


@pytest.mark.parametrize(("act", "told"), [(end, b"hello"), (reset, "reset")], ids=["end", "reset"])
def test_a_streams_handler_begins_before_its_client_is_gone(
    kit: Kit, act: Callable[[socket.socket], None], told: object
) -> None:
    seen: list[object] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.extend((reader.at_eof(), reader.exception(), writer.is_closing()))
        try:
            seen.append(await reader.read())
        except ConnectionResetError:
            seen.append("reset")
        writer.close()
        kit.look()

    def already_gone() -> tuple[socket.socket, socket.socket]:
        served, peer = tcp_pair()
        peer.sendall(b"hello")
        act(peer)
        return served, peer if peer.fileno() >= 0 else socket.socket()

    if kit.kind == "asyncio":
        kit.connect(
            asyncio.StreamReaderProtocol(asyncio.StreamReader(loop=kit.loop), handle, loop=kit.loop), already_gone
        )
    else:
        kit.connect(streams_factory(handle, kit.poll_loop, set())(), already_gone)
    kit.until(lambda: len(seen) == 4)
    assert seen == [False, None, False, told]
