"""PROXY headers before datagrams and connections: what is written is what is read, and whatever else comes raises
`Malformed` alone.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.serve.accept.proxy_protocol import (
    MOST_BYTES,
    SIGNATURE,
    Header,
    Malformed,
    ProxyHeaderReader,
    parse_datagram,
    parse_header,
    parse_v2,
)
from forkd.serve.loop import PollLoop

PORTS = st.integers(0, 65535)
V4 = st.tuples(st.ip_addresses(v=4), PORTS)
V6 = st.tuples(st.ip_addresses(v=6), PORTS)
PAYLOADS = st.binary(max_size=40)
EXTENSIONS = st.lists(
    st.tuples(st.integers(0, 255).filter(lambda kind: kind != 0x20), st.binary(max_size=20)), max_size=4
)


def fixed(command: int, protocol: int, length: int, version: int = 2) -> bytes:
    return SIGNATURE + struct.pack("!BBH", version << 4 | command, protocol, length)


IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
#: The addresses and ports of a source and a destination.
Ends = tuple[tuple[IPAddress, int], tuple[IPAddress, int]]


def vectors(extensions: list[tuple[int, bytes]]) -> bytes:
    return b"".join(struct.pack("!BH", kind, len(value)) + value for kind, value in extensions)


def written(ends: Ends, extensions: list[tuple[int, bytes]], transport: int = 2) -> bytes:
    """A header as a proxy writes it."""
    source, destination = ends
    addresses = source[0].packed + destination[0].packed + struct.pack("!HH", source[1], destination[1])
    rest = addresses + vectors(extensions)
    return fixed(1, (1 if source[0].version == 4 else 2) << 4 | transport, len(rest)) + rest


def as_endpoint(address: IPAddress, port: int) -> tuple[object, ...]:
    text = socket.inet_ntop(socket.AF_INET if address.version == 4 else socket.AF_INET6, address.packed)
    return (text, port) if address.version == 4 else (text, port, 0, 0)


BOTH = st.tuples(V4, V4) | st.tuples(V6, V6)


@given(ends=BOTH, extensions=EXTENSIONS, payload=PAYLOADS)
def test_what_a_proxy_writes_is_read(ends: Ends, extensions: list[tuple[int, bytes]], payload: bytes) -> None:
    header = written(ends, extensions)
    found, rest = parse_datagram(header + payload)
    assert rest == payload
    assert found == Header(len(header), as_endpoint(*ends[0]), as_endpoint(*ends[1]), "datagram")  # type: ignore[arg-type]


def test_addresses_have_the_form_that_a_socket_gives() -> None:
    header = written(((ipaddress.ip_address("10.0.0.1"), 7), (ipaddress.ip_address("192.0.2.3"), 53)), [])
    assert parse_datagram(header + b"x")[0] == Header(28, ("10.0.0.1", 7), ("192.0.2.3", 53), "datagram")
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.bind(("::1", 0))
        port = sock.getsockname()[1]
        header = written(((ipaddress.ip_address("::1"), port), (ipaddress.ip_address("2001:db8::"), 9)), [])
        assert parse_datagram(header)[0].source == sock.getsockname()
    assert parse_datagram(header)[0].destination == ("2001:db8::", 9, 0, 0)


@given(ends=BOTH, extensions=EXTENSIONS)
def test_each_beginning_of_a_header_is_incomplete(ends: Ends, extensions: list[tuple[int, bytes]]) -> None:
    header = written(ends, extensions)
    for end in range(len(header)):
        assert parse_v2(header[:end]) is None
        with pytest.raises(Malformed, match="longer than its datagram"):
            parse_datagram(header[:end])
    assert parse_v2(header) is not None


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
def test_a_header_with_one_wrong_byte_raises_nothing_else(ends: Ends, place: int, value: int) -> None:
    data = bytearray(written(ends, [(4, b"pad")]) + b"payload")
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
    ends = (ipaddress.ip_address("10.0.0.1"), 7), (ipaddress.ip_address("10.0.0.2"), 8)
    header = written(ends, [], transport=1)
    assert parse_header(header + b"GET") == Header(28, ("10.0.0.1", 7), ("10.0.0.2", 8), "stream")


# Of connections


def line(ends: Ends) -> bytes:
    """A header of version 1 as a proxy writes it."""
    (source, port), (destination, other) = ends
    return b"PROXY TCP%d %s %s %d %d\r\n" % (
        source.version,
        str(source).encode(),
        str(destination).encode(),
        port,
        other,
    )


@given(ends=BOTH, payload=PAYLOADS, extensions=EXTENSIONS)
def test_connection_has_a_header_of_either_version(
    ends: Ends, payload: bytes, extensions: list[tuple[int, bytes]]
) -> None:
    for header in (line(ends), written(ends, extensions, transport=1)):
        found = parse_header(header + payload)
        assert found == Header(len(header), as_endpoint(*ends[0]), as_endpoint(*ends[1]), "stream")  # type: ignore[arg-type]
        assert [parse_header(header[:end]) for end in range(1, len(header))] == [None] * (len(header) - 1)


@given(data=st.binary(min_size=1, max_size=300))
def test_random_connections_raise_nothing_else(data: bytes) -> None:
    for header in (data, b"PROXY " + data, b"PROXY TCP4 " + data, SIGNATURE + data, fixed(1, 0x11, len(data)) + data):
        try:
            found = parse_header(header)
        except Malformed:
            continue
        assert found is None or found.length <= len(header)


class Reading:
    """A proxy's connection whose header is read.

    Attributes:
        outcome: the header, or why there is none; None while it is waited for.
    """

    def __init__(self, loop: PollLoop) -> None:
        self._loop = loop
        self.proxy, self.sock = socket.socketpair()
        self.sock.setblocking(False)
        self.outcome: Header | str | None = None
        self._reader = ProxyHeaderReader(loop, self.sock, 60, self._end, self._end)

    def _end(self, outcome: Header | str) -> None:
        assert self.outcome is None
        self.outcome = outcome

    def send(self, data: bytes, cuts: list[int]) -> None:
        """Sends this in pieces, each of which the loop sees before the next one."""
        places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
        for start, end in pairwise(places):
            self.proxy.sendall(data[start:end])
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()

    def rest(self) -> bytes:
        """What is left to read; all is closed then."""
        self._reader.cancel()
        self.proxy.close()
        data = b"".join(iter(lambda: self.sock.recv(65536), b""))
        self.sock.close()
        return data


@pytest.fixture(scope="module")
def loop() -> Iterator[PollLoop]:
    made = PollLoop()
    yield made
    made.close()


CUTS = st.lists(st.integers(0, 1 << 16), max_size=6)


@given(ends=BOTH, extensions=EXTENSIONS, payload=PAYLOADS, cuts=CUTS, second=st.booleans())
def test_reader_takes_the_header_and_not_a_byte_more(
    loop: PollLoop, ends: Ends, extensions: list[tuple[int, bytes]], payload: bytes, cuts: list[int], second: bool
) -> None:
    for header in (line(ends), written(ends, extensions, transport=1)):
        reading = Reading(loop)
        after = header + payload if second else payload
        reading.send(header + after, cuts)
        assert reading.outcome == Header(len(header), as_endpoint(*ends[0]), as_endpoint(*ends[1]), "stream")  # type: ignore[arg-type]
        assert reading.rest() == after


@given(ends=BOTH, extensions=EXTENSIONS, cuts=CUTS, lie=st.integers(0, 65535), byte=st.binary(min_size=1, max_size=1))
def test_reader_is_not_misled_by_a_length_that_lies(
    loop: PollLoop, ends: Ends, extensions: list[tuple[int, bytes]], cuts: list[int], lie: int, byte: bytes
) -> None:
    header = written(ends, extensions, transport=1)
    reading = Reading(loop)
    reading.send(header[:14] + struct.pack("!H", lie) + header[16:] + byte * 100, cuts)
    if isinstance(reading.outcome, Header):
        assert reading.outcome.length == 16 + lie <= len(header) + 100
        assert reading.rest() == (header + byte * 100)[16 + lie :]
        return
    if reading.outcome is None:  # it waits for what is still to come
        assert len(header) + 100 - 16 < lie <= MOST_BYTES - 16
    assert len(reading.rest()) <= len(header) + 100


@given(start=st.sampled_from([b"PROXY TCP4 ", b"PROXY UNKNOWN ", fixed(1, 0x11, 4081), fixed(0, 0, 65535)]), cuts=CUTS)
def test_reader_gives_up_a_header_without_an_end(loop: PollLoop, start: bytes, cuts: list[int]) -> None:
    reading = Reading(loop)
    reading.send(start + bytes(5000), cuts)
    assert isinstance(reading.outcome, str)
    assert len(reading.rest()) >= 5000 - 107  # it is refused for its first line, or for its length


@pytest.mark.parametrize("rest", [b"", b" ", b" TCP4 nonsense 1 2", b" 65535 x"])
def test_unknown_client_is_the_proxy_itself(rest: bytes) -> None:
    assert parse_header(b"PROXY UNKNOWN" + rest + b"\r\nGET") == Header(15 + len(rest))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"GET / HTTP/1.1\r\n", "what came begins otherwise"),
        (b"PROX\r\n", "what came begins otherwise"),
        (b"PROXY \r\n", "version 1 that can't be read"),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1\r\n", "can't be read"),
        (b"PROXY TCP4  10.0.0.1 10.0.0.2 1 2\r\n", "can't be read"),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2 \r\n", "can't be read"),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 01 2\r\n", "can't be read"),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 +2\r\n", "can't be read"),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\n\r\n", "can't be read"),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 65536\r\n", "the port 65536"),
        (b"PROXY TCP4 10.0.0.01 10.0.0.2 1 2\r\n", "Leading zeros"),
        (b"PROXY TCP4 ::1 ::1 1 2\r\n", "can't be read"),
        (b"PROXY TCP6 10.0.0.1 10.0.0.2 1 2\r\n", "can't be read"),
        (b"PROXY UDP4 10.0.0.1 10.0.0.2 1 2\r\n", "can't be read"),
        (b"PROXY UNKNOWN" + b" " * 94, "without its end in 107 bytes"),
        (b"PROXY UNKNOWN" + b" " * 93 + b"\r\n", "without its end in 107 bytes"),
        (fixed(1, 0x11, 65535) + bytes(MOST_BYTES), "of more than 4096 bytes"),
        (fixed(1, 0x12, 12) + bytes(12), "speaks for datagrams"),
    ],
)
def test_malformed_header_of_a_connection_is_told(data: bytes, sentence: str) -> None:
    with pytest.raises(Malformed) as caught:
        parse_header(data)
    assert sentence in str(caught.value)


def test_extensions_say_what_the_proxy_knows_of_the_client() -> None:
    tls = struct.pack("!BI", 0x07, 0) + vectors([(0x21, b"TLSv1.3"), (0x22, b"alice"), (0x23, b"AES")])
    ends = ((ipaddress.ip_address("10.0.0.1"), 7), (ipaddress.ip_address("192.0.2.3"), 53))
    given = [(0x01, b"h2"), (0x02, b"example.org"), (0x05, b"\0id"), (0xEA, b"another's"), (0x20, tls)]
    header = parse_header(written(ends, given, transport=1))
    assert header is not None
    assert header.details == {
        "alpn": "h2",
        "authority": "example.org",
        "unique_id": b"\0id",
        "ssl": True,
        "ssl_verified": True,
        "ssl_version": "TLSv1.3",
        "ssl_cn": "alice",
        "ssl_cipher": "AES",
    }
    unverified = parse_header(written(ends, [(0x20, struct.pack("!BI", 0x03, 1))], transport=1))
    assert unverified is not None
    assert unverified.details == {"ssl": True, "ssl_verified": False}
