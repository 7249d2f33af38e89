"""Echo on forkd beside asyncio and uvloop: CPU time per request and per connection, as ratios within one run.

Each server runs in turn, several rounds of all, under the same load from this process; what is compared is the median
of the CPU time that all processes of the server took (proc(5), utime and stime). Absolute figures mean little on a
shared machine, and nothing on another one.

    python bench/compare.py [--workers 4] [--clients 50] [--seconds 2] [--rounds 5] [--fresh]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PEER = Path(__file__).parent / "peer.py"
MESSAGE = b"x" * 39 + b"\n"
RESET_AT_CLOSE = struct.pack("ii", 1, 0)  # so that the client's ports are free again at once


def main() -> None:
    """Runs the comparison and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fresh", action="store_true", help="a new connection for each request")
    arguments = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for label, command in servers(arguments.workers).items():
            found.setdefault(label, []).append(measure(command, arguments))
    first = statistics.median(cpu for cpu, _ in found["forkd"])
    print(f"{'':8} {'CPU µs/request':>15} {'of forkd':>9} {'requests/s':>11}")
    for label, rounds in found.items():
        cpu = statistics.median(cpu for cpu, _ in rounds)
        rate = statistics.median(rate for _, rate in rounds)
        print(f"{label:8} {cpu:15.2f} {cpu / first:9.2f} {rate:11.0f}")


def servers(workers: int) -> dict[str, list[str]]:
    """The servers' command lines, without the port."""
    python = sys.executable
    peers = ["asyncio", *(["uvloop"] if importlib.util.find_spec("uvloop") else [])]
    forkd = [python, "-m", "forkd", "run", "--workers", str(workers), "--log-level", "error"]
    return {"forkd": forkd, **{peer: [python, str(PEER), peer, str(workers)] for peer in peers}}


def measure(command: list[str], arguments: argparse.Namespace) -> tuple[float, float]:
    """CPU microseconds per request, and requests per second, of one server."""
    port = free_port()
    with tempfile.TemporaryDirectory() as run:
        if "forkd" in command:
            command = [*command, "--listen", f"tcp://127.0.0.1:{port}", "--run-directory", f"{run}/forkd"]
        else:
            command = [*command, str(port)]
        server = subprocess.Popen(command, start_new_session=True)
        try:
            wait_for(port)
            before, began = cpu_seconds(server.pid), time.monotonic()
            requests = load(port, arguments.clients, began + arguments.seconds, fresh=arguments.fresh)
            took = time.monotonic() - began
            return (cpu_seconds(server.pid) - before) * 1e6 / requests, requests / took
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait()


def forkd_command(handler: str, workers: int, port: int, run: str, settings: Sequence[str] = ()) -> list[str]:
    """The command of a daemon at a port of 127.0.0.1, whose files are in a directory.

    Args:
        handler: what serves; empty: the built-in echo.
        workers: how many.
        port: where it listens.
        run: the directory.
        settings: more of them, each KEY=VALUE.
    """
    command = [sys.executable, "-m", "forkd", "run", *([handler] if handler else []), "--name", "bench"]
    command += ["--workers", str(workers), "--listen", f"tcp://127.0.0.1:{port}", "--run-directory", f"{run}/forkd"]
    return command + [word for setting in (f"log.to={run}/log", *settings) for word in ("--set", setting)]


def free_port() -> int:
    """A port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def wait_for(port: int) -> None:
    """Waits until the server accepts."""
    deadline = time.monotonic() + 10
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), 1) as probe:
                probe.sendall(MESSAGE)
                probe.recv(100)
                return
        except OSError:
            if time.monotonic() > deadline:
                raise


def cpu_seconds(server: int) -> float:
    """The CPU time that a server and the processes below it have taken; forkd's workers have sessions of their own."""
    parents, ticks = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        pid = int(stat.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    found, below = 0, {server}
    while below:
        found += sum(ticks.get(pid, 0) for pid in below)
        below = {pid for pid, parent in parents.items() if parent in below}
    return found / os.sysconf("SC_CLK_TCK")


def load(port: int, clients: int, until: float, *, fresh: bool) -> int:
    """Requests answered to `clients` that each ask again when they have their answer."""
    poll = select.epoll()
    socks: dict[int, socket.socket] = {}

    def connect() -> None:
        sock = socket.create_connection(("127.0.0.1", port), 5)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_AT_CLOSE)
        socks[sock.fileno()] = sock
        poll.register(sock, select.EPOLLIN)
        sock.send(MESSAGE)

    for _ in range(clients):
        connect()
    answered = 0
    while time.monotonic() < until:
        for descriptor, _ in poll.poll(1):
            assert len(socks[descriptor].recv(4096)) == len(MESSAGE)
            answered += 1
            if fresh:
                socks.pop(descriptor).close()
                connect()
            else:
                socks[descriptor].send(MESSAGE)
    for sock in socks.values():
        sock.close()
    poll.close()
    return answered


if __name__ == "__main__":
    main()
