"""Reloads that take place: new settings, listeners and code, while the clients of the old workers stay.

What a reload is asked for while something else is under way is here too. Those that fail are in `test_reload_errors`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.changing_daemon import Changing, backlog, descriptors, listener, outcome, wait_at_gate
from tests.support.clients import at_end, dial, echoes, read, refuses
from tests.support.daemon import Daemon, Harness
from tests.support.processes import eventually, wait_end


def wait_records(daemon: Daemon, words: str, count: int) -> None:
    """Waits until the log has so many records with these words, no more."""
    eventually(lambda: sum(words in one for one in daemon.records()) == count, what=f"{count} times {words!r}")


def test_reload_takes_up_settings_and_code_while_clients_stay(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    address, master, old = daemon.address, daemon.pid, daemon.workers()
    clients = site.crowd()
    site.write(
        workers=3, listen=[listener("tcp://127.0.0.1:0", backlog=77)], log={"to": str(daemon.log), "level": "debug"}
    )
    site.code("later")
    result = daemon.command("reload")
    assert (result.returncode, result.stdout) == (0, "tested reloaded: 3 workers of generation 2\n"), result.stderr
    status = daemon.status()
    assert (status["pid"], status["generation"], status["wanted"], status["change"]) == (master, 2, 3, "")
    assert daemon.wait_workers(3, without=old.values()).keys() == {1, 2, 3}
    assert daemon.workers("draining") == old
    assert {one["generation"] for one in status["workers"] if one["pid"] in old.values()} == {1}
    assert (daemon.address, backlog(address)) == (address, 77)
    daemon.wait_log("DEBUG .* worker 3.*: serving")
    assert site.greet(address)[1] == "later"
    client, _ = site.greet(address)
    assert all(echoes(one) for one in [*clients, client])
    for one in clients:
        one.close()
    for pid in old.values():
        wait_end(pid)
    eventually(lambda: len(daemon.status()["deaths"]) == 2, what="their certificates")
    assert {(one["expected"], one["cause"]) for one in daemon.status()["deaths"]} == {
        (True, "another generation serves")
    }


def test_reload_binds_what_is_new_and_closes_what_is_gone(harness: Harness, tmp_path: Path) -> None:
    kept, gone, new = (tmp_path / name for name in ("kept", "gone", "new"))
    site = Changing(harness, workers=1)
    site.write(listen=[listener("tcp://127.0.0.1:0"), listener(f"unix:{gone}"), listener(f"unix:{kept}")])
    daemon = site.daemon.start()
    before, inode, address = descriptors(daemon.pid), kept.stat().st_ino, daemon.address
    clients = [site.greet(where)[0] for where in (address, f"unix:{gone}", f"unix:{kept}")]
    listeners = [listener(f"unix:{kept}", mode="0600"), listener(f"unix:{new}"), listener("tcp://127.0.0.1:0")]
    site.write(listen=listeners, drain_timeout="1h")
    daemon.signal(signal.SIGHUP)
    daemon.wait_log("reload: done, generation 2 serves")
    found = [one["address"] for one in daemon.status()["listeners"]]
    # The port that was free is kept: it is what a free port was asked for.
    assert found == [f"unix:{kept}", f"unix:{new}", address]
    assert (kept.stat().st_ino, kept.stat().st_mode & 0o777) == (inode, 0o600)
    assert not gone.exists()
    clients += [site.greet(where)[0] for where in found]
    site.write(listen=listeners[:2])
    assert daemon.command("reload").returncode == 0
    assert refuses(address)
    assert all(echoes(client) for client in clients)
    for client in clients:
        client.close()
    assert eventually(lambda: len(daemon.status()["workers"]) == 1, what="the end of the old workers")
    site.write(listen=[listener("tcp://127.0.0.1:0"), *listeners[:1], listener(f"unix:{gone}")])
    assert daemon.command("reload").returncode == 0
    eventually(lambda: len(descriptors(daemon.pid)) == len(before), what="as many descriptors as before")


def test_clients_of_a_retired_generation_are_closed_in_time(harness: Harness) -> None:
    site = Changing(harness, drain_timeout="300ms")
    daemon = site.daemon.start()
    client, _ = site.greet()
    daemon.signal(signal.SIGHUP)
    daemon.wait_log("reload: done")
    assert at_end(client)
    eventually(lambda: len(daemon.status()["deaths"]) == 2, what="their ends")


def test_waiting_client_is_served_by_the_next_generation(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    address, old = daemon.address, daemon.workers()
    for pid in old.values():
        os.kill(pid, signal.SIGSTOP)
    site.code("later")
    waiting = [harness.connect(address) for _ in range(5)]
    for client in waiting:
        client.sendall(b"patience")
    daemon.signal(signal.SIGHUP)
    assert [read(client, 13) for client in waiting] == [b"laterpatience"] * 5
    for pid in old.values():
        os.kill(pid, signal.SIGCONT)
        wait_end(pid)


def test_log_goes_where_the_new_settings_say(harness: Harness, tmp_path: Path) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    client, before = site.greet()[0], daemon.log
    site.write(log={"to": str(tmp_path / "new.log"), "format": "json"})
    assert daemon.command("reload").returncode == 0
    daemon.log = tmp_path / "new.log"
    daemon.wait_log('"message": "reload: done')
    client.close()
    daemon.wait_log('"message": "worker . .* has ended: exit status 0')
    assert "reload: done" not in before.read_text()
    assert os.readlink(f"/proc/{daemon.pid}/fd/2") == str(daemon.log)
    for pid in daemon.workers().values():
        assert any(f" {daemon.log}" in f" {one}" for one in descriptors(pid))
        assert not any(str(before) in one for one in descriptors(pid))


def test_log_that_went_to_the_terminal_can_go_back_there(harness: Harness, tmp_path: Path) -> None:
    site = Changing(harness, log={"level": "info"})
    daemon = site.daemon
    daemon.log = daemon.terminal
    daemon.run()
    site.write(log={"to": str(tmp_path / "file")})
    assert daemon.command("reload").returncode == 0
    assert "generation 2 serves" in (tmp_path / "file").read_text()
    site.write(log={"level": "info"})
    assert daemon.command("reload").returncode == 0
    daemon.wait_log("generation 3 serves")
    assert not any("generation 2 serves" in record for record in daemon.records())


def test_old_workers_drain_for_as_long_as_they_were_made_to(harness: Harness) -> None:
    site = Changing(harness, workers=1)
    daemon = site.daemon.start()
    daemon.expect("did not end by its drain deadline; these are its stacks", "killing worker 1", "killed by SIGKILL")
    (client, _), first = site.greet(), daemon.workers()[1]
    site.write(drain_timeout="100ms")
    assert daemon.command("reload").returncode == 0
    second = daemon.workers()[1]
    assert daemon.command("upgrade").returncode == 0  # by which the state of the first goes to another image
    os.kill(daemon.workers()[1], signal.SIGSTOP)
    assert daemon.command("reload").returncode == 0
    wait_end(second)
    daemon.wait_log(
        r"killing worker 1 .* did not end by its drain deadline"
    )  # the third, which is younger than the first
    assert echoes(client)
    assert daemon.workers("draining") == {1: first}


# While something else is under way


def test_reloads_asked_meanwhile_follow_once_by_the_latest_file(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    with site.gate("later") as let:
        site.write(workers=1)
        daemon.signal(signal.SIGHUP)
        wait_at_gate(lambda: daemon.workers("booting").values(), 1)
        assert daemon.status()["change"] == "reload"
        for count, workers in enumerate((4, 5, 3), 1):
            site.write(workers=workers)
            daemon.signal(signal.SIGHUP)
            wait_records(daemon, "reload: waits", count)
        asked = site.begin("reload")
        wait_records(daemon, "reload: waits", 4)
        site.code("third")
        let(1)
        assert outcome(asked)[:2] == (0, "tested reloaded: 3 workers of generation 3\n")
    assert (daemon.status()["wanted"], site.greet()[1]) == (3, "third")
    wait_records(daemon, "reload: begins", 2)


def test_stop_during_a_reload_stops_and_tells_those_that_wait(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    (client, _), master = site.greet(), daemon.pid
    with site.gate("later"):
        asked = [site.begin("reload")]
        wait_at_gate(lambda: daemon.workers("booting").values(), 2)
        asked.append(site.begin("reload"))
        daemon.wait_log("reload: waits for what is under way: reload")
        daemon.signal(signal.SIGTERM)
        for one in asked:
            assert outcome(one) == (1, "", "forkd: the reload failed, and tested goes on as before: the daemon stops\n")
        assert echoes(client)
        refused = daemon.command("reload")
        assert (refused.returncode, refused.stderr.splitlines()[-1][-22:]) == (1, "the daemon is draining")
        client.close()
        wait_end(master)


def test_reload_that_is_asked_for_during_the_start_follows_it(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon
    with site.gate("first") as let:
        start = site.begin("start")
        daemon.wait_answer()
        daemon.signal(signal.SIGHUP)
        daemon.wait_log("reload: waits for what is under way: starting")
        site.write(workers=1)
        let(2)
        assert outcome(start)[0] == 0
        let(1)
        daemon.wait_log("reload: done, generation 2 serves")
    assert list(daemon.workers()) == [1]


@pytest.mark.parametrize("changed", [True, False])
def test_diff_tells_what_would_change_and_changes_nothing(harness: Harness, changed: bool, tmp_path: Path) -> None:
    site = Changing(harness, working_directory=str(tmp_path))
    daemon = site.daemon.start()
    before = daemon.status()["generation"], daemon.workers()
    lines = ["a reload would change no setting; the handlers are imported again"]
    if changed:
        site.write(workers=4, working_directory="/", listen=[*site.settings["listen"], listener("unix:@changing")])
        lines = [
            "workers: 2 -> 4",
            "listen unix:@changing: added, handler says:Says",
            f"working_directory: {tmp_path} -> / (needs a restart)",
        ]
    result = daemon.command("reload", "--diff")
    assert (result.returncode, sorted(result.stdout.splitlines())) == (0, sorted(lines)), result.stderr
    assert (daemon.status()["generation"], daemon.workers()) == before
    with pytest.raises(ConnectionRefusedError):
        dial("unix:@changing")
    assert not any("reload" in one for one in daemon.records())
