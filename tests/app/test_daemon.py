"""A serving daemon under signals and losses: workers that die, a master that dies, draining, more and fewer workers.

Clients are connected meanwhile: those that must not be hurt are served to the end, and
those that are refused learn it at once.
"""

from __future__ import annotations

import os
import signal
from itertools import pairwise
from pathlib import Path

import pytest

from forkd.master.plan import BACKOFF
from tests.support.clients import at_end, echoes, is_free, read, refuses, survives
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, alive, eventually, title, wait_end


def wait_end_of_run(daemon: Daemon) -> int:
    """The exit status of `forkd run`."""
    assert daemon.process is not None
    return daemon.process.wait(DEADLINE)


# Workers die


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV])
def test_killed_worker_is_replaced_and_other_clients_live(harness: Harness, signum: signal.Signals) -> None:
    daemon = harness.daemon(workers=2).start()
    daemon.expect(f"worker 1 .* has ended: killed by {signum.name}")
    clients = harness.connect_to_each(daemon, 12)
    assert all(echoes(client) for client in clients)
    victim, other = daemon.workers().values()
    each = daemon.wait_clients(len(clients))
    os.kill(victim, signum)
    replaced = daemon.wait_workers(2, without={victim})
    assert replaced[2] == other
    assert sum(survives(client) for client in clients) == each[other]
    death = daemon.status()["deaths"][-1]
    assert (death["slot"], death["pid"], death["clients"]) == (1, victim, each[victim])
    assert death["exit"].startswith(f"killed by {signum.name}")
    assert death["expected"] is False


def test_clients_wait_while_no_worker_lives_and_are_served(harness: Harness) -> None:
    daemon = harness.daemon(workers=2).start()
    daemon.expect("worker 1 .* killed by SIGKILL", "worker 2 .* killed by SIGKILL")
    master, workers, address = daemon.pid, daemon.workers().values(), daemon.address
    os.kill(master, signal.SIGSTOP)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
        wait_end(pid)
    clients = [harness.connect(address) for _ in range(20)]
    for client in clients:
        client.sendall(b"patience")
    os.kill(master, signal.SIGCONT)
    assert [read(client, 8) for client in clients] == [b"patience"] * 20


def test_worker_that_dies_repeatedly_is_restarted_with_backoff(harness: Harness) -> None:
    daemon = harness.daemon(workers=2).start()
    daemon.expect("worker 1 .* killed by SIGKILL")
    other = daemon.workers()[2]
    killed: set[int] = set()
    for _ in range(5):
        victim = daemon.wait_workers(2, without=killed)[1]
        killed.add(victim)
        os.kill(victim, signal.SIGKILL)
        assert echoes(harness.connect(daemon))
    assert daemon.wait_workers(2, without=killed)[2] == other
    now = daemon.status()["workers"][0]
    deaths = [(one["time"], one["age"]) for one in daemon.status()["deaths"]]
    assert len(deaths) == 5
    waits = [born - age - died for (died, _), (born, age) in pairwise(deaths)]
    for count, wait in enumerate(waits[1:]):
        assert wait >= BACKOFF * 2**count * 0.98
    assert now["pid"] not in killed


