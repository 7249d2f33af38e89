"""Every setting, declared once: name, kind, default, one line of documentation and what a change of it needs.

A new setting is one new field here, or in `listener` for one of a listener. The loader, the defaults, `--set`, `forkd
check`, the reference page, the JSON Schema and what a reload makes of a change all come from these classes; the fields'
types are what the rest of the code sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from forkd import MOST_WORKERS
from forkd.config import values
from forkd.config.address import Address
from forkd.config.fields import ListOf, Needs, option, section
from forkd.config.listener import Listener

if TYPE_CHECKING:
    from forkd.config.values import Network

BUILTIN_ECHO = "forkd.builtin:Echo"
BUILTIN_DATAGRAM_ECHO = "forkd.builtin:DatagramEcho"
DEFAULT_ADDRESS = "tcp://127.0.0.1:7007"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recycle:
    """When a worker has served long enough: at whichever of its limits comes first, another takes its place."""

    connections: int = option(
        values.integer(0, 10**9), "Connections that a worker accepts before it is replaced. 0: never.", 0
    )
    age: float = option(
        values.at_least(values.DURATION, 1.0, or_zero=True),
        "Time that a worker serves before it is replaced, from 1s on. 0: never.",
        0.0,
    )
    memory: int = option(values.SIZE, "Resident memory at which a worker is replaced. 0: never.", 0)
    jitter: float = option(
        values.PERCENT,
        "By which fraction, at most, each worker's limits are lowered at random, so that workers don't go together.",
        0.1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rlimits:
    """What the kernel lets one worker have (setrlimit(2)). Not given: what the daemon was started with."""

    nofile: int | None = option(
        values.FILES_LIMIT,
        "Open descriptors, and so about as many connections. Default: as many as the hard limit that the daemon was "
        "started with; unlimited: as many as fs.nr_open.",
        None,
    )
    core: int | None = option(
        values.SIZE_LIMIT,
        "Size of a core file. 0: none. More: also of workers that are another user than the daemon, which dump none "
        "otherwise.",
        None,
    )
    memlock: int | None = option(values.SIZE_LIMIT, "Memory that may be locked.", None)
    address_space: int | None = option(values.SIZE_LIMIT, "Virtual memory.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What is written, how and where."""

    level: str = option(values.choice("debug", "info", "warning", "error"), "The least severe records kept.", "info")
    format: str = option(values.choice("text", "json"), "One line of text, or one JSON object, a record.", "text")
    to: Path | str | None = option(
        values.LOG_TARGET,
        "A file, stderr, or journal (systemd's, with fields). What `forkd start` has detached writes to "
        "/var/log/forkd/NAME.log (for root) or $XDG_STATE_HOME/forkd/NAME.log where this says stderr.",
        None,
    )
    access: bool = option(values.BOOLEAN, "A record of each connection, at its end.", False)

    @property
    def form(self) -> str:
        """How records are written to where they go: `text`, `json` or `journal`."""
        return values.JOURNAL if self.to == values.JOURNAL else self.format


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """The settings of single-connection mode."""

    timeout: float | None = option(
        values.DURATION,
        "Time that the client has to come; then the exit status is 124. 0: as long as it takes, which is the default "
        "but for a rendezvous, which has 2m.",
        None,
    )
    from_: tuple[Network, ...] = option(
        ListOf(values.NETWORK),
        "Networks that the client may come from; one from elsewhere is refused, and the wait goes on. Default: any.",
        [],
    )
    adopt: bool = option(
        values.BOOLEAN, "Whether the connection takes over the descriptor number of the listener.", False
    )
    fd: int | None = option(
        values.integer(0, 65535),
        "The descriptor number that the connection gets, for programs that want it there.",
        None,
    )
    rendezvous: Address | None = option(
        values.PEER,
        "The other end of a TCP simultaneous open: both ends connect to each other, each from where it listens "
        "otherwise, and there is no server.",
        None,
    )
    pid_file: Path | None = option(values.PATH, "A file with the process's number, while it is ready and serves.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admin:
    """Where the master itself tells of the daemon, by HTTP: health, metrics, state. Nothing can be changed there."""

    address: tuple[Address, ...] = option(
        ListOf(values.OWN_ADDRESS, or_one=True),
        "Where: tcp://HOST:PORT, unix:/path, or a port alone, which is one of 127.0.0.1. Default: nowhere. It needs "
        "h11 and prometheus_client: pip install 'forkd-server[admin]'.",
        [],
    )
    allow: tuple[Network, ...] = option(
        ListOf(values.NETWORK), "Networks that may ask; others get status 403. Default: any.", []
    )
    mode: int | None = option(
        values.MODE,
        "File mode of a unix socket's path. Default: 0600, or 0660 with the group of `control_group` where there is "
        "one.",
        None,
    )
    ready_workers: int = option(
        values.integer(1, MOST_WORKERS),
        "Workers that have to serve for the daemon to be ready; where fewer are wanted, all of them.",
        1,
    )


#: What the master does at an address of its own, in the place of a handler.
ADMIN, AGENT = "admin", "agent"


class Service(NamedTuple):
    """An address at which the master itself answers.

    Attributes:
        keys: of its setting.
        listener: where it listens; `ADMIN` or `AGENT` in the place of a handler.
    """

    keys: tuple[str | int, ...]
    listener: Listener


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One daemon."""

    name: str = option(
        values.NAME,
        "The daemon's name, in process titles and paths. Default: the file's name.",
        "echo",
        needs=Needs.RESTART,
    )
    mode: str = option(
        values.choice("pool", "once"),
        "A pool of workers for any number of clients, or one process that serves one client (`forkd once`) and ends.",
        "pool",
        needs=Needs.RESTART,
    )
    workers: int | None = option(
        values.WORKERS,
        "Worker processes; auto is one for each processor it may use, or as many as its control groups have the time "
        "of, rounded up, where that is less.",
        None,
    )
    listen: tuple[Listener, ...] = option(ListOf(Listener), "The listeners, each with its own handler.")
    setup: str | None = option(
        values.HANDLER,
        "What is called in each worker, inside its running loop, before those of the listeners and before it takes "
        "clients: a function or coroutine function without arguments. If it fails, the worker has not booted.",
        None,
    )
    teardown: str | None = option(
        values.HANDLER,
        "What is called in each worker after its last client, and after the teardowns of the listeners; it has what is "
        "left of `drain_timeout`.",
        None,
    )
    python_path: tuple[Path, ...] = option(
        ListOf(values.PATH), "Directories that handlers are imported from, first. Default: the working directory.", []
    )
    preload: bool = option(
        values.BOOLEAN,
        "Import the handlers in the master before it forks, so that workers share their memory; their code then "
        "changes by an upgrade only.",
        False,
        needs=Needs.UPGRADE,
    )
    working_directory: Path | None = option(
        values.PATH,
        "The daemon's current directory. Default: the one that it is started in. Each generation of workers enters it "
        "again, by its path.",
        None,
        needs=Needs.RESTART,
    )
    run_directory: Path | None = option(
        values.PATH,
        "Where the pid file and the control socket are. Default: /run/forkd/NAME for root, else "
        "$XDG_RUNTIME_DIR/forkd/NAME, else a private directory under the temporary one.",
        None,
        needs=Needs.RESTART,
    )
    user: str | None = option(
        values.ACCOUNT,
        "The workers' user, a name or a number; the master keeps its own. Default: the daemon's own user.",
        None,
    )
    group: str | None = option(
        values.ACCOUNT, "The workers' group, a name or a number. Default: the user's primary group.", None
    )
    groups: tuple[str, ...] = option(
        ListOf(values.ACCOUNT),
        "Supplementary groups of the workers, names or numbers. Default: none, where `user` or `group` is given.",
        [],
    )
    umask: int | None = option(
        values.MODE,
        "The workers' umask: permissions that new files don't have. Default: the daemon's own, which is 0027 with "
        "`start`, and with `run` that of what starts it.",
        None,
    )
    chroot: Path | None = option(
        values.PATH,
        "A directory that is the root directory of the workers. Handlers and Python's own modules are imported inside "
        "it, unless `preload` has brought them in.",
        None,
    )
    no_new_privs: bool | None = option(
        values.BOOLEAN,
        "Keep programs that workers start from gaining privileges by set-user-ID bits or file capabilities. Default: "
        "true where `user` is given, else false.",
        None,
    )
    rlimits: Rlimits = section(Rlimits, "What the kernel lets one worker have.")
    boot_timeout: float = option(
        values.at_least(values.DURATION, 0.1),
        "Time that a worker has to import its handlers, call each `setup` and report ready, from 100ms on.",
        60.0,
    )
    stall_timeout: float = option(
        values.at_least(values.DURATION, 0.1, or_zero=True),
        "Time that a worker's loop may stand still before its stacks are logged and it is killed, from 100ms on. 0: "
        "never.",
        30.0,
    )
    drain_timeout: float = option(
        values.DURATION,
        "Time that open connections have to end after a stop, a reload or a recycling; then they are closed. What is "
        "left of it each `teardown` may take.",
        30.0,
    )
    drain_spread: float = option(
        values.DURATION,
        "Time over which the calls of `shutdown()` are spread evenly when a worker drains, so that its clients do not "
        "come back all at once; as far as `drain_timeout` lasts.",
        0.0,
    )
    stop_delay: float = option(
        values.DURATION,
        "Time that a stop waits before the daemon drains. It serves on, new clients too, while `/ready` and the agent "
        "check say that it leaves, so that balancers learn of it first.",
        0.0,
    )
    give_up_after: int = option(
        values.FAILURES,
        "Failures in a row, of each worker and while none serves, after which a daemon that has served ends. Off: it "
        "goes on trying until it is told to stop. At the start the first failure ends it.",
        0,
    )
    orphans: str = option(
        values.choice("end", "leave"),
        "What becomes of processes that a handler has left running when its worker has ended: they are told to end, "
        "and killed 2 s later, or left alone. One that has a session of its own is always left.",
        "end",
    )
    admin: Admin = section(Admin, "Where the master tells of the daemon, by HTTP.")
    agent: Address | None = option(
        values.OWN_ADDRESS,
        "Where the master answers HAProxy's agent checks: up with a weight by free places, drain, or down with the "
        "reason. Default: nowhere.",
        None,
    )
    statsd: Address | None = option(
        values.STATSD,
        "Where metrics are sent to, in statsd's datagrams, every ten seconds. Default: nowhere.",
        None,
    )
    control_group: str | None = option(
        values.ACCOUNT,
        "A group, by name or number, whose members may use the control socket too, for all commands but restart. "
        "Default: only the daemon's own user and root.",
        None,
    )
    recycle: Recycle = section(Recycle, "When a worker is replaced by a fresh one.")
    once: Once = section(Once, "Of single-connection mode, where `mode` is once.")
    log: Log = section(Log, "The log.")

    @property
    def services(self) -> tuple[Service, ...]:
        """The addresses at which the master itself answers."""
        shared = self.admin.mode is None and self.control_group is not None
        mode = (0o660 if shared else 0o600) if self.admin.mode is None else self.admin.mode

        def at(address: Address, role: str) -> Listener:
            group = self.control_group if address.is_unix and not address.abstract else None
            return Listener(address=address, handler=role, backlog=128, mode=mode, group=group)

        found = [Service(("admin", "address", place), at(one, ADMIN)) for place, one in enumerate(self.admin.address)]
        return (*found, *([Service(("agent",), at(self.agent, AGENT))] if self.agent is not None else ()))

    @property
    def is_measured(self) -> bool:
        """Whether somebody asks for what workers need not count for themselves."""
        return bool(self.admin.address) or self.agent is not None or self.statsd is not None

    @property
    def service_listeners(self) -> tuple[Listener, ...]:
        """Their listeners alone."""
        return tuple(service.listener for service in self.services)
