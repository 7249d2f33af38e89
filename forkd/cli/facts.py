"""What `forkd doctor` judges: facts about this machine and its daemons, found out without changing anything.

What this user may not see, or the system does not tell, is None or empty. The functions that make facts of a text are
pure; the others read /proc, ask a running daemon, and ask systemd.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import pwd
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

from forkd.cli.control_client import RunningMaster
from forkd.cli.locate import SeenDaemon, connect, every_daemon
from forkd.cli.target import WantedDaemon, wanted_daemon
from forkd.config.loader import LoadResult, read_settings
from forkd.config.settings import Settings
from forkd.errors import ForkdError, NotRunning
from forkd.messages import StatusReply, StatusRequest
from forkd.system.identity import look_up_identity
from forkd.system.logs import log_target
from forkd.system.proc import network_namespace_of
from forkd.system.run_directory import run_directory

_TMPFILES = ("/etc/tmpfiles.d", "/run/tmpfiles.d", "/usr/lib/tmpfiles.d")  # the first has precedence (tmpfiles.d(5))
_LOGROTATE = ("/etc/logrotate.conf", "/etc/logrotate.d")

#: What systemd's units write durations in (systemd.time(7)), in seconds.
_UNITS = {
    "us": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86_400, "w": 604_800,
    "month": 2_629_800, "y": 31_557_600,
}  # fmt: skip

_TIME_ERROR = 5  # of adjtimex(2): the clock is not synchronized
_TIMEX_SIZE = 512  # bytes: more than struct timex has

_SYSTEMD_SECONDS = 5.0

_PROPERTIES = (
    "LoadState,MainPID,Type,NotifyAccess,TimeoutStartUSec,TimeoutStopUSec,RestartUSec,Restart,StartLimitIntervalUSec,"
    "StartLimitBurst,KillMode"
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts about the machine.

    Attributes:
        syncookies: net.ipv4.tcp_syncookies.
        kernel: the first two numbers of its version.
        now: seconds since the epoch.
        installed: when forkd's files were written.
        is_synchronized: whether the kernel takes its clock for right.
        memory: bytes of memory.
        available: bytes of it that are to be had.
    """

    syncookies: int | None = None
    kernel: tuple[int, int] | None = None
    now: float = 0.0
    installed: float | None = None
    is_synchronized: bool | None = None
    memory: int | None = None
    available: int | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """What systemd's unit of a daemon says.

    Attributes:
        name: its name.
        takes_extensions: whether the daemon may ask for more time.
        start_seconds, stop_seconds: how long a start and a stop may take; None: as long as they do.
        restarts: whether systemd starts it again when it has failed.
        restart_seconds: how long it waits before.
        interval_seconds: within which `burst` starts are given up.
        burst: so many; 0: they never are.
        kill_mode: KillMode.
    """

    name: str
    takes_extensions: bool = True
    start_seconds: float | None = None
    stop_seconds: float | None = None
    restarts: bool = True
    restart_seconds: float = 0.1
    interval_seconds: float = 10.0
    burst: int = 5
    kill_mode: str = "mixed"


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """Facts about a daemon.

    Attributes:
        name: its name.
        pid: the master's; None where it does not run.
        user: the master's user, by name.
        now: seconds since the epoch.
        started: when it was started.
        problems: mistakes in its settings file.
        somaxconn: net.core.somaxconn where it listens.
        backlogs: of each listener for connections its address and backlog.
        drops: of each listener its address, and what found no place.
        connections: how many a worker may have by the limits; 0: there is no limit.
        nofile: how many descriptors a worker may have.
        most_clients: of the worker that has the most.
        stop_delay, drain_timeout, boot_timeout: the settings.
        run_directory: where that is.
        cleaning: what removes old files there, in a sentence; empty: nothing does.
        lingers: whether the user's directory below /run/user outlives the last logout; None: it is elsewhere.
        free_bytes: of directories that it writes to, how much room there is.
        unit: systemd's, which runs it.
        log: the log's file.
        log_moved: whether it writes to another file than that by now.
        rotations: of logrotate's rules the file that they are in, the paths, and their text.
        certificates: of each its file, and when it ends.
        swapped, resident: bytes of its processes' memory, in swap and in use.
        worker_user: the workers' user.
        unreadable: directories for handlers that this user can't read.
    """

    name: str
    pid: int | None = None
    user: str = ""
    now: float = 0.0
    started: float | None = None
    problems: tuple[str, ...] = ()
    somaxconn: int | None = None
    backlogs: tuple[tuple[str, int], ...] = ()
    drops: tuple[tuple[str, int], ...] = ()
    connections: int = 0
    nofile: int | None = None
    most_clients: int = 0
    stop_delay: float = 0.0
    drain_timeout: float | None = None
    boot_timeout: float | None = None
    run_directory: Path | None = None
    cleaning: str = ""
    lingers: bool | None = None
    free_bytes: tuple[tuple[str, int], ...] = ()
    unit: Unit | None = None
    log: str | None = None
    log_moved: bool = False
    rotations: tuple[tuple[str, tuple[str, ...], str], ...] = ()
    certificates: tuple[tuple[str, float], ...] = ()
    swapped: int = 0
    resident: int = 0
    worker_user: str = ""
    unreadable: tuple[str, ...] = ()


