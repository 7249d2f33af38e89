"""Rotated logs: USR1 has the master and its workers go on in a new file, and no line is lost on the way."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from tests.support.changing_daemon import Changing, descriptors, listener, wait_at_gate
from tests.support.clients import echoes
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, eventually


def rotate(daemon: Daemon, number: int) -> Path:
    """Moves the log away and has a new one opened, as logrotate(8) does; where the old one is."""
    old = daemon.log.with_name(f"{daemon.log.name}.{number}")
    daemon.log.rename(old)
    daemon.signal(signal.SIGUSR1)
    daemon.wait_log("log file .* reopened")
    return old


def numbers(path: Path, port: int) -> list[int]:
    """The numbers of the lines that were logged there for the client with this port."""
    return [int(number) for number in re.findall(rf" chatty: port {port} line (\d+)$", path.read_text(), re.MULTILINE)]


@pytest.mark.parametrize("verb", ["start", "run"])
def test_rotations_lose_no_line_of_workers_that_log(harness: Harness, verb: str) -> None:
    site = Changing(harness, listen=[listener("tcp://127.0.0.1:0", handler="chatty:Chatty")])
    daemon = site.daemon.start() if verb == "start" else site.daemon.run()
    clients = {sock.getsockname()[1]: sock for sock in (harness.connect(daemon) for _ in range(8))}

    def wait_lines() -> None:
        eventually(lambda: all(numbers(daemon.log, port) for port in clients), what="a line for each client")

    files = []
    for number in (1, 2, 3):
        wait_lines()
        files.append(rotate(daemon, number))
    wait_lines()
    files.append(daemon.log)
    for port, client in clients.items():
        client.sendall(b"enough")
        count = int(client.recv(100))
        assert [number for file in files for number in numbers(file, port)] == list(range(1, count + 1))
    for pid in (daemon.pid, *daemon.workers().values()):
        assert not any(".log." in one for one in descriptors(pid))


def wait_new_file(*pids: int) -> None:
    """Waits until these processes have no old file open: workers close theirs when the master tells them."""
    eventually(lambda: not any(".log." in one for pid in pids for one in descriptors(pid)), what="old files closed")


def test_new_file_has_the_lines_of_master_and_later_workers(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    old = rotate(daemon, 1)
    assert daemon.log.stat().st_mode & 0o777 == old.stat().st_mode & 0o777
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGKILL)
    daemon.wait_log(rf"worker 1 \(pid {victim}\) has ended")
    replaced = daemon.wait_workers(2, without={victim})
    assert daemon.command("reload").returncode == 0
    daemon.wait_log("reload: done")
    rotate(daemon, 2)
    assert daemon.command("upgrade").returncode == 0
    rotate(daemon, 3)
    wait_new_file(daemon.pid, *daemon.workers().values())
    assert not {*replaced.values()} & {*daemon.workers().values()}
    assert "has ended" not in old.read_text()


def test_worker_booting_during_a_rotation_logs_to_the_new_file(harness: Harness) -> None:
    site = Changing(harness, workers=1)
    daemon = site.daemon.start()
    site.write(log={"to": str(daemon.log), "level": "debug"})
    with site.gate("later") as let:
        daemon.signal(signal.SIGHUP)
        wait_at_gate(lambda: daemon.workers("booting").values(), 1)
        rotate(daemon, 1)
        let(1)
        daemon.wait_log("reload: done")
    rotate(daemon, 2)
    pid = daemon.workers()[1]
    wait_new_file(pid)


def test_log_that_is_cut_short_goes_on_at_its_beginning(harness: Harness) -> None:
    daemon = Changing(harness).daemon.start()
    os.truncate(daemon.log, 0)
    daemon.signal(signal.SIGTTIN)
    daemon.wait_log("scale to 3 workers")
    assert daemon.log.read_bytes()[0] != 0


def test_file_that_can_not_be_opened_leaves_the_old_one_in_use(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    site = Changing(harness)
    daemon = site.daemon
    daemon.log = tmp_path / "logs" / "log"
    site.write(log={"to": str(daemon.log)})
    daemon.start()
    (tmp_path / "logs").rename(tmp_path / "moved")
    (tmp_path / "logs").write_text("")
    daemon.log = tmp_path / "moved" / "log"
    daemon.expect(
        "log reopen failed, the open file stays: can't open the log file .*/logs/log: .*/logs is not a directory"
    )
    daemon.signal(signal.SIGUSR1)
    daemon.wait_log("the open file stays")
    assert echoes(site.greet()[0])


def test_log_on_a_terminal_is_not_harmed_by_a_reopen(harness: Harness) -> None:
    site = Changing(harness, log={"level": "info"})
    daemon = site.daemon
    daemon.log = daemon.terminal
    daemon.run()
    client, workers = site.greet()[0], daemon.workers()
    daemon.signal(signal.SIGUSR1)
    daemon.wait_log("log reopen ignored: not logging to a file")
    assert echoes(client)
    assert daemon.workers() == workers
    daemon.signal(signal.SIGTTIN)
    daemon.wait_log("worker 3 is ready")
    client.close()
    daemon.signal(signal.SIGTERM)
    assert daemon.process is not None
    assert daemon.process.wait(DEADLINE) == 0
