"""Restarts: another master takes over name, addresses and control socket from the one that runs, without a gap."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.changing_daemon import WORD, Changing, descriptors, listener, outcome, wait_at_gate
from tests.support.clients import at_end, dial, echoes, read
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, descendants, eventually, title, wait_end


class RepeatedClient(threading.Thread):
    """A client that connects, checks an echo and leaves, again and again, and notes what went wrong."""

    def __init__(self, addresses: list[str]) -> None:
        super().__init__()
        self.addresses = addresses
        self.served: list[str] = []
        self.wrong: list[str] = []
        self.enough = threading.Event()

    def run(self) -> None:
        while not self.enough.is_set():
            for address in self.addresses:
                try:
                    with dial(address) as sock:
                        word = read(sock, WORD).decode()
                        assert echoes(sock)
                        self.served.append(word)
                except (OSError, AssertionError) as error:
                    self.wrong.append(f"{address}: {error!r}")

    @contextlib.contextmanager
    def running(self) -> Iterator[RepeatedClient]:
        """While it runs; no connection may have been refused or cut."""
        self.start()
        try:
            yield self
        finally:
            self.enough.set()
            self.join(DEADLINE)
        assert self.wrong == []


def test_restart_has_no_gap_for_clients(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    site = Changing(harness, listen=[listener("tcp://127.0.0.1:0"), listener(f"unix:{path}")])
    daemon = site.daemon.start()
    status, inode, old = daemon.status(), path.stat().st_ino, daemon.workers()
    addresses = [one["address"] for one in status["listeners"]]
    client, _ = site.greet()
    site.code("later")
    (tmp_path / "below").mkdir()
    site.write(workers=3, working_directory=str(tmp_path / "below"))
    with RepeatedClient(addresses).running() as repeated:
        eventually(lambda: repeated.served, what="a first client served")
        result = daemon.command("restart")
        assert result.returncode == 0, result.stderr
        eventually(lambda: repeated.served[-1] == "later", what="one of the new daemon's")
    assert result.stdout == (
        f"tested restarted, pid {daemon.pid}, 3 workers on {', '.join(addresses)}; log: {daemon.log}\n"
    )
    after = daemon.status()
    assert after["pid"] != status["pid"]
    assert (after["generation"], after["wanted"]) == (1, 3)
    assert [one["address"] for one in after["listeners"]] == addresses
    assert path.stat().st_ino == inode
    assert os.readlink(f"/proc/{after['pid']}/cwd") == str(tmp_path / "below")
    assert int((daemon.run_directory / "pid").read_text()) == after["pid"]
    assert echoes(client)  # the old one's, which drains
    client.close()
    for pid in (*old.values(), status["pid"]):
        wait_end(pid)
    assert path.exists()
    assert {one.name for one in daemon.run_directory.iterdir()} == {"pid", "control.sock"}
    assert daemon.command("start").stdout == f"tested is already running, pid {after['pid']}\n"
    assert site.greet(f"unix:{path}")[1] == "later"


def test_restart_closes_what_is_gone_and_binds_what_is_new(harness: Harness, tmp_path: Path) -> None:
    gone, new = tmp_path / "gone", tmp_path / "new"
    site = Changing(harness, listen=[listener("tcp://127.0.0.1:0", backlog=7), listener(f"unix:{gone}")])
    daemon = site.daemon.start()
    address, client = daemon.address, site.greet(f"unix:{gone}")[0]
    site.write(listen=[listener(f"unix:{new}", mode="0600"), listener(address, backlog=9)])
    assert daemon.command("restart").returncode == 0
    assert [one["address"] for one in daemon.status()["listeners"]] == [f"unix:{new}", address]
    assert not gone.exists()
    assert new.stat().st_mode & 0o777 == 0o600
    assert all(echoes(one) for one in (client, site.greet(address)[0], site.greet(f"unix:{new}")[0]))


def test_restarts_in_a_row_keep_addresses_and_cost_nothing(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    address, before = daemon.address, len(descriptors(daemon.pid))
    for _ in range(3):
        master = daemon.pid
        assert daemon.command("restart").returncode == 0
        wait_end(master)
        assert daemon.pid != master
        assert daemon.address == address
    eventually(lambda: len(descriptors(daemon.pid)) <= before, what="as many descriptors as before")
    assert daemon.command("reload").returncode == 0
    assert daemon.command("upgrade").returncode == 0
    assert daemon.command("stop", "--now").returncode == 0
    assert list(daemon.run_directory.iterdir()) == []


@pytest.mark.parametrize("changes", [("reload",), ("restart", "reload"), ("reload", "upgrade", "reload")])
def test_restart_keeps_a_path_after_other_changes(harness: Harness, tmp_path: Path, changes: tuple[str, ...]) -> None:
    path = tmp_path / "sock"
    site = Changing(harness, listen=[listener(f"unix:{path}")], workers=1)
    daemon = site.daemon.start()
    inode = path.stat().st_ino
    for verb in (*changes, "restart"):
        result = daemon.command(verb)
        assert result.returncode == 0, result.stderr
    wait_for_one_master(daemon)
    assert path.stat().st_ino == inode
    assert site.greet(f"unix:{path}")[1] == "first"
    assert daemon.command("stop", "--now").returncode == 0
    assert not path.exists()


def test_path_that_a_reload_drops_is_the_next_daemons(harness: Harness, tmp_path: Path) -> None:
    """Its file may get the same inode as the one that was removed."""
    path = tmp_path / "sock"
    site = Changing(harness, listen=[listener(f"unix:{path}"), listener("tcp://127.0.0.1:0")], workers=1)
    daemon = site.daemon.start()
    site.write(listen=[listener("tcp://127.0.0.1:0")])
    assert daemon.command("reload").returncode == 0
    assert not path.exists()
    other = harness.daemon("other", listen=(f"unix:{path}",), workers=1).start()
    assert daemon.command("stop").returncode == 0
    assert echoes(harness.connect(other))


# Those that fail

ONLY_IN_A_WORKER = "import setproctitle\nassert 'worker' not in setproctitle.getproctitle(), 'no good worker'\n"


class Untouched:
    """What must be as it was after a restart that fails."""

    def __init__(self, site: Changing) -> None:
        self.site, self.daemon = site, site.daemon.start()
        self.before, self.files = self.daemon.status(), self.look()
        self.pid = int(self.before["pid"])
        self.descriptors = len(descriptors(self.pid))
        self.client, _ = site.greet()

    def look(self) -> dict[str, tuple[int, str]]:
        """The files that tell of it: inode, and what is in them."""
        paths = [
            self.daemon.run_directory / "pid",
            self.daemon.run_directory / "control.sock",
            self.site.directory / "sock",
        ]
        return {one.name: (one.stat().st_ino, one.read_text() if one.is_file() else "") for one in paths}

    def check(self) -> None:
        """Fails where it is not."""
        found = self.daemon.status()
        for key in ("pid", "started", "generation", "state", "listeners", "deaths"):
            assert found[key] == self.before[key]
        assert [one["pid"] for one in found["workers"]] == [one["pid"] for one in self.before["workers"]]
        assert self.look() == self.files
        assert echoes(self.client)
        assert self.site.greet()[1] == self.site.greet(f"unix:{self.site.directory / 'sock'}")[1] == "first"
        eventually(lambda: len(descriptors(self.pid)) <= self.descriptors, what="as many descriptors as before")


@pytest.mark.parametrize("why", ["its handler", "its time"])
def test_restart_that_fails_leaves_the_old_daemon_untouched(harness: Harness, tmp_path: Path, why: str) -> None:
    listeners = [listener("tcp://127.0.0.1:0"), listener(f"unix:{tmp_path / 'sock'}")]
    site = Changing(harness, listen=listeners)
    untouched = Untouched(site)
    daemon = site.daemon
    # The port is another by the file, the path is no more; both must stay.
    site.write(listen=[listener("tcp://127.0.0.1:0", backlog=9), listener(f"unix:{tmp_path / 'new'}")])
    if why == "its handler":
        daemon.expect("could not boot: says:Says: importing says failed: AssertionError: no good worker")
        site.code("later", ONLY_IN_A_WORKER)
        status, out, err = outcome(site.begin("restart"))
        assert "AssertionError: no good worker" in err
    else:
        daemon.expect(
            "these are its stacks", "killing worker", "killed by SIGKILL, it was not ready by its boot_timeout"
        )
        site.write(boot_timeout="1s")
        with site.gate("later") as let:
            let(1)  # the check's
            status, out, err = outcome(site.begin("restart"))
        assert "it was not ready by its boot_timeout" in err
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("forkd: ")
    assert not (tmp_path / "new").exists()
    assert not (daemon.run_directory / "control.sock.new").exists()
    untouched.check()
    site.code("later")
    site.write(listen=listeners)
    assert daemon.command("restart").returncode == 0
    assert site.greet()[1] == "later"


def test_restart_survives_the_death_of_the_new_master(harness: Harness, tmp_path: Path) -> None:
    site = Changing(harness, listen=[listener("tcp://127.0.0.1:0"), listener(f"unix:{tmp_path / 'sock'}")])
    untouched = Untouched(site)
    with site.gate("later") as let:
        asked = site.begin("restart")
        let(1)  # the check's
        masters = eventually(lambda: others(untouched.pid), what="the new master")
        os.kill(masters[0], signal.SIGKILL)
        status, _, err = outcome(asked)
    assert (status, err) == (1, "forkd: it ended without a word\n")
    eventually(lambda: not others(untouched.pid), what="its end")
    untouched.check()
    site.code("later")
    assert site.daemon.command("restart").returncode == 0
    assert site.greet()[1] == "later"


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_restart_whose_command_is_killed_is_still_whole(harness: Harness, signum: signal.Signals) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    master, client = daemon.pid, site.greet()[0]
    with site.gate("later") as let:
        asked = site.begin("restart")
        let(1)  # the check's
        eventually(lambda: others(master), what="the new master")
        asked.send_signal(signum)
        assert outcome(asked)[0] in (130, -signal.SIGKILL)
        assert daemon.pid == master  # it is still the old one that is asked
        let(2)
        eventually(lambda: daemon.pid != master, what="the new master in place")
    daemon.wait_log("draining")
    assert echoes(client)
    client.close()
    wait_end(master)


@pytest.mark.parametrize("verb", ["reload", "upgrade", "restart"])
def test_no_worker_of_the_code_before_takes_a_client_after_a_change(harness: Harness, verb: str) -> None:
    daemon = harness.daemon(target="busy:SlowTurns").start()
    clients = harness.connect_to_each(daemon, 6)
    before = daemon.workers().values()
    result = daemon.command(verb)
    assert result.returncode == 0, result.stderr
    assert all("draining" in title(pid) for pid in before)
    assert all(echoes(client) for client in clients)


def test_restart_and_other_changes_exclude_each_other(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    master, client = daemon.pid, site.greet()[0]
    with site.gate("later") as let:
        asked = site.begin("restart")
        let(1)  # the check's
        there = eventually(lambda: others(master), what="the new master")[0]
        wait_at_gate(lambda: descendants(there), 2)
        site.code("third")  # for which the second one's check need not wait
        for verb, why in (
            ("restart", "another change is under way: restart"),
            ("reload", "the reload failed, and tested goes on as before: a restart is under way"),
            ("upgrade", "the upgrade failed, and tested goes on as before: a restart is under way"),
        ):
            assert outcome(site.begin(verb)) == (1, "", f"forkd: {why}\n")
        for signum, verb in ((signal.SIGHUP, "reload"), (signal.SIGUSR2, "upgrade")):
            daemon.signal(signum)
            eventually(lambda verb=verb: count(daemon, f"{verb}: refused, a restart is under way") == 2)  # type: ignore[misc]
        let(2)
        assert outcome(asked)[0] == 0
    assert echoes(client)
    assert site.greet()[1] == "later"
    with site.gate("their") as let:
        asked = site.begin("reload")
        wait_at_gate(lambda: daemon.workers("booting").values(), 2)
        site.code("fifth")
        assert outcome(site.begin("restart")) == (1, "", "forkd: another change is under way: reload\n")
        let(2)
        assert outcome(asked)[0] == 0


def count(daemon: Daemon, words: str) -> int:
    """Records of the log that have these words."""
    return sum(words in one for one in daemon.records())


def wait_for_one_master(daemon: Daemon) -> None:
    """Waits until a master that was succeeded has ended."""
    present = daemon.pid
    eventually(lambda: not others(present), what="the end of the master before")


def others(known: int) -> list[int]:
    """The masters but this one."""
    return [pid for pid in descendants(os.getpid()) if pid != known and title(pid) == "forkd: tested master"]


# What does not run, what just stops, and what is another's to restart


def test_restart_in_the_foreground_is_refused_with_advice(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.run()
    master, workers, client = daemon.pid, daemon.workers(), site.greet()[0]
    assert daemon.status()["foreground"] is True
    for then in ("upgrade", "reload"):
        status, out, err = outcome(site.begin("restart"))
        assert (status, out) == (1, "")
        assert "it runs in the foreground" in err
        assert "restart it there" in err
        assert "`forkd upgrade`" in err
        assert (daemon.pid, daemon.workers()) == (master, workers)
        assert daemon.command(then).returncode == 0  # the refusal holds for the image after an upgrade
        workers = daemon.wait_workers(2, without={*workers.values()})
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("draining")
    assert outcome(site.begin("restart"))[0] == 1  # nor is another one started in the background when it has gone
    assert echoes(client)
    client.close()
    wait_end(master)
    assert daemon.command("stop").stdout == "tested is not running\n"


def test_restart_of_what_does_not_run_starts_it(harness: Harness) -> None:
    daemon = Changing(harness).daemon
    result = daemon.command("restart")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"tested is not running\ntested started, pid {daemon.pid}, 2 workers on {daemon.address}; log: {daemon.log}\n"
    )


def test_restart_of_a_draining_daemon_waits_and_starts_it(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    client, master = site.greet()[0], daemon.pid
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("draining")
    asked = site.begin("restart")
    assert at_end(client)
    status, out, err = outcome(asked)
    assert (status, err) == (0, "")
    assert f"tested started, pid {daemon.pid}, " in out
    assert daemon.pid != master
