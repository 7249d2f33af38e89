"""Limits of a listener's connections, by the real daemon: never more than there may be, in one worker, in all of them,
from one address; and slots come back however a connection ends.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.clients import at_end, dial, echoes, survives
from tests.support.daemon import Daemon, Harness
from tests.support.many_clients import BurstClients
from tests.support.network_namespaces import private_network
from tests.support.processes import eventually

HERE = "127.0.0.1"


def write(harness: Harness, limits: str, more: str = "", address: str = "tcp://127.0.0.1:0") -> None:
    """Settings with one listener, an echo."""
    listener = f"{{address: '{address}', handler: 'forkd.builtin:Echo', limits: {limits}{more}}}"
    (harness.directory / "limited.yaml").write_text(f"listen: [{listener}]\n")


def start(harness: Harness, workers: int, limits: str, more: str = "", address: str = "tcp://127.0.0.1:0") -> Daemon:
    write(harness, limits, more, address)
    target = harness.directory / "limited.yaml"
    return harness.daemon(target=target, workers=workers, listen=(), settings=("drain_timeout=15m",)).start()


def refused(daemon: Daemon) -> dict[str, int]:
    """How many were refused in all, by reason; as long as no worker has died the rows say the same."""
    status = daemon.status()
    found: dict[str, int] = dict(status["totals"]["refused"])
    if not status["deaths"]:
        assert found == {key: sum(one["refused"][key] for one in status["workers"]) for key in found}
    return {reason: count for reason, count in found.items() if count}


def wait_no_clients(daemon: Daemon) -> None:
    eventually(lambda: not sum(one["clients"] for one in daemon.status()["workers"]), what="the end of all clients")


@pytest.mark.parametrize(("limits", "most"), [("{connections: 5}", 5), ("{per_worker: 2}", 8)])
def test_a_client_without_a_slot_waits_in_the_backlog(harness: Harness, limits: str, most: int) -> None:
    daemon = start(harness, 4, limits)
    with BurstClients() as burst:
        burst.connect(daemon.address, [HERE] * 25).wait(served=most)
        with pytest.raises(AssertionError, match=f"{most} are served"):
            burst.wait(seconds=0.7)
        for _ in range(4):
            burst.close(3)
            burst.wait(served=most)
        assert burst.refused == []
        daemon.wait_clients(most)
    assert refused(daemon) == {}


def test_one_slot_serves_one_client_after_the_other(harness: Harness) -> None:
    """With more workers than slots most have none reserved, and every slot is some worker's."""
    daemon = start(harness, 4, "{connections: 1}")
    with BurstClients() as burst:
        burst.connect(daemon.address, [HERE] * 12)
        for _ in range(12):
            burst.wait(served=1)
            assert sum(one["clients"] for one in daemon.status()["workers"]) == 1
            burst.close(1)
        assert (burst.waiting, burst.refused) == (set(), [])


def test_a_connection_with_quick_ack_releases_its_slot_too(harness: Harness) -> None:
    daemon = start(harness, 1, "{connections: 1, per_ip: 1}", ", socket: {quickack: true}")
    for _ in range(3):
        client = harness.connect(daemon)
        assert echoes(client)
        client.close()
        wait_no_clients(daemon)
    assert refused(daemon) == {}


def test_a_client_without_a_slot_is_refused_with_the_message(harness: Harness) -> None:
    daemon = start(harness, 4, r"{connections: 6, over: refuse, message: 'full\x21 go\r\n'}")
    with BurstClients() as burst:
        burst.connect(daemon.address, [HERE] * 40).wait()
        assert len(burst.served) == 6
        # They had sent something that was not read, and yet none is reset before it has read why.
        assert burst.refused == [b"full! go\r\n"] * 34
    daemon.wait_log(r"INFO .*: refused 127.0.0.1 \(full\)")
    assert len([one for one in daemon.records() if "refused 127" in one]) == 1
    assert refused(daemon) == {"full": 34}
    head, *rows = daemon.command("status").stdout.split("\n\n")[1].splitlines()
    column = head.split().index("REFUSED")
    assert sum(int(row.split()[column]) for row in rows) == 34


def test_each_worker_refuses_beyond_its_own_limit(harness: Harness) -> None:
    daemon = start(harness, 1, "{per_worker: 3, over: refuse}")
    with BurstClients() as burst:
        burst.connect(daemon.address, [HERE] * 10).wait()
        assert len(burst.served) == 3
        burst.close(1)
        wait = daemon.wait_clients(2)
        assert sum(wait.values()) == 2
        burst.connect(daemon.address, [HERE]).wait()
        assert len(burst.served) == 3
    assert refused(daemon) == {"full": 7}


def test_one_address_has_no_more_slots_than_per_ip(harness: Harness) -> None:
    daemon = start(harness, 4, "{per_ip: 5, message: 'no more'}")
    address = daemon.address
    for number in range(6):
        with BurstClients() as burst, BurstClients() as others:
            burst.connect(address, [f"127.0.1.{number % 2}"] * 30)
            others.connect(address, [f"127.0.2.{number % 3}"] * 4)
            assert len(burst.wait().served) == 5
            assert len(others.wait().served) == 4
            assert set(burst.refused) == {b"no more"}
        wait_no_clients(daemon)
    assert refused(daemon) == {"per_ip": 150}


def test_an_ipv6_network_of_64_bits_counts_as_one_client(harness: Harness) -> None:
    with private_network("2001:db8::/32"):
        daemon = start(harness, 4, "{per_ip: 3}", address="tcp://[::1]:0")
        with BurstClients() as burst, BurstClients() as others:
            burst.connect(daemon.address, [f"2001:db8:0:1::{number:x}" for number in range(1, 20)]).wait()
            others.connect(daemon.address, [f"2001:db8:0:{number:x}::1" for number in range(2, 10)]).wait()
            assert (len(burst.served), len(others.served)) == (3, 8)
        assert refused(daemon) == {"per_ip": 16}


