"""The header that a proxy puts before what it forwards, with the addresses of the client that it speaks for: PROXY
protocol, versions 1 and 2 (proxy-protocol.txt of HAProxy, sections 2.1 and 2.2).

First rules alone: bytes in, addresses out; what is malformed is refused with a sentence. Whether a header may be
trusted is for the caller to decide, by the peer that it came from: any client can write one. Then `ProxyHeaderReader`,
which waits for the header of an accepted connection and reads exactly that: what follows it is still in the socket,
be it a TLS hello, or for a thread or a program to read.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from forkd.config.listener import Timeouts
from forkd.ended import Ended
from forkd.serve.accept.acceptor import Serve
from forkd.serve.loop import IN, PollLoop
from forkd.system.scoreboard import ClientAddresses
from forkd.system.socket_stats import cookie_of

#: What a header of version 1 begins with, and how many bytes it has at most, its end of line included.
V1_START = b"PROXY "
V1_MOST = 107

#: Bytes of a connection's header of version 2 at most. What proxies write has some hundreds.
MOST_BYTES = 4096

#: Seconds that a proxy has for the header of a connection, at most.
HEADER_SECONDS = 10.0

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

#: As the socket module has them: host and port, and for IPv6 the flow and the scope, which are 0.
Endpoint = tuple[str, int] | tuple[str, int, int, int]

_FIXED = struct.Struct("!12sBBH")
_TLV = struct.Struct("!BH")
_LOCAL, _PROXY = 0, 1
_FAMILIES = {0: "unspecified", 1: "IPv4", 2: "IPv6", 3: "unix"}
_TRANSPORTS = {0: "unspecified", 1: "stream", 2: "datagram"}
#: Bytes of both addresses; those of a unix client are two paths of 108 bytes.
_LENGTHS = {0: 0, 1: 12, 2: 36, 3: 216}

#: The extensions that handlers can ask for, by their numbers (section 2.2): what was agreed on in the client's TLS
#: hello, the host that it asked for, and the connection's identifier. 0x20 has others in it, about its TLS.
_TEXTS = {0x01: "alpn", 0x02: "authority", 0x21: "ssl_version", 0x22: "ssl_cn", 0x23: "ssl_cipher"}
_UNIQUE_ID, _SSL = 0x05, 0x20
_SSL_FIXED = struct.Struct("!BI")  # what the client has done; 0 where its certificate was verified
_CLIENT_SSL, _CLIENT_CERT = 0x01, 0x06  # it speaks TLS; it has shown a certificate, now or earlier in its session

_MAPPED = bytes(10) + b"\xff\xff"  # in front of an IPv4 address (RFC 4291)

_V1_LINE = re.compile(
    rb"PROXY (?:(TCP4|TCP6) ([0-9a-fA-F.:]+) ([0-9a-fA-F.:]+) (0|[1-9][0-9]{0,4}) (0|[1-9][0-9]{0,4})|UNKNOWN(?: .*)?)"
)

#: What a handler may be told of a client beside its address.
Details = Mapping[str, "str | bytes | bool"]


T = TypeVar("T")


class Malformed(ValueError):
    """What came is no header, or one that this side can't take; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says.

    Attributes:
        length: its bytes, after which the payload begins.
        source: where the client is; None where the header does not say, and the peer's own address is the one.
        destination: what address it has sent to; None together with `source`.
        transport: how the client came: "stream", "datagram", or "unspecified".
        details: what the header's extensions say, each where it is there: `alpn`, `authority`, `ssl_version`, `ssl_cn`
            and `ssl_cipher` (text), `unique_id` (bytes), `ssl` (whether the client speaks TLS to the proxy), and
            `ssl_verified` (whether the proxy has seen its certificate and found it right).
    """

    length: int
    source: Endpoint | None = None
    destination: Endpoint | None = None
    transport: str = "unspecified"
    details: Details = field(default_factory=dict, compare=False)


def parse_datagram(datagram: bytes) -> tuple[Header, bytes]:
    """The header in front of a datagram's payload, and the payload.

    Raises:
        Malformed: there is none, or none of a datagram.
    """
    header = parse_v2(datagram)
    if header is None:
        raise Malformed(f"a PROXY header that is longer than its datagram of {len(datagram)} bytes")
    if header.transport == "stream":
        raise Malformed("the PROXY header of a datagram speaks for a stream")
    return header, datagram[header.length :]


def parse_header(data: bytes) -> Header | None:
    """The header of either version at the beginning of a connection's `data`; None while it may be one of which more
    has to come, and then all of `data` is its.

    Raises:
        Malformed: it is none, however it goes on, or none of a connection.
    """
    if data.startswith(V1_START[: len(data)]):
        return _parse_v1(data)
    if not data.startswith(SIGNATURE[: len(data)]):
        raise Malformed("no PROXY header: what came begins otherwise")
    header = parse_v2(data)
    if len(data) >= _FIXED.size and _FIXED.size + _FIXED.unpack_from(data)[3] > MOST_BYTES:
        raise Malformed(f"a PROXY header of more than {MOST_BYTES} bytes")
    if header is not None and header.transport == "datagram":
        raise Malformed("the PROXY header of a connection speaks for datagrams")
    return header


def _parse_v1(data: bytes) -> Header | None:
    line, end, _ = data[:V1_MOST].partition(b"\r\n")
    if not end:
        if len(data) >= V1_MOST:
            raise Malformed(f"a PROXY header of version 1 without its end in {V1_MOST} bytes")
        return None
    length = len(line) + len(end)
    found = _V1_LINE.fullmatch(line)
    if found is None:
        raise Malformed(f"a PROXY header of version 1 that can't be read: {line!r}")
    family, *texts = found.groups()
    if family is None:
        return Header(length)
    kind = ipaddress.IPv4Address if family == b"TCP4" else ipaddress.IPv6Address  # strict, where inet_pton(3) is not
    try:
        hosts = [_text(kind(one.decode())) for one in texts[:2]]
    except ValueError as error:
        raise Malformed(f"a PROXY header of version 1 that can't be read: {error}") from None
    ports = [int(one) for one in texts[2:]]
    if max(ports) > 65535:
        raise Malformed(f"a PROXY header with the port {max(ports)}")
    rest = () if family == b"TCP4" else (0, 0)
    source, destination = ((host, port, *rest) for host, port in zip(hosts, ports, strict=True))
    return Header(length, source, destination, "stream")


def _text(host: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """An address as the socket module writes it."""
    return socket.inet_ntop(socket.AF_INET if host.version == 4 else socket.AF_INET6, host.packed)


def parse_v2(data: bytes) -> Header | None:
    """The header of version 2 at the beginning of `data`; None while it may be one of which more has to come.

    Raises:
        Malformed: it is none, however it goes on.
    """
    if not data.startswith(SIGNATURE[: len(data)]):
        raise Malformed("no PROXY header of version 2: its signature is missing")
    if len(data) < _FIXED.size:
        return None
    _, kind, protocol, rest = _FIXED.unpack_from(data)
    version, command = kind >> 4, kind & 15
    if version != 2:
        raise Malformed(f"a PROXY header of version {version}, where 2 is known")
    if command not in (_LOCAL, _PROXY):
        raise Malformed(f"the PROXY header's command {command} is neither 0 (LOCAL) nor 1 (PROXY)")
    length = _FIXED.size + rest
    if command == _LOCAL:  # the proxy speaks for itself, and what it says of addresses does not count
        return Header(length) if len(data) >= length else None
    family, transport = protocol >> 4, protocol & 15
    if family not in _FAMILIES or transport not in _TRANSPORTS:
        raise Malformed(f"the PROXY header's address family and transport are 0x{protocol:02x}, which is unknown")
    if rest < _LENGTHS[family]:
        raise Malformed(f"a PROXY header has {rest} bytes for {_FAMILIES[family]} addresses of {_LENGTHS[family]}")
    if len(data) < length:
        return None
    details = _details(data[_FIXED.size + _LENGTHS[family] : length]) if family else {}
    source, destination = _endpoints(family, data)
    return Header(length, source, destination, _TRANSPORTS[transport], details)


def _endpoints(family: int, data: bytes) -> tuple[Endpoint, Endpoint] | tuple[None, None]:
    if family == 1:
        source, destination, *ports = struct.unpack_from("!4s4sHH", data, _FIXED.size)
        hosts = [socket.inet_ntop(socket.AF_INET, one) for one in (source, destination)]
        return (hosts[0], ports[0]), (hosts[1], ports[1])
    if family == 2:
        source, destination, *ports = struct.unpack_from("!16s16sHH", data, _FIXED.size)
        hosts = [socket.inet_ntop(socket.AF_INET6, one) for one in (source, destination)]
        return (hosts[0], ports[0], 0, 0), (hosts[1], ports[1], 0, 0)
    return None, None  # paths on the proxy's machine say nothing here, and have no place in an `Endpoint`


def _details(data: bytes) -> Details:
    """What the extensions say."""
    found: dict[str, str | bytes | bool] = {}
    for kind, value in _extensions(data):
        if kind in _TEXTS:
            found[_TEXTS[kind]] = value.decode(errors="replace")
        elif kind == _UNIQUE_ID:
            found["unique_id"] = value
        elif kind == _SSL and len(value) >= _SSL_FIXED.size:
            client, unverified = _SSL_FIXED.unpack_from(value)
            found["ssl"] = bool(client & _CLIENT_SSL)
            found["ssl_verified"] = bool(client & _CLIENT_CERT) and not unverified
            for inner, text in _extensions(value[_SSL_FIXED.size :]):
                if inner in _TEXTS:
                    found[_TEXTS[inner]] = text.decode(errors="replace")
    return found


def _extensions(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The type-length-value vectors (section 2.2), which must fill their place exactly."""
    at = 0
    while at < len(data):
        if len(data) - at < _TLV.size:
            raise Malformed(f"a PROXY header ends with {len(data) - at} bytes that are no extension")
        kind, length = _TLV.unpack_from(data, at)
        value = data[at + _TLV.size : at + _TLV.size + length]
        at += _TLV.size + length
        if at > len(data):
            raise Malformed(f"the PROXY header's extension 0x{kind:02x} of {length} bytes goes beyond its end")
        yield kind, value


