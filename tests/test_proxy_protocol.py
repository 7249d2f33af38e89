"""PROXY headers before datagrams: what is written is what is read, and whatever else comes raises `Malformed` alone."""

from __future__ import annotations

import ipaddress
import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.serve.proxy_protocol import SIGNATURE, Header, Malformed, parse_datagram, parse_header

PORTS = st.integers(0, 65535)
V4 = st.tuples(st.ip_addresses(v=4), PORTS)
V6 = st.tuples(st.ip_addresses(v=6), PORTS)
PAYLOADS = st.binary(max_size=40)
EXTENSIONS = st.lists(st.tuples(st.integers(0, 255), st.binary(max_size=20)), max_size=4)


def fixed(command: int, protocol: int, length: int, version: int = 2) -> bytes:
    return SIGNATURE + struct.pack("!BBH", version << 4 | command, protocol, length)


def vectors(extensions: list[tuple[int, bytes]]) -> bytes:
    return b"".join(struct.pack("!BH", kind, len(value)) + value for kind, value in extensions)


def written(
    source: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int],
    destination: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int],
    extensions: list[tuple[int, bytes]],
    transport: int = 2,
) -> bytes:
    """A header as a proxy writes it."""
    addresses = source[0].packed + destination[0].packed + struct.pack("!HH", source[1], destination[1])
    rest = addresses + vectors(extensions)
    return fixed(1, (1 if source[0].version == 4 else 2) << 4 | transport, len(rest)) + rest


def as_endpoint(address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int) -> tuple[object, ...]:
    text = socket.inet_ntop(socket.AF_INET if address.version == 4 else socket.AF_INET6, address.packed)
    return (text, port) if address.version == 4 else (text, port, 0, 0)


BOTH = st.tuples(V4, V4) | st.tuples(V6, V6)


@given(ends=BOTH, extensions=EXTENSIONS, payload=PAYLOADS)
def test_what_a_proxy_writes_is_read(ends, extensions, payload) -> None:  # type: ignore[no-untyped-def]
    header = written(*ends, extensions)
    found, rest = parse_datagram(header + payload)
    assert rest == payload
    assert found == Header(len(header), as_endpoint(*ends[0]), as_endpoint(*ends[1]), "datagram")  # type: ignore[arg-type]


def test_addresses_have_the_form_that_a_socket_gives() -> None:
    header = written((ipaddress.ip_address("10.0.0.1"), 7), (ipaddress.ip_address("192.0.2.3"), 53), [])
    assert parse_datagram(header + b"x")[0] == Header(28, ("10.0.0.1", 7), ("192.0.2.3", 53), "datagram")
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        port = sock.getsockname()[1]
        header = written((ipaddress.ip_address("::1"), port), (ipaddress.ip_address("2001:db8::"), 9), [])
        assert parse_datagram(header)[0].source == sock.getsockname()
    assert parse_datagram(header)[0].destination == ("2001:db8::", 9, 0, 0)


@given(ends=BOTH, extensions=EXTENSIONS)
def test_each_beginning_of_a_header_is_one_of_which_more_has_to_come(ends, extensions) -> None:  # type: ignore[no-untyped-def]
    header = written(*ends, extensions)
    for end in range(len(header)):
        assert parse_header(header[:end]) is None
        with pytest.raises(Malformed, match="longer than its datagram"):
            parse_datagram(header[:end])
    assert parse_header(header) is not None


@given(data=st.binary(max_size=300), command=st.integers(0, 1), protocol=st.sampled_from([0, 0x11, 0x12, 0x22, 0x32]))
def test_random_bytes_raise_nothing_else(data: bytes, command: int, protocol: int) -> None:
    for datagram in (data, SIGNATURE + data, fixed(command, protocol, len(data) // 2) + data):
        try:
            header, payload = parse_datagram(datagram)
        except Malformed:
            continue
        assert header.length + len(payload) == len(datagram)
        assert datagram.endswith(payload)


@given(ends=BOTH, place=st.integers(0, 51), value=st.integers(0, 255))
def test_a_header_with_one_wrong_byte_raises_nothing_else(ends, place: int, value: int) -> None:  # type: ignore[no-untyped-def]
    data = bytearray(written(*ends, [(4, b"pad")]) + b"payload")
    data[place % len(data)] = value
    try:
        header, payload = parse_datagram(bytes(data))
    except Malformed:
        return
    assert header.length + len(payload) == len(data)


@pytest.mark.parametrize("protocol", [0x00, 0x12, 0x31, 0x45, 0xFF])
@pytest.mark.parametrize("block", [b"", b"\0\1", bytes(12), bytes(range(40))])
def test_a_proxy_that_speaks_for_itself_has_its_own_address(protocol: int, block: bytes) -> None:
    header, payload = parse_datagram(fixed(0, protocol, len(block)) + block + b"ping")
    assert (header, payload) == (Header(16 + len(block)), b"ping")


@pytest.mark.parametrize(("protocol", "block"), [(0x00, b""), (0x00, b"whatever"), (0x02, b"\0"), (0x32, bytes(216))])
def test_addresses_of_no_use_here_are_none(protocol: int, block: bytes) -> None:
    header, payload = parse_datagram(fixed(1, protocol, len(block)) + block + b"ping")
    assert (header.source, header.destination, payload) == (None, None, b"ping")
    assert header.length == 16 + len(block)


@pytest.mark.parametrize(
    ("datagram", "sentence"),
    [
        (b"hello", "its signature is missing"),
        (b"PROXY UDP4 10.0.0.1 10.0.0.2 1 2\r\n", "its signature is missing"),
        (b"", "longer than its datagram of 0 bytes"),
        (fixed(1, 0x12, 12, version=1) + bytes(12), "of version 1, where 2 is known"),
        (fixed(2, 0x12, 12) + bytes(12), "command 2 is neither"),
        (fixed(1, 0x42, 12) + bytes(12), "0x42, which is unknown"),
        (fixed(1, 0x13, 12) + bytes(12), "0x13, which is unknown"),
        (fixed(1, 0x12, 11) + bytes(11), "has 11 bytes for IPv4 addresses of 12"),
        (fixed(1, 0x22, 35) + bytes(35), "has 35 bytes for IPv6 addresses of 36"),
        (fixed(1, 0x32, 215) + bytes(215), "has 215 bytes for unix addresses of 216"),
        (fixed(1, 0x12, 65535) + bytes(40), "longer than its datagram of 56 bytes"),
        (fixed(0, 0x00, 1), "longer than its datagram of 16 bytes"),
        (fixed(1, 0x11, 12) + bytes(12), "speaks for a stream"),
        (fixed(1, 0x12, 14) + bytes(14), "ends with 2 bytes that are no extension"),
        (fixed(1, 0x12, 15) + bytes(12) + b"\4\0\1", "extension 0x04 of 1 bytes goes beyond its end"),
        (fixed(1, 0x12, 19) + bytes(12) + b"\3\xff\xffabcd", "extension 0x03 of 65535 bytes goes beyond its end"),
    ],
)
def test_what_is_malformed_is_told(datagram: bytes, sentence: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_datagram(datagram)
    assert sentence in str(caught.value)


def test_a_stream_may_have_one_too() -> None:
    header = written((ipaddress.ip_address("10.0.0.1"), 7), (ipaddress.ip_address("10.0.0.2"), 8), [], transport=1)
    assert parse_header(header + b"GET") == Header(28, ("10.0.0.1", 7), ("10.0.0.2", 8), "stream")
