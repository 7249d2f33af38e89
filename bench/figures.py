"""forkd's cost beside that of others, and how it grows: what docs/benchmarks.md is made of.

Servers run in turn, several rounds of all, under the same clients (load.c). What is compared is the CPU time that all
processes of a server take for a request, as a ratio to an echo in C (floor.c) in the same round; the median of the
rounds is given, with the least and the most. Rounds in which C itself is more than 20 % from its median are repeated.

    python bench/figures.py [--quick] [--rounds 3] [--seconds 1.0] [--json FILE] [--docs DIRECTORY]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import report
from forkd_daemon import MESSAGE, free_port
from shapes import (
    FORKD,
    GROWTH,
    IDLE,
    MAIN,
    METERED,
    OTHERS,
    PACKAGES,
    PURE,
    SHAPES,
    STAYING,
    VARIANTS,
    WATCHED,
    Shape,
)

HERE = Path(__file__).parent
BUILT = HERE.parent / "build" / "bench"
TICKS = os.sysconf("SC_CLK_TCK")

#: How far C may be from its median.
STEADY = 0.2

Found = dict[str, Any]


def main() -> None:
    """Measures all, and writes it where it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a round of half a second of the main servers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--docs", type=Path, help="write benchmarks.md and its plots to this directory")
    arguments = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rounds, seconds = (1, 0.5) if arguments.quick else (arguments.rounds, arguments.seconds)
    found: Found = {"rounds": rounds, "seconds": seconds, "missing": missing(), "shapes": {}, "growth": {}}
    for name, shape in SHAPES.items():
        servers = MAIN if arguments.quick or not shape.others else MAIN + OTHERS
        found["shapes"][name] = measure(shape, servers, rounds, seconds)
        show(shape, found["shapes"][name])
    for label, reason in found["missing"].items():
        print(f"not measured: {label}, for want of {reason}")
    if not arguments.quick:
        found["variants"] = {name: measure(one, ("C", *VARIANTS), rounds, seconds) for name, one in SHAPES.items()}
        found["rest"] = {label: measure_rest(label) for label in MAIN if label not in found["missing"]}
        for axis, shapes in GROWTH.items():
            found["growth"][axis] = {shape.title: measure(shape, MAIN, 1, 0.6 * seconds) for shape in shapes}
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))
    if arguments.docs:
        report.write(found, arguments.docs)


def missing() -> dict[str, str]:
    """The servers that can't run here, and what they lack."""
    lacking = {label: f"the package {one}" for label, one in PACKAGES.items() if importlib.util.find_spec(one) is None}
    if shutil.which("socat") is None:
        lacking["socat"] = "the program socat"
    perl = ["perl", "-MNet::Server::PreFork", "-e", "1"]
    if shutil.which("perl") is None or subprocess.run(perl, capture_output=True, check=False).returncode:
        lacking["Net::Server::PreFork"] = "Perl's module Net::Server::PreFork"
    version = [sys.executable, "-m", "forkd", "--version"]
    if "(compiled)" not in subprocess.run(version, capture_output=True, text=True, check=True).stdout:
        lacking[FORKD] = "the compiled twin: install forkd where a C compiler and Python's headers are"
    return lacking


