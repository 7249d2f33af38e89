"""A daemon that leaves its load balancers without losing a client: `stop_delay`, `drain_spread`, `forkd drain` and
`forkd resume`.
"""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.admin import ask, check, service_of
from tests.support.changing_daemon import Changing
from tests.support.clients import at_end, echoes, read, refuses
from tests.support.daemon import Daemon, Harness, forkd
from tests.support.paths import CHECKOUT
from tests.support.processes import DEADLINE, eventually
from tests.support.service_manager import FakeManager, managed_daemon

LOOKED_AT = ("admin.address=tcp://127.0.0.1:0", "agent=tcp://127.0.0.1:0")
LEAVES = (*LOOKED_AT, "stop_delay=1h")


def wait_state(daemon: Daemon, state: str) -> dict[str, Any]:
    """The status of a daemon when it is in this state."""

    def there() -> dict[str, Any]:
        found = daemon.status()
        return found if found["state"] == state else {}

    return eventually(there, what=f"a daemon that is {state}")


def ended(daemon: Daemon) -> int:
    assert daemon.process is not None
    return daemon.process.wait(DEADLINE)


# stop_delay


def test_daemon_that_leaves_serves_on_but_says_so(harness: Harness) -> None:
    daemon = harness.daemon(settings=LEAVES).run()
    where, agent, address = service_of(daemon), service_of(daemon, "agent"), daemon.address
    before = harness.connect(daemon)
    assert echoes(before)
    daemon.signal(signal.SIGTERM)
    wait_state(daemon, "leaving")
    assert ask(where, "/ready")[::2] == (503, "not ready: the daemon is leaving\n")
    assert check(agent) == "drain\n"
    assert ask(where, "/live").status == 200
    assert "forkd_draining 1.0" in ask(where, "/metrics").body
    after = harness.connect(address)
    assert echoes(after)
    counts = daemon.wait_clients(2)
    victim = min(counts, key=lambda pid: counts[pid])  # a client stays
    daemon.expect("killed by SIGKILL")
    os.kill(victim, signal.SIGKILL)
    daemon.wait_workers(2, without={victim})  # it takes clients, so there are workers for them
    for verb in ("reload", "drain", "scale"):
        result = daemon.command(verb, *(["3"] if verb == "scale" else []))
        assert (result.returncode, "the daemon is leaving" in result.stderr) == (1, True), result
    daemon.signal(signal.SIGTERM)  # what is left of an hour is skipped, and no client is closed
    wait_state(daemon, "draining")
    eventually(lambda: refuses(address), what="a listener that is closed")
    assert check(agent) == "drain\n"
    kept = [client for client in (before, after) if not is_over(client)]
    assert kept
    assert all(echoes(client) for client in kept)
    for client in kept:
        client.close()
    assert ended(daemon) == 0


def is_over(client: Any) -> bool:
    """Whether a client's worker was the one that was killed."""
    try:
        return not echoes(client)
    except OSError:
        return True


def test_stop_comes_after_its_delay(harness: Harness) -> None:
    daemon = harness.daemon(settings=("stop_delay=300ms",), workers=1).start()
    client, began = harness.connect(daemon), time.monotonic()
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log(r"daemon state: leaving \(asked to stop after stop_delay\)")
    daemon.wait_log(r"daemon state: draining \(stop_delay is over\)")
    assert time.monotonic() - began >= 0.3
    assert echoes(client)
    client.close()


def test_forkd_stop_waits_for_delay_and_drain(harness: Harness) -> None:
    daemon = harness.daemon(settings=("stop_delay=400ms", "drain_timeout=300ms"), workers=1).start()
    client = harness.connect(daemon)
    assert echoes(client)
    began = time.monotonic()
    result = daemon.command("stop")
    assert (result.returncode, result.stderr) == (0, "")
    assert time.monotonic() - began >= 0.7
    assert at_end(client)


