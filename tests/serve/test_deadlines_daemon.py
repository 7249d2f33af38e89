"""Deadlines in a real daemon: each ends what it should, says so to the log, the handler and the counters, and leaves
all other clients alone.
"""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import ssl
import time
from typing import Any

import pytest

from tests.support.clients import at_end, echoes, read
from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually
from tests.support.transport_contract import anonymous

ADDRESSES = ["tcp://127.0.0.1:0", "tcp://[::1]:0", "unix:@forkd-{}"]


def start(harness: Harness, handler: str, *settings: str, address: str = ADDRESSES[0], **more: Any) -> Daemon:
    settings = tuple(f"listen.{setting}" for setting in settings)
    address = address.format(harness.directory.name)
    return harness.daemon(target=f"lasting:{handler}", listen=(address,), settings=settings, **more).start()


def ended(daemon: Daemon) -> dict[str, int]:
    """The counts of connections that were ended, by reason, of all workers together; those that are none left out."""
    workers = daemon.status()["workers"]
    reasons = workers[0]["ended"]
    return {reason: count for reason in reasons if (count := sum(worker["ended"][reason] for worker in workers))}


def expect_end(daemon: Daemon, client: socket.socket, reason: str, error: str, before: int = 0) -> None:
    """Waits until the client's connection ends for this reason, and for all that are to hear of it; so many have ended
    by it before.
    """
    assert at_end(client)
    daemon.wait_log(rf"INFO tested worker \d.* closed client .* \({reason}\): it ")
    daemon.wait_log(f"lost by {error}: it ")
    assert ended(daemon) == {reason: before + 1}


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_client_that_says_nothing_is_closed(harness: Harness, address: str) -> None:
    daemon = start(harness, "Echo", "timeouts.first_byte=1s", "timeouts.idle=off", address=address)
    other = harness.connect(daemon)
    assert echoes(other)
    began = time.monotonic()
    expect_end(daemon, harness.connect(daemon), "first_byte", "FirstByteTimeout")
    assert time.monotonic() - began >= 1.0
    assert echoes(other)


def test_a_client_that_is_told_something_need_not_speak(harness: Harness) -> None:
    daemon = start(harness, "Ticking", "timeouts.first_byte=700ms", "timeouts.idle=off")
    client = harness.connect(daemon)
    assert read(client, 16) == b"tick" * 4  # one each 300 ms
    assert ended(daemon) == {}
    client.close()


@pytest.mark.parametrize("handler", ["Echo", "Filling"])
@pytest.mark.parametrize("address", ADDRESSES)
def test_a_client_that_falls_silent_is_closed(harness: Harness, address: str, handler: str) -> None:
    daemon = start(harness, handler, "timeouts.idle=300ms", address=address)
    client = eventually(lambda: speaking(harness.connect(daemon), b"x", 0.6, 0.2), what="a client that is never silent")
    before = ended(daemon).get("idle", 0)
    last = time.monotonic()
    expect_end(daemon, client, "idle", "IdleTimeout", before)
    assert time.monotonic() - last >= 0.2


def speaking(client: socket.socket, word: bytes, seconds: float, most: float) -> socket.socket | None:
    """The client when it has sent a word each 50 ms for so long, and had each back; None where this machine was late,
    so that it was silent for longer than `most` once, and may have been closed.
    """
    began = last = time.monotonic()
    while last < began + seconds:
        try:
            answered = echoes(client, word)
        except ConnectionError:
            answered = False
        before, last = last, time.monotonic()
        if last - before > most:
            client.close()
            return None
        assert answered
        select.select([client], [], [], 0.05)
    return client


def test_a_sender_of_a_byte_now_and_then_ends_with_its_lifetime(harness: Harness) -> None:
    daemon = start(harness, "Echo", "timeouts.idle=10s", "timeouts.lifetime=600ms")
    client = harness.connect(daemon)
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):  # a byte that is on its way when it is closed has it reset
        while not select.select([client], [], [], 0.05)[0] or client.recv(1):
            client.sendall(b"x")
    assert time.monotonic() - began >= 0.6
    daemon.wait_log(r"lost by LifetimeOver: it is \d+\.\d s old")
    assert ended(daemon) == {"lifetime": 1}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("handler", ["Echo", "Parting", "sending"])
def test_a_client_that_never_reads_is_closed(harness: Harness, handler: str, address: str) -> None:
    daemon = start(harness, handler, "timeouts.write=500ms", "timeouts.idle=off", address=address)
    client = harness.connect(daemon)
    client.settimeout(1)
    try:
        while handler == "Echo":
            client.sendall(bytes(65536))
    except (TimeoutError, ConnectionError):  # it takes no more, or is gone by now
        pass
    daemon.wait_log(r"closed client .* \(write\): it has taken nothing")
    daemon.wait_log("lost by WriteTimeout")
    assert ended(daemon) == {"write": 1}


