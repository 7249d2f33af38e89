"""The units under a real systemd, in a container: what is promised of forkd@, of its socket, and of one process
for each client.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import at_end, echoes
from tests.support.needs import needs_program, needs_python_for_all, needs_root
from tests.support.nspawn import UNITS, SystemdContainer, units
from tests.support.processes import eventually

#: All of them share one container.
pytestmark = pytest.mark.xdist_group("systemd")

PORTS = iter(range(7100, 7200))


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemdContainer]:
    needs_root()
    for program in ("systemd-nspawn", "nsenter", "systemctl", "ip"):
        needs_program(program)
    needs_python_for_all()
    made = SystemdContainer(tmp_path_factory.mktemp("container"))
    made.build()
    try:
        made.boot()
        yield made
    finally:
        made.stop()


@pytest.fixture
def clients() -> Iterator[contextlib.ExitStack]:
    """What is in it is closed at the end."""
    with contextlib.ExitStack() as stack:
        yield stack


class Service:
    """One daemon, `forkd@NAME`, with a port of its own."""

    def __init__(self, container: SystemdContainer, name: str, address: str = "") -> None:
        self.container = container
        self.name = name
        self.unit = f"forkd@{name}"
        self.address = address or f"tcp://127.0.0.1:{next(PORTS)}"
        self.settings(workers=1)

    def settings(
        self, *, workers: int, handler: str = "forkd.builtin:Echo", log: str = "stderr", more: str = ""
    ) -> None:
        """Writes its file."""
        listen = f"listen: [{{address: '{self.address}', handler: '{handler}'}}]"
        self.container.write(f"forkd/{self.name}.yaml", f"workers: {workers}\nlog: {{to: {log}}}\n{listen}\n{more}")

    def start(self) -> Service:
        self.container.check_run("systemctl", "enable", "--now", self.unit)
        return self

    def dial(self, clients: contextlib.ExitStack) -> socket.socket:
        return clients.enter_context(self.container.dial(self.address))

    @property
    def main(self) -> str:
        """The master's pid, as systemd knows it."""
        return self.container.show(self.unit, "MainPID")

    @property
    def status(self) -> str:
        return self.container.show(self.unit, "StatusText")

    def signal(self, name: str) -> None:
        """Sends the master alone a signal."""
        self.container.check_run("systemctl", "kill", f"--signal={name}", "--kill-who=main", self.unit)

    def wait_restart(self, before: str) -> None:
        """Waits until systemd has started another master, which is ready."""
        eventually(
            lambda: self.container.ask("is-active", self.unit) == "active" and self.main not in ("0", before),
            what=f"another master of {self.unit}",
        )


def test_unit_is_active_when_it_serves_and_stops_when_told(
    container: SystemdContainer, clients: contextlib.ExitStack
) -> None:
    service = Service(container, "chat").start()
    assert container.ask("is-active", service.unit) == "active"
    with service.dial(clients) as client:
        assert echoes(client)
    assert service.status.startswith("running: 1 of 1 workers")
    assert "running" in container.check_run("forkd", "status", "chat")  # of root, though its directory is forkd's
    assert "in order" in container.check_run("forkd", "check", "chat")
    container.check_run("systemctl", "stop", service.unit)
    assert container.show(service.unit, "Result") == "success"
    with pytest.raises(ConnectionRefusedError):
        service.dial(clients)
    assert "INFO chat master" in container.journal(service.unit)
    assert not re.search("ERROR|Traceback", container.journal(service.unit))


def test_unit_serves_a_path_with_a_mode(container: SystemdContainer, clients: contextlib.ExitStack) -> None:
    service = Service(container, "moded", "unix:/run/forkd/moded/echo.sock")
    listen = f"{{address: '{service.address}', handler: 'forkd.builtin:Echo', mode: 0660}}"
    container.write("forkd/moded.yaml", f"workers: 1\nlisten: [{listen}]\n")
    service.start()
    assert echoes(service.dial(clients))


def user_recipe() -> str:
    """The drop-in for `user:` that the unit's comment has."""
    lines = (UNITS / "forkd@.service").read_text().splitlines()
    start = lines.index("#   [Service]")
    return "".join(f"{line[4:]}\n" for line in itertools.takewhile(lambda one: one.startswith("#   "), lines[start:]))


