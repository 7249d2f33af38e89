"""Which clients may come in: networks, what counts as one client, and how often it may come."""

from __future__ import annotations

import ipaddress
import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.config.address import parse_address
from forkd.config.listener import ConnectionLimits, Listener
from forkd.config.units import Rate, parse_escaped, unescape
from forkd.config.values import parse_network
from forkd.serve.accept.access import DENIED, RATE, AccessPolicy, Networks, client_network, keyed_hash, packed
from forkd.system.scoreboard import Scoreboard
from forkd.system.shared_counters import SharedCounters

NETWORKS = st.one_of(
    st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(lambda one: ipaddress.ip_network(one, strict=False)),
    st.tuples(st.ip_addresses(v=6), st.integers(0, 128)).map(lambda one: ipaddress.ip_network(one, strict=False)),
)


@given(st.lists(NETWORKS, max_size=8), st.data())
def test_networks_agree_with_the_standard_library(networks: list[Any], data: st.DataObject) -> None:
    near = st.sampled_from(networks or [ipaddress.ip_network("::/0")]).map(lambda one: one[-1])
    found = data.draw(near | st.ip_addresses())
    mapped = getattr(found, "ipv4_mapped", None) or found
    plain = [one for one in networks if one.version == mapped.version]
    assert Networks(networks).contains((str(found), 7)) >= any(mapped in one for one in plain)
    if not any(one.version == 6 and one.subnet_of(parse_network("::ffff:0:0/96")) for one in networks):
        assert Networks(networks).contains((str(found), 7)) == any(mapped in one for one in plain)


def test_an_ipv4_client_of_an_ipv6_socket_is_an_ipv4_client() -> None:
    for text in ("10.0.0.0/8", "::ffff:10.0.0.0/104"):
        those = Networks([parse_network(text)])
        assert those.contains(("::ffff:10.1.2.3", 1, 0, 0))
        assert those.contains(("10.1.2.3", 1))
        assert not those.contains(("::ffff:11.1.2.3", 1, 0, 0))
    assert not Networks([parse_network("::/0")]).contains(("10.1.2.3", 1))


def test_client_network_is_an_ipv4_address_or_an_ipv6_64() -> None:
    assert client_network(("::ffff:10.1.2.3", 1, 0, 0)) == client_network(("10.1.2.3", 2)) == bytes([10, 1, 2, 3])
    assert (
        client_network(("2001:db8::1", 1, 0, 0))
        == client_network(("2001:db8::ffff:1", 2, 0, 0))
        != client_network(("2001:db8:0:1::", 1))
    )
    assert packed(("fe80::1%eth0", 1, 0, 3))[-1] == 1
    assert packed("") == packed(b"") == packed(None) == b""


@pytest.fixture
def counters() -> Iterator[SharedCounters]:
    board = Scoreboard(2)
    board.claim()
    board.regions.map_writable(0)
    yield SharedCounters(board, 0)
    os.close(board.descriptor)
    os.close(board.regions.descriptor)


def policy(
    counters: SharedCounters, address: str = "tcp://127.0.0.1:7", rate: Rate | None = None, **more: Any
) -> AccessPolicy:
    listener = Listener(address=parse_address(address), handler="a:b", limits=ConnectionLimits(rate_per_ip=rate))
    networks: dict[str, Any] = {key: tuple(map(parse_network, value)) for key, value in more.items()}
    return AccessPolicy(replace(listener, **networks), address, counters)


def test_deny_overrides_allow_and_no_address_is_not_allowed(counters: SharedCounters) -> None:
    made = policy(counters, allow=["10.0.0.0/8"], deny=["10.9.0.0/16"])
    found = [made.refusal(peer) for peer in (("10.1.1.1", 1), ("10.9.1.1", 1), ("11.1.1.1", 1), "")]
    assert found == ["", DENIED, DENIED, DENIED]
    assert [policy(counters, deny=["10.9.0.0/16"]).refusal(peer) for peer in ("", ("10.9.1.1", 1))] == ["", DENIED]


def test_each_address_has_its_own_rate_at_each_listener(counters: SharedCounters) -> None:
    one, other = (policy(counters, f"udp://127.0.0.1:{port}".replace("udp", "tcp"), Rate(3, 3600)) for port in (1, 2))
    for made in (one, other):
        assert [made.refusal(("10.0.0.1", 5)) for _ in range(5)] == ["", "", "", RATE, RATE]
        assert made.refusal(("10.0.0.2", 5)) == ""
    assert [one.refusal("") for _ in range(5)] == [""] * 5


def test_keys_differ_by_the_secret_the_listener_and_the_client() -> None:
    drawn = itertools.product((b"a", b"b"), ("x", "y"), (b"1", b"2"))
    keys = [keyed_hash(secret, address)(what) for secret, address, what in drawn]
    assert len(set(keys)) == 8
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


@given(st.binary())
def test_any_octets_can_be_written_as_a_message(data: bytes) -> None:
    text = "".join(rf"\x{octet:02x}" for octet in data)
    assert unescape(parse_escaped(text)) == data


def test_a_message_has_escapes_and_is_else_utf_8() -> None:
    assert unescape(parse_escaped(r"a\r\n\t\\x41\x41 é")) == b"a\r\n\t\\x41A \xc3\xa9"


@pytest.mark.parametrize(
    ("text", "said"), [(r"ab\q", r"no escape \q (character 3)"), ("\\", "(character 1)"), (r"\x4", r"\x (")]
)
def test_a_wrong_escape_is_told_with_its_position(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="there are") as found:
        parse_escaped(text)
    assert said in str(found.value)
