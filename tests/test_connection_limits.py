"""Limits of a listener's connections, by the real daemon: never more than there may be, in one worker, in all of them,
from one address; and places come back however a connection ends.
"""

from __future__ import annotations

import os
import signal

import pytest
from clients import at_end, dial, echoes, survives
from harness import Daemon, Harness
from network import own_network
from processes import eventually
from storm import Storm

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
    """How many were refused in all, by reason; as long as nobody has died the living's rows say the same."""
    status = daemon.status()
    found: dict[str, int] = dict(status["totals"]["refused"])
    if not status["deaths"]:
        assert found == {key: sum(one["refused"][key] for one in status["workers"]) for key in found}
    return {reason: count for reason, count in found.items() if count}


def wait_nobody(daemon: Daemon) -> None:
    eventually(lambda: not sum(one["clients"] for one in daemon.status()["workers"]), what="the end of all clients")


@pytest.mark.parametrize(("limits", "most"), [("{connections: 5}", 5), ("{per_worker: 2}", 8)])
def test_who_finds_no_place_waits_in_the_backlog_until_there_is_one(harness: Harness, limits: str, most: int) -> None:
    daemon = start(harness, 4, limits)
    with Storm() as storm:
        storm.rise(daemon.address, [HERE] * 25).settle(served=most)
        with pytest.raises(AssertionError, match=f"{most} are served"):
            storm.settle(seconds=0.7)
        for _ in range(4):
            storm.leave(3)
            storm.settle(served=most)
        assert storm.refused == []
        daemon.wait_clients(most)
    assert refused(daemon) == {}


def test_one_place_is_had_by_one_client_after_the_other(harness: Harness) -> None:
    """With more workers than places most have none in hand, and every place is in somebody's."""
    daemon = start(harness, 4, "{connections: 1}")
    with Storm() as storm:
        storm.rise(daemon.address, [HERE] * 12)
        for _ in range(12):
            storm.settle(served=1)
            assert sum(one["clients"] for one in daemon.status()["workers"]) == 1
            storm.leave(1)
        assert (storm.waiting, storm.refused) == (set(), [])


def test_a_connection_that_acknowledges_at_once_gives_its_place_back_too(harness: Harness) -> None:
    daemon = start(harness, 1, "{connections: 1, per_ip: 1}", ", socket: {quickack: true}")
    for _ in range(3):
        client = harness.connect(daemon)
        assert echoes(client)
        client.close()
        wait_nobody(daemon)
    assert refused(daemon) == {}


def test_who_finds_no_place_is_refused_with_the_message_where_that_is_wanted(harness: Harness) -> None:
    daemon = start(harness, 4, r"{connections: 6, over: refuse, message: 'full\x21 go\r\n'}")
    with Storm() as storm:
        storm.rise(daemon.address, [HERE] * 40).settle()
        assert len(storm.served) == 6
        # They had said something that nobody has read, and yet none is reset before it has heard why.
        assert storm.refused == [b"full! go\r\n"] * 34
    daemon.wait_log(r"INFO .*: refused 127.0.0.1 \(full\)")
    assert len([one for one in daemon.records() if "refused 127" in one]) == 1
    assert refused(daemon) == {"full": 34}
    head, *rows = daemon.command("status").stdout.split("\n\n")[1].splitlines()
    column = head.split().index("REFUSED")
    assert sum(int(row.split()[column]) for row in rows) == 34


def test_each_worker_refuses_beyond_its_own_limit(harness: Harness) -> None:
    daemon = start(harness, 1, "{per_worker: 3, over: refuse}")
    with Storm() as storm:
        storm.rise(daemon.address, [HERE] * 10).settle()
        assert len(storm.served) == 3
        storm.leave(1)
        wait = daemon.wait_clients(2)
        assert sum(wait.values()) == 2
        storm.rise(daemon.address, [HERE]).settle()
        assert len(storm.served) == 3
    assert refused(daemon) == {"full": 7}


def test_one_address_has_no_more_places_than_it_may_and_others_have_theirs(harness: Harness) -> None:
    daemon = start(harness, 4, "{per_ip: 5, message: 'no more'}")
    address = daemon.address
    for number in range(6):
        with Storm() as storm, Storm() as others:
            storm.rise(address, [f"127.0.1.{number % 2}"] * 30)
            others.rise(address, [f"127.0.2.{number % 3}"] * 4)
            assert len(storm.settle().served) == 5
            assert len(others.settle().served) == 4
            assert set(storm.refused) == {b"no more"}
        wait_nobody(daemon)
    assert refused(daemon) == {"per_ip": 150}


def test_an_ipv6_network_of_64_bits_counts_as_one_client(harness: Harness) -> None:
    with own_network("2001:db8::/32"):
        daemon = start(harness, 4, "{per_ip: 3}", address="tcp://[::1]:0")
        with Storm() as storm, Storm() as others:
            storm.rise(daemon.address, [f"2001:db8:0:1::{number:x}" for number in range(1, 20)]).settle()
            others.rise(daemon.address, [f"2001:db8:0:{number:x}::1" for number in range(2, 10)]).settle()
            assert (len(storm.served), len(others.served)) == (3, 8)
        assert refused(daemon) == {"per_ip": 16}


