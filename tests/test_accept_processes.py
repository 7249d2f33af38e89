"""Accepting in several processes: forked workers on one listening socket with one scoreboard, and real clients.

Each worker greets with its number, so a client knows who took it. A worker ends when the test closes the socket that
it watches, or when the test's process dies, and its exit status says whether all went well in it.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import select
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from time import monotonic, monotonic_ns

import pytest

from forkd.serve import balance as balancing
from forkd.serve.accept import PAUSE, Acceptor, Tally
from forkd.serve.admission import SLACK
from forkd.serve.balance import Balance
from forkd.serve.handlers.protocol import ProtocolServer
from forkd.serve.loop import PollLoop
from forkd.system.scoreboard import Field, Row, Scoreboard

PATIENCE = 20.0


class Greeter(asyncio.Protocol):
    """Says which worker it is in, then echoes."""

    number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
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
            self.tell(b"nobody\n")
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


class Crew:
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
        self.news.settimeout(PATIENCE)
        stack.callback(self.end)

    def _new_row(self) -> Row:
        row = self.board.claim()
        row[Field.PID] = os.getpid()
        return row

    def start(self, count: int, spare: int | None = None) -> None:
        """Forks workers; with `spare`, each may open so many descriptors more."""
        for _ in range(count):
            number = len(self.pids)
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    self._work(number, spare)
                    status = 0
                finally:
                    if status:
                        sys.excepthook(*sys.exc_info())
                    os._exit(status)
            self.pids.append(pid)
            while self.hear() != "ready":
                pass  # what the others say meanwhile

    def _work(self, number: int, spare: int | None) -> None:
        self.stop_said.close()
        log = logging.getLogger("forkd")
        log.handlers, log.propagate = [logging.StreamHandler(self.told.makefile("w"))], False
        listener = Telling(fileno=self.listener.detach())
        listener.tell = self.told.sendall
        loop, row, factory = PollLoop(), self.rows[number], type("Numbered", (Greeter,), {"number": number})
        tally = Tally(row)
        balance = Balance(loop, self.board, tally)
        acceptor = Acceptor(loop, listener, ProtocolServer(loop, factory, tally, 0), balance)
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
            assert byte, "nobody is left to say anything"
            line += byte
        return line.decode().strip()

    def last_words(self) -> list[str]:
        """Ends all workers; the lines that nobody has heard yet."""
        self.end()
        self.told.close()
        return b"".join(iter(lambda: self.news.recv(4096), b"")).decode().splitlines()

    def call(self) -> socket.socket:
        """A client that is in the listener's backlog."""
        sock = self.stack.enter_context(socket.create_connection(self.listener.getsockname(), PATIENCE))
        sock.settimeout(PATIENCE)
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
        handle = os.pidfd_open(pid)
        try:
            if not select.select([handle], [], [], PATIENCE)[0]:
                os.kill(pid, signal.SIGKILL)
        finally:
            os.close(handle)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def crew() -> Iterator[Crew]:
    with ExitStack() as stack:
        yield Crew(stack)


def spread(clients: list[Client], workers: int) -> list[int]:
    """How many clients each worker has."""
    counts = Counter(client.worker for client in clients)
    return [counts[number] for number in range(workers)]


def test_clients_that_come_one_by_one_and_stay_are_spread_evenly(crew: Crew) -> None:
    crew.start(4)
    loads = spread(crew.clients(400), 4)
    assert sum(loads) == 400
    assert max(loads) <= 1.05 * min(loads) + 1
    assert [row.active for row in crew.rows] == loads


def test_a_client_wakes_one_worker_and_the_next_client_another(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "BEAT", 3600.0)  # at a heartbeat they look without being woken
    crew.start(4)
    clients = crew.clients(100)
    again = sum(former.worker == latter.worker for former, latter in pairwise(clients))
    assert again < 40
    assert crew.last_words().count("nobody") < 40


def test_a_crowd_that_comes_at_once_is_served_and_spread(crew: Crew) -> None:
    crew.start(4)
    waiting = [crew.call() for _ in range(200)]
    loads = spread([Client(sock, int(sock.recv(10))) for sock in waiting], 4)
    assert sum(loads) == 200
    assert max(loads) <= min(loads) + 2 * (SLACK + 1)


def test_who_holds_more_than_its_share_steps_out_and_comes_back_when_its_clients_leave(crew: Crew) -> None:
    crew.start(1)
    first = crew.clients(4 * SLACK)
    crew.start(1)
    second = crew.clients(3 * SLACK)
    assert spread(second, 2)[0] <= 1  # the one by which it learns that it is ahead
    for client in [*first, *second]:
        if client.worker == 0:
            client.leave()
    third = crew.clients(2 * SLACK)
    assert spread(third, 2)[1] <= 2


def test_a_worker_that_stands_still_keeps_no_client_waiting_and_comes_back(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balancing, "BEAT", 0.1)
    crew.start(4)
    crew.clients(8)
    os.kill(crew.pids[0], signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(crew.pids[0], os.WUNTRACED)[1])
    meanwhile = crew.clients(24 * SLACK)
    loads = spread(meanwhile, 4)
    assert loads[0] == 0
    assert min(loads[1:]) > 2 * SLACK
    os.kill(crew.pids[0], signal.SIGCONT)
    deadline = monotonic() + PATIENCE
    while (client := crew.client()).worker != 0:
        client.leave()
        assert monotonic() < deadline
    assert spread(crew.clients(4 * SLACK), 4)[0] > 2


def test_the_clients_of_a_worker_that_dies_are_lost_and_no_others(crew: Crew, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balancing, "BEAT", 0.1)
    crew.start(2)
    clients = crew.clients(20)
    os.kill(crew.pids[0], signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(crew.pids.pop(0), 0)[1]) == -signal.SIGKILL
    for client in clients:
        client.sock.sendall(b"there?") if client.worker == 1 else None
        assert client.sock.recv(10) == (b"there?" if client.worker == 1 else b"")
    assert spread(crew.clients(40), 2) == [0, 40]


def test_a_worker_without_descriptors_pauses_says_so_once_and_serves_again(crew: Crew) -> None:
    crew.start(1, spare=3)
    clients = crew.clients(3)
    waiting = crew.call()
    words: list[str] = []
    while len(words) < 5:
        words += [word for word in [crew.hear()] if word != "nobody"]
    complaints = [word for word in words if not word.startswith("failed ")]
    assert len(complaints) == 1
    assert os.strerror(errno.EMFILE) in complaints[0]
    tries = [float(word.split()[1]) for word in words if word not in complaints]
    assert min(later - sooner for sooner, later in pairwise(tries)) > 0.9 * PAUSE
    clients[0].sock.sendall(b"still here")
    assert clients[0].sock.recv(100) == b"still here"
    clients[1].leave()
    assert waiting.recv(10) == b"0\n"
    assert complaints[0] not in crew.last_words()
