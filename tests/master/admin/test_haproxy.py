"""The agent check and /ready as a real HAProxy takes them: who gets clients, and how many."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from forkd.system.scoreboard import HEARTBEAT_SECONDS
from tests.support.admin import service_of
from tests.support.changing_daemon import Changing
from tests.support.clients import dial, echoes
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program
from tests.support.processes import eventually


class Balancer:
    """A running HAProxy.

    Args:
        stats: its own control socket.
    """

    def __init__(self, stats: Path) -> None:
        self.stats = stats

    def tell(self, command: str) -> str:
        with dial(f"unix:{self.stats}") as sock, sock.makefile("rb") as answer:
            sock.sendall(command.encode() + b"\n")
            return answer.read().decode()

    def server(self, name: str) -> tuple[str, int]:
        """What it takes a server for, and the server's weight of 100."""
        if not self.stats.exists():
            return "", 0
        rows = csv.DictReader(self.tell("show stat").removeprefix("# ").splitlines())
        return next((row["status"], int(row["weight"])) for row in rows if row["svname"] == name)

    def wait(self, status: str, weight: int, name: str = "agent") -> None:
        eventually(lambda: self.server(name) == (status, weight), what=f"{name} {status} of weight {weight}")

    def wait_both(self, status: str) -> None:
        """By the agent check, and by /ready."""
        eventually(
            lambda: all(self.server(name)[0].startswith(status) for name in ("agent", "ready")), what=f"both {status}"
        )


@contextmanager
def balancer(directory: Path, daemon: Daemon) -> Iterator[Balancer]:
    """HAProxy that looks at a daemon in two ways: by the agent check, and by /ready."""
    needs_program("haproxy")
    where, agent, admin = daemon.address, service_of(daemon, "agent"), service_of(daemon, "admin")
    where, (agent_port, admin_port) = where.removeprefix("tcp://"), (one.rpartition(":")[2] for one in (agent, admin))
    stats = directory / "haproxy.sock"
    config = f"""
global
 stats socket {stats} level admin
defaults
 mode tcp
 timeout connect 5s
 timeout client 30s
 timeout server 30s
backend by_agent
 default-server weight 100 inter 100ms agent-inter 100ms fall 1 rise 1 agent-addr 127.0.0.1
 server agent {where} check addr 127.0.0.1 port {admin_port} agent-check agent-port {agent_port}
backend by_ready
 option httpchk GET /ready
 server ready {where} weight 100 check addr 127.0.0.1 port {admin_port} inter 100ms fall 1 rise 1
"""
    (directory / "haproxy.cfg").write_text(config)
    command = ["haproxy", "-db", "-q", "-f", str(directory / "haproxy.cfg")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield Balancer(stats)
        finally:
            process.terminate()


def test_haproxy_follows_the_daemon(harness: Harness, tmp_path: Path) -> None:
    limited = {"address": "tcp://127.0.0.1:0", "handler": "forkd.builtin:Echo", "limits": {"connections": 4}}
    site = Changing(harness, listen=[limited], workers=1, agent="tcp://127.0.0.1:0", stall_timeout="900ms")
    site.write(admin={"address": "tcp://127.0.0.1:0"})
    daemon = site.daemon.start()
    daemon.expect("these are its stacks", "killing worker 1", "worker 1 .* has ended: killed by SIGKILL")
    with balancer(tmp_path, daemon) as found:
        found.wait("UP", 100)
        found.wait("UP", 100, "ready")
        clients = [harness.connect(daemon) for _ in range(2)]
        assert all(map(echoes, clients))
        found.wait("UP", 50)
        os.kill(daemon.workers()[1], signal.SIGSTOP)  # killed as it stalls, and followed by another one
        found.wait_both("DOWN")
        found.wait("UP", 100)
        found.wait("UP", 100, "ready")
        client = harness.connect(daemon)
        assert echoes(client)
        daemon.signal(signal.SIGTERM)
        eventually(lambda: found.server("agent")[0].startswith("DRAIN"), what="a server that drains")
        client.close()


def test_stuck_pool_is_out_after_a_few_heartbeats(harness: Harness, tmp_path: Path) -> None:
    settings = ("admin.address=tcp://127.0.0.1:0", "agent=tcp://127.0.0.1:0")
    daemon = harness.daemon(workers=2, settings=settings).start()
    pool = list(daemon.workers().values())
    with balancer(tmp_path, daemon) as found:
        found.wait_both("UP")
        for pid in pool:
            os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        found.wait_both("DOWN")
        # Three that are missed, one interval of a tenth of that, and the rest for a machine that is busy.
        assert time.monotonic() - stopped < 10 * HEARTBEAT_SECONDS
        for pid in pool:
            os.kill(pid, signal.SIGCONT)
        found.wait_both("UP")
    assert list(daemon.workers().values()) == pool