def test_no_more_come_from_one_address_than_its_rate_allows(harness: Harness) -> None:
    daemon = start(harness, 4, "{rate_per_ip: 10/h}")
    address = daemon.address
    for turn in range(2):
        with Storm() as storm, Storm() as others:
            storm.rise(address, ["127.0.1.1"] * 30).settle()
            others.rise(address, [f"127.0.2.{turn}"] * 10).settle()
            assert (len(storm.served), len(others.served)) == (0 if turn else 10, 10)
    assert refused(daemon) == {"rate": 50}


def test_who_may_not_come_from_where_it_comes_is_told_nothing(harness: Harness) -> None:
    daemon = start(harness, 2, "{message: 'secret'}", ", allow: [127.0.0.0/8, 10.0.0.0/8], deny: [127.0.3.0/24]")
    with Storm() as storm:
        storm.rise(daemon.address, ["127.0.3.1"] * 5 + ["127.0.4.1"] * 5).settle()
        assert len(storm.served) == 5
        assert set(storm.refused) <= {b"", None}
    assert refused(daemon) == {"denied": 5}
    daemon.wait_log(r"INFO .*: refused 127.0.3.1 \(denied\)")


def test_places_come_back_after_a_worker_was_killed_and_totals_stay(harness: Harness) -> None:
    daemon = start(harness, 2, "{connections: 6, per_ip: 6, over: refuse}")
    daemon.expect("killed by SIGKILL")
    with Storm() as storm, Storm() as second:
        storm.rise(daemon.address, [HERE] * 20).settle()
        assert len(storm.served) == 6
        before = daemon.status()["totals"]
        assert (before["accepted"], before["refused"]["full"]) == (6, 14)
        victim = next(pid for pid, count in daemon.wait_clients(6).items() if count)
        os.kill(victim, signal.SIGKILL)
        daemon.wait_workers(2, without={victim})
        left = 0
        for sock in storm.served:
            sock.settimeout(20)
            left += survives(sock)
        second.rise(daemon.address, [HERE] * 20).settle()
        assert len(second.served) + left == 6
        after = daemon.status()["totals"]
        assert (after["accepted"], after["refused"]["full"]) == (12 - left, 14 + 14 + left)


def test_a_reload_changes_limits_and_old_workers_clients_have_their_places_yet(harness: Harness) -> None:
    daemon = start(harness, 2, "{connections: 4, per_ip: 6, over: refuse}")
    with Storm() as old, Storm() as new:
        old.rise(daemon.address, [HERE] * 4).settle()
        before = daemon.workers()
        write(harness, "{connections: 6, per_ip: 6, over: refuse}")
        assert daemon.command("reload").returncode == 0
        daemon.wait_workers(2, without=before.values())
        new.rise(daemon.address, [HERE] * 10).settle()
        assert (len(old.served), len(new.served), len(new.refused)) == (4, 2, 8)
        old.leave()
        eventually(lambda: len(daemon.status()["workers"]) == 2, what="the end of the old workers")
        new.rise(daemon.address, [HERE] * 10).settle()
        assert len(new.served) == 6


def test_an_upgrade_keeps_totals_and_places(harness: Harness) -> None:
    daemon = start(harness, 2, "{connections: 4, over: refuse}")
    with Storm() as old, Storm() as new:
        old.rise(daemon.address, [HERE] * 9).settle()
        assert daemon.command("upgrade").returncode == 0
        new.rise(daemon.address, [HERE] * 3).settle()
        assert (len(old.served), len(new.served)) == (4, 0)
        old.leave()
        eventually(lambda: len(daemon.status()["workers"]) == 2, what="the end of the old workers")
        totals = daemon.status()["totals"]
        assert (totals["accepted"], totals["closed"], totals["refused"]["full"]) == (4, 4, 8)
        assert daemon.command("upgrade").returncode == 0
        assert daemon.status()["totals"] == totals


def test_a_full_listener_keeps_nobody_from_another(harness: Harness) -> None:
    """Also those from whom the kernel's next choice would be a worker that is full there, and has fewer clients."""
    (harness.directory / "two.yaml").write_text(
        "listen:\n"
        "  - {address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo', limits: {per_worker: 1}}\n"
        f"  - {{address: 'unix:{harness.directory}/s', handler: 'forkd.builtin:Echo'}}\n"
    )
    daemon = harness.daemon(target=harness.directory / "two.yaml", workers=2, listen=()).start()
    narrow, wide = (one["address"] for one in daemon.status()["listeners"])
    with Storm() as storm:
        storm.rise(narrow, [HERE] * 3).settle(served=2)
        clients = [harness.connect(wide) for _ in range(30)]
        assert all(survives(client) for client in clients)
        storm.leave(2)
        storm.settle(served=1)


def test_more_connections_than_descriptors_are_told_of_at_the_start_and_by_the_check(harness: Harness) -> None:
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
