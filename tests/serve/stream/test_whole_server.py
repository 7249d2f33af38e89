"""Whole servers, which accept by themselves: started, counted, listed, ended and drained, with real daemons."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import Mock

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.serve.accept.acceptor import ConnectionStats
from forkd.serve.deadlines import Deadlines
from forkd.serve.handlers import Handler
from forkd.serve.loop import PollLoop
from forkd.serve.stream.transport import ServerContext
from forkd.serve.stream.whole_server import ListeningSocket, ServerConnections, WholeServer
from forkd.system.listeners import BoundListener
from forkd.system.scoreboard import Row
from tests.support.admin import ask as ask_admin
from tests.support.clients import at_end
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, eventually, wait_end

Serve = Callable[..., Daemon]

#: Of handlers/whole.py: what returns its servers, goes on until it is cancelled or until the drain, is an object, or
#: wants the signals.
KINDS = ("returned", "forever", "until_drain", "Object", "taking_signals")


@pytest.fixture
def serve(harness: Harness) -> Serve:
    """Starts a daemon with one worker and a server of handlers/whole.py."""

    def start(handler: str, *settings: str, listen: str = "tcp://127.0.0.1:0", workers: int = 1) -> Daemon:
        more = ("drain_timeout=20s", *settings)
        return harness.daemon(target=f"whole:{handler}", listen=(listen,), workers=workers, settings=more).start()

    return start


def ask(client: socket.socket, words: bytes = b"you\n") -> int:
    """The pid of the process that answers."""
    client.sendall(words)
    pid, said = client.makefile("rb").readline().split()
    assert said + b"\n" == words
    return int(pid)


def test_metrics_of_a_listener_are_those_of_its_server(harness: Harness, serve: Serve) -> None:
    daemon = serve("returned", "admin.address=tcp://127.0.0.1:0")
    for _ in range(3):
        with harness.connect(daemon) as client:
            ask(client)
    wait_closed(daemon, 3)
    values = {"forkd_listener_connections_served_total": 3, "forkd_listener_connections": 0}
    lines = {f'{name}{{listener="{daemon.address}"}} {value}.0' for name, value in values.items()}
    lines.add(f'forkd_received_bytes_total{{listener="{daemon.address}"}} 12.0')

    def told() -> set[str]:
        return set(ask_admin(daemon, "/metrics").body.splitlines())

    assert eventually(lambda: lines <= told(), what="what a worker reckons at its heartbeats")


def wait_closed(daemon: Daemon, count: int) -> None:
    """Waits until so many connections are over, and counted as that."""
    eventually(lambda: daemon.status()["totals"]["closed"] == count, what=f"the end of {count} connections")


def several(harness: Harness, *handlers: str) -> Daemon:
    """A daemon with one worker, and a listener for each of these servers."""
    listen = [f'{{"address": "tcp://127.0.0.1:0", "handler": "whole:{one}"}}' for one in handlers]
    file = harness.directory / "several.yaml"
    file.write_text(f"listen: [{', '.join(listen)}]\n")
    return harness.daemon(target=file, listen=(), workers=1).start()


def test_servers_keep_their_clients_over_a_reload(harness: Harness) -> None:
    daemon = several(harness, *KINDS)
    addresses = [str(one["address"]) for one in daemon.status()["listeners"]]
    clients = [harness.connect(address) for address in addresses]
    (old,) = {ask(client) for client in clients}
    assert daemon.wait_clients(len(KINDS)) == {old: len(KINDS)}
    assert daemon.command("reload").returncode == 0
    assert {ask(client) for client in clients} == {old}
    for client in clients:
        client.close()
    wait_end(old)
    assert {ask(harness.connect(address)) for address in addresses} == set(daemon.workers().values())
    assert all((harness.directory / name).exists() for name in ("cancelled", "drained", "stopped"))
    assert daemon.status()["totals"]["accepted"] == 2 * len(KINDS)


def test_every_client_of_a_server_is_counted(harness: Harness, serve: Serve) -> None:
    daemon = serve("returned", "log.access=true", workers=2)
    for _ in range(50):
        with harness.connect(daemon) as client:
            ask(client)
    wait_closed(daemon, 50)
    totals = daemon.status()["totals"]
    assert (totals["accepted"], totals["errors"]) == (50, 0)
    ends = [record for record in daemon.records() if "forkd.access" in record]
    assert len(ends) == 50
    assert all("in 4, out " in record and record.endswith("eof") for record in ends), ends[0]


def test_client_of_a_server_is_listed_and_killed(harness: Harness, serve: Serve) -> None:
    daemon = serve("returned")
    client = harness.connect(daemon)
    ask(client)
    (listed,) = json.loads(daemon.command("clients", "--json").stdout)
    assert (listed["worker"], listed["listener"], listed["in"]) == (1, daemon.address, 4)
    assert listed["age"] is not None
    assert daemon.command("clients", "--kill", listed["id"]).returncode == 0
    assert at_end(client)
    wait_closed(daemon, 1)
    assert daemon.status()["totals"]["ended"]["killed"] == 1


def test_deadlines_hold_for_clients_of_a_server(harness: Harness, serve: Serve) -> None:
    daemon = serve("returned", "listen.timeouts.first_byte=0.7s", "listen.timeouts.idle=1s")
    idle = harness.connect(daemon)
    ask(idle)
    silent = harness.connect(daemon)
    assert at_end(silent)
    assert at_end(idle)
    wait_closed(daemon, 2)
    ended = daemon.status()["totals"]["ended"]
    assert (ended["first_byte"], ended["idle"]) == (1, 1)


def test_server_of_a_unix_socket_leaves_its_path(harness: Harness, serve: Serve) -> None:
    path = harness.directory / "whole.sock"
    daemon = serve("on_unix", listen=f"unix:{path}")
    client = harness.connect(daemon)
    old, inode = ask(client), path.stat().st_ino
    assert daemon.wait_clients(1) == {old: 1}
    assert daemon.command("reload").returncode == 0
    client.close()
    eventually(lambda: not daemon.workers("draining"), what="the end of the old worker")
    assert path.stat().st_ino == inode
    assert ask(harness.connect(daemon)) != old


def test_server_whose_path_was_bound_again_is_replaced(harness: Harness, serve: Serve) -> None:
    path = harness.directory / "whole.sock"
    daemon = serve("on_unix", listen=f"unix:{path}")
    client = harness.connect(daemon)
    old = ask(client)
    path.unlink()
    daemon.wait_log(f"worker 1 .* is to be replaced: unix:{path} was bound again")
    daemon.wait_workers(1, without=[old])
    assert ask(client) == old
    assert ask(harness.connect(daemon)) != old


def test_connections_that_a_server_hides_are_found(harness: Harness) -> None:
    daemon = several(harness, "copied", "Detached")
    addresses = [str(one["address"]) for one in daemon.status()["listeners"]]
    clients = [harness.connect(address) for address in (*addresses, *addresses)]
    (pid,) = {int(client.makefile("rb").readline()) for client in clients}
    assert daemon.wait_clients(4) == {pid: 4}
    for client in clients:
        client.close()
    wait_closed(daemon, 4)
    assert daemon.command("stop").returncode == 0


def test_process_that_a_server_forks_keeps_no_client(harness: Harness, serve: Serve) -> None:
    daemon = serve("forking")
    client, other = harness.connect(daemon), harness.connect(daemon)
    assert ask(client, b"fork\n") == ask(other)
    for one in (client, other):
        one.shutdown(socket.SHUT_WR)
        assert at_end(one)
    wait_closed(daemon, 2)
    assert daemon.status()["totals"]["accepted"] == 2


class OnLoop:
    """A listener in this process, its loop and its counters."""

    def __init__(self, stack: ExitStack) -> None:
        self.loop = PollLoop()
        stack.callback(self.loop.close)
        made = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener = Listener(address=parse_address("tcp://127.0.0.1:0"), handler="a:b")
        self.bound = BoundListener(listener, listener.address, [made])
        self.stats = ConnectionStats(Row.unshared(), Mock())
        self.context = ServerContext(self.loop, self.stats, Deadlines(self.loop))
        self.clients = [stack.enter_context(socket.create_connection(made.getsockname())) for _ in range(2)]


def test_one_client_is_accepted_in_one_turn_of_the_loop() -> None:
    async def accept(sock: socket.socket) -> None:
        for _ in range(2):
            accepted.append(sock.accept()[0])
            with pytest.raises(BlockingIOError):
                sock.accept()
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    accepted: list[socket.socket] = []
    with ExitStack() as stack:
        here = OnLoop(stack)
        connections = ServerConnections(here.context, here.bound)
        sock = stack.enter_context(ListeningSocket.of(here.bound.sockets[0], connections))
        here.loop.run_until_complete(accept(sock))
        assert here.stats.active == 2
        for one in accepted:
            one.close()
        assert here.stats.active == 0


class Told:
    """A server that notes when it is told to stop."""

    def __init__(self, loop: PollLoop) -> None:
        self.loop = loop
        self.stopped_at = 0.0

    def add_sockets(self, sockets: list[socket.socket]) -> None:
        self.sockets = sockets
        self.loop.add_reader(sockets[0], lambda: None)

    def stop(self) -> None:
        self.stopped_at = self.loop.time()
        self.accepted_until_then = self.loop.remove_reader(self.sockets[0])


def test_server_hears_its_last_clients_before_it_is_stopped() -> None:
    with ExitStack() as stack:
        here = OnLoop(stack)
        server = Told(here.loop)
        whole = WholeServer(here.context, here.bound, Handler("server", server))
        here.loop.run_until_complete(whole.wait_accepting(here.loop.time() + DEADLINE))
        sock, _ = server.sockets[0].accept()
        began = here.loop.time()
        whole.stop(here.loop.stop)
        here.loop.run_forever()
        assert whole.has_stopped
        assert server.stopped_at - began > 0.1
        assert not server.accepted_until_then
        sock.close()


def test_waiting_for_a_client_leaves_the_socket_nonblocking() -> None:
    with socket.create_server(("127.0.0.1", 0)) as made, ListeningSocket(fileno=made.detach()) as sock:
        sock.setblocking(True)
        assert not os.get_blocking(sock.fileno())
        sock.settimeout(0.01)
        with pytest.raises(TimeoutError):
            sock.accept()
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.accept()


def test_server_that_does_not_stop_accepts_no_more(harness: Harness, serve: Serve) -> None:
    daemon = serve("deaf", "drain_timeout=60s")
    client = harness.connect(daemon)
    old = ask(client)
    assert daemon.command("reload").returncode == 0

    eventually(lambda: not has_listener(old, daemon.address), what="the end of its listening socket")
    assert {ask(harness.connect(daemon)) for _ in range(5)} == set(daemon.workers().values())
    assert ask(client) == old
    (harness.directory / "let go").touch()
    assert daemon.command("stop", "--now").returncode == 0


def has_listener(pid: int, address: str) -> bool:
    """Whether a process has the listening socket of this address."""
    port = int(address.rpartition(":")[2])
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    (inode,) = (row[9] for row in rows if int(row[1].split(":")[1], 16) == port and row[3] == "0A")
    found = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return f"socket:[{inode}]" in found


@pytest.mark.parametrize(
    ("handler", "why"),
    [
        ("fails", "could not begin to serve .*: ValueError: no database"),
        ("returns", "has ended before it accepted clients at"),
        ("never", r"does not accept clients at .* in time \(boot_timeout\)"),
    ],
)
def test_server_that_does_not_begin_ends_the_start(harness: Harness, handler: str, why: str) -> None:
    daemon = harness.daemon(target=f"whole:{handler}", workers=1, settings=("boot_timeout=4s",))
    daemon.expect(why)
    result = daemon.command("start")
    assert result.returncode == 1
    assert f"whole:{handler}" in result.stderr


def test_server_that_fails_has_its_worker_replaced(harness: Harness, serve: Serve) -> None:
    daemon = serve("gives_up")
    daemon.expect("The server at .* has failed")
    client = harness.connect(daemon)
    old = ask(client)
    (harness.directory / "give up").touch()
    daemon.wait_log("is to be replaced: its server at .* has failed")
    daemon.wait_workers(1, without=[old])
    assert ask(client) == old
    assert ask(harness.connect(daemon)) != old
    assert "RuntimeError: out of ideas" in daemon.wait_log("The server at .* has failed")