def measure(shape: Shape, servers: tuple[str, ...], rounds: int, seconds: float) -> Found:
    """Rounds of all servers; of each: CPU microseconds of a request, ratios to C, requests a second, waits."""
    lacking = missing()
    kept: list[dict[str, Found]] = []
    for _ in range(rounds + 2):
        kept.append({label: run(label, shape, seconds) for label in servers if label not in lacking})
        middle = statistics.median_low(one["C"]["cpu"] for one in kept)
        steady = [one for one in kept if abs(one["C"]["cpu"] / middle - 1) <= STEADY] if rounds > 1 else kept
        if len(steady) >= rounds:
            break
    found = {}
    for label in steady[0]:
        of_server = [one[label] for one in steady]
        ratios = [one[label]["cpu"] / one["C"]["cpu"] for one in steady]
        found[label] = {key: statistics.median(one[key] for one in of_server) for key in of_server[0]}
        found[label] |= {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
        found[label]["failed"] = sum(one["failed"] for one in of_server)
    return found


def show(shape: Shape, found: Found) -> None:
    """Prints the figures of one shape."""
    print(f"\n{shape.title}\n{'':22} {'of C':>6} {'least':>6} {'most':>6} {'CPU us':>8} {'a second':>9}", end="")
    print(f" {'p50 us':>8} {'p99 us':>8} {'p99.9 us':>9} {'failed':>7}")
    for label, row in found.items():
        print(f"{label:22} {row['ratio']:6.2f} {row['least']:6.2f} {row['most']:6.2f} {row['cpu']:8.2f}", end="")
        print(
            f" {row['rate']:9.0f} {row['p50']:8.0f} {row['p99']:8.0f} {row['p999']:9.0f} {row['failed']:7.0f}",
            flush=True,
        )


def run(label: str, shape: Shape, seconds: float) -> Found:
    """One round of one server."""
    with serving(label, shape) as (server, port, _):
        before = settled(server)
        command = [BUILT / "load", shape.load, port, shape.clients, seconds, shape.size]
        pipe = subprocess.PIPE
        with subprocess.Popen([str(word) for word in command], stdin=pipe, stdout=pipe, text=True) as clients:
            assert clients.stdout is not None
            said = clients.stdout.readline()
            spent = cpu_seconds(server) - before  # while the clients stay: some servers' processes end with them
        if not said:
            sys.exit(f"bench: {label}: {shape.title}: the clients have failed")
        load: Found = json.loads(said)
    requests = max(load["requests"], 1)
    waits = {key: load[key] for key in ("p50", "p99", "p999")}
    return {
        "cpu": max(spent, 0.005) * 1e6 / requests,
        "rate": requests / load["seconds"],
        "failed": load["failed"],
        **waits,
    }


def settled(server: int) -> float:
    """A server's CPU time, once all of its workers have started."""
    until, used = time.monotonic() + 3, cpu_seconds(server)
    while time.monotonic() < until:
        time.sleep(0.15)
        before, used = used, cpu_seconds(server)
        if used < before + 0.002:
            break
    return used


def measure_rest(label: str) -> Found:
    """What is measured without load: start-up, memory of an idle connection, and the spread over workers."""
    with serving(label, Shape("idle", IDLE)) as (server, port, started):
        before = memory(server)
        idle = connect(port, IDLE)
        kib = (memory(server) - before) / IDLE
        for sock in idle:
            sock.close()
    with serving(label, Shape("staying", STAYING, workers=4)) as (server, port, _):
        before_each = {pid: descriptors(pid) for pid in below(server)}
        staying = connect(port, STAYING)
        counts = sorted(descriptors(pid) - count for pid, count in before_each.items() if pid != server)[-4:]
        for sock in staying:
            sock.close()
    return {"start": started, "idle": kib, "spread": counts[-1] / max(counts[0], 1)}


def connect(port: int, count: int) -> list[socket.socket]:
    """So many connections, each served once."""
    found = []
    for _ in range(count):
        sock = socket.create_connection(("127.0.0.1", port), 10)
        sock.sendall(MESSAGE)
        assert sock.recv(100) == MESSAGE
        found.append(sock)
    return found


def below(server: int) -> list[int]:
    """The pids of a server's processes."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
    found, level = [], [server]
    while level:
        found += level
        level = [pid for pid, parent in parents.items() if parent in level]
    return found


def cpu_seconds(server: int) -> float:
    """The CPU time of a server's processes, and of those of them that have ended and were waited for.

    A process's times of proc(5) are whole ticks, too coarse where each client has a process; what the scheduler says of
    its threads is exact, but lost when they end.
    """
    total = 0.0
    for pid in below(server):
        try:
            ticks = [int(field) for field in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]]
            threads = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
        except OSError:  # it has ended
            continue
        own, waited_for = sum(ticks[:2]) / TICKS, sum(ticks[2:]) / TICKS
        total += max(own, sum(int(times[0]) for times in threads) / 1e9) + waited_for
    return total


def memory(server: int) -> float:
    """KiB of a server's processes; what they share counts once."""
    total = 0
    for pid in below(server):
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(row.split()[1]) for row in rows if row.startswith("Pss:"))
    return total


