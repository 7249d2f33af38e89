"""`forkd doctor`: each check by facts alone; and faults that are really there, in a network namespace where needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd.cli import doctor
from forkd.cli.doctor import DAEMON_CHECKS, MACHINE_CHECKS, Finding
from forkd.cli.facts import DaemonFacts, Machine, Unit, cleaning_of, logrotate_rules, parse_span, parse_unit
from tests.support.certificates import Authority
from tests.support.daemon import Daemon, Harness, forkd
from tests.support.needs import needs_root
from tests.support.network_namespaces import private_network
from tests.support.paths import CHECKOUT
from tests.support.unprivileged import NOBODY

DAY = 86_400.0
WELL = Machine(syncookies=1, kernel=(6, 1), now=9 * DAY, installed=8 * DAY, is_synchronized=True, memory=100)
RULE = ("/etc/logrotate.d/x", ("/var/log/x/*.log",), "weekly")


@pytest.mark.parametrize(
    ("check", "machine", "said"),
    [
        (doctor.syncookies, Machine(syncookies=0), "tcp_syncookies is 0"),
        (doctor.kernel, Machine(kernel=(4, 19)), "Linux 4.19"),
        (doctor.kernel, Machine(kernel=(5, 9)), "Linux 5.9"),
        (doctor.clock, Machine(now=0.0, installed=9 * DAY), "installed later"),
        (doctor.clock, Machine(is_synchronized=False), "not synchronized"),
        (doctor.memory, Machine(memory=100 << 20, available=4 << 20), "of 100 MiB of memory 4 MiB are available"),
    ],
)
def test_check_of_the_machine_finds_its_fault(
    check: Callable[[Machine], Iterator[Finding]], machine: Machine, said: str
) -> None:
    (found,) = check(machine)
    assert said in found.what
    assert found.remedy


@pytest.mark.parametrize(
    ("check", "facts", "said"),
    [
        (doctor.settings, {"problems": ("x.yaml:1:1: wokers",)}, "wokers: the next reload or start fails"),
        (doctor.somaxconn, {"somaxconn": 128, "backlogs": (("unix:/s", 4096),)}, "leaves 128 of it"),
        (doctor.drops, {"drops": (("tcp://h:1", 3), ("tcp://h:2", 0))}, "tcp://h:1 has dropped 3 connections"),
        (doctor.drops, {"drops": (("udp://h:1", 3),)}, "lost 3 datagrams"),
        (doctor.nofile, {"connections": 2000, "nofile": 1024}, "take 2064 descriptors, and it may have 1024"),
        (doctor.nofile, {"most_clients": 800, "nofile": 1024}, "800 clients"),
        (doctor.run_directory, {"cleaning": "by age"}, "is cleaned: by age"),
        (doctor.run_directory, {"lingers": False, "user": "ann"}, "goes when user ann logs out"),
        (doctor.disk, {"free_bytes": (("/var", 5 << 20), ("/", 5 << 30))}, "/var has 5 MiB left"),
        (doctor.log_rotation, {"log": "/l", "log_moved": True}, "moved away from /l"),
        (doctor.log_rotation, {"log": "/var/log/x/a.log", "rotations": (RULE,)}, "does not send USR1"),
        (doctor.certificates, {"certificates": (("a", 2 * DAY), ("b", 90 * DAY))}, "a ends in 2 days"),
        (doctor.certificates, {"certificates": (("a", -2 * DAY),)}, "a has ended 2 days ago"),
        (doctor.swap, {"swapped": 30 << 20, "resident": 70 << 20}, "30 MiB of its memory are in swap"),
        (doctor.python_path, {"unreadable": ("/srv",), "worker_user": "ann"}, "user ann can't read /srv"),
        (doctor.clock_of_start, {"started": 60.0}, "60 s in the future"),
        (
            doctor.systemd,
            {"unit": Unit("u", takes_extensions=False, stop_seconds=10, burst=0), "drain_timeout": 30.0},
            "TimeoutStopSec of u is 10s, too short for the 30s of its drain_timeout",
        ),
        (
            doctor.systemd,
            {
                "unit": Unit("u", takes_extensions=False, stop_seconds=40, burst=0),
                "drain_timeout": 30.0,
                "stop_delay": 25.0,
            },
            "TimeoutStopSec of u is 40s, too short for the 55s of its stop_delay and drain_timeout",
        ),
        (
            doctor.systemd,
            {"unit": Unit("u", takes_extensions=False, start_seconds=10, burst=0), "boot_timeout": 60.0},
            "TimeoutStartSec of u is 10s",
        ),
        (doctor.systemd, {"unit": Unit("u", restart_seconds=0.1, burst=5)}, "after 5 failed starts within 10s"),
        (doctor.systemd, {"unit": Unit("u", burst=0, kill_mode="control-group")}, "KillMode of u"),
    ],
)
def test_check_of_a_daemon_finds_its_fault(
    check: Callable[[DaemonFacts], Iterator[Finding]], facts: dict[str, Any], said: str
) -> None:
    (found,) = check(DaemonFacts("x", **facts))
    assert said in found.what
    assert found.remedy


@pytest.mark.parametrize(
    "facts",
    [
        DaemonFacts("unknown"),
        DaemonFacts(
            "x", somaxconn=4096, backlogs=(("unix:/s", 4096),), drops=(("unix:/s", 0),), connections=900, nofile=1024,
            drain_timeout=90.0, boot_timeout=90.0, unit=Unit("u", stop_seconds=1, start_seconds=1, restart_seconds=2.5),
            lingers=True, free_bytes=(("/", 5 << 30),), certificates=(("a", 90 * DAY),), resident=1, started=-5.0,
            log="/var/log/x/y/a.log", rotations=(RULE, ("f", ("/var/log/x/y/*",), "kill -USR1 7")),
        ),
    ],
)  # fmt: skip
def test_checks_find_nothing_where_nothing_is_wrong(facts: DaemonFacts) -> None:
    assert [one for check in DAEMON_CHECKS for one in check(facts)] == []
    assert [one for check in MACHINE_CHECKS for one in (*check(WELL), *check(Machine()))] == []


def test_cleaning_is_by_the_rule_with_an_age_unless_it_is_excluded() -> None:
    rules = [("q", "/tmp", "10d"), ("d", "/run", "-"), ("d", "/var/tmp", "30d"), ("x", "/var/tmp/forkd*", "-")]
    assert cleaning_of(Path("/tmp/forkd-1000/x"), rules) == "systemd-tmpfiles removes what is older than 10d from /tmp"
    assert cleaning_of(Path("/var/tmp/forkd-1000/x"), rules) == ""
    assert cleaning_of(Path("/run/forkd/x"), rules) == ""
    assert cleaning_of(Path("/tmpx/y"), rules) == ""


def test_rules_of_logrotate_are_read_with_their_paths() -> None:
    text = (CHECKOUT / "systemd/forkd.logrotate").read_text()
    ((paths, body),) = logrotate_rules(text)
    assert (paths, "USR1" in body) == (("/var/log/forkd/*.log",), True)
    several = 'weekly\n"/var/log/a" /var/log/b\n/var/log/c {\n  daily\n}\n/var/log/d {\n  USR1\n}\n'
    assert list(logrotate_rules(several)) == [
        (("/var/log/a", "/var/log/b", "/var/log/c"), "\n  daily\n"),
        (("/var/log/d",), "\n  USR1\n"),
    ]


@pytest.mark.parametrize(
    ("text", "seconds"), [("1min 30s", 90), ("infinity", None), ("100ms", 0.1), ("0", 0), ("1h 2us", 3600.000002)]
)
def test_span_of_systemd_is_read(text: str, seconds: float | None) -> None:
    assert parse_span(text) == (None if seconds is None else pytest.approx(seconds))


def test_unit_is_that_whose_main_process_the_master_is() -> None:
    text = (
        "LoadState=loaded\nMainPID=7\nType=exec\nNotifyAccess=none\nTimeoutStartUSec=infinity\nTimeoutStopUSec=10s\n"
        "RestartUSec=100ms\nRestart=always\nStartLimitIntervalUSec=10s\nStartLimitBurst=5\nKillMode=mixed\n"
    )
    unit = parse_unit("u", text, 7)
    assert unit == Unit("u", takes_extensions=False, stop_seconds=10.0)
    assert parse_unit("u", text, 8) is None
    assert parse_unit("u", "LoadState=not-found\n", None) is None


@pytest.mark.parametrize(
    ("kind", "access", "start_seconds", "takes_extensions"),
    [
        ("notify", "main", 20.0, True),
        ("simple", "main", None, True),
        ("exec", "none", None, False),
        ("forking", "none", 20.0, False),
    ],
)
def test_type_of_a_unit_says_whether_it_waits_for_a_start_and_may_be_asked_for_time(
    kind: str, access: str, start_seconds: float | None, takes_extensions: bool
) -> None:
    unit = parse_unit("u", f"LoadState=loaded\nType={kind}\nNotifyAccess={access}\nTimeoutStartUSec=20s\n", None)
    assert unit is not None
    assert (unit.start_seconds, unit.takes_extensions) == (start_seconds, takes_extensions)


def findings(daemon: Daemon, *target: object) -> dict[str, str]:
    """What `forkd doctor` finds of a daemon, by check."""
    result = forkd("doctor", "--json", *(target or daemon.identity), cwd=daemon.directory)
    found = json.loads(result.stdout)
    assert result.returncode == (1 if found["findings"] else 0), result.stderr
    return {one["check"]: one["what"] for one in found["findings"] if one["about"] == daemon.name}


def test_doctor_finds_what_is_really_wrong(harness: Harness) -> None:
    with private_network():
        Path("/proc/sys/net/core/somaxconn").write_text("16")
        daemon = harness.daemon(
            name="ill", workers=1, settings=("listen.0.limits.per_worker=500", "rlimits.nofile=256")
        ).start()  # fmt: skip
        address = daemon.address
    daemon.log.rename(daemon.log.with_suffix(".1"))
    found = findings(daemon)
    assert found["somaxconn"] == f"the backlog of {address} is 4096, but net.core.somaxconn leaves 16 of it"
    assert found["log_rotation"] == f"it still writes to a log that was moved away from {daemon.log}, or removed"
    text = forkd("doctor", cwd=daemon.directory)  # all that run
    assert (text.returncode, f"ill: {found['somaxconn']}\n    sysctl -w" in text.stdout) == (1, True)
    daemon.log.with_suffix(".1").rename(daemon.log)
    assert daemon.command("stop").returncode == 0


def test_doctor_knows_the_log_of_a_daemon_in_the_foreground(harness: Harness) -> None:
    daemon = harness.daemon(name="well", workers=1).run()
    where = "--run-directory", daemon.run_directory
    assert "log_rotation" not in findings(daemon, *where)
    daemon.log.unlink()
    assert findings(daemon, *where)["log_rotation"].endswith(f"moved away from {daemon.log}, or removed")
    daemon.log.touch()
    assert "log_rotation" in findings(daemon, *where)


def test_doctor_looks_at_a_file_whose_daemon_does_not_run(harness: Harness, open_directory: Path) -> None:
    needs_root()
    secret = open_directory / "secret"
    secret.mkdir(mode=0o700)
    cert, key = Authority(open_directory).issue("server", days=3)
    file = open_directory / "asleep.yaml"
    more = f"limits: {{per_worker: 500}}, tls: {{cert: {cert}, key: {key}}}"
    listen = f"[{{address: 'tcp://127.0.0.1:0', handler: 'a:B', {more}}}]"
    file.write_text(
        f"wokers: 1\nuser: {NOBODY}\nrlimits: {{nofile: 256}}\npython_path: [{secret}, {open_directory}]\n"
        f"listen: {listen}\n"
    )
    daemon = harness.daemon(name="asleep")
    found = findings(daemon, file)
    assert "wokers: unknown setting" in found["settings"]
    assert found["python_path"].endswith(f"can't read {secret}, from where its handlers are imported")
    assert "take 564 descriptors, and it may have 256" in found["nofile"]
    assert found["certificates"].startswith("certificate ")


@pytest.mark.parametrize(("syncookies", "status"), [(1, 0), (0, 1)])
def test_exit_status_says_whether_something_is_wrong(tmp_path: Path, syncookies: int, status: int) -> None:
    program = (
        "import sys, forkd.cli, forkd.cli.doctor as doctor\n"
        f"doctor.machine_facts = lambda: doctor.Machine(syncookies={syncookies})\n"
        "doctor.daemons_meant = lambda command: []\n"
        "sys.exit(forkd.cli.main(['doctor']))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    last = "nothing wrong" if syncookies else "1 wrong"
    assert (result.returncode, result.stdout.splitlines()[-1]) == (
        status, f"{last}; looked at this machine; no daemon runs that this user may ask",
    )  # fmt: skip


def test_doctor_of_a_daemon_that_is_nowhere_fails(tmp_path: Path) -> None:
    result = forkd("doctor", "nowhere", cwd=tmp_path)
    assert (result.returncode, result.stdout, "nowhere is not running" in result.stderr) == (1, "", True)
