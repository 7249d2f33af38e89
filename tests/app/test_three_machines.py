"""Three daemons on machines of their own (network namespaces) behind a real HAProxy: upgraded, restarted, stopped and
killed one after the other, while clients come and go.

No short connection is lost and no long one is cut, but where HAProxy may not send a client to another server: there a
stop or a killed master may lose some. There is a short form, and a long one for `make soak`, which prints its figures.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program
from tests.support.network_namespaces import Host, private_network
from tests.support.processes import DEADLINE, eventually

INTERVAL = "inter {0}ms fall 2 rise 1"

#: How HAProxy looks at its servers, so often, by front end; each has a port from 7001 on.
FRONTS = {
    "none": ("", ""),
    "check": ("option httpchk GET /ready", f"check port 9101 {INTERVAL}"),
    "redispatch": ("option redispatch 1\n option httpchk GET /ready", f"check port 9101 {INTERVAL}"),
    "agent": ("option redispatch 1", f"check {INTERVAL} agent-check agent-port 9102 agent-inter {{0}}ms"),
}
SAFE = ("redispatch", "agent")
LONG = 7000  # the port of the front end for long sessions

SETTINGS = ("admin.address=tcp://0.0.0.0:9101", "agent=tcp://0.0.0.0:9102", "drain_spread=300ms")


class Size(NamedTuple):
    """Of a run.

    Attributes:
        connections: short ones, at least.
        sessions: long ones at a time.
        workers: of each daemon.
        pause: seconds between two short connections.
        often: milliseconds between two looks of HAProxy at a server.
    """

    connections: int
    sessions: int
    workers: int
    pause: float
    often: int


class Machine:
    """One of them, which HAProxy looks at so often (milliseconds)."""

    def __init__(self, harness: Harness, host: Host, workers: int, often: int) -> None:
        self.host = host
        self.daemon = Daemon(
            harness.directory, host.name, target="polite:Polite", workers=workers,
            settings=(*SETTINGS, f"stop_delay={3 * often + 200}ms"),
            listen=("tcp://0.0.0.0:7007",),
        )  # fmt: skip
        self.daemon.is_free = lambda address: True  # its network is gone by then
        harness.daemons.append(self.daemon)

    def command(self, verb: str) -> None:
        """Runs a command about its daemon there."""
        daemon = self.daemon
        options = daemon.options if verb in ("start", "restart") else []
        command = [sys.executable, "-m", "forkd", verb, *daemon.target, *daemon.identity, *options]
        result = subprocess.run(
            [*self.host.prefix, *map(str, command)],
            cwd=daemon.directory, capture_output=True, text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr

    def kill(self) -> None:
        """Kills its master, as a crash would."""
        daemon = self.daemon
        left = [daemon.pid, *daemon.workers().values()]
        daemon.signal(signal.SIGKILL)
        eventually(lambda: not any(Path(f"/proc/{pid}/ns").exists() and alive(pid) for pid in left), what="its end")
        daemon.expect("the master is gone")


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextmanager
def machines(harness: Harness, workers: int, often: int) -> Iterator[list[Machine]]:
    """Three of them, each at 10.7.N.2, with a wire to this thread's network."""
    with private_network(), ExitStack() as undo:
        made = []
        for number in range(1, 4):
            host = Host(f"forkd-{os.getpid()}-m{number}", f"10.7.{number}.2")
            run("ip", "netns", "add", host.name)
            undo.callback(run, "ip", "netns", "delete", host.name)
            run("ip", "link", "add", f"wire{number}", "type", "veth", "peer", "wire", "netns", host.name)
            run("ip", "address", "add", f"10.7.{number}.1/24", "dev", f"wire{number}")
            run("ip", "link", "set", f"wire{number}", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "wire")
            for link in ("lo", "wire"):
                host.run("ip", "link", "set", link, "up")
            made.append(Machine(harness, host, workers, often))
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(lambda machine: machine.command("start"), made))
            yield made
        finally:
            for machine in made:
                machine.daemon.stop()


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)


@contextmanager
def haproxy(directory: Path, hosts: Sequence[Host], often: int) -> Iterator[None]:
    """HAProxy before them, on this thread's loopback; returns when all servers are up."""
    needs_program("haproxy")
    config = ["global", f" stats socket {directory}/haproxy.sock", " maxconn 4000", "defaults", " mode tcp"]
    config += [" retries 3", " timeout connect 2s", " timeout client 60s", " timeout server 60s", " timeout check 2s"]
    for port, (name, (options, how)) in enumerate([*FRONTS.items(), ("long", FRONTS["agent"])], 7001):
        config += [f"listen {name}", f" bind 127.0.0.1:{port}", *([f" {options}"] if options else [])]
        config += [f" server {host.name} {host.address}:7007 {how.format(often)}" for host in hosts]
    (directory / "haproxy.cfg").write_text("\n".join(config) + "\n")
    with subprocess.Popen(
        ["haproxy", "-db", "-q", "-f", str(directory / "haproxy.cfg")], stderr=subprocess.DEVNULL
    ) as one:
        try:
            eventually(lambda: probe(7001), what="HAProxy")
            yield
        finally:
            one.terminate()