def test_a_client_that_reads_slowly_is_not_closed(harness: Harness) -> None:
    # Its handler has closed, so that neither a first byte nor a sign of life is waited for.
    silence = ("timeouts.first_byte=500ms", "keepalive.heartbeat=500ms")
    daemon = start(harness, "Parting", "timeouts.write=600ms", *silence, "socket.send_buffer=64KiB")
    client = harness.connect(daemon)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    got, began = 0, time.monotonic()
    while time.monotonic() < began + 1.5:
        got += len(client.recv(65536))
        select.select([], [], [], 0.01)
    assert ended(daemon) == {}
    while data := client.recv(1 << 20):
        got += len(data)
    assert got == 64 << 20


@pytest.mark.parametrize("off", ["off", "0"])
def test_a_deadline_that_is_off_ends_no_client(harness: Harness, off: str) -> None:
    daemon = start(harness, "Echo", *(f"timeouts.{name}={off}" for name in ("first_byte", "idle", "write", "lifetime")))
    silent, client = harness.connect(daemon), harness.connect(daemon)
    assert echoes(client)
    assert not select.select([silent, client], [], [], 0.5)[0]
    assert ended(daemon) == {}


def test_a_streams_handler_reads_why(harness: Harness) -> None:
    daemon = start(harness, "streams", "timeouts.idle=300ms")
    client = harness.connect(daemon)
    assert echoes(client)
    assert at_end(client)
    daemon.wait_log("read raises IdleTimeout: it was idle for")


# The heartbeat


def test_a_silent_client_lives_while_it_answers_heartbeats(harness: Harness) -> None:
    daemon = start(harness, "Asking", "keepalive.heartbeat=800ms", "timeouts.first_byte=off")
    client = harness.connect(daemon)
    for _ in range(2):
        assert read(client, 1) == b"?"
        assert echoes(client, b"!")
    last = time.monotonic()
    assert read(client, 1) == b"?"
    expect_end(daemon, client, "heartbeat", "HeartbeatLost")
    assert time.monotonic() - last >= 1.5


def test_a_client_that_speaks_is_not_asked(harness: Harness) -> None:
    daemon = start(harness, "Asking", "keepalive.heartbeat=400ms")
    assert eventually(lambda: speaking(harness.connect(daemon), b"!", 1.0, 0.3), what="a client that is never silent")


def test_a_protocol_without_a_heartbeat_is_left_alone(harness: Harness) -> None:
    daemon = start(harness, "Echo", "keepalive.heartbeat=100ms", "timeouts.first_byte=off", "timeouts.idle=off")
    client = harness.connect(daemon)
    assert not select.select([client], [], [], 0.8)[0]
    assert echoes(client)


def test_a_new_protocol_has_heartbeats_the_old_one_had_not(harness: Harness) -> None:
    daemon = start(harness, "Handing", "keepalive.heartbeat=100ms", "timeouts.first_byte=off", "timeouts.idle=off")
    client = harness.connect(daemon)
    assert not select.select([client], [], [], 0.5)[0]
    client.sendall(b"x")
    assert read(client, 1) == b"?"


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_half_closed_client_is_not_expected_to_send(harness: Harness, address: str) -> None:
    silence = ("timeouts.first_byte=200ms", "keepalive.heartbeat=200ms")
    daemon = start(harness, "Staying", *silence, "timeouts.idle=10s", address=address)
    client = harness.connect(daemon)
    client.shutdown(socket.SHUT_WR)
    assert not select.select([client], [], [], 1.0)[0]
    assert ended(daemon) == {}