def machine_facts() -> Machine:
    """The facts about this machine, and about the network namespace of this process."""
    version = re.match(r"(\d+)\.(\d+)", os.uname().release)
    memory = {words[0]: int(words[1]) * 1024 for line in _read("/proc/meminfo").splitlines() if (words := line.split())}
    return Machine(
        syncookies=_number("/proc/sys/net/ipv4/tcp_syncookies"),
        kernel=None if version is None else (int(version[1]), int(version[2])),
        now=time.time(),
        installed=os.stat(__file__).st_ctime,
        is_synchronized=_is_synchronized(),
        memory=memory.get("MemTotal:"),
        available=memory.get("MemAvailable:"),
    )


def daemons_meant(command: argparse.Namespace) -> list[DaemonFacts]:
    """The facts about the daemon that a command means, running or not; without a TARGET about all that run and that
    this user may ask. Raises as `locate.connect` but where it is not running.
    """
    if command.target is None and command.name is None and command.run_directory is None:
        return [_facts(one.master.name, _settings_of(one.status), one) for one in every_daemon() if one.status]
    wanted = wanted_daemon(command)
    result = _settings_of({"source": wanted.source}, wanted.name) if wanted.file else None
    try:
        seen = _running(wanted)
    except NotRunning:
        if result is None:
            raise
        seen = None
    name = wanted.name if seen is None else seen.status["name"]  # a run directory may say which one is meant
    return [_facts(name, result or _settings_of(seen.status if seen else {}), seen)]


def _running(wanted: WantedDaemon) -> SeenDaemon:
    with connect(wanted) as master:
        status = master.ask(StatusRequest(), StatusReply).status
        return SeenDaemon(RunningMaster(status["pid"], master.uid, master.run.name), master.run, status)


def _settings_of(status: Mapping[str, Any], name: str = "") -> LoadResult | None:
    """The settings in the file that a daemon was started with; None where there is none."""
    source = status.get("source", "")
    if not source.startswith("/"):
        return None
    return read_settings(Path(source), (), {"name": status.get("name", name)})


