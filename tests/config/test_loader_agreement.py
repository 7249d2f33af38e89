"""What settings must agree on: each mistake that no single value shows, told where it stands in the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkd.config.loader import read_settings

FILE = """\
mode: once
listen: [{address: 'ADDRESS', handler: 'a:b'}]
once: ONCE
"""
TCP = "tcp://127.0.0.1:7"


def mistakes(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    return [str(problem).removeprefix(f"{path}:") for problem in read_settings(path).problems]


@pytest.mark.parametrize(
    ("address", "once", "said"),
    [
        (TCP, "{fd: 1}", "3:12: once.fd: 1 is where forkd's own output goes; take 0, or a number from 3 on"),
        ("unix:@x", "{from: [10.0.0.0/8]}", "3:14: once.from: means where a tcp client comes from, and unix:@x has"),
        ("unix:@x", f"{{rendezvous: '{TCP}'}}", "2:20: listen[0].address: a rendezvous is of two tcp addresses"),
        (TCP, f"{{rendezvous: '{TCP}'}}", f"3:20: once.rendezvous: {TCP} is our own address too"),
        (TCP, "{rendezvous: 'tcp://[::1]:9', adopt: yes}", "3:44: once.adopt: a rendezvous has no listener whose"),
        (TCP, "{rendezvous: 'tcp://[::1]:9', from: ['::1']}", "3:43: once.from: a rendezvous is with its peer alone"),
    ],
)
def test_settings_of_mode_once_that_do_not_go_together_are_told(
    tmp_path: Path, address: str, once: str, said: str
) -> None:
    text = FILE.replace("ADDRESS", address).replace("ONCE", once)
    (found,) = mistakes(tmp_path, text)
    assert found.startswith(said)
    assert mistakes(tmp_path, text.replace("mode: once", "mode: pool")) == []


def test_mode_once_has_one_listener(tmp_path: Path) -> None:
    text = "mode: once\nlisten: [{address: 'unix:@a', handler: 'a:b'}, {address: 'unix:@b', handler: 'a:b'}]\n"
    assert mistakes(tmp_path, text) == ["2:9: listen: mode once serves one client at one address, and here are 2"]


def test_wrong_network_or_peer_is_told_with_what_was_meant(tmp_path: Path) -> None:
    once = "{from: [10.1.2.3/8], rendezvous: 'tcp://[::1]:0'}"
    assert mistakes(tmp_path, FILE.replace("ADDRESS", TCP).replace("ONCE", once)) == [
        "3:15: once.from[0]: '10.1.2.3/8' is not a network; did you mean 10.0.0.0/8?",
        "3:40: once.rendezvous: 'tcp://[::1]:0' can't be connected to; write tcp://HOST:PORT with the other end's port",
    ]


@pytest.mark.parametrize(
    ("address", "more", "said"),
    [
        (
            "udp://[::1]:7",
            "kind: streams",
            "kind: streams serves no datagrams, which come to udp://[::1]:7; it wants kind",
        ),
        ("unix-dgram:@x", "kind: protocol", "kind: protocol serves no datagrams, which come to unix-dgram:@x"),
        (
            TCP,
            "kind: datagram",
            f"kind: datagram serves no connections, which come to {TCP}; it wants kind: protocol, streams, socket",
        ),
        ("unix:@a", "freebind: true", "freebind: is about tcp and udp addresses, and unix:@a is none"),
        (TCP, "multicast: [239.1.2.3]", f"multicast: groups are joined by udp listeners, and {TCP} is none"),
        (
            "udp://[::1]:7",
            "multicast: [10.1.2.3]",
            "multicast[0]: '10.1.2.3' is not a multicast group; write 239.1.2.3",
        ),
        (
            "udp://[::1]:7",
            "multicast: ['ff02::1%a b']",
            "multicast[0]: 'ff02::1%a b': a network interface has a name of",
        ),
    ],
)
def test_settings_that_do_not_go_with_the_address_are_told(tmp_path: Path, address: str, more: str, said: str) -> None:
    listener = f"{{address: '{address}', handler: 'a:b', {more}}}"
    (found,) = mistakes(tmp_path, f"listen:\n- address: nonsense\n  handler: 'a:b'\n- {listener}\n")[-1:]
    assert f"listen[1].{said}" in found


@pytest.mark.parametrize("address", ["udp://[::1]:7", "unix-dgram:@x", "fd:"])
def test_datagrams_may_be_served_by_what_says_so(tmp_path: Path, address: str) -> None:
    assert mistakes(tmp_path, f"listen: [{{address: '{address}', handler: 'a:b', kind: datagram}}]\n") == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("limits.per_ip", "limits: {per_ip: 4}"),
        ("limits.rate_per_ip", "limits: {rate_per_ip: 4/s}"),
        ("allow", "allow: ['::1']"),
        ("deny", "deny: [10.0.0.0/8]"),
    ],
)
def test_a_unix_socket_has_no_addresses_to_ask_for(tmp_path: Path, key: str, value: str) -> None:
    """The place is right where a listener before it can't be read."""
    text = f"listen:\n  - {{address: 'x', handler: 'a:b'}}\n  - {{address: 'ADDRESS', handler: 'a:b', {value}}}\n"
    found = mistakes(tmp_path, text.replace("ADDRESS", "unix:@x"))
    assert len(found) == 2
    assert found[1].startswith("3:")
    assert f": listen[1].{key}: means the addresses that clients come from, and unix:@x has none" in found[1]
    assert len(mistakes(tmp_path, text.replace("ADDRESS", TCP))) == 1


