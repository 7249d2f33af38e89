"""What the admin endpoint costs: how late the master reaps a dead worker under scrapes, and what workers pay.

Reaction: workers are killed one after the other, each when the one before it has a successor; the time from when the
kernel has ended one until the master has reaped it. First alone; then beside so many scrapes of /metrics in a second,
each on a connection of its own, and so many readers that ask for /metrics and take a byte in a while.

Cost: instructions in user mode that one worker spends on a connection with one echo, without an admin endpoint and with
it, counted by valgrind (callgrind), which takes a minute or two: the difference of two runs, without the boot.

    python bench/admin.py [--seconds 10] [--rate 200] [--readers 20] [--workers 8] [--connections 3000]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from forkd_daemon import MESSAGE, forkd_command, free_port
from replace import ask, serving

REQUEST = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=float, default=200.0)
    parser.add_argument("--readers", type=int, default=20)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--connections", type=int, default=3000)
    parser.add_argument("--scrape", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: PORT SECONDS
    arguments = parser.parse_args()
    if arguments.scrape:
        scrape(int(arguments.scrape[0]), float(arguments.scrape[1]), arguments.rate, arguments.readers)
        return
    with daemon(arguments.workers, admin=True) as (control, _, admin):
        show("alone", reactions(control, arguments.seconds))
        command = [sys.executable, __file__, "--scrape", str(admin), str(arguments.seconds)]
        command += [f"--rate={arguments.rate}", f"--readers={arguments.readers}"]
        with subprocess.Popen(command):
            time.sleep(0.5)
            show("under scrapes", reactions(control, arguments.seconds - 0.5))
    if arguments.connections and shutil.which("valgrind"):
        plain, measured = (cost(arguments.connections, admin=admin) for admin in (False, True))
        ratio = measured / plain
        print(f"{'a connection':16} {plain:8.0f} instructions, {measured:.0f} with metrics: {ratio:.3f}")


def show(label: str, times: list[float]) -> None:
    """Prints times in milliseconds."""
    times.sort()
    median, worst = times[len(times) // 2], times[-1]
    print(f"{label:16} {median * 1e3:8.1f} ms   max {worst * 1e3:8.1f} ms   of {len(times)} deaths")


@contextlib.contextmanager
def daemon(
    workers: int, *, admin: bool, prefix: Sequence[str] = (), told: IO[bytes] | None = None
) -> Iterator[tuple[Path, int, int]]:
    """A daemon with the built-in echo: its control socket, its port, and that of its endpoint."""
    port, admin_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as run:
        command = forkd_command("", workers, port, run, [f"admin.address={admin_port}"] if admin else [])
        server = subprocess.Popen([*prefix, *command], stderr=told)
        try:
            control = Path(run, "forkd", "control.sock")
            while not control.exists() and server.poll() is None:
                time.sleep(0.05)
            serving(control, workers)
            yield control, port, admin_port
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()


def reactions(control: Path, seconds: float) -> list[float]:
    """Seconds that each dead worker waited for the master."""
    times, until = list[float](), time.monotonic() + seconds
    while time.monotonic() < until:
        serving = [one for one in ask(control)["workers"] if one["state"] == "serving"]
        if not serving:
            time.sleep(0.05)
            continue
        pid = max(serving, key=lambda one: one["age"])["pid"]
        os.kill(pid, signal.SIGKILL)
        while state_of(pid) not in ("Z", ""):
            pass
        ended = time.monotonic()
        while state_of(pid):
            pass
        times.append(time.monotonic() - ended)
        time.sleep(0.3)
    return times


def state_of(pid: int) -> str:
    """A process's state letter; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def scrape(port: int, seconds: float, rate: float, readers: int) -> None:
    """Scrapes so often, beside readers that take their time."""
    until, done = time.monotonic() + seconds, 0
    for _ in range(readers):
        threading.Thread(target=read_slowly, args=(port, until), daemon=True).start()
    began = time.monotonic()
    while (now := time.monotonic()) < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 5) as sock:
            sock.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            while sock.recv(1 << 16):
                pass
            done += 1
        time.sleep(max(0.0, began + done / rate - time.monotonic()))
    print(f"{'scrapes':16} {done / (now - began):8.0f} a second")


def read_slowly(port: int, until: float) -> None:
    """Asks, and takes a byte in a while."""
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            sock.connect(("127.0.0.1", port))
            sock.sendall(REQUEST)
            while time.monotonic() < until and sock.recv(1):
                time.sleep(0.2)


def cost(connections: int, *, admin: bool) -> float:
    """Instructions in user mode that a worker spends on a connection with one echo."""
    few, many = (instructions(count, admin=admin) for count in (connections // 10, connections))
    return (many - few) / (connections - connections // 10)


def instructions(connections: int, *, admin: bool) -> int:
    """Instructions of a worker in its life, which has so many connections."""
    prefix = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null"]
    with tempfile.TemporaryFile() as told, daemon(1, admin=admin, prefix=prefix, told=told) as (control, port, _):
        [pid] = serving(control, 1)
        echo(port, connections)
        os.kill(pid, signal.SIGTERM)
        while state_of(pid):
            time.sleep(0.05)
        told.seek(0)
        found = re.search(rb"==%d== Collected : (\d+)" % pid, told.read())
    if found is None:
        raise SystemExit("valgrind has counted no instructions")
    return int(found[1])


def echo(port: int, connections: int) -> None:
    """So many connections, one after the other."""
    for _ in range(connections):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(MESSAGE)
            sock.recv(len(MESSAGE))


if __name__ == "__main__":
    main()
