"""`forkd clients` with a real daemon: that every column says of a client what it has done, what is shown and in which
order, and which of them an operator closes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from forkd.cli.clients import COLUMNS, _sorted
from forkd.errors import ForkdError
from forkd.messages import ClientsReply
from forkd.system.client_list import list_clients
from forkd.system.proc import network_namespace_of
from tests.support.changing_daemon import Changing, listener
from tests.support.clients import at_end, dial, echoes, endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.forked import exit_code, start_child
from tests.support.needs import needs_program, needs_root
from tests.support.processes import eventually, title, wait_end
from tests.support.unprivileged import NOBODY

CLOCK = 0.02  # seconds: the kernel counts idle time in its ticks, and a worker accepts a little after the connection


def listed(daemon: Daemon, *options: str) -> list[dict[str, Any]]:
    result = daemon.command("clients", "--json", *options)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


def name_of(sock: socket.socket) -> str:
    """How the list calls a client."""
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if sock.family == socket.AF_INET6 else f"{host}:{port}"


def found(daemon: Daemon, sock: socket.socket) -> dict[str, Any]:
    """What the list says of a client."""
    (one,) = [one for one in listed(daemon) if one["client"] == name_of(sock)]
    return one


def from_host(harness: Harness, daemon: Daemon, host: str) -> socket.socket:
    """A client that has this address, and is served."""
    sock = harness.closing(socket.socket())
    sock.settimeout(20)
    sock.bind((host, 0))
    sock.connect(endpoint(daemon.address)[1])
    assert echoes(sock)
    return sock


def test_a_client_is_told_of_as_it_is(harness: Harness) -> None:
    daemon = harness.daemon(target="deaf:Deaf").start()
    begun = monotonic()
    client = harness.connect(daemon)
    assert echoes(client, bytes(1000))
    connected = monotonic()
    first = eventually(lambda: one if (one := found(daemon, client))["age"] > 0.3 else None, what="its age")
    before = monotonic()
    assert echoes(client, b"more")
    said = monotonic()
    asked = monotonic()
    second = found(daemon, client)
    answered = monotonic()
    assert asked - connected - CLOCK <= second["age"] <= answered - begun
    assert asked - said - CLOCK <= second["idle"] <= answered - before + CLOCK
    # It would have stayed that much longer idle without a word; a list that takes so long tells nothing.
    assert second["idle"] < first["idle"] + asked - before or answered - asked > first["idle"]
    assert first["idle"] > 0.3 - CLOCK - (connected - begun)
    assert {key: second[key] for key in ("in", "out", "recvq", "sendq", "state", "listener")} == {
        "in": 1004, "out": 1004, "recvq": 0, "sendq": 0, "state": "established", "listener": daemon.address,
    }  # fmt: skip
    assert daemon.workers()[second["worker"]] == second["pid"]
    assert 0 < second["rtt"] < 10
    assert (first["id"], set(first)) == (second["id"], {*COLUMNS, "pid", "proxy"})


def test_queues_of_a_client_that_does_not_read_are_shown(harness: Harness) -> None:
    daemon = harness.daemon(target="deaf:Deaf").start()
    deaf, lazy = harness.connect(daemon), harness.connect(daemon)
    assert echoes(deaf, b"stop")
    deaf.sendall(bytes(5000))
    lazy.sendall(b"send 20000000")
    one = eventually(lambda: one if (one := found(daemon, deaf))["recvq"] else None, what="what is unread")
    assert (one["in"], one["out"], one["recvq"], one["sendq"]) == (5004, 4, 5000, 0)
    two = eventually(lambda: two if (two := found(daemon, lazy))["sendq"] else None, what="what is unsent")
    assert (two["in"], two["recvq"]) == (13, 0)
    assert 0 < two["out"] < 20_000_000
    assert two["sendq"] > 0
    deaf.shutdown(socket.SHUT_WR)
    eventually(lambda: found(daemon, deaf)["state"] == "close-wait", what="the end of file")
    assert found(daemon, deaf)["recvq"] == 5000


def test_an_age_is_not_that_of_the_connection_before(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    old = harness.connect(daemon)
    eventually(lambda: found(daemon, old)["age"] > 1, what="its age")
    old.close()
    eventually(lambda: daemon.status()["workers"][0]["clients"] == 0, what="its end")
    begun = monotonic()
    assert echoes(harness.connect(daemon))
    (one,) = listed(daemon)
    assert one["age"] <= monotonic() - begun


def test_every_listener_has_its_clients(harness: Harness, tmp_path: Path) -> None:
    path, name = f"unix:{tmp_path / 'socket'}", f"unix:@forkd-test-{os.getpid()}"
    daemon = harness.daemon(listen=("tcp://127.0.0.1:0", "tcp://[::1]:0", "tcp://0.0.0.0:0", path, name)).start()
    addresses = [one["address"] for one in daemon.status()["listeners"]]
    clients = [harness.connect(address.replace("0.0.0.0", "127.0.0.1")) for address in addresses]
    assert all(echoes(client) for client in clients)
    everyone = {one["listener"]: one for one in listed(daemon)}
    assert everyone.keys() == {*addresses}
    for client, address in zip(clients[:3], addresses[:3], strict=True):
        assert everyone[address]["client"] == name_of(client)
    clients[3].sendall(b"unread echo")
    eventually(lambda: found_unix(daemon, path)["sendq"] == 11, what="the echo")
    for address in (path, name):
        one = found_unix(daemon, address)
        assert one["client"] == f"uid={os.geteuid()},pid={os.getpid()}"
        assert [one[key] for key in ("idle", "in", "out", "rtt")] == [None] * 4
        assert (one["recvq"], one["state"], one["age"] > 0) == (0, "established", True)
        assert listed(daemon, "--listener", address) == [one | {"age": pytest.approx(one["age"], abs=20)}]
    result = daemon.command("clients", "--listener", "tcp://127.0.0.9:1")
    assert (result.returncode, addresses[0] in result.stderr) == (64, True)
    table = [line.split() for line in daemon.command("clients").stdout.splitlines()]
    assert table[0] == [column.upper() for column in COLUMNS]
    assert {(row[0], row[2]) for row in table[1:]} == {(str(one["id"]), one["listener"]) for one in everyone.values()}
    for address in (path, name):
        one = found_unix(daemon, address)
        assert daemon.command("clients", "--kill", one["id"]).returncode == 0
    assert [at_end(client) for client in clients[4:]] == [True]
    assert [echoes(client) for client in clients[:3]] == [True] * 3


def found_unix(daemon: Daemon, address: str) -> dict[str, Any]:
    (one,) = [one for one in listed(daemon) if one["listener"] == address]
    return one


def test_the_list_has_the_order_that_is_asked_for(harness: Harness) -> None:
    daemon = harness.daemon().start()
    clients = [harness.connect(daemon) for _ in range(3)]
    for client, size in zip(clients, (20, 3000, 100), strict=True):
        assert echoes(client, bytes(size))
    assert [one["in"] for one in listed(daemon, "--sort", "in")] == [20, 100, 3000]
    assert [one["out"] for one in listed(daemon, "--sort=-out")] == [3000, 100, 20]
    ages = [one["age"] for one in listed(daemon)]
    assert ages == sorted(ages, reverse=True)
    result = daemon.command("clients", "--sort", "size")
    assert (result.returncode, "there are id, worker, listener" in result.stderr) == (64, True)


def test_sorting_compares_numbers_and_puts_unknown_last() -> None:
    names = ["10.0.0.10:9", "10.0.0.9:80", "uid=0,pid=7", "10.0.0.9:9"]
    rows: list[dict[str, Any]] = [{"client": name} for name in [None, *names]]
    right = ["10.0.0.9:9", "10.0.0.9:80", "10.0.0.10:9", "uid=0,pid=7"]
    assert [one["client"] for one in _sorted(rows, "client", descending=False)] == [*right, None]
    assert [one["client"] for one in _sorted(rows, "client", descending=True)] == [*right[::-1], None]


def test_client_not_accepted_yet_is_not_listed(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    (pid,) = daemon.workers().values()
    served = harness.connect(daemon)
    assert echoes(served)
    os.kill(pid, signal.SIGSTOP)
    try:
        harness.connect(daemon)
        assert [one["client"] for one in listed(daemon)] == [name_of(served)]
    finally:
        os.kill(pid, signal.SIGCONT)
    daemon.wait_clients(2)
    eventually(lambda: len(listed(daemon)) == 2, what="both clients")


def test_one_is_killed_by_its_id_and_the_others_live(harness: Harness) -> None:
    daemon = harness.daemon(target="deaf:Deaf").start()
    clients = [harness.connect(daemon) for _ in range(4)]
    assert all(echoes(client) for client in clients)
    doomed = found(daemon, clients[2])["id"]
    result = daemon.command("clients", "--kill", doomed)
    assert (result.returncode, result.stdout) == (0, "tested: closed 1 client\n"), result.stderr
    assert at_end(clients[2])
    assert daemon.wait_log("lost it by Killed, killed")
    assert str(clients[2].getsockname()) in daemon.wait_log(r"INFO .*\(killed\): by an operator")
    assert all(echoes(client) for client in (*clients[:2], clients[3]))
    result = daemon.command("clients", "--kill", doomed)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"forkd: tested has no client with the ID {doomed}\n"
    assert len(listed(daemon)) == 3


@pytest.mark.parametrize(("network", "doomed"), [("127.0.0.2", 2), ("127.0.0.2/31", 3), ("::ffff:10.0.0.3", 0)])
def test_clients_of_a_network_are_killed_and_others_live(harness: Harness, network: str, doomed: int) -> None:
    daemon = harness.daemon().start()
    hosts = ["127.0.0.2", "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"]
    clients = [from_host(harness, daemon, host) for host in hosts]
    result = daemon.command("clients", "--kill-ip", network)
    assert (result.returncode, f"closed {doomed} clients" in result.stdout) == (int(not doomed), bool(doomed))
    gone = {2: [0, 2], 3: [0, 2, 3], 0: []}[doomed]
    for number, client in enumerate(clients):
        assert at_end(client) if number in gone else echoes(client)
    result = daemon.command("clients", "--kill-ip", "10.0.0.0/8")
    assert (result.returncode, result.stderr) == (1, "forkd: tested has no client with an address in 10.0.0.0/8\n")


def test_client_that_waits_to_flush_is_killed_too(harness: Harness) -> None:
    daemon = harness.daemon(target="flood:Considerate", workers=1).start()
    client = harness.connect(daemon)
    one = eventually(lambda: one if (one := found(daemon, client))["sendq"] else None, what="what is unsent")
    assert daemon.command("clients", "--kill", one["id"]).returncode == 0
    eventually(lambda: daemon.status()["workers"][0]["clients"] == 0, what="its end")


def test_silent_worker_is_named_and_may_answer_late(harness: Harness) -> None:
    daemon = harness.daemon().start()
    clients = harness.connect_to_each(daemon, 4)
    assert all(echoes(client) for client in clients)
    slot, pid = 2, daemon.workers()[2]
    os.kill(pid, signal.SIGSTOP)
    try:
        result = daemon.command("clients", "--kill-ip", "127.0.0.1")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert result.returncode == 1
    assert result.stdout.startswith("tested: closed ")
    assert result.stderr == f"forkd: no answer in time from worker {slot} (pid {pid})\n"
    assert all(at_end(client) for client in clients)  # it does what it was told when it comes round
    assert echoes(harness.connect(daemon))
    assert [record for record in daemon.records() if "invalid message" in record] == []


def test_a_worker_that_dies_meanwhile_is_not_waited_for(harness: Harness) -> None:
    daemon = harness.daemon().start()
    pid = daemon.workers()[2]
    daemon.expect("worker 2 .*has ended: killed by SIGKILL")
    os.kill(pid, signal.SIGSTOP)
    command = [sys.executable, "-m", "forkd", "clients", *map(str, daemon.identity), "--kill-ip", "10.0.0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as asking:
        daemon.wait_log("closing the clients of 10.0.0.1/32")
        os.kill(pid, signal.SIGKILL)
        _, said = asking.communicate(timeout=20)
    assert (asking.returncode, said) == (1, "forkd: tested has no client with an address in 10.0.0.1/32\n")
    daemon.wait_workers(2, without={pid})


def test_clients_of_draining_workers_are_listed(harness: Harness, tmp_path: Path) -> None:
    gone = f"unix:{tmp_path / 'gone'}"
    site = Changing(harness, workers=1)
    site.write(listen=[listener("tcp://127.0.0.1:0"), listener(gone)], drain_timeout="1h")
    daemon = site.daemon.start()
    (old,) = daemon.workers().values()
    address = daemon.address
    clients = [site.greet(where)[0] for where in (address, gone)]
    site.write(listen=[listener("tcp://127.0.0.1:0")], drain_timeout="1h")
    assert daemon.command("reload").returncode == 0
    eventually(lambda: "draining" in title(old), what="the old worker's drain")  # else it may take one more
    clients.append(site.greet(address)[0])
    everyone = sorted((one["listener"], one["pid"] == old) for one in listed(daemon))
    assert everyone == [(address, False), (address, True), (gone, True)]
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("draining")
    assert sorted((one["listener"], one["pid"] == old) for one in listed(daemon)) == everyone
    assert daemon.command("clients", "--kill-ip", "127.0.0.0/8").stdout == "tested: closed 2 clients\n"
    assert [at_end(client) for client in (clients[0], clients[2])] == [True, True]
    assert echoes(clients[1])
    clients[1].close()
    wait_end(old)


def test_clients_in_great_number_are_each_listed_once(harness: Harness) -> None:
    daemon = harness.daemon(workers=4).start()
    clients = [harness.connect(daemon) for _ in range(400)]
    assert all(echoes(client) for client in clients)
    everyone = listed(daemon, "--sort", "client")
    assert [one["client"] for one in everyone] == [
        name_of(client) for client in sorted(clients, key=lambda client: client.getsockname()[1])
    ]
    assert len({one["id"] for one in everyone}) == 400
    assert {one["in"] for one in everyone} == {len(b"are you there?\n")}
    assert sorted({one["pid"] for one in everyone}) == sorted(daemon.workers().values())


def test_clients_without_accept_times_have_no_age() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, dial(f"tcp://127.0.0.1:{server.getsockname()[1]}") as client:
        worker = {"slot": 1, "pid": os.getpid(), "row": 0}
        places = {"address": "here", "sockets": [[server.family, *server.getsockname()]]}
        told = ClientsReply(os.getpid(), [worker], [places], [])
        assert list_clients("x", told, -1) == []  # not accepted yet
        with server.accept()[0] as served:
            (one,) = list_clients("x", told, -1)
            assert (one["client"], one["listener"], one["age"]) == (name_of(client), "here", None)
            with server.dup(), served.dup():  # by whatever descriptors it is one client
                assert len(list_clients("x", told, -1)) == 1


def test_a_daemon_that_does_not_run_has_no_clients(harness: Harness) -> None:
    result = harness.daemon().command("clients")
    assert (result.returncode, result.stderr) == (1, "forkd: tested is not running\n")


def test_the_daemons_own_user_sees_its_clients(open_harness: Harness, open_directory: Path) -> None:
    needs_program("setpriv")
    directory = open_directory / "nobodys"
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    daemon = Daemon(directory)
    open_harness.daemons.append(daemon)
    daemon.prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    client = open_harness.connect(daemon.run())
    assert echoes(client)
    command = [*daemon.prefix, sys.executable, "-m", "forkd", "clients", *map(str, daemon.identity)]
    result = subprocess.run([*command, "--json"], cwd=open_directory, capture_output=True, text=True, check=True)
    (one,) = json.loads(result.stdout)
    assert (one["client"], one["in"], one["age"] > 0) == (name_of(client), 15, True)
    subprocess.run([*command, "--kill", str(one["id"])], cwd=open_directory, capture_output=True, check=True)
    assert at_end(client)


def test_another_users_workers_are_one_sentence() -> None:
    needs_root()
    told = ClientsReply(os.getpid(), [{"slot": 1, "pid": os.getpid(), "row": 0}], [], [])

    def look() -> None:
        os.setuid(NOBODY)
        with pytest.raises(ForkdError, match="the workers of x are another user's; only root"):
            list_clients("x", told, -1)

    assert exit_code(start_child(look)) == 0


def test_a_daemon_in_a_network_namespace_of_its_own(harness: Harness) -> None:
    needs_root()
    needs_program("unshare")
    needs_program("ip")
    daemon = harness.daemon()
    daemon.prefix = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    daemon.run()
    with network_namespace_of(daemon.pid):
        client = dial(daemon.address)
        assert echoes(client)
    with client:
        (one,) = listed(daemon)
        assert (one["client"], one["in"]) == (name_of(client), 15)
    daemon.held.clear()  # the addresses are those of the other namespace
