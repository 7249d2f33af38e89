"""How long `forkd clients` takes beside so many clients, and whether the workers notice.

The time is that of the whole command, with the interpreter's start. What the workers notice is how late their loops'
heartbeats come round (LAG in `forkd status`), the worst of all workers while the command runs again and again, and
beside it the same without the command; and the processor time that they use meanwhile.

    python bench/clients.py [--clients 10000] [--workers 4] [--rounds 5] [--seconds 5]
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forkd_daemon import free_port, wait_for
from replace import ask

#: Clients in one process, which has a descriptor for each.
PART = 2500


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory, "forkd")
        identity = ["--name", "clients", "--run-directory", str(run)]
        with daemon(identity, arguments.workers, port, Path(directory, "log")), idle_clients(port, arguments.clients):
            wait_clients(run / "control.sock", arguments.clients)
            command = [sys.executable, "-m", "forkd", "clients", *identity]
            for label, more in (("table", []), ("JSON", ["--json"]), ("sorted by client", ["--sort", "client"])):
                times = [timed([*command, *more], arguments.clients) for _ in range(arguments.rounds)]
                print(f"{label:20} {statistics.median(times) * 1e3:8.0f} ms   max {max(times) * 1e3:8.0f} ms")
            for label, deed in (("alone", lambda: time.sleep(0.2)), ("beside it", lambda: timed(command))):
                lag, cpu = watched(run / "control.sock", deed, arguments.seconds)
                print(f"{'workers ' + label:20} {lag * 1e3:8.2f} ms lag   {cpu:8.1%} of a processor, all together")


@contextmanager
def daemon(identity: list[str], workers: int, port: int, log: Path) -> Iterator[None]:
    """A daemon with the built-in echo."""
    command = [sys.executable, "-m", "forkd", "run", *identity, "--workers", str(workers)]
    options = ["--listen", f"tcp://127.0.0.1:{port}", "--set", f"log.to={log}"]
    server = subprocess.Popen([*command, *options])
    try:
        wait_for(port)
        yield
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()


@contextmanager
def idle_clients(port: int, count: int) -> Iterator[None]:
    """So many connections, in as many processes as they need."""
    pids = []
    try:
        for start in range(0, count, PART):
            pid = os.fork()
            if pid == 0:
                visit(port, min(PART, count - start))
            pids.append(pid)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def visit(port: int, count: int) -> None:
    """In a child: connects so often, and stays."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kept = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(b"here")
        kept.append(sock)
    signal.pause()


def wait_clients(control: Path, count: int) -> None:
    """Waits until all are served."""
    while sum(worker["clients"] for worker in ask(control)["workers"]) < count:
        time.sleep(0.1)


def timed(command: list[str], count: int = 0) -> float:
    """Seconds that a command takes, which has to list so many."""
    begun = time.perf_counter()
    result = subprocess.run(command, capture_output=True, check=True)
    taken = time.perf_counter() - begun
    assert result.stdout.count(b"127.0.0.1:") >= count
    return taken


def watched(control: Path, deed: Callable[[], Any], seconds: float) -> tuple[float, float]:
    """The workers' largest lag while something is done again and again, and the share of a processor that they use."""
    pids = [worker["pid"] for worker in ask(control)["workers"]]
    worst, begun, before = 0.0, time.perf_counter(), sum(map(used, pids))
    while time.perf_counter() < begun + seconds:
        deed()
        worst = max([worst, *(worker["lag"] for worker in ask(control)["workers"])])
    return worst, (sum(map(used, pids)) - before) / (time.perf_counter() - begun)


def used(pid: int) -> float:
    """Seconds of processor time that a process has used (proc_pid_stat(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
