"""The transport while its worker drains: a protocol that has a `shutdown()` is asked to end, and no other is disturbed.

asyncio's own transport has nothing like it, so these tests are for forkd's alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import socket
from typing import Any

import pytest

from forkd import drain
from tests.support.transport_contract import MUCH, Kit, Recorder, forkd_only, kits, read_to_end, tcp_pair

kit = kits
pytestmark = forkd_only

GREETED = contextvars.ContextVar("GREETED", default=0)


class Polite(Recorder):
    """One that can be asked to end."""

    def shutdown(self) -> None:
        self.called("shutdown")


class Slow(Recorder):
    """One whose methods for forkd are coroutine functions."""

    async def shutdown(self) -> None:
        await asyncio.sleep(0)
        self.called("shutdown")

    async def heartbeat(self) -> None:
        await self.shutdown()


@pytest.fixture(autouse=True)
def worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as a worker that does not drain yet."""
    monkeypatch.setattr(drain._Worker, "drains", False)


def test_a_notified_protocol_goes_on_until_it_suits_it(kit: Kit) -> None:
    protocol = Polite(kit)
    transport, peer = kit.connect(protocol)
    transport.notify_drain()
    assert protocol.calls == ["connection_made", "shutdown"]
    peer.sendall(b"one more")
    kit.until(lambda: protocol.received)
    transport.write(b"goodbye")
    transport.close()
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]
    assert kit.in_thread(read_to_end, peer) == b"goodbye"


@pytest.mark.parametrize("shutdown", [None, "at noon"])
def test_a_protocol_without_a_way_to_be_asked_is_served_on(kit: Kit, shutdown: object) -> None:
    protocol = Recorder(kit)
    if shutdown:
        vars(protocol)["shutdown"] = shutdown
    transport, peer = kit.connect(protocol)
    transport.notify_drain()
    peer.sendall(b"one more")
    kit.until(lambda: protocol.received)
    assert not transport.is_closing()


def test_a_protocol_is_asked_in_the_context_of_its_connection(kit: Kit) -> None:
    seen = []
    protocol = Polite(kit, connection_made=lambda _: GREETED.set(7), shutdown=lambda _: seen.append(GREETED.get()))
    transport, _ = kit.connect(protocol)
    transport.notify_drain()
    assert seen == [7]
    assert GREETED.get() == 0


@pytest.mark.parametrize("method", ["shutdown", "heartbeat"])
def test_a_method_that_is_async_runs_as_a_task(kit: Kit, method: str) -> None:
    seen: list[int] = []
    protocol = Slow(kit, connection_made=lambda _: GREETED.set(7), shutdown=lambda _: seen.append(GREETED.get()))
    transport, _ = kit.connect(protocol)
    transport._call_hook(method)
    gc.collect()
    kit.until(lambda: seen)
    assert (protocol.calls, seen) == (["connection_made", "shutdown"], [7])


@pytest.mark.parametrize("kind", [Polite, Slow])
@pytest.mark.parametrize("error", [ValueError("wrong"), KeyError()], ids=repr)
def test_a_shutdown_method_that_raises_is_reported(kit: Kit, error: Exception, kind: type[Recorder]) -> None:
    def raising(_: Any) -> None:
        raise error

    protocol = kind(kit, shutdown=raising)
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    transport.notify_drain()
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [error]
    assert len(kit.in_thread(read_to_end, peer)) < MUCH
    [reported] = kit.take_reported()
    assert reported["message"] == "protocol.shutdown() call failed."
    assert (reported["exception"], reported["protocol"], reported["transport"]) == (error, protocol, transport)


@pytest.mark.parametrize("unsent", [b"", bytes(MUCH)], ids=["sent", "unsent"])
def test_one_that_ends_already_is_not_asked(kit: Kit, unsent: bytes) -> None:
    protocol = Polite(kit)
    transport, _ = kit.connect(protocol)
    transport.write(unsent)
    transport.close()
    transport.notify_drain()
    assert protocol.calls.count("shutdown") == 0


def test_a_late_client_is_heard_before_the_drain_is_notified(kit: Kit) -> None:
    drain.begin()
    protocol = Polite(kit)
    kit.connect(protocol, first=b"hello?")
    assert protocol.calls == ["connection_made", "data_received", "shutdown"]


def test_a_late_silent_client_is_notified_at_once(kit: Kit) -> None:
    drain.begin()
    protocol = Polite(kit)
    kit.connect(protocol)
    assert protocol.calls == ["connection_made", "shutdown"]


@pytest.mark.parametrize("where", ["connection_made", "data_received", "shutdown"])
@pytest.mark.parametrize("end", ["close", "abort"])
def test_a_late_client_may_end_at_any_time(kit: Kit, where: str, end: str) -> None:
    drain.begin()
    protocol = Polite(kit, **{where: lambda p, *_: getattr(p.transport, end)()})
    kit.connect(protocol, first=b"hello?")
    kit.until(lambda: protocol.lost)
    assert protocol.calls[-2:] == [where, "connection_lost"]


def test_one_whose_client_has_gone_meanwhile_is_not_asked(kit: Kit) -> None:
    def at_its_end() -> tuple[socket.socket, socket.socket]:
        served, peer = tcp_pair()
        served.shutdown(socket.SHUT_RD)
        return served, peer

    drain.begin()
    protocol = Polite(kit)
    kit.connect(protocol, at_its_end)
    assert protocol.calls == ["connection_made", "eof_received", "connection_lost"]


def test_the_transport_says_whether_the_worker_drains(kit: Kit) -> None:
    transport, _ = kit.connect(Recorder(kit))
    assert transport.get_extra_info("draining") is False
    drain.begin()
    assert transport.get_extra_info("draining") is True
