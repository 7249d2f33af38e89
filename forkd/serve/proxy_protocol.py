"""The header that a proxy puts before what it forwards, with the addresses of the client that it speaks for: PROXY
protocol, version 2 (proxy-protocol.txt of HAProxy, section 2.2). Rules alone: bytes in, addresses out.

Whether a header may be believed is for the caller, by the peer that it came from: anybody can write one.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

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
    """

    length: int
    source: Endpoint | None = None
    destination: Endpoint | None = None
    transport: str = "unspecified"


def parse_datagram(datagram: bytes) -> tuple[Header, bytes]:
    """The header in front of a datagram's payload, and the payload.

    Raises:
        Malformed: there is none, or none of a datagram.
    """
    header = parse_header(datagram)
    if header is None:
        raise Malformed(f"a PROXY header that is longer than its datagram of {len(datagram)} bytes")
    if header.transport == "stream":
        raise Malformed("the PROXY header of a datagram speaks for a stream")
    return header, datagram[header.length :]


def parse_header(data: bytes) -> Header | None:
    """The header at the beginning of `data`; None while it may be one of which more has to come.

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
    if family:
        _check_extensions(data[_FIXED.size + _LENGTHS[family] : length])
    source, destination = _endpoints(family, data)
    return Header(length, source, destination, _TRANSPORTS[transport])


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


def _check_extensions(data: bytes) -> None:
    """That the type-length-value vectors (section 2.2.8) fill their place exactly. None of them is needed here."""
    at = 0
    while at < len(data):
        if len(data) - at < _TLV.size:
            raise Malformed(f"a PROXY header ends with {len(data) - at} bytes that are no extension")
        kind, length = _TLV.unpack_from(data, at)
        at += _TLV.size + length
        if at > len(data):
            raise Malformed(f"the PROXY header's extension 0x{kind:02x} of {length} bytes goes beyond its end")
