"""Every setting, declared once: name, kind, default, one line of documentation and what a change of it needs.

A new setting is one new field here. The loader, the defaults, `--set`, `forkd check`, the reference page, the JSON
Schema and what a reload makes of a change all come from these classes; the fields' types are what the rest of the code
sees. Those of a listener are in `listener`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forkd.config import units
from forkd.config.address import Address
from forkd.config.declare import ListOf, Needs, option, section
from forkd.config.listener import Listener

if TYPE_CHECKING:
    from forkd.config.units import Network

BUILTIN_ECHO = "forkd.builtin:Echo"
BUILTIN_DATAGRAM_ECHO = "forkd.builtin:DatagramEcho"
DEFAULT_ADDRESS = "tcp://127.0.0.1:7007"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recycle:
    """When a worker has served long enough: at whichever of its limits comes first, another takes its place."""

    connections: int = option(
        units.integer(0, 10**9), "Connections that a worker accepts before it is replaced. 0: never.", 0
    )
    age: float = option(units.DURATION, "Time that a worker serves before it is replaced. 0: never.", 0.0)
    memory: int = option(units.SIZE, "Resident memory at which a worker is replaced. 0: never.", 0)
    jitter: float = option(
        units.PERCENT,
        "By which fraction, at most, each worker's limits are lowered at random, so that workers don't go together.",
        0.1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rlimits:
    """What the kernel lets one worker have (setrlimit(2)). Not given: what the daemon was started with."""

    nofile: int | None = option(
        units.FILES_LIMIT,
        "Open descriptors, and so about as many connections. Default: as many as the hard limit that the daemon was "
        "started with; unlimited: as many as fs.nr_open.",
        None,
    )
    core: int | None = option(
        units.SIZE_LIMIT,
        "Size of a core file. 0: none. More: also of workers that are another user than the daemon, which dump none "
        "otherwise.",
        None,
    )
    memlock: int | None = option(units.SIZE_LIMIT, "Memory that may be locked.", None)
    address_space: int | None = option(units.SIZE_LIMIT, "Virtual memory.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What is written, how and where."""

    level: str = option(units.choice("debug", "info", "warning", "error"), "The least severe records kept.", "info")
    format: str = option(units.choice("text", "json"), "One line of text, or one JSON object, a record.", "text")
    to: Path | str | None = option(
        units.LOG_TARGET,
        "A file, stderr, or journal (systemd's, with fields). What `forkd start` has detached writes to "
        "/var/log/forkd/NAME.log (for root) or $XDG_STATE_HOME/forkd/NAME.log where this says stderr.",
        None,
    )
    access: bool = option(units.BOOLEAN, "A record of each connection, at its end.", False)

    @property
    def form(self) -> str:
        """How records are written to where they go: `text`, `json` or `journal`."""
        return units.JOURNAL if self.to == units.JOURNAL else self.format


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """What single-connection mode wants to know."""

    timeout: float | None = option(
        units.DURATION,
        "Time that the client has to come; then the exit status is 124. 0: as long as it takes, which is the default "
        "but for a rendezvous, which has 2m.",
        None,
    )
    from_: tuple[Network, ...] = option(
        ListOf(units.NETWORK),
        "Networks that the client may come from; anybody else is turned away, and the wait goes on. Default: any.",
        [],
    )
    adopt: bool = option(
        units.BOOLEAN, "Whether the connection takes over the descriptor number of the listener.", False
    )
    fd: int | None = option(
        units.integer(0, 65535),
        "The descriptor number that the connection gets, for programs that want it there.",
        None,
    )
    rendezvous: Address | None = option(
        units.PEER,
        "The other end of a TCP simultaneous open: both ends connect to each other, each from where it listens "
        "otherwise, and there is no server.",
        None,
    )
    pid_file: Path | None = option(units.PATH, "A file with the process's number, while it is ready and serves.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One daemon."""

    name: str = option(
        units.NAME,
        "The daemon's name, in process titles and paths. Default: the file's name.",
        "echo",
        needs=Needs.RESTART,
    )
    mode: str = option(
        units.choice("pool", "once"),
        "A pool of workers for all who come, or one process that serves one client (`forkd once`) and ends.",
        "pool",
        needs=Needs.RESTART,
    )
    workers: int | None = option(units.WORKERS, "Worker processes; auto is one for each processor it may use.", None)
    listen: tuple[Listener, ...] = option(ListOf(Listener), "The listeners, each with its own handler.")
    python_path: tuple[Path, ...] = option(
        ListOf(units.PATH), "Directories that handlers are imported from, first. Default: the working directory.", []
    )
    preload: bool = option(
        units.BOOLEAN,
        "Import the handlers in the master before it forks, so that workers share their memory; their code then "
        "changes by an upgrade only.",
        False,
        needs=Needs.UPGRADE,
    )
    working_directory: Path | None = option(
        units.PATH,
        "The daemon's current directory. Default: the one that it is started in.",
        None,
        needs=Needs.RESTART,
    )
    run_directory: Path | None = option(
        units.PATH,
        "Where the pid file and the control socket are. Default: /run/forkd/NAME for root, else "
        "$XDG_RUNTIME_DIR/forkd/NAME, else a private directory under the temporary one.",
        None,
        needs=Needs.RESTART,
    )
    user: str | None = option(
        units.ACCOUNT,
        "Who the workers are, a name or a number; the master stays who it is. Default: the daemon's own user.",
        None,
    )
    group: str | None = option(
        units.ACCOUNT, "The workers' group, a name or a number. Default: the user's primary group.", None
    )
    groups: tuple[str, ...] = option(
        ListOf(units.ACCOUNT),
        "Supplementary groups of the workers, names or numbers. Default: none, where `user` or `group` is given.",
        [],
    )
    umask: int | None = option(
        units.MODE, "The workers' umask: permissions that new files don't have. Default: the daemon's own.", None
    )
    chroot: Path | None = option(
        units.PATH,
        "A directory that is the root directory of the workers. Handlers and Python's own modules are imported inside "
        "it, unless `preload` has brought them in.",
        None,
    )
    no_new_privs: bool | None = option(
        units.BOOLEAN,
        "Keep programs that workers start from gaining privileges by set-user-ID bits or file capabilities. Default: "
        "true where `user` is given, else false.",
        None,
    )
    rlimits: Rlimits = section(Rlimits, "What the kernel lets one worker have.")
    boot_timeout: float = option(
        units.DURATION, "Time that a worker has to import its handlers and report ready.", 60.0
    )
    stall_timeout: float = option(
        units.DURATION,
        "Time that a worker's loop may stand still before its stacks are logged and it is killed. 0: never.",
        30.0,
    )
    drain_timeout: float = option(
        units.DURATION,
        "Time that open connections have to end after a stop, a reload or a recycling; then they are closed.",
        30.0,
    )
    recycle: Recycle = section(Recycle, "When a worker is replaced by a fresh one.")
    once: Once = section(Once, "Of single-connection mode, where `mode` is once.")
    log: Log = section(Log, "The log.")