def header_seconds(timeouts: Timeouts) -> float:
    """How long the proxies of a listener have for a header: no longer than a client has for its first byte."""
    return min(HEADER_SECONDS, timeouts.first_byte or HEADER_SECONDS)


class ProxiedSocket(socket.socket):
    """A connection that a proxy has made for a client.

    Attributes:
        proxy_header: what the proxy says; None before it has.
        proxy_peername: the proxy's own address; None before that.
    """

    __slots__ = ("proxy_header", "proxy_peername")

    def __init__(self, family: int = -1, kind: int = -1, proto: int = -1, fileno: int | None = None) -> None:
        super().__init__(family, kind, proto, fileno)
        self.proxy_header: Header | None = None
        self.proxy_peername: Any = None


def note_clients(addresses: ClientAddresses, serve: Serve) -> Serve:
    """What serves accepted connections as `serve` does, and notes whose they are, for `forkd clients`."""

    def note_and_serve(sock: socket.socket, peer: Any) -> None:
        header: Header | None = getattr(sock, "proxy_header", None)
        if header is not None and header.source is not None:
            host, port, *_ = header.source
            packed = ipaddress.ip_address(host).packed
            address = packed if len(packed) == 16 else _MAPPED + packed
            addresses.record(sock.fileno(), cookie_of(sock), address, port)
        serve(sock, peer)

    return note_and_serve


