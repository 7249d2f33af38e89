"""Handlers that block, each client in a thread: served, bounded, counted and drained as those of the loop are."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from forkd.serve.deadlines import ActivityStamps
from forkd.serve.stream.threads import StampedSocket
from tests.support.clients import at_end, dial, echoes, read
from tests.support.daemon import STOOD_STILL, Daemon, Harness
from tests.support.needs import needs_program
from tests.support.once_process import OnceProcess
from tests.support.processes import eventually

Single = Callable[..., OnceProcess]


def counted(daemon: Daemon, key: str) -> int:
    """A counter of all workers together."""
    return sum(worker.get(key, 0) for worker in daemon.status()["workers"])


def test_function_and_request_handler_serve_tcp_and_unix(harness: Harness) -> None:
    unix = f"unix:@{harness.directory}"
    file = harness.directory / "tested.yaml"
    file.write_text(f"""\
name: tested
listen:
  - {{address: "tcp://127.0.0.1:0", handler: "blocking:echo"}}
  - {{address: "{unix}", handler: "blocking:echo_and_close", limits: {{per_worker: 5}}}}
  - {{address: "tcp://127.0.0.1:0", handler: "blocking:Lines"}}
log: {{access: true}}
""")
    daemon = harness.daemon(target=file, listen=()).start()
    for _ in range(30):  # more than there are threads
        for listener, answer in zip(daemon.status()["listeners"], (b"hello\n", b"hello\n", b"> hello\n"), strict=True):
            with dial(str(listener["address"])) as client:
                client.sendall(b"hello\n")
                assert read(client, len(answer)) == answer
                client.shutdown(socket.SHUT_WR)
                assert at_end(client)
    daemon.wait_clients(0)
    daemon.wait_log(rf"forkd.access: unix on {unix}: \S+ s, in 6, out 6, rtt -, eof")
    daemon.wait_log(r"forkd.access: 127.0.0.1:\d+ on tcp\S+ \S+ s, in 6, out 8, rtt \S+ ms, eof")
    assert counted(daemon, "errors") == 0


def test_handler_of_http_server_serves_curl(harness: Harness) -> None:
    needs_program("curl")
    daemon = harness.daemon(target="blocking:Pages").start()
    url = daemon.address.replace("tcp", "http")
    done = subprocess.run(["curl", "-s", f"{url}/one", f"{url}/two"], capture_output=True, text=True, check=True)
    assert done.stdout == "/one for 127.0.0.1\n/two for 127.0.0.1\n"
    daemon.wait_log('blocking: "GET /two HTTP/1.1" 200')


@pytest.mark.parametrize("over", ["wait", "refuse"])
def test_worker_without_a_free_thread_takes_no_client(harness: Harness, over: str) -> None:
    settings = ("listen.threads=1", f"listen.limits.over={over}", "listen.limits.connections=10")
    daemon = harness.daemon(target="blocking:busy", settings=settings).start()
    first, second, third = (harness.connect(daemon) for _ in range(3))
    pids = {one.makefile("rb").readline().strip() for one in (first, second)}
    assert pids == {str(pid).encode() for pid in daemon.workers().values()}
    daemon.wait_clients(2)
    first.close()
    assert third.makefile("rb").readline().strip() in pids


DEADLINES = {"first_byte": b"", "idle": b"wait", "lifetime": b"wait", "write": b"write"}


@pytest.mark.parametrize("scheme", ["tcp", "unix"])
def test_deadlines_end_clients_whose_threads_block(harness: Harness, scheme: str) -> None:
    file = harness.directory / "tested.yaml"
    lines = ["name: tested", "log: {access: true}", "listen:"]
    for reason in DEADLINES:
        address = "tcp://127.0.0.1:0" if scheme == "tcp" else f"unix:@{harness.directory}/{reason}"
        lines.append(f"- {{address: '{address}', handler: 'blocking:ends', timeouts: {{{reason}: 100ms}}}}")
    file.write_text("\n".join(lines))
    daemon = harness.daemon(target=file, listen=(), workers=1).start()
    for listener, says in zip(daemon.status()["listeners"], DEADLINES.values(), strict=True):
        harness.connect(str(listener["address"])).sendall(says)
    for reason in DEADLINES:
        daemon.wait_log(rf"forkd.access: .*, {reason}$")
    daemon.wait_clients(0)
    assert counted(daemon, "errors") == 0
    for reason in DEADLINES:
        assert daemon.status()["totals"]["ended"][reason] == 1


@pytest.mark.parametrize("call", ["sendall", "send", "sendfile"])
def test_bytes_of_a_unix_client_are_counted(harness: Harness, call: str) -> None:
    listen = f"unix:@{harness.directory}"
    daemon = harness.daemon(target="blocking:much", listen=(listen,), workers=1, settings=("log.access=true",)).start()
    client = harness.connect(daemon)
    client.sendall(call.encode())
    assert len(read(client, 1_000_000)) == 1_000_000
    daemon.wait_log(rf"in {len(call)}, out 1000000, ")


@pytest.mark.parametrize("call", ["sendall", "send", "sendfile"])
def test_progress_of_one_call_is_noted(call: str, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(3_000_000))
    ours, client = socket.socketpair()
    with ours, client, StampedSocket.of(ours) as sock, (tmp_path / "data").open("rb") as file:
        sock.stamps = stamps = ActivityStamps(ours, 0.0)
        data = file if call == "sendfile" else file.read()
        sending = threading.Thread(target=getattr(sock, call), args=(data,))
        sending.start()
        assert len(read(client, 1_500_000)) == 1_500_000
        assert sending.is_alive()  # as the buffers do not take the rest
        assert stamps.bytes_out > 1_000_000
        assert len(read(client, 1_500_000)) == 1_500_000
        sending.join(20)
        assert stamps.bytes_out == 3_000_000


def test_function_that_returns_a_coroutine_is_an_error(harness: Harness) -> None:
    daemon = harness.daemon(target="blocking:forgets_await", workers=1).start()
    daemon.expect(r"ERROR .*: The handler failed\.(\n.*)*TypeError: the handler returned a coroutine")
    assert at_end(harness.connect(daemon))
    daemon.wait_clients(0)
    assert counted(daemon, "errors") == 1


def test_operator_sees_and_ends_a_client_of_a_thread(harness: Harness) -> None:
    daemon = harness.daemon(target="blocking:echo", workers=1).start()
    client = harness.connect(daemon)
    assert echoes(client)
    (listed,) = json.loads(daemon.command("clients", "--json").stdout)
    assert (listed["in"], listed["out"]) == (15, 15)
    assert listed["age"] < 60
    assert daemon.command("clients", "--kill", str(listed["id"])).returncode == 0
    assert at_end(client)
    daemon.wait_clients(0)
    assert daemon.status()["totals"]["ended"]["killed"] == 1


def test_drain_waits_for_threads_until_its_deadline(harness: Harness) -> None:
    daemon = harness.daemon(target="blocking:ends", workers=1, settings=("drain_timeout=2s",)).start()
    (worker,) = daemon.workers().values()
    patient, deaf = harness.connect(daemon), harness.connect(daemon)
    for client in (patient, deaf):
        client.sendall(b"wait")
        assert read(client, 7) == b"waiting"
    daemon.signal(signal.SIGTERM)
    eventually(lambda: b"(draining" in Path(f"/proc/{worker}/cmdline").read_bytes(), what="the worker's drain")
    patient.sendall(b"go on")
    assert read(patient, 6) == b"drains"
    assert at_end(patient)
    assert read(deaf, 6) == b"drains"  # its handler's read has ended at the deadline
    assert at_end(deaf)
    daemon.wait_log("the last worker is gone")


def test_idle_threads_hold_up_no_drain(harness: Harness) -> None:
    daemon = harness.daemon(target="blocking:echo").start()
    for _ in range(4):
        with dial(daemon.address) as client:
            assert echoes(client)
    daemon.wait_clients(0)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("the last worker is gone")


def test_failed_handler_is_logged_and_its_thread_serves_on(harness: Harness) -> None:
    daemon = harness.daemon(target="blocking:ends", workers=1, settings=("listen.threads=1",)).start()
    daemon.expect(r"ERROR .*: The handler failed\.(\n.*)*ValueError: as told", "SystemExit: 7")
    for word, answer in ((b"raise", b""), (b"exit", b""), (b"fork", b"child"), (b"close", b"last word")):
        with dial(daemon.address) as client:
            client.sendall(word)
            assert read(client, 100) == answer
    assert counted(daemon, "errors") == 2


def test_last_word_reaches_a_client_that_still_sends(harness: Harness) -> None:
    settings = ("listen.threads=1", "listen.socket.linger=1m")
    daemon = harness.daemon(target="blocking:ends", workers=1, settings=settings).start()
    client = harness.connect(daemon)
    client.sendall(b"close".ljust(100) + bytes(100_000))  # which the handler does not read
    assert read(client, 100) == b"last word"
    with dial(daemon.address) as another:  # is served while the first one lingers
        another.sendall(b"close")
        assert read(another, 100) == b"last word"
    daemon.wait_clients(1)
    client.close()
    daemon.wait_clients(0)


def test_client_that_resets_is_no_error(harness: Harness) -> None:
    daemon = harness.daemon(target="blocking:echo", workers=1, settings=("log.access=true",)).start()
    with dial(daemon.address) as client:
        assert echoes(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    daemon.wait_log("forkd.access: .*, reset$")
    assert counted(daemon, "errors") == 0


def test_handler_that_goes_on_without_its_client_is_no_stall(harness: Harness) -> None:
    settings = ("stall_timeout=500ms", "listen.threads=1")
    daemon = harness.daemon(target="blocking:ends", workers=1, settings=settings).start()
    daemon.allow(STOOD_STILL)
    pid = daemon.workers()[1]
    with dial(daemon.address) as client:
        client.sendall(b"sleep")
    daemon.wait_clients(0)
    with dial(daemon.address) as client:  # the thread is free again
        client.sendall(b"close")
        assert read(client, 100) == b"last word"
    assert daemon.workers() == {1: pid}


@pytest.mark.parametrize(("word", "status"), [(b"close", 0), (b"raise", 1), (b"exit", 7)])
def test_one_client_has_its_verdict_from_a_thread(single: Single, word: bytes, status: int) -> None:
    one = single("blocking:ends")
    if word == b"raise":
        one.expect(r"ERROR .*: The handler failed", "ValueError: as told")
    one.start()
    with dial(one.address) as client:
        client.sendall(word)
        assert read(client, 9) == (b"last word" if word == b"close" else b"")
    assert one.status() == status


def test_descriptors_of_a_worker_stay_as_many(harness: Harness) -> None:
    daemon = harness.daemon(target="blocking:echo_and_close", workers=1, settings=("listen.threads=2",)).start()
    pid = daemon.workers()[1]

    def serve() -> int:
        for _ in range(10):
            with dial(daemon.address) as client:
                assert echoes(client)
        daemon.wait_clients(0)
        return len(os.listdir(f"/proc/{pid}/fd"))

    before = serve()
    eventually(lambda: serve() <= before, what="no more descriptors than before")
