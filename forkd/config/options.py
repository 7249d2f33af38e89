"""Every setting, declared once: name, kind, default, one line of documentation and what a change of it needs.

A new setting is one new field here. The loader, the defaults, `--set`, `forkd check`, the reference page, the JSON
Schema and what a reload makes of a change all come from these classes; the fields' types are what the rest of the code
sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from forkd.config import units
from forkd.config.address import Address
from forkd.config.units import Kind

if TYPE_CHECKING:
    from forkd.config.units import Network

T = TypeVar("T")

BUILTIN_ECHO = "forkd.builtin:Echo"
DEFAULT_ADDRESS = "tcp://127.0.0.1:7007"

_KEY = "option"


class Needs(Enum):
    """What the change of a setting needs before it holds in a daemon that runs, the least first."""

    RELOAD = "reload"
    UPGRADE = "upgrade"
    RESTART = "restart"

    def __lt__(self, other: Needs) -> bool:
        order = list(Needs)
        return order.index(self) < order.index(other)


@dataclass(frozen=True, slots=True)
class ListOf:
    """A sequence of scalars, or of sections."""

    item: Kind[Any] | type


@dataclass(frozen=True, slots=True)
class Option:
    """What is declared of one setting.

    Attributes:
        kind: how its value is read: a scalar's `Kind`, a section's class, or a `ListOf` either.
        doc: one line for the reference page.
        required: whether the file must give it.
        needs: what a change of it needs; what is in a section or a sequence needs at least as much.
    """

    kind: Kind[Any] | ListOf | type
    doc: str
    required: bool = False
    needs: Needs = Needs.RELOAD


def _option(kind: Kind[Any] | ListOf, doc: str, default: Any = MISSING, *, needs: Needs = Needs.RELOAD) -> Any:
    metadata = {_KEY: Option(kind, doc, required=default is MISSING, needs=needs)}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _section(kind: type, doc: str, *, needs: Needs = Needs.RELOAD) -> Any:
    return field(default_factory=kind, metadata={_KEY: Option(kind, doc, needs=needs)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one listener allows."""

    write_buffer: int = _option(
        units.SIZE,
        "Unsent bytes that one connection may hold when its handler writes again; a client that reads so little is cut "
        "off. 0: no limit.",
        64 << 20,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """One address and the handler behind it."""

    address: Address = _option(
        units.ADDRESS, "Where to listen: tcp://HOST:PORT, unix:/path, unix:@name or fd:NAME (systemd's)."
    )
    handler: str = _option(
        units.HANDLER, "What serves each connection: an asyncio.Protocol class or factory, or a streams coroutine."
    )
    kind: str = _option(
        units.choice("auto", "protocol", "streams"),
        "The handler's form; auto tells a Protocol class, a factory and a coroutine function apart.",
        "auto",
    )
    backlog: int = _option(
        units.integer(1, 65535),
        "Connections that the kernel keeps waiting (listen(2)); net.core.somaxconn caps it.",
        4096,
    )
    mode: int | None = _option(units.MODE, "File mode of a unix socket's path.", None)
    owner: str | None = _option(units.TEXT, "Owner of a unix socket's path, a user's name or number.", None)
    group: str | None = _option(units.TEXT, "Group of a unix socket's path, a group's name or number.", None)
    limits: Limits = _section(Limits, "What this listener allows.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recycle:
    """When a worker has served long enough: at whichever of its limits comes first, another takes its place."""

    connections: int = _option(
        units.integer(0, 10**9), "Connections that a worker accepts before it is replaced. 0: never.", 0
    )
    age: float = _option(units.DURATION, "Time that a worker serves before it is replaced. 0: never.", 0.0)
    memory: int = _option(units.SIZE, "Resident memory at which a worker is replaced. 0: never.", 0)
    jitter: float = _option(
        units.PERCENT,
        "By which fraction, at most, each worker's limits are lowered at random, so that workers don't go together.",
        0.1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rlimits:
    """What the kernel lets one worker have (setrlimit(2)). Not given: what the daemon was started with."""

    nofile: int | None = _option(
        units.FILES_LIMIT,
        "Open descriptors, and so about as many connections. Default: as many as the hard limit that the daemon was "
        "started with; unlimited: as many as fs.nr_open.",
        None,
    )
    core: int | None = _option(
        units.SIZE_LIMIT,
        "Size of a core file. 0: none. More: also of workers that are another user than the daemon, which dump none "
        "otherwise.",
        None,
    )
    memlock: int | None = _option(units.SIZE_LIMIT, "Memory that may be locked.", None)
    address_space: int | None = _option(units.SIZE_LIMIT, "Virtual memory.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """What is written, how and where."""

    level: str = _option(units.choice("debug", "info", "warning", "error"), "The least severe records kept.", "info")
    format: str = _option(units.choice("text", "json"), "One line of text, or one JSON object, a record.", "text")
    to: Path | str | None = _option(
        units.LOG_TARGET,
        "A file, stderr, or journal (systemd's, with fields). What `forkd start` has detached writes to "
        "/var/log/forkd/NAME.log (for root) or $XDG_STATE_HOME/forkd/NAME.log where this says stderr.",
        None,
    )

    @property
    def form(self) -> str:
        """How records are written to where they go: `text`, `json` or `journal`."""
        return units.JOURNAL if self.to == units.JOURNAL else self.format


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """What single-connection mode wants to know."""

    timeout: float | None = _option(
        units.DURATION,
        "Time that the client has to come; then the exit status is 124. 0: as long as it takes, which is the default "
        "but for a rendezvous, which has 2m.",
        None,
    )
    from_: tuple[Network, ...] = _option(
        ListOf(units.NETWORK),
        "Networks that the client may come from; anybody else is turned away, and the wait goes on. Default: any.",
        [],
    )
    adopt: bool = _option(
        units.BOOLEAN, "Whether the connection takes over the descriptor number of the listener.", False
    )
    fd: int | None = _option(
        units.integer(0, 65535),
        "The descriptor number that the connection gets, for programs that want it there.",
        None,
    )
    rendezvous: Address | None = _option(
        units.PEER,
        "The other end of a TCP simultaneous open: both ends connect to each other, each from where it listens "
        "otherwise, and there is no server.",
        None,
    )
    pid_file: Path | None = _option(units.PATH, "A file with the process's number, while it is ready and serves.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One daemon."""

    name: str = _option(
        units.NAME,
        "The daemon's name, in process titles and paths. Default: the file's name.",
        "echo",
        needs=Needs.RESTART,
    )
    mode: str = _option(
        units.choice("pool", "once"),
        "A pool of workers for all who come, or one process that serves one client (`forkd once`) and ends.",
        "pool",
        needs=Needs.RESTART,
    )
    workers: int | None = _option(units.WORKERS, "Worker processes; auto is one for each processor it may use.", None)
    listen: tuple[Listener, ...] = _option(ListOf(Listener), "The listeners, each with its own handler.")
    python_path: tuple[Path, ...] = _option(
        ListOf(units.PATH), "Directories that handlers are imported from, first. Default: the working directory.", []
    )
    preload: bool = _option(
        units.BOOLEAN,
        "Import the handlers in the master before it forks, so that workers share their memory; their code then "
        "changes by an upgrade only.",
        False,
        needs=Needs.UPGRADE,
    )
    working_directory: Path | None = _option(
        units.PATH,
        "The daemon's current directory. Default: the one that it is started in.",
        None,
        needs=Needs.RESTART,
    )
    run_directory: Path | None = _option(
        units.PATH,
        "Where the pid file and the control socket are. Default: /run/forkd/NAME for root, else "
        "$XDG_RUNTIME_DIR/forkd/NAME, else a private directory under the temporary one.",
        None,
        needs=Needs.RESTART,
    )
    user: str | None = _option(
        units.ACCOUNT,
        "Who the workers are, a name or a number; the master stays who it is. Default: the daemon's own user.",
        None,
    )
    group: str | None = _option(
        units.ACCOUNT, "The workers' group, a name or a number. Default: the user's primary group.", None
    )
    groups: tuple[str, ...] = _option(
        ListOf(units.ACCOUNT),
        "Supplementary groups of the workers, names or numbers. Default: none, where `user` or `group` is given.",
        [],
    )
    umask: int | None = _option(
        units.MODE, "The workers' umask: permissions that new files don't have. Default: the daemon's own.", None
    )
    chroot: Path | None = _option(
        units.PATH,
        "A directory that is the root directory of the workers. Handlers and Python's own modules are imported inside "
        "it, unless `preload` has brought them in.",
        None,
    )
    no_new_privs: bool | None = _option(
        units.BOOLEAN,
        "Keep programs that workers start from gaining privileges by set-user-ID bits or file capabilities. Default: "
        "true where `user` is given, else false.",
        None,
    )
    rlimits: Rlimits = _section(Rlimits, "What the kernel lets one worker have.")
    boot_timeout: float = _option(
        units.DURATION, "Time that a worker has to import its handlers and report ready.", 60.0
    )
    stall_timeout: float = _option(
        units.DURATION,
        "Time that a worker's loop may stand still before its stacks are logged and it is killed. 0: never.",
        30.0,
    )
    drain_timeout: float = _option(
        units.DURATION,
        "Time that open connections have to end after a stop, a reload or a recycling; then they are closed.",
        30.0,
    )
    recycle: Recycle = _section(Recycle, "When a worker is replaced by a fresh one.")
    once: Once = _section(Once, "Of single-connection mode, where `mode` is once.")
    log: Log = _section(Log, "The log.")


def options(section: type) -> dict[str, Option]:
    """The settings of a section: name to declaration, in the order of declaration."""
    return {_name(f): f.metadata[_KEY] for f in fields(section)}


def _name(declared: Field[Any]) -> str:
    """A setting's name: the field's, which has an underscore at its end where Python has reserved the word."""
    return declared.name.removesuffix("_")


def value_of(section: Any, name: str) -> Any:
    """The value that a section, an instance of its class, has for a setting."""
    return getattr(section, next(f.name for f in fields(section) if _name(f) == name))


def made_of(section: Callable[..., T], values: Mapping[str, Any]) -> T:
    """A section, by its class, made of its settings' values by name; those that are missing have their default."""
    return section(**{f.name: values[_name(f)] for f in fields(section) if _name(f) in values})  # type: ignore[arg-type]


def default_of(section: type, name: str) -> Any:
    """The default of a section's setting; raises KeyError where it has none."""
    known: Mapping[str, Field[Any]] = {_name(f): f for f in fields(section)}
    declared = known[name]
    if declared.default_factory is not MISSING:
        factory: Callable[[], Any] = declared.default_factory
        return factory()
    if declared.default is MISSING:
        raise KeyError(name)
    return declared.default
