"""What a client waits for its echo while others make one worker busy, and whether the worker is taken for stuck.

The others send 64 KiB of newlines, read what comes back, and send again: each read of the worker's brings up to 65,536
messages. The figures are of one more client of the same worker that sends a line and reads it, again and again.

    python bench/fairness.py [--floods 0 1 60 150] [--seconds 5] [--handlers busy:Lines ...]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from forkd_daemon import forkd_command, free_port, wait_for

LINES = b"\n" * 65_536
HANDLERS = ["busy:Lines", "busy:read_lines", "busy:read_bytes", "busy:OwnLines"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floods", type=int, nargs="+", default=[0, 1, 60, 150])
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--handlers", nargs="+", default=HANDLERS)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"{'':16} {'floods':>7} {'echoes':>8} {'median':>9} {'p99':>9} {'max':>9}   (ms, load {load:.1f})")
    for handler in arguments.handlers:
        for count in arguments.floods:
            with serving(handler) as port, flooding(port, count):
                times = sorted(echo_times(port, arguments.seconds))
            median, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
            print(f"{handler:16} {count:7} {len(times):8} {median:9.2f} {p99:9.2f} {times[-1]:9.2f}", flush=True)


@contextlib.contextmanager
def serving(handler: str) -> Iterator[int]:
    """A daemon with one worker: its port."""
    port = free_port()
    handlers = Path(__file__).parent.parent / "tests" / "handlers"
    with tempfile.TemporaryDirectory() as run:
        server = subprocess.Popen(forkd_command(handler, 1, port, run, [f"python_path=[{handlers}]"]))
        try:
            wait_for(port)
            yield port
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()
            if "stood still" in Path(run, "log").read_text():
                print("killed as stalled:")


@contextlib.contextmanager
def flooding(port: int, count: int) -> Iterator[None]:
    """So many clients that keep the worker busy, in a process of their own."""
    if (child := os.fork()) == 0:
        flood(port, count)
        os._exit(0)
    try:
        time.sleep(1.0)  # they are all at it
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def flood(port: int, count: int) -> None:
    """Sends newlines by each of so many connections whenever all that it sent has come back."""
    poll, clients, left = select.epoll(), {}, {}
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", port))
        clients[client.fileno()], left[client.fileno()] = client, len(LINES)
        poll.register(client.fileno(), select.EPOLLIN)
    for client in clients.values():
        client.sendall(LINES)
    while count:
        for fd, _ in poll.poll():
            data = clients[fd].recv(len(LINES))
            left[fd] -= len(data)
            if not data:
                poll.unregister(fd)
            elif not left[fd]:
                left[fd] = len(LINES)
                clients[fd].sendall(LINES)
    signal.pause()


def echo_times(port: int, seconds: float) -> Iterator[float]:
    """Milliseconds that each echo takes."""
    client = socket.create_connection(("127.0.0.1", port), timeout=120)
    until = time.perf_counter() + seconds
    while (begun := time.perf_counter()) < until:
        client.sendall(b"\n")
        if not client.recv(1):
            raise SystemExit("the connection was closed")
        yield (time.perf_counter() - begun) * 1e3
        time.sleep(0.002)


if __name__ == "__main__":
    main()
