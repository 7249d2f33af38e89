"""The transport while its worker drains: a protocol that has a `shutdown()` is asked to end, and no other is disturbed.

asyncio's own transport has nothing like it, so these tests are for forkd's alone.
"""

from __future__ import annotations

import contextvars
import socket

import pytest
from contract import MUCH, Recorder, forkd_only, kits, read_to_end, tcp_pair

from forkd import drain

kit = kits
pytestmark = forkd_only

GREETED = contextvars.ContextVar("GREETED", default=0)


class Polite(Recorder):
    """One that can be asked to end."""

    def shutdown(self):
        self.called("shutdown")


@pytest.fixture(autouse=True)
def worker(monkeypatch):
    """This process as a worker that does not drain yet."""
    monkeypatch.setattr(drain._Worker, "drains", False)


def test_a_protocol_that_is_asked_to_end_goes_on_until_it_suits_it(kit):
    protocol = Polite(kit)
    transport, peer = kit.connect(protocol)
    transport.ask_to_end()
    assert protocol.calls == ["connection_made", "shutdown"]
    peer.sendall(b"one more")
    kit.until(lambda: protocol.received)
    transport.write(b"goodbye")
    transport.close()
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [None]
    assert kit.in_thread(read_to_end, peer) == b"goodbye"


@pytest.mark.parametrize("shutdown", [None, "at noon"])
def test_a_protocol_without_a_way_to_be_asked_is_served_on(kit, shutdown):
    protocol = Recorder(kit)
    if shutdown:
        protocol.shutdown = shutdown
    transport, peer = kit.connect(protocol)
    transport.ask_to_end()
    peer.sendall(b"one more")
    kit.until(lambda: protocol.received)
    assert not transport.is_closing()


def test_a_protocol_is_asked_in_the_context_of_its_connection(kit):
    seen = []
    protocol = Polite(kit, connection_made=lambda _: GREETED.set(7), shutdown=lambda _: seen.append(GREETED.get()))
    transport, _ = kit.connect(protocol)
    transport.ask_to_end()
    assert seen == [7]
    assert GREETED.get() == 0


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyError()], ids=repr)
def test_one_that_raises_when_it_is_asked_is_reported_and_lost(kit, error):
    def raising(_):
        raise error

    protocol = Polite(kit, shutdown=raising)
    transport, peer = kit.connect(protocol)
    transport.write(bytes(MUCH))
    transport.ask_to_end()
    kit.until(lambda: protocol.lost)
    assert protocol.lost == [error]
    assert len(kit.in_thread(read_to_end, peer)) < MUCH
    [reported] = kit.take_reported()
    assert reported["message"] == "protocol.shutdown() call failed."
    assert (reported["exception"], reported["protocol"], reported["transport"]) == (error, protocol, transport)


@pytest.mark.parametrize("unsent", [b"", bytes(MUCH)], ids=["sent", "unsent"])
def test_one_that_ends_already_is_not_asked(kit, unsent):
    protocol = Polite(kit)
    transport, _ = kit.connect(protocol)
    transport.write(unsent)
    transport.close()
    transport.ask_to_end()
    assert protocol.calls.count("shutdown") == 0


def test_one_that_connects_while_the_worker_drains_is_asked_when_its_first_words_are_heard(kit):
    drain.begin()
    protocol = Polite(kit)
    kit.connect(protocol, first=b"hello?")
    assert protocol.calls == ["connection_made", "data_received", "shutdown"]


def test_one_that_connects_while_the_worker_drains_and_says_nothing_is_asked_at_once(kit):
    drain.begin()
    protocol = Polite(kit)
    kit.connect(protocol)
    assert protocol.calls == ["connection_made", "shutdown"]


@pytest.mark.parametrize("where", ["connection_made", "data_received", "shutdown"])
@pytest.mark.parametrize("end", ["close", "abort"])
def test_one_that_connects_while_the_worker_drains_may_end_at_any_time(kit, where, end):
    drain.begin()
    protocol = Polite(kit, **{where: lambda p, *_: getattr(p.transport, end)()})
    kit.connect(protocol, first=b"hello?")
    kit.until(lambda: protocol.lost)
    assert protocol.calls[-2:] == [where, "connection_lost"]


def test_one_whose_client_has_gone_meanwhile_is_not_asked(kit):
    def at_its_end():
        served, peer = tcp_pair()
        served.shutdown(socket.SHUT_RD)
        return served, peer

    drain.begin()
    protocol = Polite(kit)
    kit.connect(protocol, at_its_end)
    assert protocol.calls == ["connection_made", "eof_received", "connection_lost"]


def test_the_transport_says_whether_the_worker_drains(kit):
    transport, _ = kit.connect(Recorder(kit))
    assert transport.get_extra_info("draining") is False
    drain.begin()
    assert transport.get_extra_info("draining") is True
