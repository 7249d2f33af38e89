"""Upgrades in place: another image of the master under the same PID, with the same clients, addresses and state.

Those that are refused are in `test_upgrade_errors`.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.support.changing_daemon import Changing, descriptors, listener, outcome, wait_at_gate
from tests.support.clients import echoes
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, descendants, eventually, title, wait_end

VERSION = '__version__ = "99.0"\n'


def begin(daemon: Daemon, verb: str) -> Daemon:
    """Starts a daemon in the foreground or in the background."""
    return daemon.run() if verb == "run" else daemon.start()


@pytest.mark.parametrize(("verb", "way"), [("run", "signal"), ("start", "command")])
def test_upgrade_goes_over_to_the_code_that_is_there_now(harness: Harness, tmp_path: Path, verb: str, way: str) -> None:
    site = Changing(harness, listen=[listener("tcp://127.0.0.1:0"), listener(f"unix:{tmp_path / 'sock'}")])
    copy = site.bring_forkd()
    daemon = begin(site.daemon, verb)
    before, old, inode = daemon.status(), daemon.workers(), (tmp_path / "sock").stat().st_ino
    clients = site.crowd(daemon.address, f"unix:{tmp_path / 'sock'}")
    with (copy / "__init__.py").open("a") as later:
        later.write(VERSION)
    site.code("later", "import os\nassert 'FORKD_RESUME' not in os.environ\n")  # else the reload fails
    site.write(workers=3)
    if way == "signal":
        daemon.signal(signal.SIGUSR2)
        daemon.wait_log("reload: done, generation 2 serves")
    else:
        result = daemon.command("upgrade")
        assert (result.returncode, result.stdout) == (0, "tested upgraded: 3 workers of generation 2\n"), result.stderr
    after = daemon.status()
    assert (after["pid"], after["started"]) == (before["pid"], before["started"])
    assert (before["version"] == "99.0", after["version"] == "99.0") == (False, True)
    assert after["listeners"] == before["listeners"]
    assert (tmp_path / "sock").stat().st_ino == inode
    assert title(daemon.pid) == "forkd: tested master"
    assert daemon.wait_workers(3, without=old.values()).keys() == {1, 2, 3}
    assert daemon.workers("draining") == old
    for address in ("", f"unix:{tmp_path / 'sock'}"):
        assert site.greet(address)[1] == "later"
    assert all(echoes(client) for client in clients)
    assert int((daemon.run_directory / "pid").read_text()) == daemon.pid
    assert daemon.command("start").stdout == f"tested is already running, pid {daemon.pid}\n"
    for client in clients:
        client.close()
    for pid in old.values():
        wait_end(pid)
    assert daemon.command("stop", "--now").returncode == 0
    assert daemon.process is None or daemon.process.wait(DEADLINE) == 0


def test_upgrade_keeps_exit_records_and_the_scaled_number(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    daemon.expect("worker 1 .* has ended: killed by SIGKILL")
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGKILL)
    daemon.wait_workers(2, without={victim})
    assert daemon.command("scale", 3).returncode == 0
    before = daemon.status()
    assert daemon.command("upgrade").returncode == 0
    after = daemon.status()
    assert after["wanted"] == len(daemon.workers()) == 3
    assert after["deaths"][: len(before["deaths"])] == before["deaths"]
    assert [one["slot"] for one in before["deaths"]] == [1]
    eventually(lambda: len(daemon.status()["workers"]) == 3, what="the end of the old workers")
    # A worker that was hurt before the upgrade is still read, and reaped, after it.
    worker = daemon.workers()[2]
    daemon.expect("worker 2 .* has ended: killed by SIGABRT")
    os.kill(worker, signal.SIGABRT)
    daemon.wait_workers(3, without={worker})
    assert daemon.status()["deaths"][-1]["pid"] == worker


def test_old_workers_are_looked_after_by_the_new_image(harness: Harness) -> None:
    site = Changing(
        harness, drain_timeout="2s", workers=1, listen=[listener("tcp://127.0.0.1:0", handler="talks:Talks")]
    )
    (site.directory / "talks.py").write_text(
        "import sys\n"
        "from forkd.builtin import Echo\n"
        "class Talks(Echo):\n"
        "    def data_received(self, data):\n"
        "        print(data.decode(), file=sys.stderr, flush=True)\n"
        "        while data == b'loop':\n"
        "            pass\n"
        "        super().data_received(data)\n"
    )
    daemon = site.daemon.start()
    daemon.expect(
        "these are its stacks", "killing worker 1 .*", "has ended: killed by SIGKILL, .*it did not end by its drain"
    )
    client, old = harness.connect(daemon), daemon.workers()[1]
    assert echoes(client, b"a word before\n")
    daemon.wait_log("output: a word before")
    assert daemon.command("upgrade").returncode == 0
    client.sendall(b"loop")
    daemon.wait_log(rf"WARNING .*worker 1 \(pid {old}\) output: loop")
    wait_end(old)


def test_five_upgrades_in_a_row_cost_no_descriptor_and_no_client(harness: Harness) -> None:
    site = Changing(harness, drain_timeout="10m")  # the first client is to outlive all of them
    daemon = site.daemon.start()
    master, address, before = daemon.pid, daemon.address, len(descriptors(daemon.pid))
    clients = []
    for count in range(5):
        clients.append(site.greet(address)[0])
        result = daemon.command("upgrade")
        assert result.stdout == f"tested upgraded: 2 workers of generation {count + 2}\n", result.stderr
    assert daemon.pid == master
    assert all(echoes(client) for client in clients)
    for client in clients:
        client.close()
    eventually(lambda: len(daemon.status()["workers"]) == 2, what="the end of the old workers")
    eventually(lambda: len(descriptors(master)) <= before, what="as many descriptors as before")


def test_preloaded_code_changes_by_an_upgrade_not_a_reload(harness: Harness) -> None:
    site = Changing(harness, preload=True)
    daemon = site.daemon.start()
    site.code("later")
    assert daemon.command("reload").returncode == 0
    assert site.greet()[1] == "first"
    site.write(preload=False)
    daemon.expect("reload: failed, and nothing has changed: a reload can't change this")
    assert "preload" in daemon.command("reload").stderr
    site.write(preload=True)
    assert daemon.command("upgrade").returncode == 0
    assert site.greet()[1] == "later"
    site.write(preload=False)
    assert daemon.command("upgrade").returncode == 0
    site.code("third")
    assert daemon.command("reload").returncode == 0
    assert site.greet()[1] == "third"


def test_upgrades_that_are_asked_for_during_one_are_done_with_it(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    master = daemon.pid
    with site.gate("later") as let:
        daemon.signal(signal.SIGUSR2)
        daemon.wait_log("upgrade: begins")
        daemon.signal(signal.SIGUSR2)
        daemon.wait_log("upgrade: waits for what is under way: upgrade")
        asked = [site.begin("upgrade"), site.begin("reload")]
        eventually(lambda: sum("upgrade: waits" in one for one in daemon.records()) == 3)
        let(20)
        for one in asked:
            status, out, err = outcome(one)
            assert (status, err) == (0, ""), err
            assert out.endswith("ed: 2 workers of generation 2\n")
    assert (daemon.pid, site.greet()[1]) == (master, "later")


def test_upgrade_keeps_the_connection_of_a_client_that_asks_later(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    client = harness.connect(f"unix:{daemon.run_directory / 'control.sock'}")
    with client.makefile("rwb") as lines:

        def generation() -> int:
            lines.write(b'{"verb": "status"}\n')
            lines.flush()
            return int(json.loads(lines.readline())["status"]["generation"])

        assert generation() == 1
        assert daemon.command("upgrade").returncode == 0
        assert generation() == 2


def test_stop_that_comes_with_the_order_to_upgrade_stops(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.run()
    client, _ = site.greet()
    assert daemon.process is not None
    for signum in (signal.SIGSTOP, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):  # so that it sees both at once
        daemon.process.send_signal(signum)
    daemon.wait_log("upgrade: refused, the daemon is draining")
    assert echoes(client)
    client.close()
    assert daemon.process.wait(DEADLINE) == 0


def test_stop_during_the_dry_run_stops(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.run()
    client, _ = site.greet()
    assert daemon.process is not None
    with site.gate("later"):
        asked = site.begin("upgrade")
        wait_at_gate(lambda: descendants(daemon.pid), 1)
        daemon.signal(signal.SIGTERM)
        assert outcome(asked)[::2] == (1, "forkd: the upgrade failed, and tested goes on as before: the daemon stops\n")
        assert echoes(client)
        client.close()
        assert daemon.process.wait(DEADLINE) == 0


def test_stop_while_the_new_image_boots_its_workers_stops(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.run()
    client, _ = site.greet()
    with site.gate("later") as let:
        asked = site.begin("upgrade")
        daemon.wait_log("upgrade: begins")
        let(1)  # the dry run's
        daemon.wait_log("new image of the master runs")
        wait_at_gate(lambda: daemon.workers("booting").values(), 2)
        daemon.signal(signal.SIGTERM)
        assert outcome(asked)[::2] == (1, "forkd: the upgrade failed, and tested goes on as before: the daemon stops\n")
        assert echoes(client)
        client.close()
        assert daemon.process is not None
        assert daemon.process.wait(DEADLINE) == 0
