"""Clients of a unix datagram socket that do not read their answers: what lies unread takes from a buffer of all."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.clients import datagram_client, endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program
from tests.support.network_namespaces import private_network

#: Seconds in which an answer comes when nothing is in its way, with much to spare.
PROMPT = 2.0


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


def flood(stack: ExitStack, daemon: Daemon, count: int, requests: list[bytes], *, connected: bool) -> None:
    """Clients that send requests and read no answer, each as many as are taken."""
    where = endpoint(daemon.address)[1]
    for _ in range(count):
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        sock.bind("")
        sock.settimeout(PROMPT)
        if connected:
            sock.connect(where)
        for request in requests:
            with suppress(TimeoutError):
                sock.send(request) if connected else sock.sendto(request, where)


@pytest.mark.parametrize("connected", [True, False], ids=["connected", "unconnected"])
@pytest.mark.parametrize(("size", "buffer"), [(0, "0"), (100, "0"), (9000, "0"), (100, "104KiB"), (9000, "104KiB")])
def test_clients_that_do_not_read_silence_no_other(
    harness: Harness, stack: ExitStack, tmp_path: Path, connected: bool, size: int, buffer: str
) -> None:
    file = tmp_path / "grams.yaml"
    file.write_text(
        "name: tested\nworkers: 2\nlisten:\n  - handler: forkd.builtin:DatagramEcho\n    socket: {send_buffer: "
        f"{buffer}}}\n    address: unix-dgram:{tmp_path / 'd.sock'}\n"
    )
    daemon = harness.daemon(target=file, listen=(), workers=None).run()
    good = stack.enter_context(datagram_client(daemon.address, PROMPT))
    flood(stack, daemon, 50, [bytes(size)] * 60, connected=connected)
    for number in range(100):
        good.send(b"%d" % number)
        assert good.recv(100) == b"%d" % number
    new = stack.enter_context(datagram_client(daemon.address, PROMPT))
    for number in range(10):
        new.send(b"%d" % number)
    assert sorted(int(new.recv(100)) for _ in range(10)) == [*range(10)]  # two workers answer


def test_hosts_that_have_vanished_silence_no_other(harness: Harness, stack: ExitStack) -> None:
    stack.enter_context(private_network())
    needs_program("ip")
    # The other end of the wire answers no ARP request; what is sent there waits for an answer in the kernel (arp(7)).
    for words in (
        "link add w0 type veth peer name w1",
        "addr add 10.9.0.1/16 dev w0",
        "link set w0 up",
        "link set w1 up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    daemon = harness.daemon(target="grams:Push", listen=("udp://0.0.0.0:0",), workers=1).run()
    good = stack.enter_context(datagram_client(daemon.address.replace("0.0.0.0", "127.0.0.1"), PROMPT))
    good.send(b"300 " + b" ".join(b"10.9.0.%d" % number for number in range(2, 12)))
    good.recv(1000)
    for _ in range(10):
        good.send(b"0")
        assert good.recv(100).endswith(b" 0")