def probe(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), DEADLINE).close()
        return True
    return False


class Crowd:
    """Clients of all front ends: short connections one after the other, and long sessions that come again when they are
    asked to leave.

    Args:
        sessions: how many of these there are at a time.
        pause: seconds between two short connections.

    Attributes:
        done: short connections that got their answer, by front end.
        lost: others, by front end, by what was done when they came, and why.
        act: what is being done now.
        sessions: how many long sessions have ended in order.
        cut: why others have not.
    """

    def __init__(self, sessions: int, pause: float) -> None:
        self.pause = pause
        self.done: Counter[str] = Counter()
        self.lost: Counter[tuple[str, str, str]] = Counter()
        self.act = "the beginning"
        self.sessions, self.cut = 0, Counter[str]()
        self.stops = threading.Event()
        self.threads = [
            threading.Thread(target=self.come, args=(name, 7001 + place)) for place, name in enumerate(FRONTS)
        ]
        self.threads += [threading.Thread(target=self.stay) for _ in range(sessions)]

    def __enter__(self) -> Crowd:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stops.set()
        for thread in self.threads:
            thread.join(DEADLINE)

    def come(self, name: str, port: int) -> None:
        while not self.stops.wait(self.pause):
            act = self.act
            try:
                with socket.create_connection(("127.0.0.1", port), DEADLINE) as sock:
                    sock.sendall(b"ping")
                    answer = sock.recv(100)
            except OSError as error:
                answer = str(error).encode()
            if answer in (b"ping", b"goodbye", b"pinggoodbye"):  # asked to leave as it came
                self.done[name] += 1
            else:
                self.lost[name, act, answer.decode() or "end of file"] += 1

    def stay(self) -> None:
        while not self.stops.is_set():
            try:
                with socket.create_connection(("127.0.0.1", 7001 + len(FRONTS)), DEADLINE) as sock:
                    self.talk(sock)
            except OSError as error:
                self.cut[str(error)] += 1

    def talk(self, sock: socket.socket) -> None:
        """Talks until it is asked to leave."""
        while not self.stops.is_set():
            sock.sendall(b"ping")
            answer = sock.recv(100)
            if b"goodbye" in answer:
                self.sessions += 1
                return
            if answer != b"ping":
                self.cut[answer.decode() or "end of file"] += 1
                return
            self.stops.wait(1.0)


@pytest.mark.parametrize(
    "size",
    [
        Size(1000, 12, 1, 0.01, 150),
        pytest.param(Size(100_000, 300, 2, 0.0, 1000), marks=[pytest.mark.soak, pytest.mark.timeout(1800)]),
    ],
    ids=["short", "full"],
)
def test_machines_are_changed_one_by_one_and_nobody_is_lost(harness: Harness, tmp_path: Path, size: Size) -> None:
    with (
        machines(harness, size.workers, size.often) as three,
        haproxy(tmp_path, [one.host for one in three], size.often),
        Crowd(size.sessions, size.pause) as crowd,
    ):
        kills = 0
        while True:
            for act in ("upgrade", "restart", "stop", "kill"):
                crowd.act = act
                for machine in three if size.sessions > 100 or act in ("upgrade", "stop") else three[:1]:
                    if act == "kill":
                        machine.kill()
                        kills += 1
                    else:
                        machine.command(act)
                    if act in ("kill", "stop"):
                        machine.command("start")
                        wait_up(tmp_path)
            if crowd.done.total() >= size.connections:
                break
        crowd.__exit__()
        print(f"\n{dict(crowd.done)} lost {dict(crowd.lost)} sessions {crowd.sessions} cut {dict(crowd.cut)}")
        lost = {(name, act) for name, act, _ in crowd.lost if act != "kill"}
        assert lost <= {("none", "stop")}
        by_kills = Counter(name for name, act, _ in crowd.lost.elements() if act == "kill")
        assert by_kills.keys().isdisjoint(SAFE)
        assert max(by_kills.values(), default=0) <= kills  # each front end has one connection at a time
        assert crowd.cut == Counter()
        assert crowd.sessions >= size.sessions


def wait_up(directory: Path) -> None:
    """Waits until HAProxy takes all servers for up."""

    def states() -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{directory}/haproxy.sock")
            sock.sendall(b"show stat\n")
            with sock.makefile() as lines:
                rows = [line.split(",") for line in lines if ",forkd-" in line]
        return all(row[17] in ("UP", "no check") for row in rows)

    eventually(states, what="servers that are up")
