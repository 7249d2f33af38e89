"""A daemon in a container: as PID 1 with nothing to write to, and in groups short of processes or of memory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import at_end, echoes, read
from tests.support.daemon import Daemon, Harness
from tests.support.many_clients import GREETING
from tests.support.needs import control_group, needs_program, needs_root
from tests.support.processes import DEADLINE, children, descendants, eventually, stat_of, title

LIMIT = 100 << 20

#: Opens the log, while it is there to be written to.
_LOG = ["sh", "-c", 'exec "$@" 2>>"$LOG"', "sh"]
_UNSHARE = [
    "setsid",
    "--wait",
    "unshare",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
]

#: Makes the run directory a mount of its own and all others read-only.
_ENTER = """
mount --bind "$RUN" "$RUN"
while read -r _ _ _ _ where _; do
  [ "$where" = "$RUN" ] || mount -o remount,bind,ro "$where"
done </proc/self/mountinfo
exec "$@"
"""


class Contained(Daemon):
    """A daemon that is PID 1 of a namespace of its own, with no terminal and no HOME; `run` alone starts it.

    All that is mounted is read-only there but the run directory, and the log is standard error. Its pids are told as
    this process has them, for the daemon's own PID 1 is another process here.
    """

    def __init__(self, directory: Path, settings: tuple[str, ...] = (), **more: Any) -> None:
        super().__init__(directory, "contained", **more, settings=("log.to=stderr", *settings))
        self.run_directory.mkdir()
        self.prefix = [*_LOG, *_UNSHARE, "sh", "-c", _ENTER, "sh"]
        self.environment = {"PATH": os.environ["PATH"], "LOG": str(self.log), "RUN": str(self.run_directory)}

    def outer(self) -> dict[int, int]:
        """The pids that are told here of all processes in there, by those that they have there."""
        found = {}
        assert self.process is not None
        for pid in descendants(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                inner = re.findall(r"(?m)^NSpid:\s+\d+\s+(\d+)$", Path(f"/proc/{pid}/status").read_text())
                found.update({int(one): pid for one in inner})
        return found

    def status(self) -> dict[str, Any]:
        """What the master tells of itself, its pids told as here; who has gone meanwhile is left out."""
        found, outer = super().status(), self.outer()
        if found["pid"] not in outer:
            raise ConnectionResetError("the master ended after it had answered")
        found["pid"] = outer[found["pid"]]
        found["workers"] = [one | {"pid": outer[one["pid"]]} for one in found["workers"] if one["pid"] in outer]
        return found


def contain(harness: Harness, target: object, settings: tuple[str, ...] = ()) -> Contained:
    """A daemon that is to run in a container."""
    needs_root()
    for program in ("unshare", "setsid", "mount"):
        needs_program(program)
    daemon = Contained(harness.directory, target=target, settings=settings)
    harness.daemons.append(daemon)
    return daemon


@pytest.fixture
def contained(harness: Harness) -> Contained:
    """A daemon that runs in a container."""
    daemon = contain(harness, target="trouble:Trouble")
    daemon.run()
    return daemon


@pytest.fixture
def pids() -> Iterator[Path]:
    """A control group that counts processes."""
    with control_group("pids") as group:
        yield group


@pytest.fixture
def memory() -> Iterator[Path]:
    """A control group that has little memory, and no swap for what exceeds it."""
    with control_group("memory") as group:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        if (group / "memory.memsw.limit_in_bytes").exists():
            (group / "memory.memsw.limit_in_bytes").write_text(str(LIMIT))
        yield group


# PID 1


def test_pid_1_serves_reloads_and_upgrades_on_a_read_only_system(harness: Harness, contained: Contained) -> None:
    master, first = contained.pid, {*contained.workers().values()}
    assert contained.outer()[1] == master
    mounts = [line.split() for line in Path(f"/proc/{master}/mounts").read_text().splitlines()]
    options = {where: options.split(",") for _, where, _, options, *_ in mounts}  # what is mounted over another is last
    assert [where for where in options if "ro" not in options[where]] == [str(contained.run_directory)]
    environment = Path(f"/proc/{master}/environ").read_bytes().split(b"\0")
    assert not [one for one in environment if one.startswith((b"HOME=", b"TERM="))]
    assert os.readlink(f"/proc/{master}/fd/0") == os.devnull
    client = harness.connect(contained)
    assert read(client, GREETING)
    for generation, signum in ((2, signal.SIGHUP), (3, signal.SIGUSR2)):
        contained.signal(signum)
        contained.wait_log(f"reload: done, generation {generation} serves")
        assert contained.pid == master
        assert echoes(client)
    assert not first & {*contained.wait_workers(2).values()}
    newcomer = harness.connect(contained)
    assert read(newcomer, GREETING)
    assert echoes(newcomer)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_pid_1_stops_when_told_to(harness: Harness, contained: Contained, signum: signal.Signals) -> None:
    client = harness.connect(contained)
    assert read(client, GREETING)
    client.close()
    contained.signal(signum)
    assert contained.process is not None
    assert contained.process.wait(DEADLINE) == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_pid_1_stops_when_told_to_at_its_start(harness: Harness, signum: signal.Signals) -> None:
    gate = harness.directory / "gate"
    os.mkfifo(gate)
    daemon = contain(harness, target="gate:Echo", settings=("preload=true",))
    daemon.begin()
    with gate.open("w"):  # it imports its handler, which waits
        os.kill(daemon.outer()[1], signum)
        assert daemon.process is not None
        assert daemon.process.wait(DEADLINE) == 0
    assert daemon.terminal.read_text() == ""
    assert not (daemon.run_directory / "pid").exists()


def test_pid_1_keeps_other_signals_until_its_loop_runs(harness: Harness) -> None:
    gate = harness.directory / "gate"
    os.mkfifo(gate)
    daemon = contain(harness, target="gate:Echo", settings=("preload=true",))
    daemon.begin()
    with gate.open("w") as file:
        os.kill(daemon.outer()[1], signal.SIGUSR1)
        file.write("x")
    daemon.wait_log("log reopen ignored")


def test_pid_1_reaps_adopted_processes(harness: Harness, contained: Contained) -> None:
    os.mkfifo(harness.directory / "gate")
    client, master = harness.connect(contained), contained.pid
    assert read(client, GREETING)
    client.sendall(b"orphan")
    assert read(client, 6) == b"orphan"
    orphan = eventually(
        lambda: next((pid for pid in children(master) if title(pid) == "cat gate"), 0),
        what="the adopted orphan",
    )
    with open(harness.directory / "gate", "wb"):
        pass
    eventually(lambda: stat_of(orphan) is None, what="the orphan, reaped")
    assert echoes(client)
    assert contained.status()["deaths"] == []
    assert len(contained.workers()) == 2


# Short of processes


def test_failed_fork_is_tried_again_and_hurts_no_client(pids: Path, harness: Harness) -> None:
    daemon = harness.daemon(target="teller:Teller", workers=2).start()
    daemon.expect("can't make worker 3: .*Resource temporarily unavailable")
    master, workers, client = daemon.pid, daemon.workers(), harness.connect(daemon)
    (pids / "cgroup.procs").write_text(str(master))
    (pids / "pids.max").write_text("1")
    result = daemon.command("scale", 3)
    assert result.returncode == 1
    assert "can't make worker 3" in result.stderr
    assert daemon.status()["state"] == "degraded"
    refusals = len(denied(daemon))
    eventually(lambda: len(denied(daemon)) > refusals + 1, what="two more attempts")
    assert daemon.workers() == workers
    assert read(client, GREETING)
    assert echoes(client)
    (pids / "pids.max").write_text("max")
    serving = daemon.wait_workers(3)
    assert {slot: serving[slot] for slot in workers} == workers
    assert (daemon.pid, daemon.status()["state"]) == (master, "running")


def denied(daemon: Daemon) -> list[str]:
    return [record for record in daemon.records() if "can't make worker 3" in record]


@pytest.mark.parametrize("verb", ["reload", "upgrade"])
def test_change_without_a_free_process_changes_nothing(pids: Path, harness: Harness, verb: str) -> None:
    daemon = harness.daemon(target="teller:Teller", workers=2).start()
    daemon.expect("can't make a helper", f"{verb}: failed, and nothing has changed: can't make a helper")
    master, workers, client = daemon.pid, daemon.workers(), harness.connect(daemon)
    (pids / "cgroup.procs").write_text(str(master))
    (pids / "pids.max").write_text("1")
    result = daemon.command(verb)
    assert result.returncode == 1
    assert "can't make a helper" in result.stderr
    assert (daemon.pid, daemon.workers(), daemon.status()["state"]) == (master, workers, "running")
    assert read(client, GREETING)
    assert echoes(client)
    (pids / "pids.max").write_text("max")
    assert daemon.command(verb).returncode == 0
    assert (daemon.pid, daemon.status()["generation"]) == (master, 2)
    assert echoes(client)


def test_reload_that_runs_out_of_processes_is_undone(pids: Path, harness: Harness) -> None:
    daemon = harness.daemon(target="teller:Teller", workers=2).start()
    daemon.expect("can't make worker 2", "reload: failed, and nothing has changed: can't make worker 2")
    master, workers, client = daemon.pid, daemon.workers(), harness.connect(daemon)
    (pids / "cgroup.procs").write_text(str(master))
    (pids / "pids.max").write_text("2")  # enough for the helper, and then for the first worker
    assert daemon.command("reload").returncode == 1
    daemon.wait_workers(2)
    eventually(lambda: {*children(master)} == {*workers.values()}, what="the end of the new generation")
    assert (daemon.workers(), daemon.status()["generation"]) == (workers, 1)
    assert read(client, GREETING)
    assert echoes(client)


# Short of memory


def test_worker_killed_for_its_memory_has_that_on_record(memory: Path, harness: Harness) -> None:
    daemon = harness.daemon(target="trouble:Trouble", workers=2)
    daemon.expect("killed by SIGKILL, by the kernel, which was out of memory")
    daemon.prefix = ["sh", "-c", f'echo $$ >{memory}/cgroup.procs; exec "$@"', "sh"]
    daemon.run()
    master, clients = daemon.pid, harness.connect_to_each(daemon, 8)
    hosts = {client: int(read(client, GREETING)) for client in clients}
    hungry = clients[0]
    hungry.sendall(b"devour")
    assert at_end(hungry)
    daemon.wait_workers(2, without={hosts[hungry]})
    death = daemon.status()["deaths"][-1]
    assert (death["pid"], death["cause"]) == (hosts[hungry], "by the kernel, which was out of memory")
    assert death["peak_memory"] > LIMIT // 2
    assert all(echoes(client) for client, host in hosts.items() if host != hosts[hungry])
    assert daemon.pid == master
