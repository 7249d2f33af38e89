"""How many instructions a worker executes for a request and for a connection, against the figures in guard.json.

Time says little on a busy machine; instructions, counted by valgrind's callgrind, are nearly the same in every run and
on every machine, as long as interpreter and compiler are the same ones. So guard.json has figures for each interpreter
that they were taken on; where it has none, or valgrind is missing, nothing is checked, and the reason is printed.

One worker serves one client, which does nothing before the worker waits for it again, so that the counts do not depend
on who is faster. Both twins
of the hot path are run. A count that is more than 5 % away from its figure fails; one that is meant is committed after
--renew.

    python bench/guard.py [--renew]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from forkd_daemon import MESSAGE, free_port

from forkd import compiled

HERE = Path(__file__).parent
FIGURES = HERE / "guard.json"
TOLERANCE = 0.05
COMPILER = os.environ.get("CC", "cc")

#: Each shape is measured so often, and the least taken: what a worker does by the clock (its heartbeat) comes on top,
#: the more of it the slower the machine is.
ROUNDS = 20

#: What PYTHONHASHSEED is in each start. Where objects are in memory decides how well CPython's cache of attributes
#: works, which is a few percent; of several starts the least is taken.
SEEDS = ("1", "2")

#: What FORKD_PURE is for each twin.
TWINS = {"compiled": "0", "pure": "1"}

#: How often each thing is done in a round.
TIMES = {"request": 20, "connection": 20, "reset connection": 20, "datagram": 20, "streams request": 20}

#: Seconds for the daemon to come up under valgrind, and for an answer.
PATIENCE = 120.0

Counts = dict[str, dict[str, int]]


def main() -> None:
    """Measures, and compares or renews."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write guard.json instead of comparing with it")
    arguments = parser.parse_args()
    figures: dict[str, Counts] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if reason := what_is_missing():
        sys.exit(f"guard: CI has to have {reason}" if os.environ.get("CI") or arguments.renew else skipped(reason))
    if interpreter() not in figures and not arguments.renew:
        sys.exit(skipped(f"figures of {interpreter()} in {FIGURES.name}; `make guard-renew` adds them"))
    found = count_all()
    if arguments.renew:
        FIGURES.write_text(json.dumps({**figures, interpreter(): found}, indent=2, sort_keys=True) + "\n")
    wanted = figures.get(interpreter(), found)
    print(f"{'instructions of a worker for a':32} {'figure':>9} {'now':>9}")
    for twin, counts in found.items():
        for shape, now in counts.items():
            before = wanted[twin].get(shape, 0)
            print(f"{f'{shape} ({twin})':32} {before:9,} {now:9,} {now / before - 1 if before else 0:+7.1%}")
    if not arguments.renew and (complaints := compare(wanted, found)):
        sys.exit("\n".join(complaints))


def skipped(reason: str) -> int:
    """Says why nothing is checked; the exit status."""
    print(f"guard: skipped, for there is no {reason}")
    return 0


def what_is_missing() -> str:
    """What of the machine is missing; empty if nothing is."""
    for program in ("valgrind", COMPILER):
        if shutil.which(program) is None:
            return f"program {program}"
    _, reason = compiled.load()
    return f"compiled twin: {reason}" if reason else ""


def interpreter() -> str:
    """What figures hold for."""
    return f"{platform.python_implementation()} {platform.python_version()}, {platform.python_compiler()}, " + (
        platform.machine()
    )


def compare(wanted: Counts, found: Counts) -> list[str]:
    """What is wrong, a line each."""
    complaints = []
    for twin, shape in ((twin, shape) for twin, counts in found.items() for shape in counts):
        now, before = found[twin][shape], wanted.get(twin, {}).get(shape)
        if before is None:
            complaint = "has no figure"
        elif now > before * (1 + TOLERANCE):
            complaint = (
                f"takes {now / before - 1:.1%} more instructions than its figure; find out why, and if it has to"
            )
        elif now < before * (1 - TOLERANCE):
            complaint = f"takes {1 - now / before:.1%} fewer instructions than its figure; for it to stay so"
        else:
            continue
        complaints.append(f"guard: {shape} ({twin}) {complaint}: run `make guard-renew` and commit bench/guard.json")
    return complaints