DROP_INS = {
    "dropped": (user_recipe(), "user: nobody\n", 65534, ""),
    "owned": (
        f"{user_recipe()}CapabilityBoundingSet=CAP_CHOWN\nSystemCallFilter=@chown\n",
        "user: nobody\n",
        65534,
        ", owner: nobody",
    ),
    "dynamic": ("[Service]\nUser=forkd-%i\nGroup=forkd-%i\nDynamicUser=yes\n", "", None, ""),
}


@pytest.mark.parametrize("name", DROP_INS)
def test_unit_serves_as_another_user(container: SystemdContainer, clients: contextlib.ExitStack, name: str) -> None:
    service = Service(container, name, f"unix:/run/forkd/{name}/echo.sock")
    drop_in, settings, uid, more = DROP_INS[name]
    listen = f"{{address: '{service.address}', handler: 'forkd.builtin:Echo', mode: 0660{more}}}"
    container.write(f"forkd/{name}.yaml", f"workers: 1\nlisten: [{listen}]\n{settings}")
    container.write(f"systemd/system/{service.unit}.service.d/user.conf", drop_in)
    container.check_run("systemctl", "daemon-reload")
    service.start()
    container.check_run("systemctl", "reload", service.unit)
    found = json.loads(container.check_run("forkd", "status", name, "--json"))
    assert (found["state"], found["generation"]) == ("running", 2)
    (worker,) = (one["pid"] for one in found["workers"] if one["state"] == "serving")
    words = Path(f"/proc/{container.pid}/root/proc/{worker}/status").read_text().split()
    owner = int(words[words.index("Uid:") + 1])
    assert owner == uid if uid is not None else owner > 60000
    path = service.address if name != "dynamic" else f"unix:/run/private/forkd/{name}/echo.sock"
    with container.dial(path) as client:
        assert echoes(client)
    container.check_run("systemctl", "stop", service.unit)
    assert not re.search("ERROR|Traceback", container.journal(service.unit))


@pytest.mark.parametrize("name", ["listed", "listed-dynamic", "listed-private"])
def test_list_of_root_has_the_daemons_of_units(container: SystemdContainer, name: str) -> None:
    """Also one whose run directory is in a /tmp of its own."""
    service = Service(container, name)
    if name == "listed-dynamic":
        container.write(f"systemd/system/{service.unit}.service.d/user.conf", DROP_INS["dynamic"][0])
    elif name == "listed-private":
        start = (
            f"[Service]\nExecStart=\nExecStart=/usr/bin/forkd run /etc/forkd/{name}.yaml --run-directory /tmp/{name}\n"
        )
        container.write(f"systemd/system/{service.unit}.service.d/where.conf", start)
    container.check_run("systemctl", "daemon-reload")
    service.start()
    found = json.loads(container.check_run("forkd", "list", "--json"))
    (one,) = [one for one in found if one["name"] == name]
    assert (one["state"], one["error"], one["pid"]) == ("running", "", int(service.main))
    assert one["addresses"] == [service.address]
    private = name == "listed-private"
    assert one["run_directory"] == (f"/proc/{service.main}/root/tmp/{name}" if private else f"/run/forkd/{name}")
    assert f"{name}: running, pid {service.main}" in container.check_run("forkd", "top", name, "--once")
    assert "reloaded" in container.check_run("forkd", "reload", name)
    container.check_run("systemctl", "stop", service.unit)
    assert name not in container.check_run("forkd", "list")


def test_list_has_no_daemons_of_containers(container: SystemdContainer) -> None:
    service = Service(container, "contained").start()
    result = subprocess.run(
        [sys.executable, "-m", "forkd", "list", "--json"], capture_output=True, text=True, timeout=60, check=True,
        cwd=container.root,
    )  # fmt: skip
    assert "contained" in container.check_run("forkd", "list")
    assert "contained" not in [one["name"] for one in json.loads(result.stdout)]
    container.check_run("systemctl", "stop", service.unit)