def test_replaced_workers_cost_the_master_no_descriptors(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    daemon.expect("killed by SIGKILL")
    descriptors = Path(f"/proc/{daemon.pid}/fd")
    before = len(list(descriptors.iterdir()))  # perhaps with one for us, which goes when the master notices our end
    killed: set[int] = set()
    for _ in range(3):
        victim = daemon.wait_workers(1, without=killed)[1]
        killed.add(victim)
        os.kill(victim, signal.SIGKILL)
    daemon.wait_workers(1, without=killed)
    eventually(lambda: len(list(descriptors.iterdir())) <= before, what="as many descriptors as before")


# The daemon drains


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_stop_lets_open_connections_finish_and_refuses_others(harness: Harness, signum: signal.Signals) -> None:
    daemon = harness.daemon().run()
    client, address = harness.connect(daemon), daemon.address
    assert echoes(client)
    daemon.signal(signum)
    eventually(lambda: refuses(address), what="the refusal of new clients")
    assert echoes(client, b"to the end" * 1000)
    client.close()
    assert wait_end_of_run(daemon) == 0


def test_draining_worker_says_so_in_its_title(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).run()
    client, pid = harness.connect(daemon), daemon.workers()[1]
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    eventually(lambda: title(pid) == "forkd: tested worker 1 (draining, 1 client)", what="its title")


def test_second_stop_closes_what_is_open(harness: Harness) -> None:
    daemon = harness.daemon().run()
    client = harness.connect(daemon)
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("draining")
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    assert at_end(client)
    assert wait_end_of_run(daemon) == 0


def test_quit_closes_at_once(harness: Harness) -> None:
    daemon = harness.daemon().run()
    clients = [harness.connect(daemon) for _ in range(10)]
    assert all(echoes(client) for client in clients)
    daemon.signal(signal.SIGQUIT)
    assert all(at_end(client) for client in clients)
    assert wait_end_of_run(daemon) == 0


@pytest.mark.parametrize("handler", ["forkd.builtin:Echo", "faulty:faulty_streams"])
def test_drain_timeout_closes_connections(harness: Harness, handler: str) -> None:
    daemon = harness.daemon(target=handler, settings=("drain_timeout=200ms",)).run()
    client = harness.connect(daemon)
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    assert at_end(client)
    assert wait_end_of_run(daemon) == 0


@pytest.mark.parametrize("who", ["the client", "the deadline"])
def test_drain_lets_a_streams_handler_run_to_its_end(harness: Harness, who: str) -> None:
    settings = ("drain_timeout=200ms",) if who == "the deadline" else ()
    daemon = harness.daemon(target="forms:with_farewell", settings=settings).run()
    client = harness.connect(daemon)
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("draining")
    if who == "the client":
        client.close()
    assert wait_end_of_run(daemon) == 0
    assert any("said farewell" in record for record in daemon.records())


def test_drain_kills_a_worker_whose_handler_never_returns(harness: Harness) -> None:
    daemon = harness.daemon(target="faulty:Faulty", workers=1, settings=("drain_timeout=100ms",)).run()
    daemon.expect(
        r"worker 1 .*: it did not end by its drain deadline; these are its stacks",
        "killing worker 1 .* it did not end by its drain deadline",
        "has ended: killed by SIGKILL",
    )
    client, worker = harness.connect(daemon), daemon.workers()[1]
    assert echoes(client)
    client.sendall(b"loop")
    daemon.signal(signal.SIGTERM)
    wait_end(worker)
    assert wait_end_of_run(daemon) == 0


def test_client_that_does_not_read_can_not_hold_up_the_end(harness: Harness) -> None:
    daemon = harness.daemon(target="flood:Considerate", settings=("drain_timeout=200ms",)).run()
    harness.connect(daemon)
    daemon.wait_log("paused with")
    daemon.signal(signal.SIGTERM)
    assert wait_end_of_run(daemon) == 0


# More and fewer workers


def test_signals_ttin_and_ttou_add_and_remove_a_worker(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    for signum, count in ((signal.SIGTTIN, 2), (signal.SIGTTIN, 3), (signal.SIGTTOU, 2)):
        daemon.signal(signum)
        assert list(daemon.wait_workers(count)) == list(range(1, count + 1))
    for _ in range(3):  # the last one stays
        daemon.signal(signal.SIGTTOU)
    assert list(daemon.wait_workers(1)) == [1]
    assert echoes(harness.connect(daemon))


@pytest.mark.parametrize("way", ["signal", "command"])
def test_retiring_worker_finishes_its_clients(harness: Harness, way: str) -> None:
    daemon = harness.daemon(workers=2).start()
    clients = harness.connect_to_each(daemon, 8)
    assert all(echoes(client) for client in clients)
    retiring = daemon.workers()[2]
    if way == "signal":
        daemon.signal(signal.SIGTTOU)
    else:
        assert daemon.command("scale", 1).returncode == 0
    daemon.wait_workers(1)
    assert daemon.workers("draining") == {2: retiring}
    eventually(lambda: "draining" in title(retiring), what="a worker that takes no client any more")
    later = [harness.connect(daemon) for _ in range(8)]
    assert all(echoes(client) for client in clients + later)
    assert alive(retiring)
    for client in clients:
        client.close()
    wait_end(retiring)
    eventually(lambda: daemon.status()["deaths"], what="its exit record")
    assert daemon.status()["deaths"][-1]["expected"] is True
    assert all(echoes(client) for client in later)


def test_slot_is_filled_while_its_former_worker_drains(harness: Harness) -> None:
    daemon = harness.daemon(workers=2).start()
    clients = harness.connect_to_each(daemon, 8)
    assert all(echoes(client) for client in clients)
    former = daemon.workers()[2]
    daemon.signal(signal.SIGTTOU)
    daemon.wait_workers(1)
    daemon.signal(signal.SIGTTIN)
    assert daemon.wait_workers(2)[2] != former
    assert daemon.workers("draining") == {2: former}
    assert all(echoes(client) for client in clients)


# The master dies


@pytest.mark.parametrize("what", ["idle", "stuck"])
def test_master_killed_ends_its_workers_and_frees_the_port(harness: Harness, what: str) -> None:
    daemon = harness.daemon(target="faulty:Faulty", workers=2).start()
    daemon.expect("the master is gone")
    address, master, workers = daemon.address, daemon.pid, daemon.workers().values()
    clients = [harness.connect(daemon) for _ in range(6)]
    assert all(echoes(client) for client in clients)
    if what == "stuck":
        clients[0].sendall(b"loop")
    os.kill(master, signal.SIGKILL)
    for pid in (master, *workers):
        wait_end(pid, 5)
    assert all(at_end(client) for client in clients)
    assert is_free(address)
    assert daemon.command("status").returncode == 1
    daemon.options.append(f"--listen={address}")
    daemon.options.remove("--listen=tcp://127.0.0.1:0")
    daemon.start()
    assert daemon.pid != master
    assert echoes(harness.connect(address))


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "unix:{}/echo", "unix:@{}"])
def test_clients_that_wait_when_the_master_is_killed_are_served(harness: Harness, tmp_path: Path, listen: str) -> None:
    daemon = harness.daemon(workers=3, listen=(listen.format(tmp_path),)).start()
    daemon.expect("the master is gone")
    master, workers = daemon.pid, daemon.workers().values()
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    waiting = [harness.connect(daemon) for _ in range(40)]
    for client in waiting:
        client.sendall(b"hello")
    os.kill(master, signal.SIGKILL)
    wait_end(master, 5)
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    assert [read(client, 5) for client in waiting] == [b"hello"] * 40
    for pid in workers:
        wait_end(pid, 5)
    daemon.start()  # which clears away what was left


