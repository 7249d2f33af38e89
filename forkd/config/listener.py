"""The settings of one listener: its address and handler, and the deadlines, options and limits of its connections.

Each is declared once, by `fields`; `settings` has those of the whole daemon.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forkd.config import values
from forkd.config.address import Address
from forkd.config.fields import ListOf, MappingOf, default_of, option, section
from forkd.config.units import escape_controls

if TYPE_CHECKING:
    from forkd.config.units import Rate
    from forkd.config.values import Network

_INT_MAX = (1 << 31) - 1  # of what setsockopt(2) takes
_LONGEST_KEEPALIVE = 32767.0  # seconds: MAX_TCP_KEEPIDLE and MAX_TCP_KEEPINTVL of net/tcp.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Deadlines of one listener's connections."""

    first_byte: float = option(
        values.DEADLINE,
        "Time that a client has to send its first byte, counted from when it connected or was last sent something. "
        "off or 0: any.",
        60.0,
    )
    idle: float = option(
        values.DEADLINE,
        "Time without a byte in either direction, after the first byte. off or 0: any.",
        600.0,
    )
    write: float = option(
        values.DEADLINE,
        "Time for which a client has taken nothing of what waits to be sent to it, also of what is left when its "
        "connection is closed. off or 0: never.",
        60.0,
    )
    lifetime: float = option(values.DEADLINE, "Time from a connection's beginning to its end. off or 0: any.", 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Keepalive:
    """How clients that have vanished are noticed."""

    idle: float = option(
        values.within(values.DEADLINE, 0.0, _LONGEST_KEEPALIVE),
        "Silence after which the kernel asks whether the client is there (tcp(7)), in whole seconds. off or 0: never.",
        60.0,
    )
    interval: float = option(
        values.within(values.DURATION, 0.001, _LONGEST_KEEPALIVE),
        "Time from one such question to the next, in whole seconds.",
        10.0,
    )
    count: int = option(
        values.integer(1, 127),
        "Unanswered questions after which the connection is dead; where there is a `user_timeout`, that decides.",
        6,
    )
    user_timeout: float | None = option(
        values.within(values.DEADLINE, 0.0, _INT_MAX / 1000),
        "Time for which what was sent may stay unacknowledged, keepalive's questions too, or the client's window shut, "
        "before the connection is dead (TCP_USER_TIMEOUT of tcp(7)). off or 0: the kernel's own limit. Default: as "
        "long as keepalive takes in all, which is 2m by default, or 2m where keepalive is off.",
        None,
    )
    heartbeat: float = option(
        values.DEADLINE,
        "Silence after which a protocol's heartbeat() is called, for it to ask its client; after twice that the "
        "connection is closed. off or 0: never.",
        0.0,
    )

    @property
    def detection_time(self) -> float:
        """Seconds of silence after which a vanished client is noticed: idle, then every unanswered question."""
        return self.idle + self.interval * self.count

    @property
    def effective_user_timeout(self) -> float:
        """Seconds of `user_timeout`, also where it is not given."""
        if self.user_timeout is not None:
            return self.user_timeout
        return min(self.detection_time, _INT_MAX / 1000) if self.idle else 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketOptions:
    """Options of one listener's connections, as the kernel has them (tcp(7), socket(7))."""

    nodelay: bool = option(values.BOOLEAN, "Send what is written at once, be it little (TCP_NODELAY).", True)
    quickack: bool = option(
        values.BOOLEAN, "Acknowledge at once what comes (TCP_QUICKACK), at the price of a system call a read.", False
    )
    busy_poll: float = option(
        values.within(values.DURATION, 0.0, _INT_MAX / 1e6),
        "Time for which a read looks for packets at the network device itself (SO_BUSY_POLL), as in 0.05ms. 0: the "
        "system's own.",
        0.0,
    )
    send_buffer: int = option(
        values.within(values.SIZE, 0, _INT_MAX),
        "Bytes that the kernel keeps for sending (SO_SNDBUF). 0: as many as it finds right; for datagrams: 4 MiB.",
        0,
    )
    receive_buffer: int = option(
        values.within(values.SIZE, 0, _INT_MAX),
        "Bytes that the kernel keeps of what has come (SO_RCVBUF); a unix socket has no such thing. 0: as many as it "
        "finds right.",
        0,
    )
    linger: float = option(
        values.DEADLINE,
        "Time for which a connection that is closed before its client has sent its end throws away what the client "
        "still sends, at most 64 MiB: closed at once it would be reset, and the client might lose the last answer. off "
        "or 0: close at once.",
        2.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """Limits of one listener's connections and clients."""

    connections: int = option(
        values.integer(0, 10**9), "Connections at a time, of all workers together. 0: no limit.", 0
    )
    per_worker: int = option(values.integer(0, 10**9), "Connections at a time, of each worker. 0: no limit.", 0)
    per_ip: int = option(
        values.integer(0, 10**9),
        "Connections at a time from one IPv4 address, or one IPv6 network of 64 bits, of all workers together; "
        "further ones are refused. 0: no limit.",
        0,
    )
    rate_per_ip: Rate | None = option(
        values.RATE,
        "New connections from one such address, at most, in any time of that length, as in 20/s, of all workers "
        "together; further ones are refused. Default: any.",
        None,
    )
    over: str = option(
        values.choice("wait", "refuse"),
        "What happens to a client over the limit of `connections` or `per_worker`: it waits in the "
        "backlog, or is refused.",
        "wait",
    )
    message: str | None = option(
        values.MESSAGE,
        "What a refused client is sent first, with \\r, \\n, \\t, \\xHH and \\\\ in it. Default: nothing.",
        None,
    )
    write_buffer: int = option(
        values.SIZE,
        "Unsent bytes that one connection may hold when its handler writes again; a client that reads so little is cut "
        "off. 0: no limit. Of datagrams, as many as come to 4 MiB are kept at most, and further ones are dropped.",
        64 << 20,
    )

    def most(self, workers: int) -> float:
        """Connections that so many workers may have at a time; inf where there is no limit."""
        return min(self.connections or inf, self.per_worker * workers or inf)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsName:
    """A certificate for some host names."""

    cert: Path = option(values.PATH, "The certificate's file, in PEM, with those that lead to its authority.")
    key: Path | None = option(values.PATH, "Its key's file, in PEM. Default: it is in the certificate's file.", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """TLS of one listener's connections."""

    cert: Path | None = option(
        values.PATH,
        "The certificate's file, in PEM, with those that lead to its authority. It is read by root, where the daemon "
        "was started by root. Default: no TLS.",
        None,
    )
    key: Path | None = option(values.PATH, "Its key's file, in PEM. Default: it is in the certificate's file.", None)
    names: tuple[TlsName, ...] = option(
        ListOf(TlsName),
        "Further certificates, for clients that ask for a host name that one of these is for, wildcards too.",
        [],
    )
    client: str = option(
        values.choice("none", "optional", "required"), "Whether a client has to show a certificate, or may.", "none"
    )
    client_ca: Path | None = option(
        values.PATH, "The authorities of clients' certificates, in PEM; has to be there unless `client` is none.", None
    )
    alpn: tuple[str, ...] = option(
        ListOf(values.TEXT), "Protocols that are offered by ALPN, the preferred one first. Default: none.", []
    )
    min_version: str = option(values.choice("1.2", "1.3"), "The oldest version of TLS that is spoken.", "1.2")
    ciphers: str | None = option(
        values.TEXT,
        "Ciphers of TLS 1.2, as OpenSSL writes them (openssl-ciphers(1)). Default: Python's own choice.",
        None,
    )
    handshake: float = option(
        values.within(values.DURATION, 0.1, 3600.0),
        "Time from a connection's beginning to the end of its handshake.",
        10.0,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """One address and the handler behind it."""

    address: Address = option(
        values.ADDRESS,
        "Where to listen: tcp://HOST:PORT, udp://HOST:PORT, unix:/path, unix:@name, unix-dgram: likewise, or fd:NAME "
        "(systemd's).",
    )
    handler: str | None = option(
        values.HANDLER,
        "What serves each connection: an asyncio.Protocol class or factory, a streams coroutine, a request handler "
        "class of socketserver, a function of (sock, address), or a whole server that is started with the listening "
        "sockets; for datagrams an asyncio.DatagramProtocol class or factory, called once a worker.",
        None,
        unless="command",
    )
    command: tuple[str, ...] = option(
        ListOf(values.PROGRAM_TEXT),
        "In the place of a handler: a program and its arguments, started for each connection, which is its standard "
        "input and output. What it writes to standard error goes to the log.",
        [],
    )
    directory: Path | None = option(values.PATH, "The programs' current directory. Default: the workers' own.", None)
    environment: Mapping[str, str] = option(
        MappingOf(values.PROGRAM_TEXT, values.ARGUMENT_NAME, "mapping of texts"),
        "Variables that the programs have beside those that the daemon has, and those about their client.",
        {},
    )
    kind: str = option(
        values.choice("auto", "protocol", "streams", "socketserver", "function", "datagram", "server", "program"),
        "The handler's form; auto tells classes of Protocol, DatagramProtocol and socketserver's BaseRequestHandler, "
        "coroutine functions of (reader, writer), functions of (sock, address), and functions of (sockets) and objects "
        "or classes with such a method, which are servers, apart, and takes a function without arguments for a factory "
        "of what its address wants.",
        "auto",
    )
    args: Mapping[str, Any] = option(
        MappingOf(values.ARGUMENT, values.ARGUMENT_NAME, "mapping of arguments"),
        "Arguments by name, with which the handler is called for each connection, or the factory once: numbers, true, "
        "false, null, texts, lists of those. A text of the form module:attribute stands for what is there; with a \\ "
        "before it, it is a text.",
        {},
    )
    factory: bool = option(
        values.BOOLEAN,
        "Whether the handler is a factory of handlers: called with `args` once in each worker, inside its running "
        "loop, it returns what serves each connection, of any form that a handler may have.",
        False,
    )
    setup: str | None = option(
        values.HANDLER,
        "What is called in each worker, inside its running loop, before the handler's factory and before it takes "
        "clients: a function or coroutine function without arguments. If it fails, the worker has not booted.",
        None,
    )
    teardown: str | None = option(
        values.HANDLER,
        "What is called in each worker after its last client, if `setup` was done; it has what is left of "
        "`drain_timeout`.",
        None,
    )
    wait: bool = option(
        values.BOOLEAN,
        "Whether the command gets the listening or datagram socket itself, as inetd's wait has it: one program at a "
        "time, started by the first worker when something comes to the socket, and again after it has ended.",
        False,
    )
    threads: int = option(
        values.integer(1, 10_000),
        "Threads of each worker, for a socketserver handler or a function of (sock, address): each serves a client. A "
        "worker whose threads are all busy takes no client.",
        8,
    )
    multicast: tuple[str, ...] = option(
        ListOf(values.GROUP),
        "Multicast groups that a udp listener joins, each with %INTERFACE where one is meant; what comes to them is "
        "served by the first worker alone.",
        [],
    )
    backlog: int = option(
        values.integer(1, 65535),
        "Connections that the kernel keeps waiting (listen(2)); net.core.somaxconn caps it.",
        4096,
    )
    freebind: bool = option(
        values.BOOLEAN,
        "Listen on an address that the machine does not have yet, as one that comes late at boot or moves from machine "
        "to machine (IP_FREEBIND of ip(7)).",
        False,
    )
    mode: int | None = option(values.MODE, "File mode of a unix socket's path.", None)
    owner: str | None = option(values.TEXT, "Owner of a unix socket's path, a user's name or number.", None)
    group: str | None = option(values.TEXT, "Group of a unix socket's path, a group's name or number.", None)
    timeouts: Timeouts = section(Timeouts, "Deadlines of its connections.")
    keepalive: Keepalive = section(Keepalive, "How clients that have vanished are noticed.")
    socket: SocketOptions = section(SocketOptions, "Options of its connections.")
    tls: Tls = section(Tls, "TLS of its connections.")
    limits: ConnectionLimits = section(ConnectionLimits, "Limits of its connections and clients.")
    allow: tuple[Network, ...] = option(
        ListOf(values.NETWORK), "Networks that clients may come from; others are refused. Default: any.", []
    )
    deny: tuple[Network, ...] = option(
        ListOf(values.NETWORK), "Networks whose clients are refused, also those in `allow`.", []
    )
    proxy_protocol: tuple[Network | str, ...] = option(
        ListOf(values.PROXY),
        "Networks of the proxies that clients come by; at a unix socket `unix`, for any process that can connect. A "
        "header in front of what a proxy forwards (PROXY protocol, version 1 or 2; of datagrams version 2) tells the "
        "client's address, for handlers, logs, limits, `allow` and `deny`. Where there are some, others are refused, "
        "and so is what comes without a header. Default: no proxy.",
        [],
    )

    @property
    def served_by(self) -> str:
        """What serves its clients, in one line: the handler's name, or the command."""
        return self.handler if self.handler is not None else escape_controls(shlex.join(self.command))


def address_disagreements(listener: Listener) -> Iterator[tuple[tuple[str, ...], str]]:
    """The settings of a listener that are about addresses which its clients, or its proxies, do not have: their keys,
    and why not. Nothing is wrong at `fd:`, of which `system.inherited` knows what it stands for.
    """
    limits = listener.limits
    given: dict[tuple[str, ...], object] = {
        ("limits", "per_ip"): limits.per_ip,
        ("limits", "rate_per_ip"): limits.rate_per_ip,
        ("allow",): listener.allow,
        ("deny",): listener.deny,
    }
    address, proxies = listener.address, listener.proxy_protocol
    known = not address.is_unix or values.UNIX in proxies  # a proxy says it
    for keys in (keys for keys, value in given.items() if value and not known):
        yield keys, f"means the addresses that clients come from, and {address} has none"
    if address.scheme == "unix-dgram" and proxies:
        yield ("proxy_protocol",), f"is of connections and of udp://, and at {address} come datagrams of unix sockets"
    elif address.is_unix and any(one != values.UNIX for one in proxies):
        yield (
            ("proxy_protocol",),
            f"names networks, and what connects to {address} has no address; write [{values.UNIX}]",
        )
    elif address.scheme in ("tcp", "udp") and values.UNIX in proxies:
        yield (
            ("proxy_protocol",),
            f"{values.UNIX} is for a unix socket, and {address} is none; write the proxies' networks",
        )


def refused_by_servers(listener: Listener) -> Iterator[tuple[tuple[str, ...], str]]:
    """The settings of a listener that can't hold where a whole server serves it: their keys, and why not."""
    accepts, closes = "accepts its clients itself", "reads, writes and closes its connections itself"
    why: dict[tuple[str, ...], str] = {
        ("tls", "cert"): "makes its own TLS",
        **dict.fromkeys((("allow",), ("deny",), ("proxy_protocol",)), accepts),
        **{("limits", name): accepts for name in ("connections", "per_worker", "per_ip", "rate_per_ip", "message")},
        **dict.fromkeys((("limits", "write_buffer"), ("socket", "linger"), ("socket", "quickack")), closes),
        ("keepalive", "heartbeat"): closes,
    }
    for keys, reason in why.items():
        owner = getattr(listener, keys[0]) if keys[1:] else listener
        value = getattr(owner, keys[-1])
        if value and value != default_of(type(owner), keys[-1]):
            yield keys, f"can't hold: a whole server {reason}"
