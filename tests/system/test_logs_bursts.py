"""Floods of records: how many of one kind are written, and that it is told how many more there were."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from forkd.system.logs import BURST, BURST_SECONDS, MOST_KINDS, BurstFilter
from tests.support.clients import at_end, datagram_client
from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually

TROUBLE = """
import asyncio

class Raises(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        if data == b"other":
            raise LookupError("another one")
        raise ValueError("as it was asked to")

class Grams(asyncio.DatagramProtocol):
    def datagram_received(self, data, addr):
        raise ValueError("as it was asked to")
"""


class Bursts:
    def __init__(self) -> None:
        self.now = 0.0
        self.more: list[str] = []
        self.filter = BurstFilter(lambda record: self.more.append(record.getMessage()), lambda: self.now)

    def note(self, text: str, *args: object, name: str = "forkd.transport", listener: str | None = "tcp://x:1") -> bool:
        record = logging.LogRecord(name, logging.INFO, "", 1, text, args, None)
        if listener is not None:
            record.listener = listener
        return self.filter.filter(record)

    def fail(self, function: Callable[[], object]) -> bool:
        try:
            function()
        except Exception:  # noqa: BLE001
            record = logging.LogRecord("asyncio", logging.ERROR, "", 1, "failed\nprotocol: 5", (), sys.exc_info())
            return self.filter.filter(record)
        return False


def test_burst_is_written_and_then_counted() -> None:
    bursts = Bursts()
    assert [bursts.note("closed %s", number) for number in range(100)] == [True] * BURST + [False] * (100 - BURST)
    bursts.filter.tell(bursts.now)
    assert bursts.more == []
    bursts.now += BURST_SECONDS
    bursts.filter.tell(bursts.now)
    assert bursts.more == [f"{100 - BURST} more like this: closed {BURST}"]
    assert bursts.note("closed %s", 100)


def test_burst_of_one_kind_hides_no_other() -> None:
    bursts = Bursts()
    while bursts.note("closed %s", 1):
        pass
    assert bursts.note("closed %s", 1, listener="tcp://x:2")
    assert bursts.note("vanished %s", 1)
    assert all(bursts.note("about no client", listener=None) for _ in range(100))
    assert all(bursts.note("%s", 1, name="forkd.access") for _ in range(100))


def test_burst_of_an_exception_hides_no_other_exception() -> None:
    bursts = Bursts()
    while bursts.fail(lambda: int("x")):
        pass
    assert bursts.fail(lambda: str.index("x", "y"))
    assert bursts.fail(lambda: int("y"))


def test_bursts_of_too_many_kinds_are_one_kind() -> None:
    bursts = Bursts()
    written = sum(bursts.note(f"kind {number}") for number in range(10 * MOST_KINDS))
    assert written == MOST_KINDS + BURST


def lines(daemon: Daemon, pattern: str) -> int:
    return sum(pattern in record for record in daemon.records())


def test_burst_of_connections_that_fail_is_told_in_short(harness: Harness) -> None:
    (harness.directory / "says.py").write_text(TROUBLE)
    daemon = harness.daemon(target="says:Raises", workers=1).run()
    daemon.expect("as it was asked to", "another one")
    for data in [b"x"] * 30 + [b"other"]:
        client = harness.connect(daemon)
        client.sendall(data)
        assert at_end(client)
    assert daemon.status()["workers"][0]["errors"] == 31
    daemon.stop()
    assert lines(daemon, "Traceback") == BURST + 1
    assert lines(daemon, f"{30 - BURST} more like this: ") == 1


def test_burst_of_datagrams_that_fail_is_told_in_short(harness: Harness) -> None:
    (harness.directory / "says.py").write_text(TROUBLE)
    daemon = harness.daemon(target="says:Grams", workers=1, listen=("udp://127.0.0.1:0",)).run()
    daemon.expect("as it was asked to")
    client = harness.closing(datagram_client(daemon.address))
    for _ in range(30):
        client.send(b"x")
    eventually(lambda: daemon.status()["workers"][0]["errors"] == 30, what="all errors")
    daemon.stop()
    assert lines(daemon, "Traceback") == BURST
    assert lines(daemon, f"{30 - BURST} more like this: ") == 1


def test_burst_of_silent_clients_is_told_in_short(harness: Harness) -> None:
    daemon = harness.daemon(workers=1, settings=("listen.timeouts.first_byte=50ms",)).run()
    clients = [harness.connect(daemon) for _ in range(30)]
    assert all(at_end(client) for client in clients)
    daemon.stop()
    assert lines(daemon, "(first_byte): it has never sent anything") == BURST + 1
    assert lines(daemon, f"{30 - BURST} more like this: closed client") == 1
