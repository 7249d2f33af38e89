"""How long a killed worker is missed: milliseconds from its SIGKILL until the next one serves.

Each figure comes from a daemon of its own with one worker, whose first death it is, so that no backoff is part of it.
The client connects after the kill and waits in the backlog; what is measured ends with the first byte of its echo.
Beside it stands the time from the kill until the dead process is gone, which is the kernel's.

    python bench/replace.py [--daemons 10] [--handler forkd.builtin:Echo]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from compare import MESSAGE, free_port, wait_for


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--daemons", type=int, default=10)
    parser.add_argument("--handler", default="forkd.builtin:Echo")
    arguments = parser.parse_args()
    columns = list(zip(*(measure(arguments.handler) for _ in range(arguments.daemons)), strict=True))
    print(f"{'':30} {'median':>8} {'max':>8}   (ms, {arguments.daemons} daemons)")
    for label, figures in zip(("kill to the end of the process", "kill to the next one serving"), columns, strict=True):
        print(f"{label:30} {statistics.median(figures):8.1f} {max(figures):8.1f}")


def measure(handler: str) -> tuple[float, float]:
    """Milliseconds to the end of a killed worker, and to the echo of the next one."""
    port = free_port()
    with tempfile.TemporaryDirectory() as run:
        command = [sys.executable, "-m", "forkd", "run", handler, "--name", "replace", "--workers", "1"]
        options = [
            "--listen",
            f"tcp://127.0.0.1:{port}",
            "--run-directory",
            f"{run}/forkd",
            "--set",
            f"log.to={run}/log",
        ]
        server = subprocess.Popen([*command, *options])
        try:
            wait_for(port)
            return kill_and_wait(only_worker(Path(run, "forkd", "control.sock")), port)
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


def only_worker(control: Path) -> int:
    """The pid of the daemon's one worker."""
    (worker,) = ask(control)["workers"]
    return int(worker["pid"])


def kill_and_wait(worker: int, port: int) -> tuple[float, float]:
    """Kills a worker; milliseconds until it has ended, and until another one has served a client."""
    descriptor = os.pidfd_open(worker)
    begun = time.perf_counter()
    os.kill(worker, signal.SIGKILL)
    select.select([descriptor], [], [])
    ended = time.perf_counter()
    os.close(descriptor)
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(MESSAGE)
        assert client.recv(100) == MESSAGE
    return (ended - begun) * 1e3, (time.perf_counter() - begun) * 1e3


if __name__ == "__main__":
    main()