def test_worker_that_still_boots_goes_with_its_master_too(harness: Harness, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    daemon = harness.daemon(target="gate:Echo", workers=1)
    with open(tmp_path / "gate", "r+b", buffering=0) as gate:
        gate.write(b"1")
        daemon.start()
        daemon.signal(signal.SIGTTIN)
        booting = eventually(lambda: daemon.workers("booting"), what="a worker that boots")[2]
        daemon.expect("the master is gone")
        master, address = daemon.pid, daemon.address
        os.kill(master, signal.SIGKILL)
        wait_end(booting, 5)
        eventually(lambda: is_free(address), what="the port free")
        gate.write(b"1")
        daemon.start()


def test_signal_to_the_process_group_is_left_to_the_master(harness: Harness) -> None:
    daemon = harness.daemon().run()
    client, master, workers = harness.connect(daemon), daemon.pid, daemon.workers()
    assert echoes(client)
    os.killpg(os.getpgid(master), signal.SIGUSR1)
    daemon.wait_log("log file .* reopened")
    assert (daemon.pid, daemon.workers()) == (master, workers)
    os.killpg(os.getpgid(master), signal.SIGHUP)
    daemon.wait_log("reload: done")
    assert not {*daemon.wait_workers(2).values()} & {*workers.values()}
    assert echoes(client)
    assert echoes(harness.connect(daemon))
