"""Who may come in: networks, what counts as one client, and how often it may come."""

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
from forkd.config.escapes import octets, parse_escaped
from forkd.config.listener import Limits, Listener
from forkd.config.scales import Rate
from forkd.config.units import parse_network
from forkd.serve.gate import DENIED, RATE, Gate, hashing
from forkd.serve.networks import Networks, origin, packed
from forkd.system.counts import Ledger
from forkd.system.memory import WRITE
from forkd.system.scoreboard import Scoreboard

NETWORKS = st.one_of(
    st.tuples(st.ip_addresses(v=version), st.integers(0, bits)).map(lambda one: ipaddress.ip_network(one, strict=False))
    for version, bits in ((4, 32), (6, 128))
)


@given(st.lists(NETWORKS, max_size=8), st.data())
def test_an_address_is_in_networks_as_the_standard_library_has_it(networks: list[Any], data: st.DataObject) -> None:
    near = st.sampled_from(networks or [ipaddress.ip_network("::/0")]).map(lambda one: one[-1])
    found = data.draw(near | st.ip_addresses())
    mapped = getattr(found, "ipv4_mapped", None) or found
    plain = [one for one in networks if one.version == mapped.version]
    assert Networks(networks).has((str(found), 7)) >= any(mapped in one for one in plain)
    if not any(one.version == 6 and one.subnet_of(parse_network("::ffff:0:0/96")) for one in networks):
        assert Networks(networks).has((str(found), 7)) == any(mapped in one for one in plain)


def test_an_ipv4_client_of_an_ipv6_socket_is_an_ipv4_client() -> None:
    for text in ("10.0.0.0/8", "::ffff:10.0.0.0/104"):
        those = Networks([parse_network(text)])
        assert those.has(("::ffff:10.1.2.3", 1, 0, 0))
        assert those.has(("10.1.2.3", 1))
        assert not those.has(("::ffff:11.1.2.3", 1, 0, 0))
    assert not Networks([parse_network("::/0")]).has(("10.1.2.3", 1))


def test_one_client_is_an_ipv4_address_or_an_ipv6_network_of_64_bits() -> None:
    assert origin(("::ffff:10.1.2.3", 1, 0, 0)) == origin(("10.1.2.3", 2)) == bytes([10, 1, 2, 3])
    assert origin(("2001:db8::1", 1, 0, 0)) == origin(("2001:db8::ffff:1", 2, 0, 0)) != origin(("2001:db8:0:1::", 1))
    assert packed(("fe80::1%eth0", 1, 0, 3))[-1] == 1
    assert packed("") == packed(b"") == packed(None) == b""


@pytest.fixture
def ledger() -> Iterator[Ledger]:
    board = Scoreboard(2)
    board.claim()
    board.regions._views[0] = board.regions._map(0, WRITE)
    yield Ledger(board, 0)
    os.close(board.descriptor)
    os.close(board.regions.descriptor)


def gate(ledger: Ledger, address: str = "tcp://127.0.0.1:7", rate: Rate | None = None, **more: Any) -> Gate:
    listener = Listener(address=parse_address(address), handler="a:b", limits=Limits(rate_per_ip=rate))
    networks = {key: tuple(map(parse_network, value)) for key, value in more.items()}
    return Gate(replace(listener, **networks), address, ledger)


def test_who_is_denied_is_so_although_allowed_and_who_has_no_address_is_not_allowed(ledger: Ledger) -> None:
    made = gate(ledger, allow=["10.0.0.0/8"], deny=["10.9.0.0/16"])
    found = [made.admits(peer) for peer in (("10.1.1.1", 1), ("10.9.1.1", 1), ("11.1.1.1", 1), "")]
    assert found == ["", DENIED, DENIED, DENIED]
    assert [gate(ledger, deny=["10.9.0.0/16"]).admits(peer) for peer in ("", ("10.9.1.1", 1))] == ["", DENIED]


def test_each_address_has_its_own_rate_at_each_listener(ledger: Ledger) -> None:
    one, other = (gate(ledger, f"udp://127.0.0.1:{port}".replace("udp", "tcp"), Rate(3, 3600)) for port in (1, 2))
    for made in (one, other):
        assert [made.admits(("10.0.0.1", 5)) for _ in range(5)] == ["", "", "", RATE, RATE]
        assert made.admits(("10.0.0.2", 5)) == ""
    assert [one.admits("") for _ in range(5)] == [""] * 5


def test_keys_differ_by_the_secret_the_listener_and_the_client() -> None:
    drawn = itertools.product((b"a", b"b"), ("x", "y"), (b"1", b"2"))
    keys = [hashing(secret, address)(what) for secret, address, what in drawn]
    assert len(set(keys)) == 8
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


@given(st.binary())
def test_any_octets_can_be_written_as_a_message(data: bytes) -> None:
    text = "".join(rf"\x{octet:02x}" for octet in data)
    assert octets(parse_escaped(text)) == data


def test_a_message_has_escapes_and_is_else_utf_8() -> None:
    assert octets(parse_escaped(r"a\r\n\t\\x41\x41 é")) == b"a\r\n\t\\x41A \xc3\xa9"


@pytest.mark.parametrize(
    ("text", "said"), [(r"ab\q", r"no escape \q (character 3)"), ("\\", "(character 1)"), (r"\x4", r"\x (")]
)
def test_an_escape_that_is_none_is_told_with_its_place(text: str, said: str) -> None:
    with pytest.raises(ValueError, match="there are") as found:
        parse_escaped(text)
    assert said in str(found.value)