@pytest.mark.parametrize("how", [signal.SIGQUIT, "now", "third"])
def test_end_at_once_does_not_wait_for_a_delay(harness: Harness, how: signal.Signals | str) -> None:
    daemon = harness.daemon(settings=("stop_delay=1h",), workers=1).start()
    client = harness.connect(daemon)
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    wait_state(daemon, "leaving")
    if how == "now":
        assert daemon.command("stop", "--now").returncode == 0
    elif how == "third":
        daemon.signal(signal.SIGTERM)
        wait_state(daemon, "draining")
        daemon.signal(signal.SIGTERM)
    else:
        daemon.signal(signal.SIGQUIT)
    assert at_end(client)


def test_daemon_that_starts_has_nobody_to_leave(harness: Harness, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    with open(tmp_path / "gate", "r+b", buffering=0):
        daemon = harness.daemon(target="gate:Echo", settings=("stop_delay=1h",), workers=1).begin()
        daemon.wait_log("master listens")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        ended(daemon)


def test_restart_does_not_wait_for_a_delay(harness: Harness) -> None:
    daemon = harness.daemon(settings=LEAVES, workers=1).start()
    client, before = harness.connect(daemon), daemon.pid
    assert echoes(client)
    assert daemon.command("restart").returncode == 0
    assert daemon.pid != before
    daemon.wait_log("daemon state: draining")
    assert check(daemon).startswith("up ready")
    client.close()
    daemon.signal(signal.SIGTERM)
    wait_state(daemon, "leaving")
    assert daemon.command("restart").returncode == 0  # one that leaves is stopped, and another one started
    assert daemon.status()["state"] == "running"
    assert daemon.command("stop", "--now").returncode == 0


def test_reload_under_way_is_over_when_the_daemon_leaves(harness: Harness) -> None:
    site = Changing(harness, stop_delay="1h", workers=1)
    site.write()
    daemon = site.daemon.start()
    with site.gate("later"):
        reload = site.begin("reload")
        daemon.wait_log("reload: ")
        daemon.signal(signal.SIGTERM)
        assert "the daemon stops" in reload.communicate(timeout=DEADLINE)[1]
        assert wait_state(daemon, "leaving")["generation"] == 1
        assert site.greet()[1] == "first"


def test_service_manager_is_asked_for_delay_and_drain(harness: Harness, tmp_path: Path) -> None:
    manager = FakeManager(str(tmp_path / "notify"))
    try:
        daemon = managed_daemon(manager, harness, workers=1, settings=("stop_delay=70s", "drain_timeout=50s")).run()
        manager.wait_for("READY")
        daemon.signal(signal.SIGTERM)
        stopping = manager.wait_for("STOPPING")
        assert 125_000_000 <= int(stopping["EXTEND_TIMEOUT_USEC"]) <= 126_000_000
        assert stopping["STATUS"].startswith("leaving: 1 of 1 workers")
        daemon.signal(signal.SIGTERM)
        assert 55_000_000 <= int(manager.wait_for("STOPPING")["EXTEND_TIMEOUT_USEC"]) <= 56_000_000
        assert ended(daemon) == 0
    finally:
        manager.close()


def test_check_tells_of_a_stop_that_takes_long(tmp_path: Path) -> None:
    def warnings(*settings: str) -> str:
        result = forkd("check", "--listen=tcp://127.0.0.1:0", *(f"--set={one}" for one in settings), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stderr

    assert "a stop may take" not in warnings("stop_delay=24s")
    assert "a stop may take 61s (stop_delay 25s, drain_timeout 30s, and 6s)" in warnings("stop_delay=25s")
    assert "drain_spread should be below drain_timeout, 5s" in warnings("drain_spread=5s", "drain_timeout=5s")
    unit = (CHECKOUT / "systemd/forkd@.service").read_text()
    assert re.findall("^TimeoutStopSec=(.*)$", unit, re.MULTILINE) == ["60s"]


# drain_spread


@pytest.mark.parametrize("handler", ["polite:Polite", "polite:polite_streams"])
@pytest.mark.parametrize("verb", ["stop", "reload"])
def test_clients_are_asked_to_leave_one_after_another(harness: Harness, handler: str, verb: str) -> None:
    daemon = harness.daemon(target=handler, workers=2, settings=("drain_spread=600ms",)).start()
    clients = [harness.connect(daemon) for _ in range(16)]
    assert all(echoes(client) for client in clients)
    assert daemon.command(verb).returncode == 0
    for client in clients:
        assert read(client, 7) == b"goodbye"
        assert at_end(client)


def test_clients_come_back_over_the_whole_spread(harness: Harness) -> None:
    daemon = harness.daemon(target="polite:Polite", workers=1, settings=("drain_spread=800ms",)).start()
    clients = [harness.connect(daemon) for _ in range(8)]
    assert all(echoes(client) for client in clients)
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    for client in clients:  # in the order of their descriptors, which is that of their turns
        assert read(client, 7) == b"goodbye"
    assert time.monotonic() - began >= 0.7  # seven gaps of a tenth of a second


def test_spread_is_cut_by_the_end_of_the_drain(harness: Harness) -> None:
    settings = ("drain_spread=1h", "drain_timeout=300ms")
    daemon = harness.daemon(target="polite:Polite", workers=1, settings=settings).start()
    clients = [harness.connect(daemon) for _ in range(4)]
    assert all(echoes(client) for client in clients)
    assert daemon.command("stop").returncode == 0
    assert all(client.recv(100) in (b"goodbye", b"") for client in clients)


def test_workers_of_a_dead_master_do_not_spread(harness: Harness) -> None:
    daemon = harness.daemon(target="polite:Polite", workers=1, settings=("drain_spread=20s",)).run()
    daemon.expect("the master is gone")
    clients = [harness.connect(daemon) for _ in range(4)]
    assert all(echoes(client) for client in clients)
    daemon.signal(signal.SIGKILL)
    for client in clients:
        assert read(client, 7) == b"goodbye"
    ended(daemon)
    for path in daemon.run_directory.iterdir():
        path.unlink()


# forkd drain, forkd resume


def test_drained_daemon_keeps_its_clients_and_takes_new_ones(harness: Harness) -> None:
    daemon = harness.daemon(settings=LOOKED_AT, workers=1).start()
    where, agent = service_of(daemon), service_of(daemon, "agent")
    client = harness.connect(daemon)
    assert echoes(client)
    result = daemon.command("drain")
    told = "tested drained: balancers are told to send no more clients; 1 client here may stay\n"
    assert (result.stdout, result.stderr, result.returncode) == (told, "", 0)
    assert ask(where, "/ready")[::2] == (503, "not ready: the daemon is drained, by forkd drain\n")
    assert check(agent) == "drain\n"
    assert (daemon.status()["state"], daemon.status()["drained"]) == ("running", True)
    assert "\ndrained: balancers are told to send no clients, until forkd resume\n" in daemon.command("status").stdout
    assert echoes(client)
    assert echoes(harness.connect(daemon))
    result = daemon.command("resume")
    assert (result.stdout, result.stderr, result.returncode) == ("tested resumed\n", "", 0)
    assert ask(where, "/ready").status == 200
    assert check(agent).startswith("up ready")
    assert not daemon.status()["drained"]


def test_drained_daemon_stays_so_over_reload_and_upgrade(harness: Harness) -> None:
    daemon = harness.daemon(settings=LOOKED_AT, workers=1).start()
    assert daemon.command("drain").returncode == 0
    for verb in ("reload", "upgrade"):
        assert daemon.command(verb).returncode == 0
        assert check(daemon) == "drain\n"
        assert ask(daemon, "/ready").status == 503
    assert daemon.command("resume").returncode == 0
    assert check(daemon).startswith("up ready")


def test_drain_that_no_balancer_can_see_is_warned_of(harness: Harness) -> None:
    result = harness.daemon(workers=1).start().command("drain")
    assert (result.returncode, result.stderr) == (0, "warning: tested has neither admin.address nor agent to tell it\n")


def test_drain_of_what_does_not_run_is_told(harness: Harness) -> None:
    for verb in ("drain", "resume"):
        result = harness.daemon(workers=1).command(verb)
        assert (result.returncode, "is not running" in result.stderr) == (1, True)
