"""What deadlines cost one worker: while many clients are idle, and when many deadlines are over at once.

Idle: so many connections with all deadlines set, none of which is over; the worker's CPU time and its wake-ups (its
voluntary context switches, proc(5)) in a second, beside those of a worker with no connection, which are its heartbeat.
Over: so many connections whose first byte does not come in time, all within a second; the longest that another client
waits for its echo meanwhile, which is the loop's lag, and that with the same requests when no deadline is over.

    python bench/deadlines.py [--idle 9000] [--over 1000] [--seconds 10]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import select
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from forkd_daemon import MESSAGE, forkd_command, free_port, wait_for
from replace import serving as serving_workers

TICKS = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=int, default=9000)
    parser.add_argument("--over", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle(arguments.idle, arguments.seconds)
    over(arguments.over)


def idle(count: int, seconds: float) -> None:
    """Prints what many idle connections cost."""
    settings = ["first_byte=1h", "idle=1h", "write=1h", "lifetime=1h"]
    with serving([f"listen.timeouts.{one}" for one in settings] + ["listen.keepalive.heartbeat=1h"]) as (port, worker):
        none = watch(worker, seconds)
        clients = connect(port, count)
        many = watch(worker, seconds)
        for sock in clients:
            sock.close()
    print(f"{'':16} {'CPU':>8} {'wake-ups':>9}   (of one worker, a second)")
    for label, (cpu, wakes) in (("no client", none), (f"{count} idle", many)):
        print(f"{label:16} {cpu:8.2%} {wakes:9.2f}")


def over(count: int) -> None:
    """Prints how long a client waits for its echo while many deadlines are over."""
    with serving(["listen.timeouts.first_byte=4s"]) as (port, _):
        good = connect(port, 1)[0]
        echo(good)
        quiet = longest_wait(good, 2.0)
        begun = time.perf_counter()
        clients = connect(port, count)
        spread = time.perf_counter() - begun
        longest_wait(good, max(0.0, begun + 3.8 - time.perf_counter()))
        busy = longest_wait(good, 1.5 + spread)
        ended = sum(not sock.recv(1) for sock in clients)
    print(f"\n{'longest wait':16} {quiet:8.2f} ms while nothing is over")
    print(f"{'':16} {busy:8.2f} ms while {ended} deadlines of {spread + 0.05:.2f} s are over")


@contextlib.contextmanager
def serving(settings: list[str]) -> Iterator[tuple[int, int]]:
    """A daemon with one worker: its port, and the worker's pid."""
    port = free_port()
    with tempfile.TemporaryDirectory() as run:
        server = subprocess.Popen(forkd_command("", 1, port, run, settings))
        try:
            wait_for(port)
            yield port, serving_workers(Path(run, "forkd", "control.sock"), 1)[0]
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()


def connect(port: int, count: int) -> list[socket.socket]:
    """So many clients."""
    return [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]


def watch(pid: int, seconds: float) -> tuple[float, float]:
    """A process's CPU time, and its wake-ups, in a second."""
    select.select([], [], [], 2.0)  # until what came before is done with
    before, begun = spent(pid), time.perf_counter()
    select.select([], [], [], seconds)
    after, passed = spent(pid), time.perf_counter() - begun
    return (after[0] - before[0]) / passed, (after[1] - before[1]) / passed


def spent(pid: int) -> tuple[float, int]:
    """Seconds of CPU time, and voluntary context switches, up to now."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    wakes = next(line.split()[1] for line in lines if line.startswith("voluntary"))
    return (int(fields[11]) + int(fields[12])) / TICKS, int(wakes)


def longest_wait(sock: socket.socket, seconds: float) -> float:
    """Milliseconds of the longest of the echoes that fit into this time."""
    until, worst = time.perf_counter() + seconds, 0.0
    while time.perf_counter() < until:
        worst = max(worst, echo(sock))
        select.select([], [], [], 0.001)
    return worst


def echo(sock: socket.socket) -> float:
    """Milliseconds of one echo."""
    begun = time.perf_counter()
    sock.sendall(MESSAGE)
    assert sock.recv(100) == MESSAGE
    return (time.perf_counter() - begun) * 1e3


if __name__ == "__main__":
    main()