@pytest.mark.parametrize(
    ("address", "proxies", "why"),
    [
        ("unix:@x", "10.0.0.0/8", "names networks, and what connects to unix:@x has no address; write [unix]"),
        (
            "unix-dgram:@x",
            "unix",
            "is of connections and of udp://, and at unix-dgram:@x come datagrams",
        ),
        ("tcp://[::1]:7007", "unix", "unix is for a unix socket, and tcp://[::1]:7007 is none; write the proxies'"),
        ("udp://[::1]:7007", "unix, '::1'", "unix is for a unix socket, and udp://[::1]:7007 is none"),
        ("unix:@x", "'unix:'", "'unix:' is not a network; did you mean unix?"),
    ],
)
def test_proxies_that_can_not_connect_there_are_told(tmp_path: Path, address: str, proxies: str, why: str) -> None:
    text = f"listen: [{{address: '{address}', handler: 'a:b', proxy_protocol: [{proxies}]}}]\n"
    (found,) = mistakes(tmp_path, text)
    assert "listen[0].proxy_protocol" in found
    assert why in found


def test_once_reads_no_header_of_datagrams(tmp_path: Path) -> None:
    text = "listen: [{address: 'udp://[::1]:7007', handler: 'a:b', proxy_protocol: ['::1']}]\n"
    assert mistakes(tmp_path, text) == []
    (found,) = mistakes(tmp_path, f"{text}mode: once\n")
    assert "listen[0].proxy_protocol: is of daemons where there are datagrams; in mode once no header is read" in found


def test_addresses_of_clients_are_known_where_proxies_connect_to_a_unix_socket(tmp_path: Path) -> None:
    rules = "allow: ['::1'], deny: [10.0.0.0/8], limits: {per_ip: 4, rate_per_ip: 4/s}"
    text = f"listen: [{{address: 'unix:@x', handler: 'a:b', proxy_protocol: [unix], {rules}}}]\n"
    assert mistakes(tmp_path, text) == []
    assert mistakes(tmp_path, f"{text}mode: once\nonce: {{from: ['::1']}}\n") == []
    assert len(mistakes(tmp_path, text.replace("proxy_protocol: [unix], ", ""))) == 4


def test_message_with_a_wrong_escape_is_told_with_its_place(tmp_path: Path) -> None:
    text = f"listen: [{{address: '{TCP}', handler: 'a:b', limits: {{message: 'so\\long'}}}}]\n"
    (found,) = mistakes(tmp_path, text)
    assert "listen[0].limits.message: 'so\\\\long' has no escape \\l (character 3); there are" in found


@pytest.mark.parametrize(
    ("setting", "key", "why"),
    [
        ("tls: {cert: c.pem}", "tls.cert", "makes its own TLS"),
        ("proxy_protocol: [10.0.0.0/8]", "proxy_protocol", "accepts its clients itself"),
        ("allow: [10.0.0.0/8]", "allow", "accepts its clients itself"),
        ("limits: {connections: 5}", "limits.connections", "accepts its clients itself"),
        ("limits: {rate_per_ip: 5/s}", "limits.rate_per_ip", "accepts its clients itself"),
        ("limits: {write_buffer: 1MiB}", "limits.write_buffer", "reads, writes and closes its connections itself"),
        ("keepalive: {heartbeat: 5s}", "keepalive.heartbeat", "reads, writes and closes its connections itself"),
    ],
)
def test_settings_that_cannot_hold_for_a_server_are_told(tmp_path: Path, setting: str, key: str, why: str) -> None:
    text = f"listen:\n  - address: '{TCP}'\n    handler: a:b\n    kind: server\n    {setting}\n"
    (found,) = mistakes(tmp_path, text)
    assert found.endswith(f"listen[0].{key}: can't hold: a whole server {why}")
    assert mistakes(tmp_path, text.replace("    kind: server\n", "")) == []
