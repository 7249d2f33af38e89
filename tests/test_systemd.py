"""The units under a real systemd, in a container: what is promised of forkd@, of its socket, and of one process
for each client.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import at_end, echoes
from needs import needs_program, needs_python_for_all, needs_root
from nspawn import UNITS, Machine, units
from processes import eventually

PORTS = iter(range(7100, 7200))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    needs_root()
    for program in ("systemd-nspawn", "nsenter", "systemctl", "ip"):
        needs_program(program)
    needs_python_for_all()
    made = Machine(tmp_path_factory.mktemp("machine"))
    made.build()
    try:
        made.boot()
        yield made
    finally:
        made.end()


@pytest.fixture
def clients() -> Iterator[contextlib.ExitStack]:
    """What is in it is closed at the end."""
    with contextlib.ExitStack() as stack:
        yield stack


class Service:
    """One daemon, `forkd@NAME`, with a port of its own."""

    def __init__(self, machine: Machine, name: str, address: str = "") -> None:
        self.machine = machine
        self.name = name
        self.unit = f"forkd@{name}"
        self.address = address or f"tcp://127.0.0.1:{next(PORTS)}"
        self.settings(workers=1)

    def settings(self, *, workers: int, handler: str = "forkd.builtin:Echo", log: str = "stderr") -> None:
        """Writes its file."""
        listen = f"listen: [{{address: '{self.address}', handler: '{handler}'}}]"
        self.machine.write(f"forkd/{self.name}.yaml", f"workers: {workers}\nlog: {{to: {log}}}\n{listen}\n")

    def start(self) -> Service:
        self.machine.do("systemctl", "enable", "--now", self.unit)
        return self

    def dial(self, clients: contextlib.ExitStack) -> socket.socket:
        return clients.enter_context(self.machine.dial(self.address))

    @property
    def main(self) -> str:
        """The master's pid, as systemd knows it."""
        return self.machine.show(self.unit, "MainPID")

    @property
    def status(self) -> str:
        return self.machine.show(self.unit, "StatusText")

    def signal(self, name: str) -> None:
        """Sends the master alone a signal."""
        self.machine.do("systemctl", "kill", f"--signal={name}", "--kill-who=main", self.unit)

    def wait_restart(self, before: str) -> None:
        """Waits until systemd has put another master in its place, which is ready."""
        eventually(
            lambda: self.machine.ask("is-active", self.unit) == "active" and self.main not in ("0", before),
            what=f"another master of {self.unit}",
        )


def test_a_unit_is_active_when_it_serves_and_stops_when_it_is_told(
    machine: Machine, clients: contextlib.ExitStack
) -> None:
    service = Service(machine, "chat").start()
    assert machine.ask("is-active", service.unit) == "active"
    with service.dial(clients) as client:
        assert echoes(client)
    assert service.status.startswith("running: 1 of 1 workers")
    machine.do("systemctl", "stop", service.unit)
    assert machine.show(service.unit, "Result") == "success"
    with pytest.raises(ConnectionRefusedError):
        service.dial(clients)
    assert "INFO chat master" in machine.journal(service.unit)
    assert not re.search("ERROR|Traceback", machine.journal(service.unit))


def test_a_unit_whose_settings_are_wrong_fails_once_with_the_reason(machine: Machine) -> None:
    service = Service(machine, "wrong")
    service.settings(workers=0)
    assert machine.run("systemctl", "start", service.unit).returncode != 0
    assert machine.ask("is-failed", service.unit) == "failed"
    assert machine.show(service.unit, "NRestarts") == "0"
    assert "workers" in machine.journal(service.unit)


def test_a_reload_returns_when_the_new_settings_serve_and_fails_where_they_can_not(
    machine: Machine, clients: contextlib.ExitStack
) -> None:
    service = Service(machine, "changes").start()
    main, client = service.main, service.dial(clients)
    service.settings(workers=2)
    machine.do("systemctl", "reload", service.unit)
    assert service.status.startswith("running: 2 of 2 workers")
    service.settings(workers=2, handler="forkd.builtin:Missing")
    assert machine.run("systemctl", "reload", service.unit).returncode != 0
    assert machine.ask("is-active", service.unit) == "active"
    assert "Missing" in machine.journal(service.unit)
    assert service.main == main
    assert echoes(client)
    assert echoes(service.dial(clients))


def test_the_journal_has_levels(machine: Machine) -> None:
    service = Service(machine, "logged")
    service.settings(workers=1, log="journal")
    service.start()
    service.settings(workers=1, log="journal", handler="forkd.builtin:Missing")
    assert machine.run("systemctl", "reload", service.unit).returncode != 0
    found = machine.do("journalctl", "--output=cat", "--priority=err", "--identifier=logged")
    assert "reload: failed, and nothing has changed" in found
    assert "listens on" not in found
    assert "listens on" in machine.journal(service.unit)