def test_a_protocol_is_asked_when_the_handshake_of_tls_is_done(harness: Harness) -> None:
    daemon = start(harness, "Securing", "keepalive.heartbeat=100ms", "timeouts.first_byte=off")
    client = harness.connect(daemon)
    assert not select.select([client], [], [], 0.5)[0]
    with anonymous(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(client) as over_tls:
        assert over_tls.recv(1) == b"?"


def test_a_heartbeat_that_raises_ends_its_connection(harness: Harness) -> None:
    daemon = start(harness, "Failing", "keepalive.heartbeat=100ms")
    daemon.expect(r"(?s)ERROR tested worker.*heartbeat\(\) call failed.*no heart")
    assert at_end(harness.connect(daemon))
    eventually(lambda: sum(worker["errors"] for worker in daemon.status()["workers"]) == 1)


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_client_that_sends_is_alive_while_it_is_not_read(harness: Harness, address: str) -> None:
    daemon = start(harness, "Deaf", "keepalive.heartbeat=800ms", "timeouts.first_byte=off", address=address)
    client = harness.connect(daemon)
    until = time.monotonic() + 2.5
    while (left := until - time.monotonic()) > 0:
        if select.select([client], [], [], left)[0]:
            assert client.recv(1) == b"?"
            client.sendall(b"!")
    assert ended(daemon) == {}


# The access log


def test_the_access_log_has_a_record_of_each_end(harness: Harness) -> None:
    settings = ("log.access=true", "log.format=json", "log.level=warning", "listen.timeouts.first_byte=1s")
    daemon = harness.daemon(target="lasting:Echo", settings=settings).start()

    def recorded(client: socket.socket) -> dict[str, Any]:
        name = "{}:{}".format(*client.getsockname())

        def found() -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in daemon.log.read_text().splitlines()]
            return [line for line in lines if line["logger"] == "forkd.access" and line.get("client") == name]

        records = eventually(lambda: found() if daemon.log.exists() else [], what=f"the record of {name}")
        assert len(records) == 1
        return records[0]

    leaver = harness.connect(daemon)
    assert echoes(leaver, b"x" * 1000)
    leaver.shutdown(socket.SHUT_WR)
    assert at_end(leaver)
    record = recorded(leaver)
    assert (record["bytes_in"], record["bytes_out"], record["reason"]) == (1000, 1000, "eof")
    assert record["listener"] == daemon.status()["listeners"][0]["address"] or record["listener"].startswith("tcp://")
    assert 0 < record["seconds"] < 20
    assert 0 < record["rtt"] < 5

    silent = harness.connect(daemon)
    assert at_end(silent)
    assert recorded(silent)["reason"] == "first_byte"

    resetting = harness.connect(daemon)
    assert echoes(resetting)
    name = resetting.getsockname()
    resetting.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    resetting.close()
    eventually(lambda: re.search(rf"{name[0]}:{name[1]}.*\"reason\": \"reset\"", daemon.log.read_text()))


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_line_of_the_access_log_reads_well(harness: Harness, address: str) -> None:
    address = address.format(harness.directory.name)
    daemon = harness.daemon(target="lasting:Echo", listen=(address,), settings=("log.access=true",)).start()
    client = harness.connect(daemon)
    assert echoes(client, b"12345")
    client.close()
    rtt = "rtt -" if address.startswith("unix") else r"rtt [\d.]+ ms"
    peer = {"u": "unix", "t": r"\[::1\]:\d+" if "::" in address else r"127.0.0.1:\d+"}[address[0]]
    daemon.wait_log(rf"{peer} on {re.escape(address)[:8]}\S*: [\d.]+ s, in 5, out 5, {rtt}, eof$")


def test_without_the_setting_there_is_no_access_log(harness: Harness) -> None:
    daemon = harness.daemon(target="lasting:Echo").start()
    client = harness.connect(daemon)
    assert echoes(client)
    client.close()
    daemon.wait_log("lost by NoneType")
    assert not [record for record in daemon.records() if "in 15, out 15" in record]


# Many


def test_many_that_expire_together_do_not_hold_up_the_others(harness: Harness) -> None:
    daemon = start(harness, "Echo", "timeouts.first_byte=1s", workers=1)
    good = harness.connect(daemon)
    assert echoes(good)
    silent = [harness.connect(daemon) for _ in range(300)]
    for client in silent:
        assert at_end(client)
    assert ended(daemon) == {"first_byte": 300}
    assert echoes(good)


@pytest.mark.parametrize(
    ("factory", "said"), [("nothing_first", "returned None"), ("misfit_first", "The protocol factory failed")]
)
def test_connection_that_could_not_be_made_has_no_deadline(harness: Harness, factory: str, said: str) -> None:
    settings = ("listen.timeouts.lifetime=1s",)
    daemon = harness.daemon(target=f"faulty:{factory}", workers=1, settings=settings).start()
    daemon.expect(said)
    assert at_end(harness.connect(daemon))
    second = harness.connect(daemon)  # by the same descriptor
    assert echoes(second)
    assert at_end(second)  # by its own deadline, which is later than that of the first would be
    eventually(lambda: daemon.status()["totals"]["closed"] >= 2, what="its end")
    assert daemon.status()["totals"]["closed"] == 2
    assert ended(daemon) == {"lifetime": 1}


def test_socket_that_its_handler_has_closed_harms_no_other(harness: Harness) -> None:
    daemon = harness.daemon(target="faulty:ClosesItself", workers=1).start()
    first = harness.connect(daemon)
    first.sendall(b"close")
    assert at_end(first)
    second = harness.connect(daemon)  # by the same descriptor
    assert echoes(second)
    eventually(lambda: daemon.status()["workers"][0]["clients"] == 1, what="the end of the first")
    assert echoes(second)
