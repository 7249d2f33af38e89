"""`forkd doctor`: what is wrong on this machine, or soon will be, for one daemon or all that run.

`facts` finds out what there is. Each check is a function of it alone, and yields a finding for each fault: what it is,
and what to do. What could not be found out is None, and no fault.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from forkd.cli.facts import DaemonFacts, Machine, daemons_meant, is_matched, machine_facts
from forkd.errors import printable
from forkd.system.rlimits import RESERVED_DESCRIPTORS
from forkd.system.tls_files import expiry_warning

#: The oldest kernel that still gets corrections.
_OLDEST_KERNEL = (5, 10)

#: The part of a limit that is in use by which it is nearly reached.
_NEARLY = 0.8

#: The part of a daemon's memory that is in swap from which on that is told.
_SWAPPED = 0.1

#: Seconds that a stop takes longer than `drain_timeout`, at most, and a start longer than `boot_timeout`.
_STOP_MARGIN, _START_MARGIN = 12.0, 7.0

#: Free bytes of a disk below which it is nearly full.
_LEAST_FREE = 64 << 20

_DAY = 86_400


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong.

    Attributes:
        what: it, in a sentence.
        remedy: what to do.
    """

    what: str
    remedy: str


def doctor(command: argparse.Namespace) -> int:
    """`forkd doctor`. The exit status is 1 where something is wrong."""
    daemons = daemons_meant(command)
    machine = machine_facts()
    found = [("machine", check.__name__, one) for check in MACHINE_CHECKS for one in check(machine)]
    for facts in daemons:
        found += [(facts.name, check.__name__, one) for check in DAEMON_CHECKS for one in check(facts)]
    if command.json:
        told = [{"about": about, "check": check, "what": one.what, "do": one.remedy} for about, check, one in found]
        checks = [check.__name__ for check in (*MACHINE_CHECKS, *DAEMON_CHECKS)]
        print(json.dumps({"daemons": [one.name for one in daemons], "checks": checks, "findings": told}, indent=2))
    else:
        print(printable("\n".join(_text(found, [one.name for one in daemons]))))
    return 1 if found else 0


def _text(found: Iterable[tuple[str, str, Finding]], names: list[str]) -> Iterator[str]:
    count = 0
    for count, (about, _, one) in enumerate(found, 1):  # noqa: B007 (it is the number of them)
        yield f"{about}: {one.what}"
        yield f"    {one.remedy}"
    where = f"this machine and {', '.join(names)}" if names else "this machine; no daemon runs that this user may ask"
    yield f"{count or 'nothing'} wrong; looked at {where}"


# Of the machine


def syncookies(machine: Machine) -> Iterator[Finding]:
    """Whether half-open connections alone can fill a listener."""
    if machine.syncookies == 0:
        yield Finding(
            "net.ipv4.tcp_syncookies is 0: a flood of half-open connections keeps all clients out",
            "sysctl -w net.ipv4.tcp_syncookies=1, and the same line in /etc/sysctl.d/forkd.conf",
        )


def kernel(machine: Machine) -> Iterator[Finding]:
    """Whether the kernel is one that is still corrected."""
    if machine.kernel is not None and machine.kernel < _OLDEST_KERNEL:
        version, oldest = (".".join(map(str, one)) for one in (machine.kernel, _OLDEST_KERNEL))
        yield Finding(
            f"the kernel is Linux {version}, which gets no corrections any more",
            f"upgrade it to {oldest} at least; some of what forkd asks of it is missing before 5.15",
        )


def clock(machine: Machine) -> Iterator[Finding]:
    """Whether the clock is right, as far as that can be told: certificates and logs go by it."""
    if machine.installed is not None and machine.now < machine.installed - _DAY:
        yield Finding(
            f"the clock says {time.strftime('%Y-%m-%d', time.localtime(machine.now))}, and forkd was installed later",
            "set it: timedatectl set-ntp true, or date -s",
        )
    elif machine.is_synchronized is False:
        yield Finding(
            "the clock is not synchronized",
            "timedatectl set-ntp true, or install chrony; in a container that is the host's task",
        )


def memory(machine: Machine) -> Iterator[Finding]:
    """Whether there is memory left."""
    if machine.memory and machine.available is not None and machine.available < machine.memory / 20:
        yield Finding(
            f"of {_mib(machine.memory)} of memory {_mib(machine.available)} are available: soon it swaps, or the "
            "kernel kills a process",
            "see which process has it (ps --sort=-rss aux), set recycle.memory, or have fewer workers",
        )


MACHINE_CHECKS: tuple[Callable[[Machine], Iterator[Finding]], ...] = (syncookies, kernel, clock, memory)

# Of a daemon


