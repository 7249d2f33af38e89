"""A daemon that changes while fifty clients come and go without pause: reloads, upgrades, killed workers, scaling.

No client is refused, cut off or sent wrong bytes but those whose worker was killed; and in the end the master is what
it was: as many descriptors, as much memory, no dead children, the same pid. Each has a short form, and a long one for
`make soak`, which prints its figures.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from forkd.states import WorkerState
from tests.support.clients import at_end, echoes, read, survives
from tests.support.daemon import Daemon, Harness
from tests.support.many_clients import GREETING, ChurnClients, Outcomes
from tests.support.processes import children, eventually, resident, wait_end

MIB = 1 << 20


def either(short: int, full: int) -> pytest.MarkDecorator:
    """The test with the count for every run, and with the one for the long run."""
    soak = pytest.param(full, marks=[pytest.mark.soak, pytest.mark.timeout(900)])
    return pytest.mark.parametrize("count", [short, soak])


def start(harness: Harness, workers: int = 2, *settings: str) -> Daemon:
    return harness.daemon(target="teller:Teller", workers=workers, settings=("drain_timeout=15m", *settings)).start()


def resident_clients(harness: Harness, daemon: Daemon, count: int = 4) -> list[Any]:
    """Clients that stay connected."""
    clients = [harness.connect(daemon) for _ in range(count)]
    assert all(len(read(client, GREETING)) == GREETING for client in clients)
    return clients


@contextmanager
def unchanged(daemon: Daemon, count: int) -> Iterator[int]:
    """Checks that the master is after it all what it was before; its pid."""
    master = daemon.pid
    before, memory = daemon.descriptors(), resident(master)
    yield master
    assert daemon.pid == master
    assert daemon.status()["state"] == "running"
    eventually(lambda: not daemon.workers(WorkerState.DRAINING.value), what="the end of those that drain")
    eventually(lambda: "Z" not in children(master).values(), what="no zombies")
    after, grown = daemon.descriptors(), resident(master) - memory
    print(f"{count} times: descriptors {before} before, {after} after; {memory / MIB:.2f} MiB, {grown / MIB:+.2f}")
    assert after == before
    assert os.readlink(f"/proc/{master}/fd/0") == os.devnull
    assert grown < 2 * MIB


def show(outcomes: Outcomes) -> None:
    refused, reset, wrong, stuck = outcomes.losses
    print(f"{outcomes.whole.total()} whole; refused {refused}, reset {reset}, wrong {wrong}, stuck {stuck}")


def reload(daemon: Daemon, number: int) -> None:
    """Has the daemon reload to its generation of this number; at no moment fewer workers serve than are wanted."""

    def done() -> bool:
        status = daemon.status()
        assert (status["state"], status["serving"]) == ("running", status["wanted"])
        return bool(status["generation"] == number)

    daemon.signal(signal.SIGHUP)
    eventually(done, what=f"generation {number}")


def upgrade(daemon: Daemon, number: int) -> None:
    """Has the daemon upgrade itself, by which its generation has this number."""
    daemon.signal(signal.SIGUSR2)
    # Not asked on the control socket: an upgrade cuts off who asks just then.
    daemon.wait_log(f"reload: done, generation {number} serves")


@either(5, 100)
def test_reloads_in_a_row_hurt_no_client(harness: Harness, count: int) -> None:
    daemon = start(harness)
    with unchanged(daemon, count):
        staying = resident_clients(harness, daemon)
        with ChurnClients(daemon.address) as churn:
            for number in range(2, count + 2):
                reload(daemon, number)
                assert all(echoes(client) for client in staying)
        for client in staying:
            client.close()
    show(churn.outcomes)
    assert churn.outcomes.losses == (0, 0, 0, 0)
    assert len(churn.outcomes.whole) > count, "not every generation has served"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_reloads_of_an_idle_daemon_leave_its_memory_as_it_was(harness: Harness) -> None:
    daemon = start(harness, 4)
    master, sizes = daemon.pid, []
    for number in range(2, 502):
        reload(daemon, number)
        eventually(lambda: not daemon.workers(WorkerState.DRAINING.value), what="the end of those that drain")
        sizes.append(resident(master))
    print(f"after 1, 10, 100 and 500 reloads: {[sizes[count - 1] // 1024 for count in (1, 10, 100, 500)]} KiB")
    assert sizes[-1] - sizes[9] < MIB / 8


@either(3, 20)
def test_upgrades_in_a_row_hurt_no_client(harness: Harness, count: int) -> None:
    daemon = start(harness)
    with unchanged(daemon, count):
        staying = resident_clients(harness, daemon)
        with ChurnClients(daemon.address) as churn:
            for number in range(2, count + 2):
                upgrade(daemon, number)
                assert all(echoes(client) for client in staying)
        for client in staying:
            client.close()
    show(churn.outcomes)
    assert churn.outcomes.losses == (0, 0, 0, 0)


@either(5, 50)
def test_scaling_hurts_no_client(harness: Harness, count: int) -> None:
    daemon = start(harness)
    with unchanged(daemon, count):
        staying = resident_clients(harness, daemon)
        with ChurnClients(daemon.address) as churn:
            for turn in range(count):
                wanted = 2 if turn == count - 1 else random.choice([1, 3, 4, 5])
                assert daemon.command("scale", wanted).returncode == 0
                assert len(daemon.workers()) == wanted
                assert all(echoes(client) for client in staying)
        for client in staying:
            client.close()
    show(churn.outcomes)
    assert churn.outcomes.losses == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("count", "workers"), [(10, 8), pytest.param(200, 32, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
def test_killed_workers_lose_their_own_clients_and_no_others(harness: Harness, count: int, workers: int) -> None:
    daemon = start(harness, workers)
    daemon.expect("worker .* killed by SIGKILL")
    with unchanged(daemon, count):
        staying = {client: int(read(client, GREETING)) for client in harness.connect_to_each(daemon, workers)}
        with ChurnClients(daemon.address) as churn:
            killed = dict(kill_one(daemon) for _ in range(count))
        eventually(lambda: len(daemon.workers()) == workers, 60, what="all workers serving")
    show(churn.outcomes)
    refused, reset, wrong, stuck = churn.outcomes.losses
    assert (refused, wrong, stuck) == (0, 0, 0)
    assert {*churn.outcomes.reset} <= {*killed, 0}
    # A worker takes one client after the other: of each that was killed one may not have been counted or greeted yet.
    assert reset <= sum(killed.values()) + count
    assert churn.outcomes.reset[0] <= count
    hurt = {pid for client, pid in staying.items() if not survives(client)}
    assert hurt == {*killed} & {*staying.values()}
    assert hurt, "no client was there to be hurt"


def kill_one(daemon: Daemon) -> tuple[int, int]:
    """Kills a worker; its pid, and how many clients it had. Where many in a row die in one slot, the next one waits;
    another serves nevertheless.
    """
    eventually(lambda: len(daemon.workers()) > 1, what="two workers serving")
    victim = random.choice([*daemon.workers().values()])
    os.kill(victim, signal.SIGKILL)
    wait_end(victim)

    def recorded() -> dict[str, Any] | None:
        return next((death for death in daemon.status()["deaths"] if death["pid"] == victim), None)

    death = eventually(recorded, what="its exit record")
    assert death is not None
    return victim, death["clients"]


def test_reload_closes_open_connections_at_the_drain_timeout(harness: Harness) -> None:
    daemon = start(harness, 2, "drain_timeout=2s")
    staying, leaving = resident_clients(harness, daemon, 2)
    former = {*daemon.workers().values()}
    reload(daemon, 2)
    assert echoes(staying)
    assert echoes(leaving)
    leaving.close()
    assert at_end(staying)
    daemon.wait_log("closing open connections: 1")
    daemon.wait_workers(2, without=former)
    for pid in former:
        wait_end(pid)
    assert all(death["expected"] for death in daemon.status()["deaths"])
