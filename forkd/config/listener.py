"""The settings of one listener: its address and handler, and what its connections may do. Declared as all are; see
`options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forkd.config import units
from forkd.config.address import Address
from forkd.config.declare import ListOf, option, section

if TYPE_CHECKING:
    from forkd.config.scales import Rate
    from forkd.config.units import Network

_INT_MAX = (1 << 31) - 1  # of what setsockopt(2) takes
_LONGEST_KEEPALIVE = 32767.0  # seconds: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL of net/tcp.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Deadlines of one listener's connections."""

    first_byte: float = option(
        units.DEADLINE,
        "Time that a client has to say something, from when it came or was last told something. off or 0: as long as "
        "it likes.",
        60.0,
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
