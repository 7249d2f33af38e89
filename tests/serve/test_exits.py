"""sys.exit() in a handler: it ends the connection that it was called for, and is logged."""

from __future__ import annotations

import pytest

from tests.support.clients import at_end, datagram_client, echoes, read
from tests.support.daemon import Harness


def test_exit_in_a_protocol_ends_its_connection_alone(harness: Harness) -> None:
    daemon = harness.daemon(target="exits:Exits", workers=1).run()
    (before,) = daemon.workers().values()
    bystander = harness.connect(daemon)
    assert echoes(bystander)
    daemon.expect("protocol.data_received", "task or callback of the handler")
    for word in (b"callback", b"interrupt", b"task", b"soon", b"later"):
        client = harness.connect(daemon)
        client.sendall(word)
        assert at_end(client), word
    assert echoes(bystander)
    assert list(daemon.workers().values()) == [before]
    assert sum("SystemExit" in record for record in daemon.records()) == 4
    assert not any("never retrieved" in record for record in daemon.records())


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0"])
def test_exit_in_a_streams_coroutine_ends_its_connection(harness: Harness, listen: str) -> None:
    daemon = harness.daemon(target="exits:by_streams", workers=1, listen=(listen,)).run()
    (before,) = daemon.workers().values()
    bystander, client = harness.connect(daemon), harness.connect(daemon)
    daemon.expect("The streams handler failed.*(\n.*)*SystemExit: 3")
    client.sendall(b"streams")
    assert at_end(client)
    assert echoes(bystander)
    assert list(daemon.workers().values()) == [before]


def test_exit_in_a_datagram_protocol_leaves_its_worker(harness: Harness) -> None:
    daemon = harness.daemon(target="exits:Grams", workers=1, listen=("udp://127.0.0.1:0",)).run()
    (before,) = daemon.workers().values()
    client = harness.closing(datagram_client(daemon.address))
    daemon.expect("protocol.datagram_received")
    client.send(b"exit")
    assert echoes(client)
    assert list(daemon.workers().values()) == [before]


def test_exit_in_a_forked_child_is_that_childs(harness: Harness) -> None:
    daemon = harness.daemon(target="exits:Exits", workers=1).run()
    client = harness.connect(daemon)
    client.sendall(b"child")
    assert read(client, 1) == b"5"
    assert echoes(client)
