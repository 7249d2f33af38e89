"""A real file through a daemon to a thousand clients at once, each byte of it compared.

Most clients are fast and take the whole file; some read, and some write, one byte at a time with pauses. The slow ones
must not cost the fast ones: no byte, no memory in the workers, no latency. One daemon has two listeners, the file's
and an echo, so that all are served by the same workers.
"""

from __future__ import annotations

import resource
import select
import socket
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, perf_counter

import pytest

from tests.support.clients import dial, echoes, endpoint
from tests.support.daemon import Daemon, Harness
from tests.support.processes import resident

MIB = 1 << 20
SIZE = 10 * MIB
FAST, SLOW = 940, 30  # 30 that read slowly, and as many that write so: 1,000 in all
PAUSE = 0.02
BUFFER = 256 * 1024
TRANSFER_DEADLINE = 90.0

SETTINGS = """\
workers: 2
listen:
  - {address: 'tcp://127.0.0.1:0', handler: 'files:Ranges'}
  - {address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}
"""


class Client:
    """A connection that never blocks, at a place in the file."""

    def __init__(self, address: str, data: bytes) -> None:
        family, where = endpoint(address)
        self.data = data
        self.place = 0
        self.sock = socket.socket(family, socket.SOCK_STREAM)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        self.sock.connect(where)
        self.sock.setblocking(False)

    def compare(self, got: memoryview | bytes) -> None:
        """That this is what the file has here."""
        assert len(got), f"end of file at {self.place}"
        assert self.data.startswith(got, self.place), f"other bytes from {self.place} on"
        self.place += len(got)


class Fetcher(Client):
    """Takes the whole file as fast as it comes."""

    view = memoryview(bytearray(BUFFER))

    def ask(self) -> None:
        self.sock.send(b"0 %d\n" % len(self.data))

    def ready(self) -> bool:
        """Takes what is there; whether that was all."""
        self.compare(self.view[: self.sock.recv_into(self.view)])
        return self.place == len(self.data)


class SlowReader(Client):
    """Asks for the whole file and takes a byte of it at a time."""

    def __init__(self, address: str, data: bytes) -> None:
        super().__init__(address, data)
        self.sock.send(b"0 %d\n" % len(data))

    def step(self) -> None:
        try:
            self.compare(self.sock.recv(1))
        except BlockingIOError:
            return


class SlowWriter(Client):
    """Sends a byte of the file at a time to the echo, and takes what has come back."""

    sent = 0

    def step(self) -> None:
        self.sent += self.sock.send(self.data[self.sent : self.sent + 1])
        try:
            self.compare(self.sock.recv(16))
        except BlockingIOError:
            return


SlowClient = SlowReader | SlowWriter


@pytest.fixture(autouse=True)
def _many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def make_payload(path: Path) -> bytes:
    """A tar file of the standard library, as much of it as makes the size; its bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    with tarfile.open(path, "w") as tar:
        for source in sorted(library.rglob("*.py")):
            tar.add(source, str(source.relative_to(library)), recursive=False)
            if path.stat().st_size > SIZE:
                break
    return path.read_bytes()


def start(harness: Harness) -> tuple[Daemon, str, str]:
    """The daemon, the file's address and the echo's."""
    (harness.directory / "transfer.yaml").write_text(SETTINGS)
    daemon = harness.daemon(target="./transfer.yaml", listen=(), workers=None).start()
    files, echo = (one["address"] for one in daemon.status()["listeners"])
    return daemon, files, echo


def slow_clients(files: str, echo: str, data: bytes) -> list[SlowClient]:
    return [client for _ in range(SLOW) for client in (SlowReader(files, data), SlowWriter(echo, data))]


def close(clients: list[SlowClient]) -> None:
    for client in clients:
        client.sock.close()


def latency(address: str, slow: list[SlowClient]) -> float:
    """Seconds that a thousand echoes take, one after the other, while slow clients take steps between them. The slowest
    hundred do not count: in those this machine had other things to do.
    """
    probes = [dial(address) for _ in range(4)]
    waits: list[float] = []
    for number in range(1000):
        if number % 50 == 0:
            for client in slow:
                client.step()
        begun = perf_counter()
        assert echoes(probes[number % len(probes)])
        waits.append(perf_counter() - begun)
    for probe in probes:
        probe.close()
    return sum(sorted(waits)[:900])


def transfer(fetchers: list[Fetcher], slow: list[SlowClient]) -> None:
    """Lets all fetchers fetch, and the slow ones take their steps meanwhile."""
    by_descriptor = {fetcher.sock.fileno(): fetcher for fetcher in fetchers}
    deadline, next_step = monotonic() + TRANSFER_DEADLINE, monotonic()
    with select.epoll() as poll:
        for fetcher in fetchers:
            poll.register(fetcher.sock, select.EPOLLIN)
            fetcher.ask()
        while by_descriptor or min(client.place for client in slow) < 100:
            now = monotonic()
            assert now < deadline, f"{len(by_descriptor)} clients lack some of the file"
            if now >= next_step:
                next_step = now + PAUSE
                for client in slow:
                    client.step()
            for descriptor, _ in poll.poll(PAUSE):
                if by_descriptor[descriptor].ready():
                    poll.unregister(by_descriptor.pop(descriptor).sock)


def test_a_thousand_clients_get_every_byte_though_some_are_slow(harness: Harness) -> None:
    data = make_payload(harness.directory / "payload")
    assert len(data) > SIZE
    daemon, files, echo = start(harness)
    workers = daemon.workers()
    before = {pid: resident(pid) for pid in workers.values()}
    slow = slow_clients(files, echo, data)
    fetchers = [Fetcher(files, data) for _ in range(FAST)]
    daemon.wait_clients(FAST + 2 * SLOW)
    transfer(fetchers, slow)
    assert {fetcher.place for fetcher in fetchers} == {len(data)}
    for pid, bytes_then in before.items():  # what a worker keeps for a client is bounded, and not the file
        assert resident(pid) - bytes_then < (FAST + 2 * SLOW) * 256 * 1024
    assert echoes(harness.connect(echo))
    close(slow)
    for fetcher in fetchers:
        fetcher.sock.close()
    daemon.wait_clients(1)
    assert daemon.workers() == workers


def test_slow_clients_do_not_slow_the_fast_ones(harness: Harness) -> None:
    data = make_payload(harness.directory / "payload")
    _, files, echo = start(harness)
    without: list[float] = []
    among: list[float] = []
    # By turns, and the best of them, since this machine has other things to do too.
    while len(among) < 3 or not min(among) < 3 * min(without):
        assert len(among) < 20, (without, among)
        without.append(latency(echo, []))
        slow = slow_clients(files, echo, data)
        among.append(latency(echo, slow))
        close(slow)