def count_all() -> Counts:
    """The least of all starts, for each twin."""
    starts = [(twin, seed) for seed in SEEDS for twin in TWINS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        counts = list(pool.map(count, *zip(*starts, strict=True)))
    found: Counts = {}
    for twin in TWINS:
        of_twin = [one for (other, _), one in zip(starts, counts, strict=True) if other == twin]
        found[twin] = {shape: min(one[shape] for one in of_twin) for shape in TIMES}
    return found


def count(twin: str, seed: str) -> dict[str, int]:
    """Instructions for one of each of TIMES, of one start."""
    with tempfile.TemporaryDirectory() as directory:
        with serving(Path(directory), twin, seed) as ports:
            shapes = scenario(ports)
        stretches = read_stretches(Path(directory))
    assert len(stretches) == len(shapes) + 1, f"{len(stretches)} stretches for {len(shapes)} shapes"
    least: dict[str, int] = {}
    for shape, instructions in zip(shapes, stretches[1:], strict=True):  # the first one is the worker's start
        least[shape] = min(instructions, least.get(shape, instructions))
    return {shape: (least[shape] - least["nothing"]) // times for shape, times in TIMES.items()}


@contextlib.contextmanager
def serving(directory: Path, twin: str, seed: str) -> Iterator[dict[str, int]]:
    """A daemon with one worker under callgrind; the ports of its listeners."""
    ports = {name: free_port() for name in ("mark", "echo", "streams", "datagrams")}
    handlers = {
        "mark": "guard_handlers:Mark",
        "echo": "forkd.builtin:Echo",
        "streams": "guard_handlers:echo",
        "datagrams": "guard_handlers:Datagrams",
    }
    schemes = {name: "udp" if name == "datagrams" else "tcp" for name in ports}
    listen = [
        {"address": f"{schemes[name]}://127.0.0.1:{port}", "handler": handlers[name]} for name, port in ports.items()
    ]
    settings = {"workers": 1, "listen": listen, "boot_timeout": "300s", "stall_timeout": "300s"}
    file = directory / "guard.yaml"
    file.write_text(json.dumps(settings))  # which is YAML, too
    valgrind = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no"]
    valgrind.append(f"--callgrind-out-file={directory}/count.%p")
    command = [sys.executable, "-m", "forkd", "run", str(file), "--run-directory", f"{directory}/run"]
    path = os.pathsep.join([str(HERE.parent), str(HERE)])
    environment = {
        "PATH": os.environ["PATH"],
        compiled.PURE: TWINS[twin],
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": path,
        "FORKD_GUARD_MARK": build_mark(directory),
    }
    log = directory / "log"
    with log.open("wb") as output:
        server = subprocess.Popen([*valgrind, *command], env=environment, stdout=output, stderr=output)
    try:
        wait_for(ports["echo"], server, log)
        yield ports
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()


def build_mark(directory: Path) -> str:
    """Compiles mark.c; the library's path."""
    library = str(directory / "mark.so")
    subprocess.run([COMPILER, "-O2", "-shared", "-fPIC", "-o", library, str(HERE / "mark.c")], check=True)
    return library


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    """Waits until a worker answers."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with connect(port) as sock:
                ask(sock)
                return
        except OSError:
            if server.poll() is not None or time.monotonic() > until:
                sys.exit(f"guard: forkd does not start under valgrind:\n{log.read_text()}")
            time.sleep(0.1)


def scenario(ports: dict[str, int]) -> list[str]:
    """Has the worker do all of TIMES again and again, with a mark after each; what was done before each mark but the
    first one.
    """
    mark, echo, streams = (connect(ports[name]) for name in ("mark", "echo", "streams"))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.settimeout(PATIENCE)
    datagrams.connect(("127.0.0.1", ports["datagrams"]))
    worker = Path("/proc", ask(mark).decode(), "stat")
    deeds: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "request": lambda: ask(echo),
        "connection": lambda: visit(ports["echo"], worker),
        "reset connection": lambda: reset(ports["echo"], worker),
        "datagram": lambda: ask(datagrams),
        "streams request": lambda: ask(streams),
    }
    done = []
    for shape, deed in list(deeds.items()) * (ROUNDS + 1):  # what is only done the first time is in the first round
        for _ in range(TIMES.get(shape, 0)):
            deed()
            wait_idle(worker)
        ask(mark)
        wait_idle(worker)
        done.append(shape)
    for sock in (mark, echo, streams, datagrams):
        sock.close()
    return done


def connect(port: int) -> socket.socket:
    """A connection."""
    sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(sock: socket.socket) -> bytes:
    """One request; its answer."""
    sock.sendall(MESSAGE)
    return sock.recv(4096)


def visit(port: int, worker: Path) -> None:
    """A connection with one request; the server has closed it when this returns."""
    with connect(port) as sock:
        wait_idle(worker)
        ask(sock)
        wait_idle(worker)
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""


def reset(port: int, worker: Path) -> None:
    """The same, but the client resets the connection; the kernel has told the server when this returns."""
    with connect(port) as sock:
        wait_idle(worker)
        ask(sock)
        wait_idle(worker)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def wait_idle(worker: Path) -> None:
    """Waits until a process sleeps, which one with nothing else to wait for does in its poll."""
    while worker.read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.0001)


def read_stretches(directory: Path) -> list[int]:
    """The instructions up to each mark, in their order."""
    found = {}
    for file in directory.glob("count.*.*"):  # what is counted after the last mark has no second number
        total = re.search(r"^(?:summary|totals): (\d+)", file.read_text(), re.MULTILINE)
        if total is not None:
            found[int(file.suffix[1:])] = int(total[1])
    return [found[number] for number in sorted(found)]


if __name__ == "__main__":
    main()