def _facts(name: str, result: LoadResult | None, seen: SeenDaemon | None) -> DaemonFacts:
    """All facts about a daemon.

    Args:
        name: its name.
        result: of its settings file.
        seen: it, where it runs.
    """
    settings = Settings(listen=()) if result is None else result.settings
    status: Mapping[str, Any] = {} if seen is None else seen.status
    pid, workers = status.get("pid"), status.get("workers", [])
    directory = seen.run.path if seen is not None and seen.run is not None else run_directory(settings).path
    log = _log_of(status, settings, known=result is not None)
    owner = os.geteuid() if seen is None else seen.master.uid
    uid, gid, groups = _worker_identity(settings, workers)
    swapped, resident = map(sum, zip((0, 0), *(_memory(one) for one in _pids(status)), strict=True))
    return DaemonFacts(
        name=name,
        pid=pid,
        user=_user_name(owner),
        now=time.time(),
        started=status.get("started"),
        problems=() if result is None else tuple(map(str, result.problems)),
        somaxconn=_somaxconn(pid),
        backlogs=tuple(_backlogs(status, settings)),
        drops=tuple((one["address"], one["drops"] or 0) for one in status.get("listeners", ())),
        connections=_connections(settings, status.get("wanted") or settings.workers or 1),
        nofile=_nofile(workers, settings),
        most_clients=max((one["clients"] for one in workers), default=0),
        stop_delay=0.0 if result is None else settings.stop_delay,
        drain_timeout=None if result is None else settings.drain_timeout,
        boot_timeout=status.get("boot_timeout", settings.boot_timeout),
        run_directory=directory,
        cleaning=cleaning_of(directory, tmpfiles_rules()) if os.path.exists("/run/systemd/system") else "",
        lingers=_lingers(directory, owner),
        free_bytes=tuple(_room([directory, *([Path(log).parent] if log else [])])),
        unit=_unit(pid, name),
        log=log,
        log_moved=log is not None and pid is not None and _is_moved(pid, Path(log)),
        rotations=tuple(_rotations()),
        certificates=tuple(_certificates(status, settings)),
        swapped=swapped,
        resident=resident,
        worker_user=_user_name(uid),
        unreadable=tuple(_unreadable(settings.python_path, uid, gid, groups)),
    )


def _backlogs(status: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, int]]:
    """Of each listener for connections its address and backlog: those that run, else those of the settings."""
    listeners = status.get("listeners") or [
        {"address": str(one.address), "backlog": one.backlog} for one in settings.listen
    ]
    for one in listeners:
        if not one["address"].startswith(("udp:", "unix-dgram:", "fd:")):
            yield one["address"], one["backlog"]


