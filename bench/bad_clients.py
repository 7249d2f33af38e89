"""How long 50 good clients wait for their echo, alone and beside bad clients.

The bad clients are 500 that send nothing, 200 that send a byte a second and 200 that send without ever reading. The
good ones ask at a steady pace, so what is compared is waiting, not throughput; both times are taken from one daemon.

    python bench/bad_clients.py [--workers 4] [--seconds 10]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator

from forkd_daemon import MESSAGE, forkd_command, free_port, wait_for

GOOD, SILENT, SLOW, DEAF = 50, 500, 200, 200

#: Requests a second of each good client.
PACE = 20.0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    port = free_port()
    with serving(port, arguments.workers):
        alone = measure(port, arguments.seconds)
        with bad_clients(port):
            beside = measure(port, arguments.seconds)
    print(f"{'':16} {'median':>8} {'p99':>8} {'failed':>7}   (ms, {GOOD} clients, {PACE:g} requests/s each)")
    for label, (waits, failed) in (("alone", alone), ("beside bad ones", beside)):
        print(f"{label:16} {statistics.median(waits):8.3f} {p99(waits):8.3f} {failed:7}")
    print(f"{'ratio of p99':16} {p99(beside[0]) / p99(alone[0]):17.2f}")


def p99(waits: list[float]) -> float:
    """The time that one in a hundred exceeds."""
    return sorted(waits)[len(waits) * 99 // 100]


@contextlib.contextmanager
def serving(port: int, workers: int) -> Iterator[None]:
    """A daemon that echoes."""
    with tempfile.TemporaryDirectory() as run:
        server = subprocess.Popen(forkd_command("", workers, port, run))
        try:
            wait_for(port)
            yield
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()


@contextlib.contextmanager
def bad_clients(port: int) -> Iterator[None]:
    """A process with bad clients, from when all are connected to the end."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            misbehave(port, tell)
        finally:
            os._exit(1)
    os.close(tell)
    assert os.read(ready, 1)
    os.close(ready)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def misbehave(port: int, tell: int) -> None:
    """What the bad clients do, for ever."""
    silent, slow, deaf = (
        [socket.create_connection(("127.0.0.1", port)) for _ in range(count)] for count in (SILENT, SLOW, DEAF)
    )
    for sock in deaf:
        sock.setblocking(False)
    while select.select([], deaf, [], 1.0)[1]:  # until no buffer on the way has taken anything for a second
        for sock in deaf:
            with contextlib.suppress(BlockingIOError):
                sock.send(bytes(1 << 16))
    os.write(tell, b"x")
    while silent:
        for sock in slow:
            time.sleep(1 / SLOW)
            sock.send(b"x")
        for sock in deaf:
            with contextlib.suppress(OSError):
                sock.send(b"x")


def measure(port: int, seconds: float) -> tuple[list[float], int]:
    """Milliseconds that each request of the good clients waited, and how many had no right answer."""
    clients = [socket.create_connection(("127.0.0.1", port)) for _ in range(GOOD)]
    poll, asked = select.epoll(), {}
    for sock in clients:
        poll.register(sock, select.EPOLLIN)
    by_descriptor = {sock.fileno(): sock for sock in clients}
    waits, failed = [], 0
    begun = time.perf_counter()
    due = [begun + number / GOOD / PACE for number in range(GOOD)]
    while (now := time.perf_counter()) < begun + seconds:
        for number, sock in enumerate(clients):
            if due[number] <= now and sock.fileno() not in asked:
                due[number] += 1 / PACE
                asked[sock.fileno()] = time.perf_counter()
                sock.sendall(MESSAGE)
        for descriptor, _ in poll.poll(max(0.0, min(due) - time.perf_counter())):
            answer = by_descriptor[descriptor].recv(100)
            waits.append((time.perf_counter() - asked.pop(descriptor)) * 1e3)
            failed += answer != MESSAGE
    for sock in clients:
        sock.close()
    return waits, failed


if __name__ == "__main__":
    main()