def descriptors(pid: int) -> int:
    """How many a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextmanager
def serving(label: str, shape: Shape) -> Iterator[tuple[int, int, float]]:
    """A server that has answered: its pid, its port, and the seconds to its first answer."""
    port = free_port()
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "FORKD_PURE": "1" if label == PURE else "0", "PYTHONPATH": str(HERE)}
        log = Path(directory, "log")
        begun = time.monotonic()
        with log.open("wb") as output:
            server = subprocess.Popen(
                command_of(label, shape, port, directory),
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            wait_for(shape, port, server, log)
            yield server.pid, port, time.monotonic() - begun
        finally:
            end(server)


def command_of(label: str, shape: Shape, port: int, directory: str) -> list[str]:
    """A server's command line."""
    scheme = "udp" if shape.kind == "datagram" else "tcp"
    if label == "C":
        return [str(BUILT / "floor"), scheme, str(port), str(shape.workers)]
    if label == "socat":
        return ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr,fork,nodelay,backlog=4096", "PIPE"]
    if label == "Net::Server::PreFork":
        return ["perl", str(HERE / "prefork.pl"), str(port), str(shape.clients + 1)]
    if label in (FORKD, PURE, *VARIANTS):
        handlers = {"stream": "forkd.builtin:Echo", "coroutine": "peers:echo", "datagram": "forkd.builtin:DatagramEcho"}
        command = [sys.executable, "-m", "forkd", "run", handlers[shape.kind], "--workers", str(shape.workers)]
        options = ["--name", "bench", "--run-directory", f"{directory}/run", "--log-level", "error"]
        options += [word for setting in settings_of(label, scheme) for word in ("--set", setting)]
        return [*command, *options, "--listen", f"{scheme}://127.0.0.1:{port}"]
    return [sys.executable, str(HERE / "peers.py"), label, shape.kind, str(shape.workers), str(port)]


def settings_of(label: str, scheme: str) -> list[str]:
    """The settings of one of forkd's variants."""
    found = ["admin.address=tcp://127.0.0.1:0"] if label == METERED else []
    if label == WATCHED:
        found.append("listen.limits.rate_per_ip=100000000/s")
    if label in VARIANTS and scheme == "tcp":
        longest = "24h" if label == WATCHED else "0"
        found += [f"listen.timeouts.{one}={longest}" for one in ("first_byte", "idle", "write", "lifetime")]
        if label == WATCHED:
            found += [f"listen.limits.{one}=10000" for one in ("connections", "per_worker", "per_ip")]
    return found


def wait_for(shape: Shape, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until the server has answered."""
    kind = socket.SOCK_DGRAM if shape.kind == "datagram" else socket.SOCK_STREAM
    until = time.monotonic() + 15
    while True:
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.settimeout(0.5)
            try:
                sock.connect(("127.0.0.1", port))
                sock.sendall(MESSAGE)
                if sock.recv(100) == MESSAGE:
                    return
            except OSError:
                if server.poll() is not None or time.monotonic() > until:
                    sys.exit(f"bench: {' '.join(map(str, server.args))} does not answer:\n{log.read_text()}")  # type: ignore[arg-type]
        time.sleep(0.01)


def end(server: subprocess.Popen[bytes]) -> None:
    """Ends a server and what it has started, which may be in sessions of its own."""
    others = []
    for pid in below(server.pid)[1:]:
        with suppress(ProcessLookupError):
            others.append(os.pidfd_open(pid))
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(5)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    for process in others:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)


if __name__ == "__main__":
    main()
