"""What a worker does to a listener that all share: the master sets it right, and the others go on."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.clients import datagram_client
from tests.support.daemon import STOOD_STILL, Daemon, Harness
from tests.support.processes import eventually
from tests.support.unprivileged import AS_NOBODY, check_unchanged, order_worker, unprivileged_daemon

HANDLERS = {"tcp": "Hostile", "udp": "Datagrams"}


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "unix:{}/sock"])
def test_cleared_o_nonblock_gets_no_worker_killed(open_harness: Harness, open_directory: Path, address: str) -> None:
    listen = (address.format(open_directory),)
    daemon = unprivileged_daemon(open_harness, "stall_timeout=900ms", listen=listen, workers=3).start()
    daemon.allow(STOOD_STILL)
    master, workers = daemon.pid, daemon.workers()
    order_worker(open_harness, daemon, "poison", "blocking")
    daemon.wait_log("listener .*: O_NONBLOCK was changed by another process, and is set right")
    for _ in range(4):
        assert "value" in order_worker(open_harness, daemon, "load", "json")
    eventually(lambda: all(one["heartbeat_age"] < 0.9 for one in daemon.status()["workers"]), what="heartbeats")
    check_unchanged(daemon, master, workers)


@pytest.mark.parametrize("change", ["reload", "restart"])
def test_cleared_o_nonblock_does_not_outlive_a_change(open_harness: Harness, change: str) -> None:
    daemon = unprivileged_daemon(open_harness, "stall_timeout=900ms").start()
    daemon.allow(STOOD_STILL)
    order_worker(open_harness, daemon, "poison", "blocking")
    assert daemon.command(change).returncode == 0
    workers = daemon.wait_workers(2)
    order_worker(open_harness, daemon, "poison", "blocking")
    # An old worker that still leaves the listener may set it right before the master looks, which then has no record.
    for _ in range(4):
        assert "value" in order_worker(open_harness, daemon, "load", "json")
    eventually(lambda: all(one["heartbeat_age"] < 0.9 for one in daemon.status()["workers"]), what="heartbeats")
    assert daemon.workers() == workers


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "unix:{}/sock"])
def test_listener_that_was_shut_down_listens_again(open_harness: Harness, open_directory: Path, address: str) -> None:
    daemon = unprivileged_daemon(open_harness, listen=(address.format(open_directory),)).start()
    master, workers = daemon.pid, daemon.workers()
    where, client = daemon.address, open_harness.connect(daemon)
    order_worker(open_harness, daemon, "poison", "shutdown")
    daemon.wait_log("it was shut down by another process, and is set right")
    assert daemon.address == where
    for _ in range(4):
        assert "value" in order_worker(open_harness, daemon, "load", "json")
    client.sendall(json.dumps(["load", "json"]).encode() + b"\n")
    assert client.recv(1000) == b'{"value": "json"}\n'
    check_unchanged(daemon, master, workers)
    assert daemon.status()["state"] == "running"


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("filter", "a socket filter"),
        ("linger", "SO_LINGER"),
        ("defer", "TCP_DEFER_ACCEPT"),
        ("device", "SO_BINDTODEVICE"),
    ],
)
def test_options_of_a_listener_are_set_back(open_harness: Harness, how: str, said: str) -> None:
    daemon = open_harness.daemon(target="hostile:Hostile").start()  # whether others may attach a filter depends
    assert "value" in order_worker(open_harness, daemon, "poison", how)
    daemon.wait_log(f"{said} was changed by another process, and is set right")
    assert "value" in order_worker(open_harness, daemon, "load", "json")


def test_backlog_of_a_listener_is_set_back(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    limit = daemon.status()["listeners"][0]["queue_limit"]
    order_worker(open_harness, daemon, "poison", "backlog")
    eventually(lambda: daemon.status()["listeners"][0]["queue_limit"] == limit, what="the backlog")
    assert daemon.status()["state"] == "running"


def test_listener_whose_port_was_taken_is_degraded(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness, workers=1).start()
    where, client = daemon.address, open_harness.connect(daemon)
    assert "value" in order_worker(open_harness, daemon, "take_port", int(where.rpartition(":")[2]))
    daemon.expect(f"listener {where} was shut down, and can't listen again: {where} is in use")
    daemon.wait_log("can't listen again")
    status = daemon.status()
    assert status["state"] == "degraded"
    assert status["reason"] == f"{where} was shut down, and can't listen again: {where} is in use"
    client.sendall(b'["give_port"]\n')
    eventually(lambda: daemon.status()["state"] == "running", what="the listener")
    assert "value" in order_worker(open_harness, daemon, "load", "json")


def test_worker_that_claims_no_load_leaves_no_client_waiting(open_harness: Harness) -> None:
    daemon = unprivileged_daemon(open_harness).start()
    assert "value" in order_worker(open_harness, daemon, "claim_no_load")
    for _ in range(10):  # of which the other worker alone would take no more than seven, for they stay
        assert order_worker(open_harness, daemon, "load", "json") == {"value": "json"}


def datagram_daemon(harness: Harness, *identity: str) -> Daemon:
    """One worker that has a TCP listener to be ordered by, and an echo by UDP."""
    listen = ("tcp://127.0.0.1:0", "udp://127.0.0.1:0")
    daemon = harness.daemon(target=harness.directory / "settings.yaml", listen=(), workers=1, settings=identity)
    lines = [f"  - {{address: '{one}', handler: 'hostile:{HANDLERS[one[:3]]}'}}\n" for one in listen]
    (harness.directory / "settings.yaml").write_text("listen:\n" + "".join(lines))
    return daemon.start()


@pytest.mark.parametrize("how", ["connect", "shutdown"])
def test_udp_socket_that_hears_nothing_is_replaced(open_harness: Harness, how: str) -> None:
    daemon = datagram_daemon(open_harness, *AS_NOBODY)
    workers, where = daemon.workers(), daemon.status()["listeners"][1]["address"]
    with datagram_client(where) as client:
        client.send(b"one")
        assert client.recv(10) == b"one"
        assert "value" in order_worker(open_harness, daemon, "poison", how, "udp")
        daemon.wait_log(f"listener {re.escape(where)}: it was (connected|shut down) by another process")
        daemon.wait_workers(1, without=workers.values())
        client.send(b"two")
        assert client.recv(10) == b"two"


def test_udp_socket_comes_to_the_next_worker_as_it_was(open_harness: Harness) -> None:
    daemon = datagram_daemon(open_harness)
    workers, where = daemon.workers(), daemon.status()["listeners"][1]["address"]
    assert "value" in order_worker(open_harness, daemon, "poison", "filter", "udp")
    daemon.expect("has ended: killed")
    os.kill(workers[1], signal.SIGKILL)
    daemon.wait_workers(1, without=workers.values())
    with datagram_client(where) as client:
        client.send(b"there")
        assert client.recv(10) == b"there"
