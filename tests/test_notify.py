"""What a service manager hears: a real daemon beside a socket that stands for systemd's (sd_notify(3))."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from board import target
from clients import read
from harness import Harness
from manager import Manager, under
from processes import eventually, wait_end


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    made = Manager(str(tmp_path / "notify") if request.param == "path" else f"@forkd-test-{os.getpid()}")
    yield made
    made.close()


def sockets(pid: int) -> set[str]:
    """The sockets that a process has open."""
    links = {target(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if link.startswith("socket:")}


def test_it_says_ready_when_every_worker_is_and_stopping_when_it_stops(
    harness: Harness, manager: Manager, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "gate")
    with open(tmp_path / "gate", "r+b", buffering=0) as gate:
        gate.write(b"1")
        daemon = under(manager, harness, target="gate:Echo", workers=2, settings=("boot_timeout=50s",))
        daemon.begin()
        starting = manager.hear()
        assert int(starting["EXTEND_TIMEOUT_USEC"]) >= 50_000_000
        assert "0 of 2 workers" in starting["STATUS"]
        assert "1 of 2 workers" in manager.until("STATUS", "1 of 2")["STATUS"]
        assert manager.said("READY") == 0
        gate.write(b"1")
        ready = manager.until("READY")
        assert ready["STATUS"] == "running: 2 of 2 workers, 0 clients"
    daemon.signal(signal.SIGTERM)
    stopping = manager.until("STOPPING")
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= 30_000_000
    assert set(manager.pids) == {daemon.process.pid if daemon.process else 0}


def test_a_reload_begins_and_ends_with_a_word_and_one_that_fails_says_why(harness: Harness, manager: Manager) -> None:
    daemon = under(manager, harness, target="./told.yaml", listen=(), workers=None)
    file = daemon.directory / "told.yaml"
    good = "workers: 1\nlisten: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n"
    file.write_text(good)
    daemon.run()
    manager.until("READY")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    daemon.signal(signal.SIGHUP)
    reloading = manager.until("RELOADING")
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert "reload is under way" in reloading["STATUS"]
    assert manager.until("READY")["STATUS"] == "running: 1 of 1 workers, 0 clients"
    daemon.expect("reload: failed")
    file.write_text(f"{good}wokers: 2\n")
    daemon.signal(signal.SIGHUP)
    manager.until("RELOADING")
    assert "did you mean 'workers'?" in manager.until("READY")["STATUS"]


def test_an_upgrade_is_a_reload_to_it_and_the_watchdog_hears_all_the_time(harness: Harness, manager: Manager) -> None:
    daemon = under(manager, harness, watchdog=4.0).run()
    manager.until("READY")
    daemon.signal(signal.SIGUSR2)
    manager.until("RELOADING")
    manager.until("READY")
    assert [manager.said(key) for key in ("READY", "RELOADING")] == [2, 1]
    # Once before its image is replaced, and once by the next one at its first turn.
    assert manager.said("WATCHDOG") >= 3
    assert len(set(manager.pids)) == 1


def test_the_watchdog_hears_nothing_while_nobody_serves(harness: Harness, manager: Manager) -> None:
    daemon = under(manager, harness, target="faulty:Faulty", workers=1, watchdog=0.2).run()
    manager.until("READY")
    manager.until("WATCHDOG")
    daemon.expect("killed by SIGKILL")
    killed: set[int] = set()
    for _ in range(3):  # so that the next one lets wait for itself for longer than the watchdog's interval
        victim = daemon.wait_workers(1, without=killed)[1]
        killed.add(victim)
        os.kill(victim, signal.SIGKILL)
    assert (
        "worker 1 has ended: killed by SIGKILL"
        in manager.until("STATUS", "^degraded: 0 of 1.*next one comes in")["STATUS"]
    )
    silent = len(manager.heard)
    manager.until("STATUS", "running: 1 of 1")
    assert [one for one in manager.heard[silent:-1] if "WATCHDOG" in one] == []
    manager.until("WATCHDOG")


def test_workers_can_not_speak_for_it(harness: Harness, manager: Manager) -> None:
    daemon = under(manager, harness, target="environment:tell", watchdog=60.0, workers=1).run()
    manager.until("READY")
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        client = harness.connect(daemon)
        client.sendall(f"{name}\n".encode())
        assert read(client, 2) == b"-\n"
    shared = sockets(daemon.workers()[1]) & sockets(daemon.pid)
    assert len(shared) == 1  # the listener alone


def test_a_manager_that_does_not_read_holds_nobody_up(harness: Harness, manager: Manager) -> None:
    daemon = under(manager, harness, workers=1).run()
    for _ in range(30):
        daemon.signal(signal.SIGTTIN)
        daemon.signal(signal.SIGTTOU)
        daemon.status()
    worker = daemon.wait_workers(1)[1]
    daemon.signal(signal.SIGTERM)
    wait_end(worker)
    eventually(lambda: daemon.process is not None and daemon.process.poll() is not None, what="its end")


def test_a_restart_is_the_managers_business_and_refused(harness: Harness, manager: Manager) -> None:
    daemon = under(manager, harness, workers=1).run()
    master, workers = daemon.pid, daemon.workers()
    refused = daemon.command("restart")
    assert refused.returncode == 1
    assert "a service manager runs it; use `systemctl restart`" in refused.stderr
    assert (daemon.pid, daemon.workers()) == (master, workers)