@pytest.mark.parametrize("late", ["dependency", "address"])
def test_start_is_tried_again_until_what_is_late_is_there(
    container: SystemdContainer, clients: contextlib.ExitStack, late: str
) -> None:
    host = "127.0.0.1" if late == "dependency" else "192.0.2.1"
    service = Service(container, f"late-{late}", f"tcp://{host}:{next(PORTS)}")
    read = "open('/etc/forkd/dependency').close()\n" if late == "dependency" else ""
    container.write("forkd/late.py", f"from forkd.builtin import Echo\n{read}")
    service.settings(workers=1, handler="late:Echo", more="python_path: [/etc/forkd]\n")
    assert container.run("systemctl", "start", service.unit).returncode != 0
    eventually(lambda: container.show(service.unit, "SubState") == "auto-restart", what="the end of the first start")
    errors = container.check_run("journalctl", "--output=cat", "--priority=err", f"--unit={service.unit}")
    assert ("/etc/forkd/dependency" if late == "dependency" else "no address of this machine") in errors
    if late == "dependency":
        container.write("forkd/dependency", "")
    else:
        container.add_address(f"{host}/32")
    service.wait_restart("0")
    assert echoes(service.dial(clients))


def test_unit_with_wrong_settings_fails_once_with_the_reason(container: SystemdContainer) -> None:
    service = Service(container, "wrong")
    service.settings(workers=0)
    assert container.run("systemctl", "start", service.unit).returncode != 0
    assert container.ask("is-failed", service.unit) == "failed"
    assert container.show(service.unit, "NRestarts") == "0"
    assert "workers" in container.journal(service.unit)


def test_reload_by_systemd_waits_for_the_new_settings_or_fails(
    container: SystemdContainer, clients: contextlib.ExitStack
) -> None:
    service = Service(container, "changes").start()
    main, client = service.main, service.dial(clients)
    service.settings(workers=2)
    container.check_run("systemctl", "reload", service.unit)
    assert service.status.startswith("running: 2 of 2 workers")
    service.settings(workers=2, handler="forkd.builtin:Missing")
    assert container.run("systemctl", "reload", service.unit).returncode != 0
    assert container.ask("is-active", service.unit) == "active"
    assert "Missing" in container.journal(service.unit)
    assert service.main == main
    assert echoes(client)
    assert echoes(service.dial(clients))


def test_journal_has_levels(container: SystemdContainer) -> None:
    service = Service(container, "logged")
    service.settings(workers=1, log="journal")
    service.start()
    service.settings(workers=1, log="journal", handler="forkd.builtin:Missing")
    assert container.run("systemctl", "reload", service.unit).returncode != 0
    found = container.check_run("journalctl", "--output=cat", "--priority=err", "--identifier=logged")
    assert "reload: failed, and nothing has changed" in found
    assert "listens on" not in found
    assert "listens on" in container.journal(service.unit)


def test_upgrade_keeps_the_main_process_and_its_clients(
    container: SystemdContainer, clients: contextlib.ExitStack
) -> None:
    service = Service(container, "upgraded").start()
    main, client = service.main, service.dial(clients)
    assert echoes(client)
    service.signal("USR2")
    eventually(lambda: "reload: done" in container.journal(service.unit), what="the upgrade")
    container.check_run("forkd", "upgrade", "/etc/forkd/upgraded.yaml", "--run-directory", "/run/forkd/upgraded")
    assert container.journal(service.unit).count("new image of the master runs") == 2
    assert (container.ask("is-active", service.unit), service.main) == ("active", main)
    assert echoes(client)
    assert echoes(service.dial(clients))


@pytest.mark.parametrize("where", ["tcp", "unix"])
def test_killed_master_comes_back_with_the_waiting_clients(
    container: SystemdContainer, clients: contextlib.ExitStack, where: str
) -> None:
    name = f"killed-{where}"
    service = Service(container, name, f"unix:/run/forkd/{name}/echo.sock" if where == "unix" else "")
    # Time enough to connect while no master runs.
    container.write(f"systemd/system/{service.unit}.service.d/slow.conf", "[Service]\nRestartSec=2s\n")
    container.check_run("systemctl", "daemon-reload")
    service.start()
    assert container.show(service.unit, "NFileDescriptorStore") == "1"
    main = service.main
    service.signal("KILL")
    eventually(lambda: container.show(service.unit, "SubState") == "auto-restart", what="the end of the master")
    client = service.dial(clients)
    client.sendall(b"waits\n")
    service.wait_restart(main)
    assert client.recv(6) == b"waits\n"
    assert container.show(service.unit, "NFileDescriptorStore") == "1"