def settings(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether the settings file is still one that the daemon can be started with."""
    for problem in facts.problems:
        yield Finding(f"{problem}: the next reload or start fails", "correct the file; forkd check reads it again")


def somaxconn(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether the kernel keeps as many waiting clients as a listener's backlog says."""
    there = facts.somaxconn
    for address, backlog in facts.backlogs:
        if there is not None and backlog > there:
            yield Finding(
                f"the backlog of {address} is {backlog}, but net.core.somaxconn leaves {there} of it",
                f"sysctl -w net.core.somaxconn={backlog}, the same line in /etc/sysctl.d/forkd.conf, then forkd reload",
            )


def drops(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether clients or datagrams found no place."""
    for address, count in facts.drops:
        if count and address.startswith(("udp:", "unix-dgram:")):
            yield Finding(
                f"{address} has lost {count} datagrams, since its buffer was full",
                "raise socket.receive_buffer and net.core.rmem_max, or have more workers",
            )
        elif count:
            yield Finding(
                f"{address} has dropped {count} connections, since its accept queue was full",
                "have more workers, or a larger backlog and net.core.somaxconn",
            )


def nofile(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether a worker can have a descriptor for each connection."""
    if facts.nofile is None:
        return
    needed = facts.connections + RESERVED_DESCRIPTORS
    remedy = "LimitNOFILE= in the unit, or ulimit -n before the start; then rlimits.nofile, where it is set"
    if facts.connections and needed > facts.nofile:
        yield Finding(
            f"its limits allow a worker {facts.connections} connections, which take {needed} descriptors, and it may "
            f"have {facts.nofile}",
            f"{needed} at least: {remedy}",
        )
    elif facts.most_clients + RESERVED_DESCRIPTORS > facts.nofile * _NEARLY:
        yield Finding(
            f"a worker has {facts.most_clients} clients, and may have {facts.nofile} descriptors",
            f"have more workers, or more descriptors: {remedy}",
        )


def run_directory(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether pid file and control socket stay where they are."""
    if facts.cleaning:
        yield Finding(
            f"its run directory {facts.run_directory} is cleaned: {facts.cleaning}",
            "set run_directory to one below /run or /var/lib, or XDG_RUNTIME_DIR",
        )
    if facts.lingers is False:
        yield Finding(
            f"its run directory {facts.run_directory} goes when user {facts.user} logs out",
            f"loginctl enable-linger {facts.user}",
        )


def disk(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether there is room for log and run directory."""
    for path, free in facts.free_bytes:
        if free < _LEAST_FREE:
            yield Finding(
                f"the disk of {path} has {_mib(free)} left",
                "make room there; log lines are lost on a full disk",
            )


def systemd(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether systemd gives the daemon the time that its own settings give."""
    unit = facts.unit
    if unit is None:
        return
    edit = f"systemctl edit {unit.name}"
    if not unit.takes_extensions:  # else forkd asks for the time that it needs
        stop = None if facts.drain_timeout is None else facts.stop_delay + facts.drain_timeout
        keys = "stop_delay and drain_timeout" if facts.stop_delay else "drain_timeout"
        for setting, there, own, margin, key in (
            ("TimeoutStopSec", unit.stop_seconds, stop, _STOP_MARGIN, keys),
            ("TimeoutStartSec", unit.start_seconds, facts.boot_timeout, _START_MARGIN, "boot_timeout"),
        ):
            needed = None if own is None else own + margin
            if there is not None and needed is not None and there < needed:
                yield Finding(
                    f"{setting} of {unit.name} is {there:g}s, too short for the {own:g}s of its {key}: it is killed",
                    f"{edit}: Type=notify and NotifyAccess=main, by which it asks for more, or {setting}={needed:g}s",
                )
    if unit.burst and unit.restarts and unit.restart_seconds * unit.burst < unit.interval_seconds:
        yield Finding(
            f"{unit.name} is given up by systemd after {unit.burst} failed starts within {unit.interval_seconds:g}s, "
            f"which come every {unit.restart_seconds:g}s",
            f"{edit}: RestartSec={unit.interval_seconds / unit.burst + 0.5:.1f}s, or StartLimitIntervalSec=0",
        )
    if unit.kill_mode == "control-group":
        yield Finding(
            f"KillMode of {unit.name} is control-group: workers and their programs get TERM beside the master",
            f"{edit}: KillMode=mixed",
        )


def log_rotation(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether the log is still the file that people read, and rotated so that it stays that."""
    if facts.log_moved:
        yield Finding(
            f"it still writes to a log that was moved away from {facts.log}, or removed",
            f"kill -USR1 {facts.pid}, and have logrotate do it, as systemd/forkd.logrotate does",
        )
    if facts.log is None:
        return
    for file, patterns, text in facts.rotations:
        if any(is_matched(facts.log, one) for one in patterns) and "USR1" not in text and "copytruncate" not in text:
            yield Finding(
                f"{file} rotates its log {facts.log} and does not send USR1: it goes on writing to the old file",
                f"add to {file} the postrotate part of systemd/forkd.logrotate, which sends it",
            )


def certificates(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether a certificate ends soon."""
    for file, expires in facts.certificates:
        if told := expiry_warning(file, expires - facts.now):
            yield Finding(told, "renew it; the daemon takes the new file by itself")


def swap(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether the daemon's memory is on a disk."""
    if facts.swapped > (facts.swapped + facts.resident) * _SWAPPED:
        yield Finding(
            f"{_mib(facts.swapped)} of its memory are in swap, beside {_mib(facts.resident)} in use: it answers late",
            "have fewer workers, set recycle.memory, or MemorySwapMax=0 in the unit",
        )


def python_path(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether the workers' user can read the handlers."""
    for path in facts.unreadable:
        yield Finding(
            f"user {facts.worker_user} can't read {path}, from where its handlers are imported",
            f"chmod o+rx {path} and the directories above it, or set user or python_path to another",
        )


def clock_of_start(facts: DaemonFacts) -> Iterator[Finding]:
    """Whether the clock went back."""
    if facts.started is not None and facts.started > facts.now + 1:
        yield Finding(
            f"it was started {facts.started - facts.now:.0f} s in the future: the clock was set back since",
            "see that one service alone sets the clock (timedatectl, chronyc tracking)",
        )


DAEMON_CHECKS: tuple[Callable[[DaemonFacts], Iterator[Finding]], ...] = (
    settings, somaxconn, drops, nofile, run_directory, disk, systemd, log_rotation, certificates, swap, python_path,
    clock_of_start,
)  # fmt: skip


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f} MiB"
