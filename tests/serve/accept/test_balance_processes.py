"""Accepting in several processes: forked workers on one listening socket with one scoreboard, and real clients.

Each worker greets with its number, so a client knows which took it. A worker ends when the test closes the socket that
it watches, or when the test's process dies, and its exit status says whether all went well in it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import signal
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from time import monotonic, monotonic_ns

import pytest

from forkd.serve.accept import balance as balancing
from forkd.serve.accept.acceptor import PAUSE, Acceptor, ConnectionStats
from forkd.serve.accept.balance import SLACK, Balance
from forkd.serve.deadlines import Deadlines
from forkd.serve.loop import PollLoop
from forkd.serve.stream.server import ProtocolServer
from forkd.serve.stream.transport import ServerContext
from forkd.system.scoreboard import Field, Row, Scoreboard
from tests.support.forked import exit_code, start_child
from tests.support.processes import DEADLINE


class Greeter(asyncio.Protocol):
    """Says which worker it is in, then echoes."""

    number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(b"%d\n" % self.number)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


class Telling(socket.socket):
    """A listener that tells of each accept(2) that failed: for want of a client, or of descriptors and when."""

    tell: Callable[[bytes], object]

    def _accept(self) -> tuple[int, object]:
        try:
            return super()._accept()  # type: ignore[misc,no-any-return]
        except BlockingIOError:
            self.tell(b"no client\n")
            raise
        except OSError as error:
            if error.errno == errno.EMFILE:
                self.tell(b"failed %r\n" % monotonic())
            raise


class Client:
    """A client that was greeted."""

    def __init__(self, sock: socket.socket, worker: int) -> None:
        self.sock = sock
        self.worker = worker

    def leave(self) -> None:
        """Closes its side, and waits until the worker has closed its own."""
        self.sock.shutdown(socket.SHUT_WR)
        assert self.sock.recv(100) == b""


class WorkerPool:
    """Workers and their clients."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=512))
        self.listener.setblocking(False)
        self.board = Scoreboard(8)
        stack.callback(self.board.close)
        self.rows = [self._new_row() for _ in range(4)]
        self.pids: list[int] = []
        self.stop_heard, self.stop_said = socket.socketpair()
        stack.enter_context(self.stop_heard)
        self.news, self.told = socket.socketpair()
        stack.enter_context(self.news)
        stack.enter_context(self.told)
        self.news.settimeout(DEADLINE)
        stack.callback(self.end)

    def _new_row(self) -> Row:
        row = self.board.claim()
        row[Field.PID] = os.getpid()
        return row

    def start(self, count: int, spare: int | None = None) -> None:
        """Forks workers; with `spare`, each may open so many descriptors more."""
        for _ in range(count):
            number = len(self.pids)
            self.pids.append(start_child(partial(self._work, number, spare)))
            while self.hear() != "ready":
                pass  # what the others say meanwhile

    def _work(self, number: int, spare: int | None) -> None:
        self.stop_said.close()
        log = logging.getLogger("forkd")
        log.handlers, log.propagate = [logging.StreamHandler(self.told.makefile("w"))], False
        listener = Telling(fileno=self.listener.detach())
        listener.tell = self.told.sendall
        loop, row, factory = PollLoop(), self.rows[number], type("Numbered", (Greeter,), {"number": number})
        stats = ConnectionStats(row, self)
        self.balance = balance = Balance(loop, self.board, stats)
        context = ServerContext(loop, stats, Deadlines(loop))
        acceptor = Acceptor(loop, listener, ProtocolServer(context, factory), balance)
        loop.add_reader(self.stop_heard, loop.stop)

        def beat() -> None:
            row[Field.HEARTBEAT] = monotonic_ns()
            balance.beat()
            loop.call_later(balancing.BEAT, beat)

        beat()
        balance.start([acceptor])
        if spare is not None:
            self._use_up_descriptors(spare)
        self.told.sendall(b"ready\n")
        loop.run_forever()
        balance.stop()
        assert listener.fileno() == -1

    def connection_closed(self) -> None:
        """In a worker: as its counters tell it."""
        self.balance.connection_closed()

    @staticmethod
    def _use_up_descriptors(spare: int) -> None:
        copies = [os.dup(0) for _ in range(max(map(int, os.listdir("/proc/self/fd"))))]
        highest = max(copies)
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for copy in copies[-spare:]:
            os.close(copy)

    def hear(self) -> str:
        """The next line that a worker says."""
        line = b""
        while not line.endswith(b"\n"):
            byte = self.news.recv(1)
            assert byte, "no worker is left to say anything"
            line += byte
        return line.decode().strip()

    def last_words(self) -> list[str]:
        """Ends all workers; the lines that were not read yet."""
        self.end()
        self.told.close()
        return b"".join(iter(lambda: self.news.recv(4096), b"")).decode().splitlines()

    def call(self) -> socket.socket:
        """A client that is in the listener's backlog."""
        sock = self.stack.enter_context(socket.create_connection(self.listener.getsockname(), DEADLINE))
        sock.settimeout(DEADLINE)
        return sock

    def client(self) -> Client:
        sock = self.call()
        return Client(sock, int(sock.recv(10)))

    def clients(self, count: int) -> list[Client]:
        """Clients that come one after the other, and stay."""
        return [self.client() for _ in range(count)]

    def end(self) -> None:
        """Ends all workers."""
        self.stop_said.close()
        statuses = [self._reap(self.pids.pop()) for _ in list(self.pids)]
        assert statuses == [0] * len(statuses)

    @staticmethod
    def _reap(pid: int) -> int:
        os.kill(pid, signal.SIGCONT)
        return exit_code(pid)


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    with ExitStack() as stack:
        yield WorkerPool(stack)


