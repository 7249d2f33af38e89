"""Workers whose loop stands still: stopped, spinning, waiting in C; and a machine that slept, where none is to blame.

A worker that stands still is killed, its stacks and the cause on record, and no other notices. The tests wait for what
the heartbeats on the scoreboard say.
"""

from __future__ import annotations

import os
import signal
import socket
from time import monotonic
from typing import Any

import pytest

from forkd.master.master import LATE
from forkd.master.plan import STACKS
from tests.support.clients import at_end, echoes, read
from tests.support.daemon import STOOD_STILL, Daemon, Harness
from tests.support.many_clients import GREETING
from tests.support.processes import eventually, wait_end
from tests.support.scoreboard import heartbeats

STALL = 1.0
CAUSE = "its loop stood still for stall_timeout"


def start(harness: Harness, *settings: str, workers: int = 2) -> Daemon:
    settings = (f"stall_timeout={int(STALL * 1000)}ms", *settings)
    return harness.daemon(target="trouble:Trouble", workers=workers, settings=settings).start()


def expect_stall(daemon: Daemon) -> None:
    daemon.expect(f"{CAUSE}; these are its stacks", f"killing worker .* {CAUSE}", f"killed by SIGKILL, .*{CAUSE}")


def hosts(harness: Harness, daemon: Daemon, count: int = 12) -> dict[int, list[socket.socket]]:
    """Clients of each worker, by its pid."""
    found: dict[int, list[socket.socket]] = {}
    for client in harness.connect_to_each(daemon, count):
        found.setdefault(int(read(client, GREETING)), []).append(client)
    return found


def wait_exit_record(daemon: Daemon, pid: int) -> dict[str, Any]:
    """The exit record of a worker that is about to end."""
    wait_end(pid)
    found: dict[str, Any] | None = eventually(
        lambda: next((one for one in daemon.status()["deaths"] if one["pid"] == pid), None)
    )
    assert found is not None
    return found


def stacks(daemon: Daemon, pid: int) -> str:
    """What the log has from a worker's standard error."""
    return "".join(record for record in daemon.records() if f"(pid {pid}) output" in record)


def test_workers_that_have_nothing_to_do_do_not_stand_still(harness: Harness) -> None:
    daemon = start(harness)
    daemon.allow(STOOD_STILL)
    workers, begun = daemon.workers(), monotonic()
    eventually(lambda: min(heartbeats(daemon.pid, {*workers.values()})) > begun + 3 * STALL, what="some heartbeats")
    assert daemon.workers() == workers


def test_machine_that_slept_kills_no_worker(harness: Harness) -> None:
    daemon = start(harness)
    daemon.allow(STOOD_STILL)
    client, master, workers = harness.connect(daemon), daemon.pid, daemon.workers()
    pids = {*workers.values()}
    for pid in (*pids, master):
        os.kill(pid, signal.SIGSTOP)
    slept = STALL + LATE + 1
    eventually(lambda: monotonic() - max(heartbeats(master, pids)) > slept, what="heartbeats that are old")
    for pid in (master, *pids):
        os.kill(pid, signal.SIGCONT)
    woken = monotonic()
    eventually(lambda: min(heartbeats(master, pids)) > woken + STALL + STACKS, what="the time to be killed")
    daemon.wait_log("event loop was delayed")
    assert daemon.workers() == workers
    assert daemon.status()["deaths"] == []
    assert len(read(client, GREETING)) == GREETING
    assert echoes(client)


def test_stopped_worker_is_killed_while_the_others_serve(harness: Harness) -> None:
    daemon = start(harness)
    expect_stall(daemon)
    by_host = hosts(harness, daemon)
    victim, other = daemon.workers().values()
    os.kill(victim, signal.SIGSTOP)
    later = [harness.connect(daemon) for _ in range(4)]
    for client in later:
        assert int(read(client, GREETING)) != victim
        assert echoes(client)
    record = wait_exit_record(daemon, victim)
    assert (record["cause"], record["exit"], record["expected"]) == (CAUSE, "killed by SIGKILL", False)
    assert record["clients"] == len(by_host[victim])
    assert all(at_end(client) for client in by_host[victim])
    assert all(echoes(client) for client in (*by_host[other], *later))
    assert daemon.wait_workers(2, without={victim})[2] == other


@pytest.mark.parametrize(("order", "function"), [("spin", "spin_for_ever"), ("block", "block_for_ever")])
def test_handler_that_does_not_come_back_is_named_in_the_log(harness: Harness, order: str, function: str) -> None:
    daemon = start(harness)
    expect_stall(daemon)
    by_host = hosts(harness, daemon)
    victim, other = daemon.workers().values()
    by_host[victim][0].sendall(order.encode())
    record = wait_exit_record(daemon, victim)
    assert record["cause"] == CAUSE
    daemon.wait_log(f"(?s)pid {victim}.*output.*trouble.py.* in {function}")
    assert f"in {function}" in stacks(daemon, victim)
    assert "in data_received" in stacks(daemon, victim)
    assert all(at_end(client) for client in by_host[victim])
    assert all(echoes(client) for client in by_host[other])
    daemon.wait_workers(2, without={victim})


def test_worker_that_goes_on_after_its_stack_dump_lives(harness: Harness) -> None:
    daemon = start(harness)
    daemon.expect(f"{CAUSE}; these are its stacks")
    workers = daemon.workers()
    os.kill(workers[1], signal.SIGSTOP)
    daemon.wait_log("these are its stacks")
    os.kill(workers[1], signal.SIGCONT)
    begun = monotonic()
    eventually(
        lambda: min(heartbeats(daemon.pid, {*workers.values()})) > begun + STALL + STACKS, what="its kill's time"
    )
    assert daemon.workers() == workers


def test_reload_replaces_a_worker_that_stands_still(harness: Harness) -> None:
    daemon = start(harness)
    expect_stall(daemon)
    by_host = hosts(harness, daemon)
    victim, other = daemon.workers().values()
    by_host[victim][0].sendall(b"block")
    daemon.signal(signal.SIGHUP)
    daemon.wait_log("reload: done, generation 2 serves")
    record = wait_exit_record(daemon, victim)
    assert record["cause"].endswith(CAUSE), "it does not say what it was killed for"
    assert all(echoes(client) for client in by_host[other])
    assert len(daemon.wait_workers(2, without={victim, other})) == 2
    assert all(echoes(client) for client in [harness.connect(daemon) for _ in range(4)] if read(client, GREETING))


def test_generation_whose_import_stands_still_is_given_up(harness: Harness) -> None:
    gate = harness.directory / "slow.py"
    gate.write_text("from trouble import Trouble\n")
    daemon = harness.daemon(target="slow:Trouble", settings=("boot_timeout=1s",)).start()
    daemon.expect(
        "not ready by its boot_timeout; these are its stacks", "reload: failed", "killing worker", "has ended"
    )
    workers = daemon.workers()
    gate.write_text("from trouble import Trouble, block_for_ever\nblock_for_ever()\n")
    result = daemon.command("reload")
    assert result.returncode == 1
    assert "boot_timeout" in result.stderr
    assert daemon.workers() == workers
    assert daemon.status()["generation"] == 1