def test_no_more_come_from_one_address_than_its_rate_allows(harness: Harness) -> None:
    daemon = start(harness, 4, "{rate_per_ip: 10/h}")
    address = daemon.address
    for turn in range(2):
        with BurstClients() as burst, BurstClients() as others:
            burst.connect(address, ["127.0.1.1"] * 30).wait()
            others.connect(address, [f"127.0.2.{turn}"] * 10).wait()
            assert (len(burst.served), len(others.served)) == (0 if turn else 10, 10)
    assert refused(daemon) == {"rate": 50}


def test_a_denied_client_is_told_nothing(harness: Harness) -> None:
    daemon = start(harness, 2, "{message: 'secret'}", ", allow: [127.0.0.0/8, 10.0.0.0/8], deny: [127.0.3.0/24]")
    with BurstClients() as burst:
        burst.connect(daemon.address, ["127.0.3.1"] * 5 + ["127.0.4.1"] * 5).wait()
        assert len(burst.served) == 5
        assert set(burst.refused) <= {b"", None}
    assert refused(daemon) == {"denied": 5}
    daemon.wait_log(r"INFO .*: refused 127.0.3.1 \(denied\)")


def test_slots_come_back_after_a_worker_was_killed(harness: Harness) -> None:
    daemon = start(harness, 2, "{connections: 6, per_ip: 6, over: refuse}")
    daemon.expect("killed by SIGKILL")
    with BurstClients() as burst, BurstClients() as second:
        burst.connect(daemon.address, [HERE] * 20).wait()
        assert len(burst.served) == 6
        before = daemon.status()["totals"]
        assert (before["accepted"], before["refused"]["full"]) == (6, 14)
        victim = next(pid for pid, count in daemon.wait_clients(6).items() if count)
        os.kill(victim, signal.SIGKILL)
        daemon.wait_workers(2, without={victim})
        left = 0
        for sock in burst.served:
            sock.settimeout(20)
            left += survives(sock)
        second.connect(daemon.address, [HERE] * 20).wait()
        assert len(second.served) + left == 6
        after = daemon.status()["totals"]
        assert (after["accepted"], after["refused"]["full"]) == (12 - left, 14 + 14 + left)


def test_a_reload_changes_limits_and_old_clients_keep_slots(harness: Harness) -> None:
    daemon = start(harness, 2, "{connections: 4, per_ip: 6, over: refuse}")
    with BurstClients() as old, BurstClients() as new:
        old.connect(daemon.address, [HERE] * 4).wait()
        before = daemon.workers()
        write(harness, "{connections: 6, per_ip: 6, over: refuse}")
        assert daemon.command("reload").returncode == 0
        daemon.wait_workers(2, without=before.values())
        new.connect(daemon.address, [HERE] * 10).wait()
        assert (len(old.served), len(new.served), len(new.refused)) == (4, 2, 8)
        old.close()
        eventually(lambda: len(daemon.status()["workers"]) == 2, what="the end of the old workers")
        new.connect(daemon.address, [HERE] * 10).wait()
        assert len(new.served) == 6


def test_an_upgrade_keeps_totals_and_slots(harness: Harness) -> None:
    daemon = start(harness, 2, "{connections: 4, over: refuse}")
    with BurstClients() as old, BurstClients() as new:
        old.connect(daemon.address, [HERE] * 9).wait()
        assert daemon.command("upgrade").returncode == 0
        new.connect(daemon.address, [HERE] * 3).wait()
        assert (len(old.served), len(new.served)) == (4, 0)
        old.close()
        eventually(lambda: len(daemon.status()["workers"]) == 2, what="the end of the old workers")
        totals = daemon.status()["totals"]
        assert (totals["accepted"], totals["closed"], totals["refused"]["full"]) == (4, 4, 8)
        assert daemon.command("upgrade").returncode == 0
        assert daemon.status()["totals"] == totals


def test_a_full_listener_does_not_block_another(harness: Harness) -> None:
    """Also those from which the kernel's next choice would be a worker that is full there, and has fewer clients."""
    (harness.directory / "two.yaml").write_text(
        "listen:\n"
        "  - {address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo', limits: {per_worker: 1}}\n"
        f"  - {{address: 'unix:{harness.directory}/s', handler: 'forkd.builtin:Echo'}}\n"
    )
    daemon = harness.daemon(target=harness.directory / "two.yaml", workers=2, listen=()).start()
    narrow, wide = (one["address"] for one in daemon.status()["listeners"])
    with BurstClients() as burst:
        burst.connect(narrow, [HERE] * 3).wait(served=2)
        clients = [harness.connect(wide) for _ in range(30)]
        assert all(survives(client) for client in clients)
        burst.close(2)
        burst.wait(served=1)


def test_more_connections_than_descriptors_give_a_warning(harness: Harness) -> None:
    daemon = start(harness, 1, "{per_worker: 900000000}")
    daemon.wait_log("WARNING .*limits.per_worker: wants 900000000 connections of one worker, which may have")
    with dial(daemon.address) as client:
        assert survives(client)
    daemon.stop()
    result = daemon.command("check")
    assert result.returncode == 0
    assert "warning: limits.per_worker: wants 900000000" in result.stderr


def test_a_denied_client_hears_the_end_at_once(harness: Harness) -> None:
    daemon = start(harness, 1, "{}", ", deny: ['127.0.0.0/8']")
    with dial(daemon.address) as client:
        assert at_end(client)