def test_watchdog_ends_a_master_that_stands_still(container: SystemdContainer, clients: contextlib.ExitStack) -> None:
    service = Service(container, "still")
    container.write(f"systemd/system/{service.unit}.service.d/soon.conf", "[Service]\nWatchdogSec=2s\n")
    container.check_run("systemctl", "daemon-reload")
    main = service.start().main
    service.signal("STOP")
    service.wait_restart(main)
    assert "Watchdog timeout" in container.journal(service.unit)
    assert echoes(service.dial(clients))


def test_restart_by_systemd_refuses_no_client(container: SystemdContainer, clients: contextlib.ExitStack) -> None:
    service = Service(container, "again").start()
    main = service.main
    restart = subprocess.Popen(container.command_inside("systemctl", "restart", service.unit))
    count = 0
    while restart.poll() is None:
        with service.dial(clients) as client:  # one that stays would hold it up
            assert echoes(client)
        count += 1
    assert restart.wait() == 0
    assert service.main != main
    assert count > 0


def test_socket_unit_starts_the_daemon_and_outlives_it(
    container: SystemdContainer, clients: contextlib.ExitStack
) -> None:
    service = Service(container, "web", "fd:web")
    port = next(PORTS)
    container.write(
        f"systemd/system/{service.unit}.socket.d/where.conf",
        f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\nFileDescriptorName=web\n",
    )
    container.check_run("systemctl", "daemon-reload")
    container.check_run("systemctl", "start", f"{service.unit}.socket")
    assert container.ask("is-active", service.unit) == "inactive"
    service.address = f"tcp://127.0.0.1:{port}"
    for _ in range(2):
        with service.dial(clients) as client:
            assert echoes(client)
        assert container.show(service.unit, "NFileDescriptorStore") == "0"  # the socket unit has it
        container.check_run("systemctl", "stop", service.unit)


def test_one_process_for_each_client(container: SystemdContainer, clients: contextlib.ExitStack) -> None:
    Service(container, "single")
    for unit in UNITS.glob("forkd-once*"):
        container.write(f"systemd/system/{unit.name.replace('once', 'once-single')}", unit.read_text())
    once, port = "forkd-once-single.socket", next(PORTS)
    container.write(f"systemd/system/{once}.d/where.conf", f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{port}\n")
    container.check_run("systemctl", "daemon-reload")
    container.check_run("systemctl", "start", once)
    both = [clients.enter_context(container.dial(f"tcp://127.0.0.1:{port}")) for _ in range(2)]
    assert all(echoes(client) for client in both)
    assert container.show(once, "NConnections") == "2"
    for client in both:
        client.shutdown(socket.SHUT_WR)
        assert at_end(client)
    eventually(lambda: container.show(once, "NConnections") == "0", what="the end of both")
    assert container.ask("list-units", "--failed", "--plain", "--no-legend", "forkd-once-*") == ""


def test_service_restarts_more_slowly_than_the_limit_of_starts() -> None:
    """Else what is away for long would end in a unit that has failed for good."""
    text = (UNITS / "forkd@.service").read_text()
    interval, burst, pause = (
        float(re.findall(rf"^{key}=(\d+)s?$", text, re.MULTILINE)[0])
        for key in ("StartLimitIntervalSec", "StartLimitBurst", "RestartSec")
    )
    assert pause * burst > 2 * interval


def test_listener_of_single_connections_has_no_limit_of_clients() -> None:
    """Beyond that limit, 200 in two seconds, systemd takes the listener away until it is started again."""
    assert "\nTriggerLimitIntervalSec=0\n" in (UNITS / "forkd-once.socket").read_text()


def test_units_say_nothing_that_systemd_does_not_know(tmp_path: Path) -> None:
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
def test_services_are_shut_in(name: str) -> None:
    needs_program("systemd-analyze")
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", "--no-pager", str(UNITS / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout
