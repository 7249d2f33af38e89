"""What the clients of a daemon meet: its listeners and handlers, handlers that raise, clients that do not read.

Also what readers of its log and clients of its control socket meet: lines that parse and that no client can forge,
and no other user served.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import socket
import stat
from pathlib import Path

import pytest

from tests.support.clients import at_end, echoes, read
from tests.support.daemon import Harness
from tests.support.forked import ChildFailed, run_in_child
from tests.support.processes import DEADLINE, eventually, resident

MIB = 1 << 20
FORGED = "x\n2026-01-01T00:00:00.000Z ERROR tested master[1] forkd: forged\r\n\x1b[2J\u2028"


# Listeners


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "tcp://[::1]:0", "unix:{}/sock", "unix:@forkd-{}"])
def test_daemon_serves_each_kind_of_address(harness: Harness, address: str) -> None:
    directory = harness.directory
    daemon = harness.daemon(listen=(address.format(directory if "/" in address else directory.name),)).start()
    assert daemon.address.startswith(address.partition("{")[0].removesuffix("0"))
    assert echoes(harness.connect(daemon), bytes(range(256)) * 1000)


@pytest.mark.parametrize("mode", ["0600", "0666", "0750"])
def test_unix_socket_has_the_mode_of_the_settings(harness: Harness, tmp_path: Path, mode: str) -> None:
    path = tmp_path / "sock"
    daemon = harness.daemon(listen=(f"unix:{path}",), settings=(f"listen.mode={mode}",)).start()
    assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
    assert daemon.command("stop").returncode == 0
    assert not path.exists()


def test_daemon_serves_several_listeners_with_own_handlers(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "many.yaml").write_text(
        "name: many\n"
        "workers: 2\n"
        "listen:\n"
        "  - {address: 'tcp://127.0.0.1:0', handler: 'forms:AsClass', backlog: 7}\n"
        "  - {address: 'tcp://127.0.0.1:0', handler: 'forms:from_factory'}\n"
        f"  - {{address: 'unix:{tmp_path}/sock', handler: 'forms:as_streams', mode: 0600}}\n"
    )
    daemon = harness.daemon("many", target="./many.yaml", listen=(), workers=None).start()
    found = daemon.status()["listeners"]
    assert [one["handler"] for one in found] == ["forms:AsClass", "forms:from_factory", "forms:as_streams"]
    assert found[0]["backlog"] == 7
    for one, word in zip(found, (b"class\n", b"factory\n", b"streams\n"), strict=True):
        for client in [harness.connect(one["address"]) for _ in range(5)]:
            assert read(client, len(word)) == word
            assert echoes(client)


def test_streams_handler_gathers_writes_and_awaits_delivery(harness: Harness) -> None:
    client = harness.connect(harness.daemon(target="forms:as_corked_streams", workers=1).run())
    client.sendall(b"go on\n")
    first = client.recv(100)  # all that one segment brings, and what may have come after it meanwhile
    assert first.startswith(b"one two three\n")
    whole = b"one two three\n0 unacknowledged\n"
    assert first + read(client, len(whole) - len(first)) == whole


# Handlers that raise


@pytest.mark.parametrize("handler", ["Faulty", "faulty_streams"])
def test_handler_that_raises_loses_only_its_connection(harness: Harness, handler: str) -> None:
    daemon = harness.daemon(target=f"faulty:{handler}", workers=1).start()
    daemon.expect(r"(?s)ERROR tested worker 1.*\n  \| Traceback .*\n  \| ValueError: oops$")
    other, client = harness.connect(daemon), harness.connect(daemon)
    assert echoes(other)
    client.sendall(b"raise oops")
    assert at_end(client)
    assert echoes(other)
    assert echoes(harness.connect(daemon))
    worker = eventually(lambda: next((one for one in daemon.status()["workers"] if one["errors"]), None))
    assert worker is not None
    assert worker["errors"] == 1
    assert daemon.status()["deaths"] == []


# Clients that do not read


def test_echo_stops_reading_from_a_client_that_does_not_read(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    client, worker = harness.connect(daemon), daemon.workers()[1]
    assert echoes(client)
    before = resident(worker)
    data, sent = bytes(range(256)) * 256, 0
    client.setblocking(False)
    poll = select.poll()
    poll.register(client, select.POLLOUT)
    while sent < 256 * MIB and poll.poll(500):
        offset = sent % len(data)
        sent += client.send(data[offset:])
    assert sent < 256 * MIB, "the echo took it all, though its client does not read"
    assert resident(worker) - before < 4 * MIB
    assert echoes(harness.connect(daemon)), "it serves others meanwhile"
    client.settimeout(20)
    received = 0
    while received < sent:
        portion = client.recv(MIB)
        start = received % len(data)
        assert portion == (data * (len(portion) // len(data) + 2))[start : start + len(portion)]
        received += len(portion)
    assert echoes(client)


def test_handler_is_paused_when_its_client_does_not_read(harness: Harness) -> None:
    daemon = harness.daemon(target="flood:Considerate", workers=1).start()
    client, worker = harness.connect(daemon), daemon.workers()[1]
    record = daemon.wait_log("paused with")
    found = re.search(r"with (\d+) bytes unsent", record)
    assert found is not None
    assert 64 << 10 < int(found[1]) <= 128 << 10
    before = resident(worker)
    assert read(client, 8 * MIB) == bytes(8 * MIB)
    daemon.wait_log("resumed")
    assert resident(worker) - before < 4 * MIB


def test_handler_that_goes_on_writing_is_cut_at_the_limit(harness: Harness) -> None:
    settings = ("listen.limits.write_buffer=4MiB",)
    daemon = harness.daemon(target="flood:Unstoppable", workers=1, settings=settings).start()
    worker = daemon.workers()[1]
    before = resident(worker)
    client = harness.connect(daemon)
    daemon.wait_log(r"WARNING .* closed client .* \(write_buffer\): it does not read: [0-9]+ bytes are unsent")
    daemon.wait_log("lost it by WriteBufferFull")
    assert resident(worker) - before < 16 * MIB
    received = 0
    try:
        while portion := client.recv(MIB):
            received += len(portion)
    except ConnectionResetError:
        pass
    assert received < 128 * MIB
    assert daemon.workers()[1] == worker


# The log


@pytest.mark.parametrize("form", ["text", "json"])
def test_client_can_not_forge_a_line_of_the_log(harness: Harness, form: str) -> None:
    daemon = harness.daemon(target="faulty:Faulty", workers=1, settings=(f"log.format={form}",)).start()
    daemon.expect(r"ValueError: x")
    client = harness.connect(daemon)
    client.sendall(b"raise " + FORGED.encode())
    assert at_end(client)
    daemon.wait_log("ValueError")
    assert daemon.command("stop").returncode == 0
    lines = daemon.log.read_text().split("\n")[:-1]
    assert any("forged" in line for line in lines)
    assert [line for line in lines if line.startswith("2026-01-01") or not line.isprintable()] == []
    if form == "json":
        assert any("ValueError: " + FORGED in json.loads(line).get("traceback", "") for line in lines)


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_peer_and_no_program_forges_a_line(harness: Harness, form: str) -> None:
    """A client of a unix socket has the name that it gives itself, and a program says what its client has sent it."""
    file = harness.directory / "tested.yaml"
    unix = f"unix:@forged-{os.getpid()}"
    file.write_text(
        f"listen: [{{address: '{unix}', command: [sh, -c, 'cat >&2']}}, "
        f"{{address: '{unix}-2', handler: 'forkd.builtin:Echo'}}]\nname: tested\n"
    )
    daemon = harness.daemon(
        target=file, listen=(), workers=1, settings=(f"log.format={form}", "log.access=true")
    ).start()
    for number, address in enumerate((unix, f"{unix}-2")):
        with socket.socket(socket.AF_UNIX) as client:
            client.bind(f"\0{os.getpid()}-{number}{FORGED}")
            client.connect("\0" + address.removeprefix("unix:@"))
            client.sendall(FORGED.encode())
            client.shutdown(socket.SHUT_WR)
            while client.recv(1000):
                pass
    assert daemon.command("clients").returncode == 0
    daemon.wait_log(f"{os.getpid()}-1x")
    assert daemon.command("stop").returncode == 0
    lines = daemon.log.read_text().split("\n")[:-1]
    assert len([line for line in lines if "forged" in line]) >= 3
    assert [line for line in lines if line.startswith("2026-01-01") or not line.isprintable()] == []


def test_json_log_has_time_process_and_message_in_each_line(harness: Harness) -> None:
    daemon = harness.daemon(workers=2, settings=("log.format=json", "log.level=debug")).start()
    assert daemon.command("stop").returncode == 0
    records = [json.loads(line) for line in daemon.log.read_text().splitlines()]
    for record in records:
        assert record.keys() - {"worker"} == {"time", "level", "daemon", "process", "pid", "logger", "message"}
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
        assert record["daemon"] == "tested"
    assert {record["process"] for record in records} == {"master", "worker 1", "worker 2"}
    assert len({record["pid"] for record in records}) == 3


# The control socket


def as_nobody(directory: Path) -> object:
    """What the control socket answers user 65534, who reaches it through an open directory; from a forked child."""

    def ask() -> str:
        os.chdir(directory)
        os.setgid(65534)
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(DEADLINE)
            sock.connect("control.sock")
            with contextlib.suppress(ConnectionError):
                sock.sendall(b'{"verb": "stop"}\n')
                return sock.recv(4096).decode()
            return ""

    return run_in_child(ask)


def test_control_socket_refuses_other_users_in_any_mode(harness: Harness) -> None:
    daemon = harness.daemon().start()
    control = daemon.run_directory / "control.sock"
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    with pytest.raises(ChildFailed, match="PermissionError"):
        as_nobody(daemon.run_directory)
    control.chmod(0o666)
    assert as_nobody(daemon.run_directory) == ""
    daemon.wait_log("control socket: user 65534 refused")
    assert daemon.status()["state"] == "running"


@pytest.mark.parametrize("nonsense", [b"\x00\xff\n", b"[]\n", b'{"verb": "dance"}\n', b"{" * 3 * MIB, b""])
def test_control_socket_survives_nonsense(harness: Harness, nonsense: bytes) -> None:
    daemon = harness.daemon().start()
    with harness.connect(f"unix:{daemon.run_directory}/control.sock") as client:
        try:
            client.sendall(nonsense)
            client.shutdown(socket.SHUT_WR)
            said = client.recv(4096)
        except ConnectionError:
            said = b""
    assert (b"unknown verb 'dance'" in said) == (b"dance" in nonsense)
    assert daemon.status()["state"] == "running"
    assert echoes(harness.connect(daemon))


def test_control_socket_serves_others_beside_silent_clients(harness: Harness) -> None:
    daemon = harness.daemon().start()
    for _ in range(20):
        harness.connect(f"unix:{daemon.run_directory}/control.sock")
    assert daemon.command("status").returncode == 0