class ProxyHeaderReader:
    """Waits for the header of one accepted connection, and reads that and nothing after it.

    Args:
        loop: the process's loop.
        sock: the connection's non-blocking socket. It is the caller's again when one of the next two is called.
        seconds: that the proxy has.
        done: called with the header, once.
        failed: called instead, with why there is none: a sentence, or nothing where the proxy has sent nothing.
    """

    __slots__ = ("_done", "_failed", "_fd", "_received", "_seconds", "_selector", "_sock", "_timer")

    is_over = False  # while it is known to the loop

    def __init__(
        self,
        loop: PollLoop,
        sock: socket.socket,
        seconds: float,
        done: Callable[[Header], None],
        failed: Callable[[str], None],
    ) -> None:
        self._selector = loop.selector
        self._sock = sock
        self._fd = sock.fileno()
        self._done, self._failed = done, failed
        self._received = b""
        self._seconds = seconds
        self._selector.epoll.register(self._fd, IN)  # first, since it may fail
        self._selector.served[self._fd] = self._ready
        self._timer = loop.call_later(seconds, self._give_up)
        self._ready(IN)  # a proxy sends the header at once

    def _ready(self, mask: int) -> None:
        try:
            peeked = self._sock.recv(MOST_BYTES - len(self._received), socket.MSG_PEEK)
            if not peeked:
                self._end(self._failed, "closed within its PROXY header" if self._received else "")
                return
            header = parse_header(self._received + peeked)
            wanted = len(peeked) if header is None else header.length - len(self._received)
            self._received += self._sock.recv(wanted)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(self._failed, f"no PROXY header: {error.strerror}")
        except Malformed as error:
            self._end(self._failed, str(error))
        else:
            if header is not None:
                self._end(self._done, header)

    def _give_up(self) -> None:
        self._end(self._failed, f"no PROXY header within {self._seconds:.1f} s")

    @property
    def peer(self) -> Any:
        """Where the proxy is; None where it has gone."""
        with contextlib.suppress(OSError):
            return self._sock.getpeername()
        return None

    @property
    def cookie(self) -> int:
        """What the kernel calls the connection. Raises OSError."""
        return cookie_of(self._sock)

    def end(self, _: Ended) -> None:
        """Ends the connection, of forkd's own accord."""
        self.cancel()

    def cancel(self) -> None:
        """Waits no more, if it still does: the connection failed, without a reason."""
        if not self._timer.cancelled():
            self._end(self._failed, "")

    def _end(self, call: Callable[[T], None], what: T) -> None:
        self._timer.cancel()
        self._selector.epoll.unregister(self._fd)
        del self._selector.served[self._fd]
        call(what)

    def close_in_child(self) -> None:
        """In a forked process: closes its copy of the socket."""
        self._sock.close()