def test_an_upgrade_keeps_the_main_process_and_its_clients(machine: Machine, clients: contextlib.ExitStack) -> None:
    service = Service(machine, "upgraded").start()
    main, client = service.main, service.dial(clients)
    assert echoes(client)
    service.signal("USR2")
    eventually(lambda: "reload: done" in machine.journal(service.unit), what="the upgrade")
    machine.do("forkd", "upgrade", "/etc/forkd/upgraded.yaml", "--run-directory", "/run/forkd/upgraded")
    assert machine.journal(service.unit).count("goes on as another image") == 2
    assert (machine.ask("is-active", service.unit), service.main) == ("active", main)
    assert echoes(client)
    assert echoes(service.dial(clients))


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_a_master_that_is_killed_comes_back_with_whoever_waits(
    machine: Machine, clients: contextlib.ExitStack, where: str
) -> None:
    name = f"killed-{where}"
    service = Service(machine, name, f"unix:/run/forkd/{name}/echo.sock" if where == "unix" else "")
    # Time enough to come while there is nobody.
    machine.write(f"systemd/system/{service.unit}.service.d/slow.conf", "[Service]\nRestartSec=2s\n")
    machine.do("systemctl", "daemon-reload")
    service.start()
    assert machine.show(service.unit, "NFileDescriptorStore") == "1"
    main = service.main
    service.signal("KILL")
    eventually(lambda: machine.show(service.unit, "SubState") == "auto-restart", what="the end of the master")
    client = service.dial(clients)
    client.sendall(b"waits\n")
    service.wait_restart(main)
    assert client.recv(6) == b"waits\n"
    assert machine.show(service.unit, "NFileDescriptorStore") == "1"


def test_the_watchdog_ends_a_master_that_stands_still(machine: Machine, clients: contextlib.ExitStack) -> None:
    service = Service(machine, "still")
    machine.write(f"systemd/system/{service.unit}.service.d/soon.conf", "[Service]\nWatchdogSec=2s\n")
    machine.do("systemctl", "daemon-reload")
    main = service.start().main
    service.signal("STOP")
    service.wait_restart(main)
    assert "Watchdog timeout" in machine.journal(service.unit)
    assert echoes(service.dial(clients))


def test_a_restart_by_systemd_refuses_nobody(machine: Machine, clients: contextlib.ExitStack) -> None:
    service = Service(machine, "again").start()
    main = service.main
    restart = subprocess.Popen(machine.entered("systemctl", "restart", service.unit))
    count = 0
    while restart.poll() is None:
        with service.dial(clients) as client:  # who stays would hold it up
            assert echoes(client)
        count += 1
    assert restart.wait() == 0
    assert service.main != main
    assert count > 0


def test_its_socket_starts_it_for_the_first_client_and_outlives_it(
    machine: Machine, clients: contextlib.ExitStack
) -> None:
    service = Service(machine, "web", "fd:web")
    port = next(PORTS)
    machine.write(
        f"systemd/system/{service.unit}.socket.d/where.conf",
        f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\nFileDescriptorName=web\n",
    )
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "start", f"{service.unit}.socket")
    assert machine.ask("is-active", service.unit) == "inactive"
    service.address = f"tcp://127.0.0.1:{port}"
    for _ in range(2):
        with service.dial(clients) as client:
            assert echoes(client)
        assert machine.show(service.unit, "NFileDescriptorStore") == "0"  # the socket unit has it
        machine.do("systemctl", "stop", service.unit)


def test_one_process_for_each_client(machine: Machine, clients: contextlib.ExitStack) -> None:
    Service(machine, "single")
    for unit in UNITS.glob("forkd-once*"):
        machine.write(f"systemd/system/{unit.name.replace('once', 'once-single')}", unit.read_text())
    once, port = "forkd-once-single.socket", next(PORTS)
    machine.write(f"systemd/system/{once}.d/where.conf", f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n")
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "start", once)
    both = [clients.enter_context(machine.dial(f"tcp://127.0.0.1:{port}")) for _ in range(2)]
    assert all(echoes(client) for client in both)
    assert machine.show(once, "NConnections") == "2"
    for client in both:
        client.shutdown(socket.SHUT_WR)
        assert at_end(client)
    eventually(lambda: machine.show(once, "NConnections") == "0", what="the end of both")
    assert machine.ask("list-units", "--failed", "--plain", "--no-legend", "forkd-once-*") == ""


def test_the_units_say_nothing_that_systemd_does_not_know(tmp_path: Path) -> None:
    needs_program("systemd-analyze")
    names = []
    for unit in units():
        copy = tmp_path / unit.name.replace("NAME", "one")
        copy.write_text(unit.read_text().replace("/usr/bin/forkd", "/bin/true"))
        names.append(str(copy).replace("@", "@one"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["forkd@.service", "forkd-once@.service"])
def test_the_services_are_shut_in(name: str) -> None:
    needs_program("systemd-analyze")
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(UNITS / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout
