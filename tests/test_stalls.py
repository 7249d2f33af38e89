"""Workers whose loop stands still: stopped, spinning, waiting in C; and a machine that slept, where none is to blame.

Who stands still is killed, its stacks and the cause on record, and nobody else notices. What the tests wait for is what
the heartbeats on the scoreboard say.
"""

from __future__ import annotations

import os
import signal
import socket
from time import monotonic
from typing import Any

import pytest
from board import heartbeats
from clients import at_end, echoes, read
from crowd import GREETING
from harness import Daemon, Harness
from processes import eventually, wait_end

from forkd.master.master import OVERSLEPT
from forkd.master.plan import STACKS

STALL = 1.0
CAUSE = "its loop stood still for stall_timeout"


def start(harness: Harness, *settings: str, workers: int = 2) -> Daemon:
    settings = (f"stall_timeout={int(STALL * 1000)}ms", *settings)
    return harness.daemon(target="trouble:Trouble", workers=workers, settings=settings).start()


def expect_stall(daemon: Daemon) -> None:
    daemon.expect(f"{CAUSE}; these are its stacks", f"kills worker .* {CAUSE}", f"killed by SIGKILL, .*{CAUSE}")


def hosts(harness: Harness, daemon: Daemon, count: int = 12) -> dict[int, list[socket.socket]]:
    """Clients, by the pid of who serves them."""
    found: dict[int, list[socket.socket]] = {}
    for client in [harness.connect(daemon) for _ in range(count)]:
        found.setdefault(int(read(client, GREETING)), []).append(client)
    return found


def wait_death(daemon: Daemon, pid: int) -> dict[str, Any]:
    """The certificate of a worker that is to die."""
    wait_end(pid)
    death = eventually(lambda: next((one for one in daemon.status()["deaths"] if one["pid"] == pid), None))
    assert death is not None
    return death


def stacks(daemon: Daemon, pid: int) -> str:
    """What the log has from a worker's standard error."""
    return "".join(record for record in daemon.records() if f"(pid {pid}) on stderr" in record)


def test_workers_that_have_nothing_to_do_do_not_stand_still(harness: Harness) -> None:
    daemon = start(harness)
    workers, begun = daemon.workers(), monotonic()
    eventually(lambda: min(heartbeats(daemon.pid, {*workers.values()})) > begun + 3 * STALL, what="some heartbeats")
    assert daemon.workers() == workers


def test_after_a_sleep_of_the_machine_nobody_is_killed(harness: Harness) -> None:
    daemon = start(harness)
    client, master, workers = harness.connect(daemon), daemon.pid, daemon.workers()
    pids = {*workers.values()}
    for pid in (*pids, master):
        os.kill(pid, signal.SIGSTOP)
    slept = STALL + OVERSLEPT + 1
    eventually(lambda: monotonic() - max(heartbeats(master, pids)) > slept, what="heartbeats that are old")
    for pid in (master, *pids):
        os.kill(pid, signal.SIGCONT)
    woken = monotonic()
    eventually(lambda: min(heartbeats(master, pids)) > woken + STALL + STACKS, what="the time to be killed")
    daemon.wait_log("was not there for")
    assert daemon.workers() == workers
    assert daemon.status()["deaths"] == []
    assert len(read(client, GREETING)) == GREETING
    assert echoes(client)


def test_a_stopped_worker_is_killed_while_the_others_serve(harness: Harness) -> None:
    daemon = start(harness)
    expect_stall(daemon)
    by_host = hosts(harness, daemon)
    victim, other = daemon.workers().values()
    os.kill(victim, signal.SIGSTOP)
    later = [harness.connect(daemon) for _ in range(4)]
    for client in later:
        assert int(read(client, GREETING)) != victim
        assert echoes(client)
    death = wait_death(daemon, victim)
    assert (death["cause"], death["exit"], death["expected"]) == (CAUSE, "killed by SIGKILL", False)
    assert death["clients"] == len(by_host[victim])
    assert all(at_end(client) for client in by_host[victim])
    assert all(echoes(client) for client in (*by_host[other], *later))
    assert daemon.wait_workers(2, without={victim})[2] == other


@pytest.mark.parametrize(("order", "function"), [("spin", "spin_for_ever"), ("block", "block_for_ever")])
def test_a_handler_that_does_not_come_back_is_named_in_the_log(harness: Harness, order: str, function: str) -> None:
    daemon = start(harness)
    expect_stall(daemon)
    by_host = hosts(harness, daemon)
    victim, other = daemon.workers().values()
    by_host[victim][0].sendall(order.encode())
    death = wait_death(daemon, victim)
    assert death["cause"] == CAUSE
    daemon.wait_log(f"(?s)pid {victim}.*on stderr.*trouble.py.* in {function}")
    assert f"in {function}" in stacks(daemon, victim)
    assert "in data_received" in stacks(daemon, victim)
    assert all(at_end(client) for client in by_host[victim])
    assert all(echoes(client) for client in by_host[other])
    daemon.wait_workers(2, without={victim})


def test_a_worker_that_comes_round_after_its_stacks_were_written_lives(harness: Harness) -> None:
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


def test_a_reload_replaces_a_worker_that_stands_still(harness: Harness) -> None:
    daemon = start(harness)
    expect_stall(daemon)
    by_host = hosts(harness, daemon)
    victim, other = daemon.workers().values()
    by_host[victim][0].sendall(b"block")
    daemon.signal(signal.SIGHUP)
    daemon.wait_log("reload: done, generation 2 serves")
    death = wait_death(daemon, victim)
    assert death["cause"].endswith(CAUSE), "it does not say what it was killed for"
    assert all(echoes(client) for client in by_host[other])
    assert len(daemon.wait_workers(2, without={victim, other})) == 2
    assert all(echoes(client) for client in [harness.connect(daemon) for _ in range(4)] if read(client, GREETING))


def test_a_generation_whose_worker_stands_still_at_its_import_is_given_up(harness: Harness) -> None:
    gate = harness.directory / "slow.py"
    gate.write_text("from trouble import Trouble\n")
    daemon = harness.daemon(target="slow:Trouble", settings=("boot_timeout=1s",)).start()
    daemon.expect("not ready by its boot_timeout; these are its stacks", "reload: failed", "kills worker", "has ended")
    workers = daemon.workers()
    gate.write_text("from trouble import Trouble, block_for_ever\nblock_for_ever()\n")
    result = daemon.command("reload")
    assert result.returncode == 1
    assert "boot_timeout" in result.stderr
    assert daemon.workers() == workers
    assert daemon.status()["generation"] == 1