def _connections(settings: Settings, workers: int) -> int:
    """Connections that one worker may have by the limits, at least."""
    limits = [one.limits for one in settings.listen]
    return sum(one.per_worker or -(-one.connections // workers) for one in limits)


def _nofile(workers: Iterable[Mapping[str, Any]], settings: Settings) -> int | None:
    """Descriptors that a worker may have: one that runs, else one that would be started from here."""
    for one in workers:
        for line in _read(f"/proc/{one['pid']}/limits").splitlines():
            if line.startswith("Max open files"):
                words = line.split()
                return int(words[3]) if words[3].isdecimal() else None
    wanted, hard = settings.rlimits.nofile, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    there = hard if wanted is None else wanted
    return there if there >= 0 else None


def _log_of(status: Mapping[str, Any], settings: Settings, *, known: bool) -> str | None:
    """The file that the daemon logs to; None where it logs elsewhere, or that is not known."""
    told = status.get("log")
    if told is None and known:
        told = log_target(settings, detached=not status.get("foreground", False))
    text = str(told or "")
    return text if text.startswith("/") else None


def _certificates(status: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, float]]:
    """The certificates that are served, else those in the settings that this user can read."""
    if status:
        for listener in status.get("listeners", ()):
            yield from ((one["file"], one["expires"]) for one in listener.get("certificates", ()))
        return
    files = [one.tls.cert for one in settings.listen] + [name.cert for one in settings.listen for name in one.tls.names]
    if any(files):
        from forkd.serve.stream.tls import describe  # noqa: PLC0415 (it brings in OpenSSL)

        for file in files:
            with contextlib.suppress(OSError, ValueError):  # `forkd check` tells what is wrong with it
                if file is not None:
                    yield str(file), describe(file, file)["expires"]


# Files and directories


def _room(directories: Iterable[Path]) -> Iterator[tuple[str, int]]:
    """How much room there is in directories, of each disk once."""
    seen = set()
    for one in directories:
        with contextlib.suppress(OSError):
            device = one.stat().st_dev
            if device not in seen:
                seen.add(device)
                found = os.statvfs(one)
                yield str(one), found.f_bavail * found.f_frsize


def _is_moved(pid: int, log: Path) -> bool:
    """Whether a master has another file open for its log than the path leads to by now."""
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
        now = log.stat()
    except (PermissionError, ProcessLookupError):
        return False
    except FileNotFoundError:
        return os.path.exists(f"/proc/{pid}")
    for number in numbers:
        with contextlib.suppress(OSError):  # closed since
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{number}"), now):
                return False
    return True


def tmpfiles_rules() -> list[tuple[str, str, str]]:
    """The rules by which systemd removes old files: type, path and age (tmpfiles.d(5))."""
    files: dict[str, Path] = {}
    for directory in map(Path, _TMPFILES):
        with contextlib.suppress(OSError):
            for path in directory.glob("*.conf"):
                files.setdefault(path.name, path)
    lines = [line.split() for name in sorted(files) for line in _read(files[name]).splitlines()]
    return [(words[0], words[1], words[5] if len(words) > 5 else "-") for words in lines if len(words) > 1]


def cleaning_of(path: Path, rules: Iterable[tuple[str, str, str]]) -> str:
    """What removes old files below a path, in words; empty where nothing does.

    Args:
        path: of a directory.
        rules: of systemd, as `tmpfiles_rules` has them.
    """
    found = ""
    for kind, where, old in rules:
        if any(is_matched(one, where) for one in (path, *path.parents)):
            if kind[:1] in "xX":
                return ""
            if kind[:1] in "dDqQvVe" and old != "-":
                found = f"systemd-tmpfiles removes what is older than {old} from {where}"
    return found


def is_matched(path: str | PurePath, pattern: str) -> bool:
    """Whether a path is one of a glob pattern, whose wildcards stand for no slash."""
    names, parts = PurePath(path).parts, PurePath(pattern).parts
    return len(names) == len(parts) and all(map(fnmatchcase, names, parts))


def _lingers(path: Path, uid: int) -> bool | None:
    if not str(path).startswith(f"/run/user/{uid}/"):
        return None
    return uid == 0 or os.path.exists(f"/var/lib/systemd/linger/{_user_name(uid)}")


def _rotations() -> Iterator[tuple[str, tuple[str, ...], str]]:
    main, more = map(Path, _LOGROTATE)
    with contextlib.suppress(OSError):
        for file in (main, *sorted(more.iterdir())):
            yield from ((str(file), *one) for one in logrotate_rules(_read(file)))


def logrotate_rules(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The rules in a file of logrotate(8): the paths of each, and its text."""
    plain = re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    for paths, body in re.findall(r"^((?:\s*[\"'/][^\n{}]*\n?)+)\{(.*?)^\s*\}", plain, re.MULTILINE | re.DOTALL):
        yield tuple(one.strip("\"'") for one in paths.split()), body


def _unreadable(paths: Iterable[Path], uid: int, gid: int, groups: tuple[int, ...]) -> Iterator[str]:
    """Those of some directories that a user can't read. It is tried, where this process may become that user."""
    if uid != os.geteuid() and os.geteuid() != 0:
        return
    for path in paths:
        if os.path.isdir(path) and not _can_read(path, uid, gid, groups):
            yield str(path)


def _can_read(path: Path, uid: int, gid: int, groups: tuple[int, ...]) -> bool:
    if uid == os.geteuid():
        return os.access(path, os.R_OK | os.X_OK)
    command = ["/bin/sh", "-c", 'test -r "$0" && test -x "$0"', str(path)]
    try:
        done = subprocess.run(command, cwd="/", user=uid, group=gid, extra_groups=groups, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return True  # that it can't be tried says nothing
    return done.returncode == 0


# Processes


def _worker_identity(settings: Settings, workers: Iterable[Mapping[str, Any]]) -> tuple[int, int, tuple[int, ...]]:
    """User, group and further groups of the workers: of one that runs, else those of the settings."""
    for one in workers:
        found = {line.partition(":")[0]: line.split()[1:] for line in _read(f"/proc/{one['pid']}/status").splitlines()}
        if found.get("Uid") and found.get("Gid"):
            return int(found["Uid"][1]), int(found["Gid"][1]), tuple(map(int, found.get("Groups", ())))
    identity, _ = look_up_identity(settings)
    uid = os.geteuid() if identity.uid is None else identity.uid
    gid = os.getegid() if identity.gid is None else identity.gid
    return uid, gid, identity.groups or ()


def _pids(status: Mapping[str, Any]) -> list[int]:
    return [status["pid"], *(one["pid"] for one in status.get("workers", ()))] if status else []


def _memory(pid: int) -> tuple[int, int]:
    """Bytes of a process in swap and in use."""
    found = {words[0]: words[1] for line in _read(f"/proc/{pid}/status").splitlines() if len(words := line.split()) > 1}
    return int(found.get("VmSwap:", 0)) * 1024, int(found.get("VmRSS:", 0)) * 1024


def _somaxconn(pid: int | None) -> int | None:
    """The limit in the network namespace of a process; None where this user may not go there."""
    with contextlib.suppress(ForkdError), network_namespace_of(os.getpid() if pid is None else pid):
        return _number("/proc/sys/net/core/somaxconn")
    return None


def _is_synchronized() -> bool | None:
    """What the kernel says of its clock (adjtimex(2)); None where it does not."""
    with contextlib.suppress(AttributeError, OSError):
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE))
        return None if state < 0 else bool(state != _TIME_ERROR)
    return None


# systemd


def _unit(pid: int | None, name: str) -> Unit | None:
    """The unit whose main process the master is, or that would start it; None where there is none."""
    if shutil.which("systemctl") is None or not os.path.exists("/run/systemd/system"):
        return None
    group = "" if pid is None else _read(f"/proc/{pid}/cgroup")
    services = [f"forkd@{name}.service"] if pid is None else re.findall(r"/([^/\n]+\.service)", group)
    if not services:
        return None
    called, scope = services[-1], ["--user"] if "/user@" in group else []
    command = ["systemctl", *scope, "show", "--no-pager", f"--property={_PROPERTIES}", called]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_SYSTEMD_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_unit(called, told, pid)


def parse_unit(name: str, text: str, pid: int | None) -> Unit | None:
    """A unit of what `systemctl show` prints; None where it is not loaded, or runs another process than the master.

    Args:
        name: of the unit.
        text: what was printed.
        pid: of the master; None: it does not run.
    """
    found = dict(line.partition("=")[::2] for line in text.splitlines())
    if found.get("LoadState") != "loaded" or (pid is not None and found.get("MainPID") != str(pid)):
        return None
    # A unit of these types is started when its process is (systemd.service(5)): no boot is too long for it.
    started_at_once = found.get("Type") in ("simple", "exec", "idle")
    return Unit(
        name,
        takes_extensions=found.get("NotifyAccess", "none") != "none",
        start_seconds=None if started_at_once else parse_span(found.get("TimeoutStartUSec", "infinity")),
        stop_seconds=parse_span(found.get("TimeoutStopUSec", "infinity")),
        restarts=found.get("Restart", "no") != "no",
        restart_seconds=parse_span(found.get("RestartUSec", "0")) or 0.0,
        interval_seconds=parse_span(found.get("StartLimitIntervalUSec", "0")) or 0.0,
        burst=int(found.get("StartLimitBurst") or 0),
        kill_mode=found.get("KillMode", "mixed"),
    )


def parse_span(text: str) -> float | None:
    """Seconds of a duration as systemd writes it, such as `1min 30s`; None for infinity."""
    if text == "infinity":
        return None
    return sum(float(number) * _UNITS.get(unit, 1) for number, unit in re.findall(r"([\d.]+)\s*([a-z]*)", text))


# Small ones


def _read(path: str | Path) -> str:
    """What is in a file; nothing where it can't be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _number(path: str) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
