"""What a service manager hears: a real daemon beside a socket that stands for systemd's (sd_notify(3))."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import echoes, read
from tests.support.daemon import Harness
from tests.support.processes import eventually, wait_end
from tests.support.scoreboard import target
from tests.support.service_manager import FakeManager, managed_daemon

#: A handler whose module wants something that may be away.
NEEDY = """
from pathlib import Path

from forkd.builtin import Echo

if Path("AWAY").exists():
    raise ConnectionError("the database is away")
"""


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FakeManager]:
    made = FakeManager(str(tmp_path / "notify") if request.param == "path" else f"@forkd-test-{os.getpid()}")
    yield made
    made.close()


def sockets(pid: int) -> set[str]:
    """The sockets that a process has open."""
    links = {target(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return {link for link in links if link.startswith("socket:")}


def test_manager_is_told_ready_and_stopping(harness: Harness, manager: FakeManager, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    with open(tmp_path / "gate", "r+b", buffering=0) as gate:
        gate.write(b"1")
        daemon = managed_daemon(manager, harness, target="gate:Echo", workers=2, settings=("boot_timeout=50s",))
        daemon.begin()
        starting = manager.receive()
        assert int(starting["EXTEND_TIMEOUT_USEC"]) >= 50_000_000
        assert "0 of 2 workers" in starting["STATUS"]
        assert "1 of 2 workers" in manager.wait_for("STATUS", "1 of 2")["STATUS"]
        assert manager.count("READY") == 0
        gate.write(b"1")
        ready = manager.wait_for("READY")
        assert ready["STATUS"] == "running: 2 of 2 workers, 0 clients"
    daemon.signal(signal.SIGTERM)
    stopping = manager.wait_for("STOPPING")
    assert int(stopping["EXTEND_TIMEOUT_USEC"]) >= 30_000_000
    assert set(manager.pids) == {daemon.process.pid if daemon.process else 0}


def test_manager_is_told_of_a_reload_and_why_one_failed(harness: Harness, manager: FakeManager) -> None:
    daemon = managed_daemon(manager, harness, target="./told.yaml", listen=(), workers=None)
    file = daemon.directory / "told.yaml"
    good = "workers: 1\nlisten: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n"
    file.write_text(good)
    daemon.run()
    manager.wait_for("READY")
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    daemon.signal(signal.SIGHUP)
    reloading = manager.wait_for("RELOADING")
    assert before <= int(reloading["MONOTONIC_USEC"]) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert "reload is under way" in reloading["STATUS"]
    assert manager.wait_for("READY")["STATUS"] == "running: 1 of 1 workers, 0 clients"
    daemon.expect("reload: failed")
    file.write_text(f"{good}wokers: 2\n")
    daemon.signal(signal.SIGHUP)
    manager.wait_for("RELOADING")
    assert "did you mean 'workers'?" in manager.wait_for("READY")["STATUS"]


def test_upgrade_is_told_as_a_reload_and_the_watchdog_is_pinged(harness: Harness, manager: FakeManager) -> None:
    daemon = managed_daemon(manager, harness, watchdog=4.0).run()
    manager.wait_for("READY")
    daemon.signal(signal.SIGUSR2)
    manager.wait_for("RELOADING")
    manager.wait_for("READY")
    assert [manager.count(key) for key in ("READY", "RELOADING")] == [2, 1]
    # Once before its image is replaced, and once by the next one at its first turn.
    assert manager.count("WATCHDOG") >= 3
    assert len(set(manager.pids)) == 1


def test_watchdog_is_pinged_while_no_worker_serves(harness: Harness, manager: FakeManager, tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text(NEEDY.replace("AWAY", str(tmp_path / "away")))
    daemon = managed_daemon(manager, harness, target="needy:Echo", workers=1, watchdog=0.2).run()
    manager.wait_for("READY")
    daemon.expect("killed by SIGKILL", "could not boot: .*ConnectionError: the database is away")
    (tmp_path / "away").touch()
    os.kill(daemon.workers()[1], signal.SIGKILL)
    manager.wait_for("STATUS", "^degraded: 0 of 1 workers, 0 clients; worker 1 has ended.*next one comes in")
    for _ in range(3):
        manager.wait_for("WATCHDOG")
    assert (daemon.status()["state"], daemon.status()["serving"]) == ("degraded", 0)
    (tmp_path / "away").unlink()
    manager.wait_for("STATUS", "running: 1 of 1")
    assert echoes(harness.connect(daemon))


def test_workers_can_not_speak_for_it(harness: Harness, manager: FakeManager) -> None:
    daemon = managed_daemon(manager, harness, target="environment:tell", watchdog=60.0, workers=1).run()
    manager.wait_for("READY")
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        client = harness.connect(daemon)
        client.sendall(f"{name}\n".encode())
        assert read(client, 2) == b"-\n"
    shared = sockets(daemon.workers()[1]) & sockets(daemon.pid)
    assert len(shared) == 1  # the listener alone


def test_manager_that_does_not_read_blocks_nothing(harness: Harness, manager: FakeManager) -> None:
    daemon = managed_daemon(manager, harness, workers=1).run()
    for _ in range(30):
        daemon.signal(signal.SIGTTIN)
        daemon.signal(signal.SIGTTOU)
        daemon.status()
    worker = daemon.wait_workers(1)[1]
    daemon.signal(signal.SIGTERM)
    wait_end(worker)
    eventually(lambda: daemon.process is not None and daemon.process.poll() is not None, what="its end")


@pytest.mark.parametrize("manager", ["path"], indirect=True)
def test_manager_with_a_full_queue_is_told_all_when_it_reads(harness: Harness, manager: FakeManager) -> None:
    manager.fill()
    daemon = managed_daemon(manager, harness, workers=1).run()
    assert daemon.status()["state"] == "running"
    ready = manager.wait_for("READY")
    assert ready["STATUS"] == "running: 1 of 1 workers, 0 clients"
    assert manager.store  # before that
    manager.fill()
    assert daemon.command("reload").returncode == 0
    manager.wait_for("RELOADING")
    assert "RELOADING" not in manager.wait_for("READY")


def test_restart_is_the_managers_business_and_refused(harness: Harness, manager: FakeManager) -> None:
    daemon = managed_daemon(manager, harness, workers=1).run()
    master, workers = daemon.pid, daemon.workers()
    refused = daemon.command("restart")
    assert refused.returncode == 1
    assert "a service manager runs it; use `systemctl restart`" in refused.stderr
    assert (daemon.pid, daemon.workers()) == (master, workers)
