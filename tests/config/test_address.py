"""Addresses: every form that is read, shown and read again, and what is said of those that are not addresses."""

from __future__ import annotations

import ipaddress
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.config.address import LONGEST_PATH, Address, parse_address

PORTS = st.integers(0, 65535)
HOSTS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?(\.[a-z0-9]{1,5}){0,2}", fullmatch=True)
PATHS = st.text(string.ascii_letters + string.digits + "/._- äß日", min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://127.0.0.1:7007", Address("tcp", host="127.0.0.1", port=7007)),
        ("tcp://localhost:0", Address("tcp", host="localhost", port=0)),
        ("tcp://[::1]:65535", Address("tcp", host="::1", port=65535)),
        ("tcp://[::]:80", Address("tcp", host="::", port=80)),
        ("tcp://[::ffff:127.0.0.1]:80", Address("tcp", host="::ffff:127.0.0.1", port=80)),
        ("tcp://[fe80::1%eth0]:80", Address("tcp", host="fe80::1%eth0", port=80)),
        ("tcp://[fe80::1%br-lan]:80", Address("tcp", host="fe80::1%br-lan", port=80)),
        ("unix:/run/x.sock", Address("unix", path="/run/x.sock")),
        ("unix:/with space", Address("unix", path="/with space")),
        ("unix:@name", Address("unix", path="@name")),
        ("unix:/" + "x" * (LONGEST_PATH - 1), Address("unix", path="/" + "x" * (LONGEST_PATH - 1))),
        ("udp://127.0.0.1:53", Address("udp", host="127.0.0.1", port=53)),
        ("udp://[ff02::fb%eth0]:0", Address("udp", host="ff02::fb%eth0", port=0)),
        ("unix-dgram:/run/x.sock", Address("unix-dgram", path="/run/x.sock")),
        ("unix-dgram:@name", Address("unix-dgram", path="@name")),
        ("fd:", Address("fd")),
        ("fd:0", Address("fd", path="0")),
        ("fd:web", Address("fd", path="web")),
        ("fd:forkd-chat.socket", Address("fd", path="forkd-chat.socket")),
        ("fd:@3", Address("fd", path="@3")),
        ("fd:3rd", Address("fd", path="3rd")),
    ],
)
def test_an_address_is_read_and_shown_as_it_was_written(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert str(address) == text


def test_address_is_abstract_where_unix_begins_with_an_at_sign() -> None:
    texts = ["unix:@x", "unix-dgram:@x", "unix:/@x", "tcp://127.0.0.1:0", "udp://127.0.0.1:0", "fd:@x"]
    assert [parse_address(text).abstract for text in texts] == [True, True, False, False, False, False]


def test_datagrams_come_to_udp_and_to_unix_sockets_of_that_name() -> None:
    texts = ["udp://[::1]:1", "unix-dgram:/x", "unix-dgram:@x", "tcp://[::1]:1", "unix:/x", "fd:x"]
    assert [parse_address(text).takes_datagrams for text in texts] == [True, True, True, False, False, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "write tcp://HOST:PORT or udp://HOST:PORT (an IPv6 host in brackets), unix:/path or unix:@name"),
        ("nonsense", "write tcp://HOST:PORT or udp://HOST:PORT (an IPv6 host in brackets), unix:/path or unix:@name"),
        ("udp:127.0.0.1:53", "is not an address"),
        ("udp://127.0.0.1", "has no port; write udp://HOST:PORT"),
        ("udp://::1:53", "as in udp://[::1]:7007"),
        ("unix-dgram:x", "write unix-dgram: and an absolute path, or unix-dgram:@name"),
        ("dgram:/x", "is not an address"),
        ("TCP://127.0.0.1:53", "is not an address"),
        ("tcp:127.0.0.1:80", "is not an address"),
        ("127.0.0.1:80", "did you mean tcp://127.0.0.1:80?"),
        ("localhost:80", "did you mean tcp://localhost:80?"),
        ("[::1]:80", "did you mean tcp://[::1]:80?"),
        ("/run/x.sock", "did you mean unix:/run/x.sock?"),
        ("@x", "did you mean unix:@x?"),
        ("tcp://127.0.0.1", "has no port; write tcp://HOST:PORT, with port 0 for any free one"),
        ("tcp://[::1]", "has no port"),
        ("tcp://::1:80", "an IPv6 host is written in brackets, as in tcp://[::1]:7007"),
        ("tcp://[::1:80", "as in tcp://127.0.0.1:7007"),
        ("tcp://127.0.0.1:65536", "a port is at most 65535"),
        ("tcp://127.0.0.1:http", "as in tcp://127.0.0.1:7007"),
        ("tcp://127.0.0.1:-1", "as in tcp://127.0.0.1:7007"),
        ("tcp://127.0.0.1:٨٠", "as in tcp://127.0.0.1:7007"),
        ("tcp://127.0.0.1:80/", "as in tcp://127.0.0.1:7007"),
        ("tcp://127.0.0.1:80\n", "as in tcp://127.0.0.1:7007"),
        ("tcp://user@host:80", "as in tcp://127.0.0.1:7007"),
        ("tcp://:80", "as in tcp://127.0.0.1:7007"),
        ("tcp://a\x1bb:80", "as in tcp://127.0.0.1:7007"),
        ("tcp://\ud83d\ude00:80", "as in tcp://127.0.0.1:7007"),
        ("tcp://[zzz]:80", ""),
        ("tcp://[127.0.0.1]:80", ""),
        ("unix:", "write unix: and an absolute path, or unix:@name"),
        ("unix:/", "write unix: and an absolute path, or unix:@name"),
        ("unix:@", "write unix: and an absolute path, or unix:@name"),
        ("unix:x.sock", "write unix: and an absolute path, or unix:@name"),
        ("unix:/" + "x" * LONGEST_PATH, f"at most {LONGEST_PATH} bytes, this one {LONGEST_PATH + 1}"),
        ("unix:/" + "ä" * 60, f"at most {LONGEST_PATH} bytes, this one 121"),
        ("unix:@a\0b", "no NUL in it"),
        ("fd:web:1", "write fd: and an inherited socket's number or systemd's name for it, as in fd:0 or fd:web"),
        ("fd:a b", "write fd: and"),
        ("fd:x\n", "write fd: and"),
        ("fd:" + "x" * 256, "write fd: and"),
        ("fd:123456789", "write fd: and"),
        ("FD:web", "is not an address"),
    ],
)
def test_wrong_address_is_refused_with_what_was_meant(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\S") as caught:
        parse_address(text)
    assert said in str(caught.value)
    assert repr(text) in str(caught.value)


@given(
    st.one_of(
        st.builds(lambda host, port: f"tcp://{host}:{port}", HOSTS, PORTS),
        st.builds(lambda host, port: f"tcp://{host}:{port}", st.ip_addresses(v=4), PORTS),
        st.builds(lambda host, port: f"tcp://[{host}]:{port}", st.ip_addresses(v=6).map(ipaddress.ip_address), PORTS),
        st.builds(lambda host, port: f"udp://{host}:{port}", HOSTS, PORTS),
        PATHS.map(lambda path: f"unix:/{path}"),
        PATHS.map(lambda path: f"unix-dgram:/{path}"),
        PATHS.map(lambda name: f"unix:@{name}"),
        st.from_regex(r"[!-9;-~]{0,7}", fullmatch=True).map(lambda name: f"fd:{name}"),
    )
)
def test_every_address_is_shown_as_it_was_written(text: str) -> None:
    assert str(parse_address(text)) == text


@given(st.one_of(st.text(), st.text("tcpunixfdgrm:/@[]%.0123456789abcdef-")))
def test_any_text_is_an_address_that_reads_again_or_is_refused(text: str) -> None:
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(address)) == address
