"""Workers that have served long enough: by their connections, their age, their memory.

Each is replaced by one that serves before it ends, one at a time, and no client notices. The daemon meanwhile never
has fewer workers that serve than are wanted, nor more than one beyond that.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from time import monotonic
from typing import Any

from tests.support.clients import echoes, read
from tests.support.daemon import Daemon, Harness
from tests.support.many_clients import GREETING, ChurnClients
from tests.support.processes import eventually
from tests.support.scoreboard import heartbeats

SETTLED = 1.0  # seconds after a heartbeat by which whatever it is to tell has been told


def start(harness: Harness, workers: int, **recycle: str) -> Daemon:
    recycle = {"jitter": "0%", **recycle}
    settings = tuple(f"recycle.{key}={value}" for key, value in recycle.items())
    return harness.daemon(target="trouble:Trouble", workers=workers, settings=("drain_timeout=15m", *settings)).start()


def look(daemon: Daemon) -> dict[str, Any]:
    """Its status, which never shows that a worker is missing, nor that two are replaced at once."""
    status = daemon.status()
    staying = [one for one in status["workers"] if one["state"] in ("booting", "serving")]
    assert (status["state"], status["serving"]) == ("running", status["wanted"])
    assert len(staying) <= status["wanted"] + 1
    return status


def serving(daemon: Daemon) -> list[int]:
    """The pids of those that serve, as `look` finds them."""
    return [one["pid"] for one in look(daemon)["workers"] if one["state"] == "serving"]


def wait_replaced(daemon: Daemon, pids: Collection[int]) -> None:
    """Waits until others serve in the place of all of these."""

    def replaced() -> bool:
        return not {*pids} & {*serving(daemon)}

    eventually(replaced, what="the replacement")


def wait_deaths(daemon: Daemon, count: int) -> list[dict[str, Any]]:
    """Waits for so many exit records, of which each must say that its worker was worn."""
    eventually(lambda: len(look(daemon)["deaths"]) >= count, what=f"{count} deaths")
    deaths = list(daemon.status()["deaths"])
    assert all(one["expected"] and one["code"] == 0 for one in deaths)
    assert all(one["cause"].startswith("recycled: ") for one in deaths), deaths
    return deaths


def wait_heartbeat(daemon: Daemon, pid: int) -> None:
    """Waits until a worker has had the time to ask to be recycled."""
    begun, master = monotonic(), daemon.pid
    eventually(lambda: min(heartbeats(master, {pid})) > begun + SETTLED, what="its heartbeats")


def visit(harness: Harness, address: str, count: int) -> None:
    """So many connections, one after the other."""
    for _ in range(count):
        client = harness.connect(address)
        assert read(client, GREETING)
        assert echoes(client)
        client.close()


def test_a_worker_is_replaced_after_its_connections(harness: Harness) -> None:
    daemon = start(harness, 1, connections="10")
    address, worker = daemon.address, daemon.workers()[1]
    visit(harness, address, 8)
    staying = harness.connect(address)
    assert int(read(staying, GREETING)) == worker
    wait_heartbeat(daemon, worker)
    assert daemon.workers() == {1: worker}
    visit(harness, address, 1)
    wait_replaced(daemon, {worker})
    assert daemon.workers("draining") == {1: worker}
    assert echoes(staying)
    visit(harness, address, 1)
    staying.close()
    (death,) = wait_deaths(daemon, 1)
    assert (death["pid"], death["clients"]) == (worker, 0)
    assert "connections" in death["cause"]


def test_a_crowd_loses_nothing_while_workers_are_replaced(harness: Harness) -> None:
    daemon = start(harness, 3, connections="100")
    first, staying = daemon.workers(), [harness.connect(daemon) for _ in range(6)]
    assert all(read(client, GREETING) for client in staying)
    with ChurnClients(daemon.address) as churn:
        wait_replaced(daemon, first.values())
        eventually(lambda: look(daemon) and len(churn.outcomes.whole) > 6, what="two replacements of each")
    assert churn.outcomes.losses == (0, 0, 0, 0)
    assert all(echoes(client) for client in staying)
    for client in staying:
        client.close()
    assert all("connections" in death["cause"] for death in wait_deaths(daemon, 3))


def test_workers_of_one_age_are_replaced_one_by_one(harness: Harness) -> None:
    daemon = start(harness, 4, age="1500ms")
    first, staying = daemon.workers(), [harness.connect(daemon) for _ in range(8)]
    assert all(read(client, GREETING) for client in staying)
    wait_replaced(daemon, first.values())
    assert all(echoes(client) for client in staying)
    for client in staying:
        client.close()
    eventually(lambda: {*first.values()} <= {death["pid"] for death in look(daemon)["deaths"]}, what="their ends")
    assert all(re.search(r"recycled: \d+s old", death["cause"]) for death in look(daemon)["deaths"])


def test_a_worker_that_has_grown_is_replaced_and_no_other(harness: Harness) -> None:
    daemon = start(harness, 2, memory="100MiB")
    first = daemon.workers()
    clients = {client: int(read(client, GREETING)) for client in harness.connect_to_each(daemon, 8)}
    hungry, host = next(iter(clients.items()))
    wait_heartbeat(daemon, host)
    assert daemon.workers() == first
    hungry.sendall(b"grow")
    assert read(hungry, 4) == b"grow"
    wait_replaced(daemon, {host})
    assert {*first.values()} - {host} <= {*daemon.workers().values()}
    assert all(echoes(client) for client in clients)
    for client in clients:
        client.close()
    (death,) = wait_deaths(daemon, 1)
    assert death["pid"] == host
    assert "memory" in death["cause"]
    assert death["peak_memory"] > 100 << 20


def test_jitter_lowers_a_limit_by_no_more_than_it_says(harness: Harness) -> None:
    daemon = start(harness, 1, connections="20", jitter="50%")
    address, worker = daemon.address, daemon.workers()[1]
    visit(harness, address, 9)
    wait_heartbeat(daemon, worker)
    assert daemon.workers() == {1: worker}
    visit(harness, address, 11)
    wait_replaced(daemon, {worker})
    wait_deaths(daemon, 1)


def test_jitter_keeps_workers_from_growing_old_together(harness: Harness) -> None:
    daemon = start(harness, 8, age="10s", jitter="90%")
    first = {*daemon.workers().values()}
    # Without jitter none would go before ten seconds are over.
    eventually(lambda: len(first & {*serving(daemon)}) < 8, 8, what="the first to go")
    assert len(first & {*serving(daemon)}) > 4
    wait_deaths(daemon, 1)


def put(path: Path, text: str) -> None:
    """Writes a file so that no worker that boots just now finds half of it."""
    part = path.with_suffix(".part")
    part.write_text(text)
    part.replace(path)


def test_a_worker_serves_on_while_its_replacement_cannot_boot(harness: Harness) -> None:
    handler = harness.directory / "mended.py"
    put(handler, "from trouble import Trouble\n")
    daemon = harness.daemon(
        target="mended:Trouble", workers=1, settings=("recycle.connections=3", "recycle.jitter=0%")
    ).start()
    daemon.expect("worker 1 .* has ended: exit status 3, could not boot: .*not yet mended")
    worker, address = daemon.workers()[1], daemon.address
    put(handler, "raise RuntimeError('not yet mended')\n")
    visit(harness, address, 3)
    daemon.wait_log("could not boot: .*not yet mended")
    visit(harness, address, 5)
    assert daemon.workers() == {1: worker}
    put(handler, "from trouble import Trouble\n")
    eventually(lambda: worker not in daemon.workers().values(), what="its replacement")
    assert all(echoes(client) for client in [harness.connect(address)] if read(client, GREETING))
