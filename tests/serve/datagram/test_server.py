"""Datagram listeners of a real daemon: which worker answers, and what deaths, scaling, reloads and stops leave."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import datagram_client, endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program
from tests.support.processes import eventually

UDP = "udp://127.0.0.1:0"


def asks(sock: socket.socket, data: bytes = b"?") -> int:
    """Sends a datagram to the handler `Who`; the pid of the worker that has answered it."""
    sock.send(data)
    pid, _, rest = sock.recv(65536).partition(b" ")
    assert rest == data
    return int(pid)


@pytest.fixture
def clients(harness: Harness) -> Iterator[Callable[..., list[socket.socket]]]:
    """Makes datagram clients that are closed at the end."""
    with ExitStack() as stack:

        def make(daemon: Daemon, count: int = 1, address: str | None = None) -> list[socket.socket]:
            return [stack.enter_context(datagram_client(address or daemon.address)) for _ in range(count)]

        yield make


Clients = Callable[..., list[socket.socket]]


def serve_who(harness: Harness, **more: Any) -> Daemon:
    return harness.daemon(**{"target": "grams:Who", "listen": (UDP,), **more})


@pytest.mark.parametrize("address", [UDP, "udp://[::1]:0", "udp://localhost:0", "udp://0.0.0.0:0", "udp://[::]:0"])
def test_datagrams_are_answered_wherever_the_daemon_listens(harness: Harness, clients: Clients, address: str) -> None:
    daemon = serve_who(harness, listen=(address,)).run()
    to = daemon.address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]").replace("localhost", "127.0.0.1")
    for sock in clients(daemon, 3, to):
        assert asks(sock) in daemon.workers().values()


@pytest.mark.parametrize("abstract", [False, True])
def test_a_unix_socket_of_datagrams_is_shared_by_all_workers(
    harness: Harness, clients: Clients, tmp_path: Path, abstract: bool
) -> None:
    address = f"unix-dgram:@{tmp_path}" if abstract else f"unix-dgram:{tmp_path / 'd.sock'}"
    daemon = serve_who(harness, listen=(address,)).run()
    (sock,) = clients(daemon)
    serving = daemon.workers()
    first = asks(sock)
    os.kill(first, signal.SIGSTOP)
    try:
        other = eventually(lambda: asks(sock), what="an answer")  # by the one that is not stopped
    finally:
        os.kill(first, signal.SIGCONT)
    assert {first, other} == {*serving.values()}


def test_the_built_in_echo_needs_no_handler(harness: Harness, clients: Clients) -> None:
    daemon = harness.daemon(listen=(UDP,)).run()
    (sock,) = clients(daemon)
    for data in (b"", b"x", bytes(65_507)):
        sock.send(data)
        assert sock.recv(65536) == data


def test_a_factory_is_taken_for_what_its_address_wants(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, target="grams:factory").run()
    assert asks(clients(daemon)[0]) in daemon.workers().values()


def test_clients_keep_their_worker_and_spread_over_all_workers(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, workers=3).run()
    socks = clients(daemon, 60)
    first = [asks(sock) for sock in socks]
    assert {*first} == {*daemon.workers().values()}
    assert [asks(sock) for sock in socks] == first


def test_queue_of_a_killed_worker_is_its_successors(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, workers=1).run()
    (sock,) = clients(daemon)
    before = asks(sock)
    os.kill(before, signal.SIGSTOP)
    for number in range(100):
        sock.send(b"%d" % number)
    os.kill(before, signal.SIGKILL)
    daemon.expect("killed by SIGKILL")
    answers = [sock.recv(100).split() for _ in range(100)]
    assert [int(number) for _, number in answers] == [*range(100)]
    assert {int(pid) for pid, _ in answers} == {*daemon.wait_workers(1, without=[before]).values()}


def test_scaling_binds_more_and_serves_what_was_queued(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, workers=2).run()
    socks = clients(daemon, 80)
    assert daemon.command("scale", 4).returncode == 0
    workers = daemon.wait_workers(4)
    owners = [asks(sock) for sock in socks]
    assert {*owners} == {*workers.values()}
    for slot in (3, 4):  # what is sent now lies in their queues when the order comes
        os.kill(workers[slot], signal.SIGSTOP)
    for sock in socks:
        sock.send(b"queued")
    daemon.signal(signal.SIGTTOU)
    daemon.signal(signal.SIGTTOU)
    daemon.wait_log("scale to 2 workers")
    for sock in socks:
        sock.send(b"after")
    for slot in (3, 4):
        os.kill(workers[slot], signal.SIGCONT)
    left = {workers[1], workers[2]}
    for sock, owner in zip(socks, owners, strict=True):
        answers = {word: int(pid) for pid, word in (sock.recv(100).split() for _ in range(2))}
        assert answers[b"queued"] == owner
        assert answers[b"after"] in left
    assert {*daemon.wait_workers(2).values()} == left


def test_a_reload_and_an_upgrade_keep_the_sockets(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, workers=2).run()
    socks = clients(daemon, 20)
    address = daemon.address
    groups = _groups(socks)
    for verb in ("reload", "upgrade"):
        before = {*daemon.workers().values()}
        result = daemon.command(verb)
        assert result.returncode == 0, result.stderr
        assert not before & {*daemon.wait_workers(2, without=before).values()}
        assert (daemon.address, _groups(socks)) == (address, groups)


def _groups(socks: list[socket.socket]) -> list[list[int]]:
    """Which clients have the same worker."""
    owners = [asks(sock) for sock in socks]
    return sorted([index for index, owner in enumerate(owners) if owner == one] for one in {*owners})


def test_a_reload_may_change_the_number_of_workers(harness: Harness, clients: Clients, tmp_path: Path) -> None:
    file = tmp_path / "grams.yaml"
    text = f"name: tested\nworkers: NUMBER\nlisten: [{{address: '{UDP}', handler: 'grams:Who'}}]\n"
    file.write_text(text.replace("NUMBER", "1"))
    daemon = serve_who(harness, target=file, listen=(), workers=None).run()
    socks = clients(daemon, 40)
    for number in (3, 2):
        file.write_text(text.replace("NUMBER", str(number)))
        assert daemon.command("reload").returncode == 0
        daemon.wait_workers(number)
        assert len(_groups(socks)) == number


def test_a_restart_hands_the_sockets_over(harness: Harness, clients: Clients) -> None:
    daemon = harness.daemon(target="grams:Who", listen=(UDP,), workers=2).start()
    socks = clients(daemon, 20)
    groups, address = _groups(socks), daemon.address
    result = daemon.command("restart")
    assert result.returncode == 0, result.stderr
    daemon.wait_workers(2)
    assert daemon.address == address
    eventually(lambda: _groups(socks) == groups, what="the same groups")


def test_queued_datagrams_are_answered_at_a_stop(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, workers=1).run()
    (sock,) = clients(daemon)
    (pid,) = daemon.workers().values()
    os.kill(pid, signal.SIGSTOP)
    for number in range(200):
        sock.send(b"%d" % number)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("draining")
    os.kill(pid, signal.SIGCONT)
    assert [int(sock.recv(100).split()[1]) for _ in range(200)] == [*range(200)]
    sock.send(b"gone")
    with pytest.raises(ConnectionRefusedError):
        sock.recv(100)


def test_tasks_of_a_handler_are_waited_for_at_a_drain(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, target="grams:Late", workers=1).run()
    (sock,) = clients(daemon)
    pid = asks_late(sock)
    assert daemon.command("reload").returncode == 0
    assert sock.recv(100) == b"%d late x" % pid
    daemon.wait_workers(1, without=[pid])


def asks_late(sock: socket.socket) -> int:
    sock.send(b"x")
    pid, _, rest = sock.recv(100).partition(b" ")
    assert rest == b"taken"
    return int(pid)


def test_exception_of_a_handler_is_reported_and_ends_nothing(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, target="grams:Trouble", workers=1).run()
    daemon.expect("ValueError: as asked")
    (sock,) = clients(daemon)
    pid = asks(sock)
    sock.send(b"raise")
    assert asks(sock) == pid
    assert eventually(lambda: daemon.status()["workers"][0]["errors"], what="the count") == 1


def test_a_worker_whose_handler_closes_its_socket_is_replaced(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, target="grams:Trouble", workers=1).run()
    (sock,) = clients(daemon)
    pid = asks(sock)
    sock.send(b"close")
    daemon.wait_log("has closed udp://")
    assert asks(sock) in daemon.wait_workers(1, without=[pid]).values()


def test_a_protocol_that_can_not_begin_is_told_at_the_start(harness: Harness) -> None:
    daemon = harness.daemon(target="grams:Unmade", listen=(UDP,), workers=1)
    result = daemon.command("start")
    assert result.returncode == 1
    assert "RuntimeError: no database" in result.stderr
    daemon.expect("no database")


def test_a_second_daemon_is_told_that_the_address_is_in_use(harness: Harness) -> None:
    daemon = serve_who(harness).run()
    other = harness.daemon("other", listen=(daemon.address,))
    for verb in ("start", "check"):
        result = other.command(verb)
        assert result.returncode
        assert f"{daemon.address} is in use by " in result.stderr


def test_datagrams_dropped_by_the_kernel_are_counted(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, workers=1).run()
    (sock,) = clients(daemon)
    pid = asks(sock)
    os.kill(pid, signal.SIGSTOP)
    try:
        for _ in range(5000):
            sock.send(bytes(100))
    finally:
        os.kill(pid, signal.SIGCONT)
    dropped = daemon.status()["listeners"][0]["drops"]

    def received() -> int:
        return int(daemon.status()["workers"][0]["datagrams"]["received"])

    eventually(lambda: received() + dropped == 5001, what="all to be counted")
    assert received() > 1
    assert dropped > 1
    text = daemon.command("status").stdout
    assert [daemon.address, "grams:Who", "-", "-", str(dropped), "-"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("address", "handler", "said"),
    [
        (UDP, "forms:as_streams", "is a streams coroutine, but at udp://127.0.0.1:0 come datagrams"),
        (UDP, "forkd.builtin:Echo", "is an asyncio.Protocol, but at udp://127.0.0.1:0 come datagrams"),
        ("tcp://127.0.0.1:0", "grams:Who", "is an asyncio.DatagramProtocol, but at tcp://127.0.0.1:0 come connections"),
    ],
)
def test_a_handler_that_does_not_fit_its_address_is_told(
    harness: Harness, address: str, handler: str, said: str
) -> None:
    daemon = harness.daemon(target=handler, listen=(address,), workers=1)
    for verb in ("check", "start"):
        result = daemon.command(verb)
        assert result.returncode
        assert said in result.stderr
    daemon.expect(re.escape(said))


def test_an_inherited_socket_of_datagrams_is_served(harness: Harness, clients: Clients) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        daemon = serve_who(harness, listen=(f"fd:{sock.fileno()}",)).run(pass_fds=[sock.fileno()])
        address = f"udp://127.0.0.1:{sock.getsockname()[1]}"
    assert daemon.address == address
    (client,) = clients(daemon)
    assert asks(client) in daemon.workers().values()
    old = set(daemon.workers().values())
    assert daemon.command("reload").returncode == 0
    # An old one may still be on its way out of the socket that both have.
    new = eventually(lambda: {asks(client)} - old, what="an answer of a new worker")
    assert new <= set(daemon.workers().values())


def test_reply_leaves_from_the_address_its_request_came_to(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, listen=("udp://0.0.0.0:0",)).run()
    for host in ("127.0.0.1", "127.0.0.2", "127.9.9.9"):
        # Connected, it takes answers from just there.
        (sock,) = clients(daemon, 1, daemon.address.replace("0.0.0.0", host))
        assert asks(sock) in daemon.workers().values()


def test_a_multicast_group_is_joined_and_one_worker_serves_it(harness: Harness) -> None:
    daemon = serve_who(harness, target=None, listen=(), workers=3)
    file = daemon.directory / "multi.yaml"
    listen = "{address: 'udp://0.0.0.0:0', handler: 'grams:Who', multicast: ['239.255.77.7%lo']}"
    file.write_text(f"name: tested\nworkers: 3\nlisten: [{listen}]\n")
    daemon.target = [file]
    daemon.options = [one for one in daemon.options if not str(one).startswith("--workers")]
    daemon.run()
    port = endpoint(daemon.address)[1][1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for number in range(20):
            sock.sendto(b"%d" % number, ("239.255.77.7", port))
        answers = [sock.recvfrom(100) for _ in range(20)]
        assert {(data.split()[0], where) for data, where in answers} == {
            (b"%d" % daemon.workers()[1], ("127.0.0.1", port))
        }
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):  # none is answered twice
            sock.recv(100)
        file.write_text(file.read_text().replace("239.255.77.7", "239.255.77.8"))
        assert daemon.command("reload").returncode == 0
        sock.sendto(b"left", ("239.255.77.7", port))
        sock.sendto(b"joined", ("239.255.77.8", port))
        sock.settimeout(20)
        assert sock.recv(100).split()[1] == b"joined"
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.recv(100)


def test_dig_is_answered_by_a_server_of_a_dns_library(harness: Harness) -> None:
    needs_program("dig")
    daemon = serve_who(harness, target="dns:Server").run()
    port = endpoint(daemon.address)[1][1]
    command = ["dig", "@127.0.0.1", "-p", str(port), "+short", "+time=5", "www.example.com", "A"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    assert result.stdout.split() == ["192.0.2.16"]


def test_number_of_workers_that_can_not_be_bound_is_refused(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness, workers=2).run()
    socks = clients(daemon, 20)
    groups = _groups(socks)
    result = daemon.command("scale", 300)
    assert result.returncode == 1
    assert "300 workers with 1 datagram sockets each are more than the 253" in result.stderr
    assert (len(daemon.workers()), _groups(socks)) == (2, groups)
    daemon.expect("scale to 300 workers refused, 2 stay")


def test_the_latest_peers_are_listed_with_their_counts(harness: Harness, clients: Clients) -> None:
    daemon = serve_who(harness).run()
    assert "RECENT" not in daemon.command("clients").stdout
    made = clients(daemon, 3)
    for count, sock in enumerate(made, start=1):
        for _ in range(count):
            asks(sock)
    names = {"{}:{}".format(*sock.getsockname()): count for count, sock in enumerate(made, start=1)}

    def listed() -> dict[str, int]:
        found = json.loads(daemon.command("clients", "--json").stdout)
        assert all(one["state"] == "recent" and one["id"] is None and one["age"] >= one["idle"] >= 0 for one in found)
        assert {one["listener"] for one in found} <= {daemon.address}
        return {one["client"]: one["datagrams_in"] for one in found if one["datagrams_in"] == one["datagrams_out"]}

    assert eventually(lambda: (found := listed()) == names and found, what="three peers") == names
    text = daemon.command("clients", "--listener", daemon.address, "--sort=-client").stdout
    rows = [line.split() for line in text.splitlines() if daemon.address in line]
    assert [(row[2], row[-2], row[-1]) for row in rows] == [
        (name, str(count), str(count)) for name, count in sorted(names.items(), reverse=True)
    ]
