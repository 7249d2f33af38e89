"""`forkd status`: docs/status.md has the keys that it prints, and no others; what it tells of trouble."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forkd.system.proc import memory_of
from forkd.system.socket_stats import ListenCounters, split_drops
from tests.support.changing_daemon import Changing
from tests.support.clients import echoes, endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.paths import CHECKOUT
from tests.support.processes import eventually


def told(daemon: Daemon) -> dict[str, Any]:
    result = daemon.command("status", "--json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def keys_of(found: object, above: str = "") -> Iterator[str]:
    """The keys of a JSON value and of all that is in it, dotted; of a list those of its items."""
    if isinstance(found, list):
        for one in found:
            yield from keys_of(one, above)
    elif isinstance(found, dict):
        for key, value in found.items():
            yield f"{above}{key}"
            yield from keys_of(value, f"{above}{key}.")


def documented() -> set[str]:
    """The keys of the page's tables; those of the counters stand for both places where there are counters."""
    found = set()
    for section in (CHECKOUT / "docs/status.md").read_text().split("\n## "):
        keys = re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE)
        places = ("workers.", "totals.") if section.startswith("Counters") else ("",)
        found |= {place + key for key in keys for place in places}
    return found


def test_keys_that_are_documented_are_those_of_the_json(harness: Harness) -> None:
    site = Changing(harness, agent="tcp://127.0.0.1:0")
    daemon = site.daemon.start()
    daemon.expect("worker 1 .* has ended: killed by SIGKILL", "reload: failed")
    assert daemon.command("reload").returncode == 0
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGKILL)
    daemon.wait_workers(2, without={victim})
    site.write(wokers=2)
    assert daemon.command("reload").returncode == 1
    found = set(keys_of(told(daemon)))
    groups = {key for key in found if any(other.startswith(f"{key}.") for other in found)}
    assert found - groups - documented() == set()
    assert documented() - found == set()


def test_stuck_worker_is_shown_as_such_and_counted_when_killed(harness: Harness) -> None:
    daemon = harness.daemon(settings=("stall_timeout=900ms",)).start()
    daemon.expect("these are its stacks", "killing worker 1", "worker 1 .* has ended: killed by SIGKILL")
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGSTOP)
    eventually(lambda: daemon.workers("stuck") == {1: victim}, what="a worker shown as stuck")
    found = next(one for one in daemon.status()["workers"] if one["pid"] == victim)
    assert found["heartbeat_age"] > 0.9
    daemon.wait_workers(2, without={victim})
    assert daemon.status()["death_counts"]["unexpected"]["stalled"] == 1


def test_deaths_are_counted_by_cause_over_an_upgrade(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    daemon.expect("worker 1 .* has ended: killed by SIGKILL")
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGKILL)
    daemon.wait_workers(2, without={victim})
    assert daemon.command("upgrade").returncode == 0
    eventually(lambda: len(daemon.status()["workers"]) == 2, what="the end of the old workers")
    counts = daemon.status()["death_counts"]
    assert counts["expected"] == 2
    assert {cause: count for cause, count in counts["unexpected"].items() if count} == {"signal": 1}
    assert "Deaths in all: signal 1; expected 2\n" in daemon.command("status").stdout


def test_failed_reload_is_told_with_its_time_until_one_succeeds(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    daemon.expect("reload: failed")
    assert daemon.status()["last_failure"] is None
    site.write(wokers=2)
    assert daemon.command("reload").returncode == 1
    found = daemon.status()
    assert found["last_failure"]["text"] == found["refusal"]
    assert found["refusal"].startswith("reload failed: ")
    assert found["last_failure"]["time"] >= found["started"]
    assert "the last reload failed: " in daemon.command("status").stdout
    del site.settings["wokers"]
    site.write()
    assert daemon.command("reload").returncode == 0
    assert (daemon.status()["last_failure"], daemon.status()["refusal"]) == (None, "")


def test_successful_reload_is_told_with_its_time_over_an_upgrade(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    daemon.expect("reload: failed")
    assert (daemon.status()["last_success"], daemon.status()["change_counts"]) == (None, {"success": 0, "failure": 0})
    began = time.time()
    assert daemon.command("reload").returncode == 0
    first = daemon.status()["last_success"]
    assert (began <= first["time"] <= time.time(), first["generation"]) == (True, 2)
    assert daemon.command("upgrade").returncode == 0
    second = daemon.status()["last_success"]
    assert (second["time"] > first["time"], second["generation"]) == (True, 3)
    site.write(wokers=2)
    assert daemon.command("reload").returncode == 1
    assert daemon.status()["last_success"] == second
    assert daemon.status()["change_counts"] == {"success": 2, "failure": 1}


def test_listener_has_its_clients_and_their_limit(harness: Harness) -> None:
    directory = harness.directory
    addresses = ("tcp://127.0.0.1:0", "tcp://localhost:0", f"unix:{directory}/s", "udp://127.0.0.1:0")
    daemon = harness.daemon(
        target=None, listen=addresses, settings=("listen.0.limits.connections=7", "log.level=error")
    ).start()
    clients = [harness.connect(told(daemon)["listeners"][number]["address"]) for number in (0, 0, 1, 2)]
    assert all(map(echoes, clients))
    found = told(daemon)
    assert [one["clients"] for one in found["listeners"]] == [2, 1, 1, None]
    assert [one["limit"] for one in found["listeners"]] == [7, None, None, None]
    assert re.search(r"^tcp://127\S+ +\S+ +2/7 ", daemon.command("status").stdout, re.MULTILINE)
    assert all(0 < one["pss"] <= one["rss"] for one in found["workers"])


def test_client_that_resets_its_connection_is_no_drop(harness: Harness) -> None:
    daemon = harness.daemon().start()
    family, where = endpoint(daemon.address)
    for _ in range(5):  # as a proxy's health check does: no acknowledgement, then a reset
        with socket.socket(family) as sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.connect(where)
    [found] = daemon.status()["listeners"]
    assert found["drops"] + found["resets"] == 5
    assert found["resets"] >= 1  # all five, unless another listener of this machine was full meanwhile


def test_drops_that_can_not_be_told_apart_count_as_drops() -> None:
    before = ListenCounters(100, 10)
    assert split_drops(5, before, ListenCounters(100, 15)) == (0, 5)
    assert split_drops(5, before, ListenCounters(105, 10)) == (5, 0)
    assert split_drops(5, before, ListenCounters(103, 12)) == (3, 2)
    assert split_drops(3, before, ListenCounters(103, 15)) == (3, 0)
    assert split_drops(6, before, ListenCounters(103, 10)) == (6, 0)  # a drop at the last step is counted twice


def test_memory_of_a_process_that_is_not_there_is_not_known() -> None:
    assert memory_of(1 << 22) == (None, None)
    rss, pss = memory_of(os.getpid())
    assert rss is not None
    assert pss is not None
    assert 0 < pss <= rss
    assert Path("/proc/self/statm").exists()