def spread(clients: list[Client], workers: int) -> list[int]:
    """How many clients each worker has."""
    counts = Counter(client.worker for client in clients)
    return [counts[number] for number in range(workers)]


def test_clients_that_come_one_by_one_and_stay_are_spread_evenly(pool: WorkerPool) -> None:
    pool.start(4)
    loads = spread(pool.clients(400), 4)
    assert sum(loads) == 400
    assert max(loads) <= min(loads) + SLACK + 1
    assert [row.active for row in pool.rows] == loads


def test_a_client_wakes_one_worker_and_the_next_client_another(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancing, "BEAT", 3600.0)  # at a heartbeat they look without being woken
    pool.start(4)
    clients = pool.clients(100)
    again = sum(former.worker == latter.worker for former, latter in pairwise(clients))
    assert again < 80  # all of them would be 99; a busy machine runs one worker twice before another, and often
    assert pool.last_words().count("no client") < 40


def test_a_crowd_that_comes_at_once_is_served_and_spread(pool: WorkerPool) -> None:
    pool.start(4)
    waiting = [pool.call() for _ in range(200)]
    loads = spread([Client(sock, int(sock.recv(10))) for sock in waiting], 4)
    assert sum(loads) == 200
    assert max(loads) <= min(loads) + 2 * (SLACK + 1)


def test_worker_over_its_share_steps_out_until_clients_leave(pool: WorkerPool) -> None:
    pool.start(1)
    first = pool.clients(4 * SLACK)
    pool.start(1)
    second = pool.clients(3 * SLACK)
    assert spread(second, 2)[0] <= 1  # the one by which it learns that it is ahead
    for client in [*first, *second]:
        if client.worker == 0:
            client.leave()
    third = pool.clients(2 * SLACK)
    assert spread(third, 2)[1] <= 2


def test_a_stalled_worker_delays_no_client_and_comes_back(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "BEAT", 0.1)
    pool.start(4)
    pool.clients(8)
    os.kill(pool.pids[0], signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pool.pids[0], os.WUNTRACED)[1])
    meanwhile = pool.clients(24 * SLACK)
    loads = spread(meanwhile, 4)
    assert loads[0] == 0
    assert min(loads[1:]) > 2 * SLACK
    os.kill(pool.pids[0], signal.SIGCONT)
    deadline = monotonic() + DEADLINE
    while (client := pool.client()).worker != 0:
        client.leave()
        assert monotonic() < deadline
    assert spread(pool.clients(4 * SLACK), 4)[0] > 2


def test_a_dead_worker_loses_its_own_clients_alone(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "BEAT", 0.1)
    pool.start(2)
    clients = pool.clients(20)
    os.kill(pool.pids[0], signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pool.pids.pop(0), 0)[1]) == -signal.SIGKILL
    for client in clients:
        client.sock.sendall(b"there?") if client.worker == 1 else None
        assert client.sock.recv(10) == (b"there?" if client.worker == 1 else b"")
    assert spread(pool.clients(40), 2) == [0, 40]


def test_a_worker_without_descriptors_pauses_and_logs_once(pool: WorkerPool) -> None:
    pool.start(1, spare=3)
    clients = pool.clients(3)
    waiting = pool.call()
    words: list[str] = []
    while len(words) < 5:
        words += [word for word in [pool.hear()] if word != "no client"]
    complaints = [word for word in words if not word.startswith("failed ")]
    assert len(complaints) == 1
    assert os.strerror(errno.EMFILE) in complaints[0]
    tries = [float(word.split()[1]) for word in words if word not in complaints]
    assert min(later - sooner for sooner, later in pairwise(tries)) > 0.9 * PAUSE
    clients[0].sock.sendall(b"still here")
    assert clients[0].sock.recv(100) == b"still here"
    clients[1].leave()
    assert waiting.recv(10) == b"0\n"
    assert complaints[0] not in pool.last_words()
