"""How long killed workers are missed: milliseconds from their SIGKILL until a client is served again.

Each figure comes from a daemon of its own, whose workers all die for the first time, so that no backoff is part of it:
one with a single worker, and one with several that are killed at once. The client connects after the kill and waits in
the backlog; what is measured ends with the first byte of its echo. Beside it stands the time from the kill until the
dead processes are gone, which is the kernel's, and how the medians compare with those of a single worker.

    python bench/replace.py [--daemons 10] [--workers 8] [--handler forkd.builtin:Echo]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from forkd_daemon import MESSAGE, forkd_command, free_port, wait_for


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemons", type=int, default=10)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--handler", default="forkd.builtin:Echo")
    arguments = parser.parse_args()
    labels = ("kill to the end of the processes", "kill to a client that is served")
    single: list[float] = []
    print(f"{'':42} {'median':>8} {'p90':>8} {'max':>8} {'ratio':>8}   (ms, {arguments.daemons} daemons each)")
    for workers in (1, arguments.workers):
        rounds = [measure(arguments.handler, workers) for _ in range(arguments.daemons)]
        columns = [sorted(figures) for figures in zip(*rounds, strict=True)]
        medians = [statistics.median(figures) for figures in columns]
        single = single or medians
        for label, figures, median, one in zip(labels, columns, medians, single, strict=True):
            p90 = figures[len(figures) * 9 // 10]
            print(f"{workers:3} killed: {label:30} {median:8.1f} {p90:8.1f} {figures[-1]:8.1f} {median / one:8.2f}")


def measure(handler: str, workers: int) -> tuple[float, float]:
    """Milliseconds to the end of killed workers, and to the echo of the first that follows them."""
    port = free_port()
    with tempfile.TemporaryDirectory() as run:
        server = subprocess.Popen(forkd_command(handler, workers, port, run))
        try:
            wait_for(port)
            return kill_and_wait(serving(Path(run, "forkd", "control.sock"), workers), port)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def ask(control: Path) -> dict[str, Any]:
    """What the daemon tells of itself."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(control))
        sock.sendall(b'{"verb": "status"}\n')
        with sock.makefile("rb") as lines:
            return dict(json.loads(lines.readline())["status"])


def serving(control: Path, workers: int) -> list[int]:
    """The pids of the daemon's workers, when all of them serve."""
    while True:
        pids = [worker["pid"] for worker in ask(control)["workers"] if worker["state"] == "serving"]
        if len(pids) == workers:
            return pids
        time.sleep(0.01)


def kill_and_wait(workers: list[int], port: int) -> tuple[float, float]:
    """Kills workers; milliseconds until they have ended, and until another one has served a client."""
    with contextlib.ExitStack() as stack:
        descriptors = [os.pidfd_open(worker) for worker in workers]
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
        begun = time.perf_counter()
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        for descriptor in descriptors:
            select.select([descriptor], [], [])
        ended = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(MESSAGE)
        assert client.recv(100) == MESSAGE
    return (ended - begun) * 1e3, (time.perf_counter() - begun) * 1e3


if __name__ == "__main__":
    main()
