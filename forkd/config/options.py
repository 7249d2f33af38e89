"""Every setting, declared once: name, kind, default, one line of documentation and what a change of it needs.

A new setting is one new field here. The loader, the defaults, `--set`, `forkd check`, the reference page, the JSON
Schema and what a reload makes of a change all come from these classes; the fields' types are what the rest of the code
sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forkd.config import units
from forkd.config.address import Address
from forkd.config.declare import ListOf, Needs, option, section

if TYPE_CHECKING:
    from forkd.config.scales import Rate
    from forkd.config.units import Network

BUILTIN_ECHO = "forkd.builtin:Echo"
BUILTIN_DATAGRAM_ECHO = "forkd.builtin:DatagramEcho"
DEFAULT_ADDRESS = "tcp://127.0.0.1:7007"

_INT_MAX = (1 << 31) - 1  # of what setsockopt(2) takes
_LONGEST_KEEPALIVE = 32767.0  # seconds: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL of net/tcp.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Deadlines of one listener's connections."""

    first_byte: float = option(
        units.DEADLINE, "Time that a client has to say something. off or 0: as long as it likes.", 60.0
    )
    idle: float = option(
        units.DEADLINE,
        "Time for which nothing has come and nothing gone, after the first byte. off or 0: never.",
        600.0,
    )
    write: float = option(
        units.DEADLINE,
        "Time for which a client has taken nothing of what waits to be sent to it, also of what is left when its "
        "connection is closed. off or 0: never.",
        60.0,
    )
    lifetime: float = option(units.DEADLINE, "Time from a connection's beginning to its end. off or 0: any.", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepalive:
    """How clients that have vanished without a word are found out."""

    idle: float = option(
        units.within(units.DEADLINE, 0.0, _LONGEST_KEEPALIVE),
        "Silence after which the kernel asks whether the client is there (tcp(7)), in whole seconds. off or 0: never.",
        60.0,
    )
    interval: float = option(
        units.within(units.DURATION, 0.001, _LONGEST_KEEPALIVE),
        "Time from one such question to the next, in whole seconds.",
        10.0,
    )
    count: int = option(
        units.integer(1, 127),
        "Unanswered questions after which the connection is dead; where there is a `user_timeout`, that decides.",
        6,
    )
    user_timeout: float | None = option(
        units.within(units.DEADLINE, 0.0, _INT_MAX / 1000),
        "Time for which what was sent may stay unacknowledged, keepalive's questions too, or the client's window shut, "
        "before the connection is dead (TCP_USER_TIMEOUT of tcp(7)). off or 0: the kernel's own patience. Default: as "
        "long as keepalive takes in all, which is 2m by default, or 2m where it asks nobody.",
        None,
    )
    heartbeat: float = option(
        units.DEADLINE,
        "Silence after which a protocol's heartbeat() is called, for it to ask its client; after twice that the "
        "connection is closed. off or 0: never.",
        0.0,
    )

    @property
    def questioning(self) -> float:
        """Seconds of silence after which the questions have found out who has vanished."""
        return self.idle + self.interval * self.count

    @property
    def patience(self) -> float:
        """Seconds of `user_timeout`, also where it is not given."""
        if self.user_timeout is not None:
            return self.user_timeout
        return min(self.questioning, _INT_MAX / 1000) if self.idle else 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """Options of one listener's connections, as the kernel has them (tcp(7), socket(7))."""

    nodelay: bool = option(units.BOOLEAN, "Send what is written at once, be it little (TCP_NODELAY).", True)
    quickack: bool = option(
        units.BOOLEAN, "Acknowledge at once what comes (TCP_QUICKACK), at the price of a system call a read.", False
    )
    busy_poll: float = option(
        units.within(units.DURATION, 0.0, _INT_MAX / 1e6),
        "Time for which a read looks for packets at the network device itself (SO_BUSY_POLL), as in 0.05ms. 0: the "
        "system's own.",
        0.0,
    )
    send_buffer: int = option(
        units.within(units.SIZE, 0, _INT_MAX),
        "Bytes that the kernel keeps for sending (SO_SNDBUF). 0: as many as it finds right.",
        0,
    )
    receive_buffer: int = option(
        units.within(units.SIZE, 0, _INT_MAX),
        "Bytes that the kernel keeps of what has come (SO_RCVBUF); a unix socket has no such thing. 0: as many as it "
        "finds right.",
        0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one listener allows."""

    connections: int = option(
        units.integer(0, 10**9), "Connections at a time, of all workers together. 0: no limit.", 0
    )
    per_worker: int = option(units.integer(0, 10**9), "Connections at a time, of each worker. 0: no limit.", 0)
    per_ip: int = option(
        units.integer(0, 10**9),
        "Connections at a time from one IPv4 address, or one IPv6 network of 64 bits, of all workers together; "
        "further ones are refused. 0: no limit.",
        0,
    )
    rate_per_ip: Rate | None = option(
        units.RATE,
        "New connections from one such address, at most, in any time of that length, as in 20/s, of all workers "
        "together; further ones are refused. Default: any.",
        None,
    )
    over: str = option(
        units.choice("wait", "refuse"),
        "What becomes of a client for whom there is no place by `connections` or `per_worker`: it waits in the "
        "backlog, or is refused.",
        "wait",
    )
    message: str | None = option(
        units.MESSAGE,
        "What a client that is refused is told first, with \\r, \\n, \\t, \\xHH and \\\\ in it. Default: nothing.",
        None,
    )
    write_buffer: int = option(
        units.SIZE,
        "Unsent bytes that one connection may hold when its handler writes again; a client that reads so little is cut "
        "off. 0: no limit. Of datagrams, as many as come to 4 MiB are kept at most, and further ones are dropped.",
        64 << 20,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """One address and the handler behind it."""

    address: Address = option(
        units.ADDRESS,
        "Where to listen: tcp://HOST:PORT, udp://HOST:PORT, unix:/path, unix:@name, unix-dgram: likewise, or fd:NAME "
        "(systemd's).",
    )
    handler: str = option(
        units.HANDLER,
        "What serves each connection: an asyncio.Protocol class or factory, or a streams coroutine; for datagrams an "
        "asyncio.DatagramProtocol class or factory, called once a worker.",
    )
    kind: str = option(
        units.choice("auto", "protocol", "streams", "datagram"),
        "The handler's form; auto tells a Protocol class, a DatagramProtocol class and a coroutine function apart, and "
        "takes a factory for what its address wants.",
        "auto",
    )
    multicast: tuple[str, ...] = option(
        ListOf(units.GROUP),
        "Multicast groups that a udp listener joins, each with %INTERFACE where one is meant; what comes to them is "
        "served by the first worker alone.",
        [],
    )
    backlog: int = option(
        units.integer(1, 65535),
        "Connections that the kernel keeps waiting (listen(2)); net.core.somaxconn caps it.",
        4096,
    )
    mode: int | None = option(units.MODE, "File mode of a unix socket's path.", None)
    owner: str | None = option(units.TEXT, "Owner of a unix socket's path, a user's name or number.", None)
    group: str | None = option(units.TEXT, "Group of a unix socket's path, a group's name or number.", None)
    timeouts: Timeouts = section(Timeouts, "Deadlines of its connections.")
    keepalive: Keepalive = section(Keepalive, "How clients that have vanished are found out.")
    socket: SocketOptions = section(SocketOptions, "Options of its connections.")
    limits: Limits = section(Limits, "What this listener allows.")
    allow: tuple[Network, ...] = option(
        ListOf(units.NETWORK), "Networks that clients may come from; others are refused. Default: any.", []
    )
    deny: tuple[Network, ...] = option(
        ListOf(units.NETWORK), "Networks whose clients are refused, also those in `allow`.", []
    )
    proxy_protocol: tuple[Network, ...] = option(
        ListOf(units.NETWORK),
        "Networks of the proxies before a udp listener, whose headers (PROXY protocol, version 2) tell the clients' "
        "addresses. Where there are some, datagrams of others are refused. Default: no proxy.",
        [],
    )


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
