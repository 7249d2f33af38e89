"""Programs, one for each client: what they find, how they are bounded and ended, and what becomes of their end."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clients import at_end, dial, echoes, read
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_program, needs_root
from tests.support.once_process import OnceProcess
from tests.support.processes import descendants, eventually

Single = Callable[..., OnceProcess]


def serving(harness: Harness, *listeners: str, workers: int = 1, settings: tuple[str, ...] = ()) -> Daemon:
    """A daemon that runs, with these listeners; a port of its own for each that has no address."""
    file = harness.directory / "tested.yaml"
    items = [text if "address:" in text else f"address: 'tcp://127.0.0.1:0', {text}" for text in listeners]
    file.write_text("\n".join(["name: tested", "listen:", *(f"- {{{item}}}" for item in items)]))
    return harness.daemon(target=file, listen=(), workers=workers, settings=settings).start()


def addresses(daemon: Daemon) -> list[str]:
    """Where its listeners listen."""
    return [str(one["address"]) for one in daemon.status()["listeners"]]


def said(address: str, words: bytes = b"") -> bytes:
    """All that a program says to a client that says this."""
    with dial(address) as client:
        client.sendall(words)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def programs(daemon: Daemon) -> list[int]:
    """The pids of what its workers have started."""
    return [pid for worker in daemon.workers().values() for pid in descendants(worker)]


def test_program_serves_each_client_over_tcp_and_unix(harness: Harness) -> None:
    unix = f"unix:@{harness.directory}"
    daemon = serving(harness, "command: [cat]", f"address: '{unix}', command: [cat]", workers=2)
    for address in addresses(daemon):
        clients = [harness.connect(address) for _ in range(5)]
        assert all(echoes(client) for client in clients)
    daemon.wait_clients(10)
    assert len(programs(daemon)) == 10
    for address in addresses(daemon):
        assert said(address, b"x" * 100_000) == b"x" * 100_000


def test_script_of_several_lines_and_empty_texts_are_passed_on(harness: Harness) -> None:
    script = r"echo $# \"$1\" ${EMPTY-unset}\n\techo second"
    daemon = serving(harness, f'command: [sh, -c, "{script}", sh, ""], environment: {{EMPTY: ""}}')
    assert said(daemon.address) == b"1 \nsecond\n"
    assert daemon.command("reload").returncode == 0
    assert said(daemon.address) == b"1 \nsecond\n"
    assert r"\n\techo second" in daemon.command("status").stdout


def test_program_that_is_replaced_is_found_again(harness: Harness) -> None:
    first, second = harness.directory / "first", harness.directory / "second"
    for directory in (first, second):
        directory.mkdir()
    (first / "tell").write_text("#!/bin/sh\necho told\n")
    (first / "tell").chmod(0o755)
    daemon = serving(harness, f"command: [tell], environment: {{PATH: '{first}:{second}:{os.defpath}'}}")
    daemon.expect("ERROR .*: tell can't be started: No such file or directory")
    (first / "tell").rename(first / "put aside")
    assert said(daemon.address) == b""
    (first / "put aside").rename(first / "tell")
    assert said(daemon.address) == b"told\n"
    (first / "tell").rename(second / "tell")
    assert said(daemon.address) == b"told\n"


def test_environment_tells_of_the_client(harness: Harness) -> None:
    unix = f"unix:@{harness.directory}"
    shows = f"command: [env], directory: {harness.directory}, environment: {{GIVEN: '1', PATH: /usr/bin:/bin}}"
    daemon = serving(harness, shows, f"address: '{unix}', {shows}")
    with dial(addresses(daemon)[0]) as client:
        text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
        found = dict(line.split("=", 1) for line in text.splitlines())
        local, peer = client.getpeername(), client.getsockname()
    names = {
        "PROTO": "TCP",
        **dict.fromkeys(("LOCAL_ADDR", "TCPLOCALIP"), local[0]),
        **dict.fromkeys(("LOCAL_PORT", "TCPLOCALPORT"), str(local[1])),
        **dict.fromkeys(("REMOTE_ADDR", "REMOTE_HOST", "TCPREMOTEIP"), peer[0]),
        **dict.fromkeys(("REMOTE_PORT", "TCPREMOTEPORT"), str(peer[1])),
        "GIVEN": "1",
        "PATH": "/usr/bin:/bin",
    }
    assert {name: found.get(name) for name in names} == names
    found = dict(line.split("=", 1) for line in said(unix).decode().splitlines())
    assert found["PROTO"] == "UNIX"
    assert found["UNIXLOCALPATH"] == unix.removeprefix("unix:")
    assert (found["UNIXREMOTEPID"], found["UNIXREMOTEEUID"]) == (str(os.getpid()), str(os.geteuid()))
    assert "REMOTE_ADDR" not in found


def test_client_of_a_proxy_is_told_to_programs_and_threads(harness: Harness) -> None:
    program, at_unix, thread = addresses(
        serving(
            harness,
            "command: [env], proxy_protocol: [127.0.0.1]",
            f"address: 'unix:{harness.directory}/proxied', command: [env], proxy_protocol: [unix]",
            "handler: 'blocking:who', proxy_protocol: [127.0.0.1]",
        )
    )
    header = b"PROXY TCP4 192.0.2.7 198.51.100.1 4000 25\r\n"
    for one in (program, at_unix):
        found = said(one, header).splitlines()
        told = (b"TCPREMOTEIP=192.0.2.7", b"REMOTE_PORT=4000", b"LOCAL_ADDR=198.51.100.1", b"TCPLOCALPORT=25")
        for line in (b"PROTO=TCP", *told):
            assert line in found
    assert said(thread, header + b"hello") == b"('192.0.2.7', 4000) hello"


def test_program_has_three_descriptors_and_default_signals(harness: Harness) -> None:
    daemon = serving(
        harness,
        "command: [ls, /proc/self/fd]",
        "command: [cat, /proc/self/status]",
        "command: [pwd], directory: /usr",
        "command: [sh, -c, 'echo blocking >&0; cat <&1']",
    )
    files, status, where, either = addresses(daemon)
    assert said(files).split() == [b"0", b"1", b"2", b"3"]  # the last is the directory that ls has opened
    fields = dict(line.split(":\t", 1) for line in said(status).decode().splitlines() if ":\t" in line)
    known = sum(1 << (number - 1) for number in signal.valid_signals())  # the C library's own are not among these
    assert {int(fields[name], 16) & known for name in ("SigIgn", "SigBlk", "SigCgt")} == {0}
    assert said(where) == b"/usr\n"
    assert said(either, b"and back") == b"blocking\nand back"


def test_program_inherits_nothing_that_a_library_left_open(harness: Harness) -> None:
    shown = "command: [ls, /proc/self/fd]"
    daemon = serving(harness, f"{shown}", f"{shown}, directory: /", "handler: 'leaks:Leaks'")
    with dial(addresses(daemon)[2]) as client:
        assert int(client.makefile("rb").readline()) > 2  # the worker has an inheritable descriptor
    assert [said(address).split() for address in addresses(daemon)[:2]] == [[b"0", b"1", b"2", b"3"]] * 2


def test_last_lines_of_standard_error_come_before_the_end(harness: Harness) -> None:
    daemon = serving(harness, "command: [sh, -c, 'seq 5000 >&2; exit 3']")
    said(addresses(daemon)[0])
    daemon.wait_log(r"sh\[\d+\] of client .* has ended: exit status 3$")
    told = [record.rpartition("]: ")[2] for record in daemon.records() if "forkd.program: sh" in record]
    assert told[:5000] == [str(number) for number in range(1, 5001)]


def test_standard_error_and_exit_statuses_are_told(harness: Harness) -> None:
    daemon = serving(
        harness,
        "command: [sh, -c, 'echo one >&2; printf two >&2; exit 3']",
        "command: [sh, -c, 'kill -SEGV $$']",
        "command: [sh, -c, 'read line; while :; do echo more; done']",
        "command: [cat]",
    )
    first, second, third, fourth = addresses(daemon)
    assert said(first) == b""
    daemon.wait_log(r"forkd.program: sh\[\d+\]: one$")
    daemon.wait_log(r"forkd.program: sh\[\d+\]: two$")
    daemon.wait_log(r"forkd.program: sh\[\d+\] of client .* has ended: exit status 3$")
    said(second)
    daemon.wait_log(r"has ended: killed by SIGSEGV")
    with dial(third) as client:
        client.sendall(b"go\n")
        assert read(client, 5) == b"more\n"
    with dial(fourth) as client:
        assert echoes(client)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    daemon.wait_log(r"forkd.program: cat\[\d+\]: cat: .*")
    daemon.wait_clients(0)
    assert eventually(
        lambda: daemon.status()["totals"]["errors"] == 2, what="two failures: that its client left is none"
    )


def test_deadline_ends_the_programs_whole_group(harness: Harness) -> None:
    daemon = serving(
        harness,
        "command: [sh, -c, 'sleep 60 & sleep 60'], timeouts: {lifetime: 300ms}",
        "command: [cat], timeouts: {idle: 100ms}",
        "command: [yes], timeouts: {write: 100ms}",
        "command: [sh, -c, 'trap \"echo caught\" TERM; while :; do sleep 60; done'], timeouts: {first_byte: 700ms}",
    )
    clients = [harness.connect(address) for address in addresses(daemon)]
    clients[1].sendall(b"x")
    assert read(clients[1], 2) in (b"x", b"")
    assert all(at_end(client) for client in clients[:2])
    assert read(clients[3], 7) == b"caught\n"
    assert at_end(clients[3])  # killed, as it did not end
    daemon.wait_clients(0)
    assert programs(daemon) == []
    totals = daemon.status()["totals"]
    assert [totals["ended"][name] for name in ("lifetime", "idle", "write", "first_byte")] == [1] * 4
    assert totals["errors"] == 0


def test_operator_ends_a_program(harness: Harness) -> None:
    daemon = serving(harness, "command: [cat]")
    client = harness.connect(addresses(daemon)[0])
    assert echoes(client)
    (listed,) = json.loads(daemon.command("clients", "--json").stdout)
    assert daemon.command("clients", "--kill", str(listed["id"])).returncode == 0
    assert at_end(client)
    daemon.wait_clients(0)


def test_drain_waits_for_programs_and_ends_them(harness: Harness) -> None:
    command = "command: [sh, -c, 'trap \"echo bye; exit\" TERM; echo here; while :; do sleep 0.05; done']"
    daemon = serving(harness, command, "command: [cat]", settings=("drain_timeout=3s",))
    deaf, patient = (harness.connect(address) for address in addresses(daemon))
    assert read(deaf, 5) == b"here\n"
    assert echoes(patient)
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("daemon state: draining")
    assert echoes(patient)
    patient.close()
    assert read(deaf, 4) == b"bye\n"
    assert at_end(deaf)
    daemon.wait_log("the last worker is gone")


@pytest.mark.parametrize(
    ("script", "status"), [("cat", 0), ("exit 7", 7), ("kill -KILL $$", 137), ("while :; do echo more; done", 0)]
)
def test_one_client_has_its_verdict_from_a_program(single: Single, tmp_path: Path, script: str, status: int) -> None:
    file = tmp_path / "single.yaml"
    file.write_text(f"listen: [{{address: 'tcp://127.0.0.1:0', command: [sh, -c, '{script}']}}]\n")
    one = single(file, listen=None).start()
    with dial(one.address) as client:
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        if status == 0:
            assert read(client, 5) in (b"hello", b"more\n")
    assert one.status() == status


@pytest.mark.parametrize(
    ("listener", "said"),
    [
        (
            "command: [no-such-program]",
            "tested.yaml:1:50: listen[0].command: there is no program 'no-such-program' that can be run in PATH (/",
        ),
        ("command: [/etc/passwd]", "command: there is no program '/etc/passwd' that can be run"),
        ("command: [cat], directory: /nowhere", "directory: there is no directory /nowhere"),
        ("command: [cat], handler: 'a:b'", ".handler: is for handlers in Python, and a command is a program of its"),
        ("command: [cat], kind: streams", ".kind: streams is a handler's form, and a command is a program; leave it"),
        ("handler: 'forkd.builtin:Echo', kind: program", ".kind: program wants a command, as in command: [cat]"),
        ("handler: 'a:b', wait: true", ".wait: true wants a command, as in command: [cat]"),
        (
            "command: [cat], wait: true, allow: [10.0.0.0/8]",
            ".allow: can't hold for the clients of a program that has the",
        ),
        ("command: [cat], wait: true, tls: {cert: /etc/x.pem}", ".tls: can't hold for the clients of a program that"),
        ("command: [cat], wait: true, limits: {per_ip: 5}", ".limits.per_ip: can't hold for the clients of a program"),
        ("command: []", ".command: names no program; write it and its arguments"),
        ("command: ['', a]", ".command: names no program; write it and its arguments"),
        ("command: cat -u", ".command: expected a sequence, found 'cat -u'; write [cat, -u]"),
        (
            "handler: 'forkd.builtin:Echo', directory: /",
            ".directory: is for a command, and a handler in Python has the",
        ),
        ("handler: 'forkd.builtin:Echo', environment: {A: b}", ".environment: is for a command, and a handler in Py"),
        ("backlog: 5", "listen[0].handler: is missing; what serves each connection"),
    ],
)
def test_command_that_can_not_be_run_is_told(harness: Harness, listener: str, said: str) -> None:
    file = harness.directory / "tested.yaml"
    file.write_text(f"listen: [{{address: 'tcp://127.0.0.1:0', {listener}}}]\n")
    result = harness.daemon(target=file, listen=()).command("check")
    assert result.returncode == 78
    assert said in result.stdout + result.stderr


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit."""
    needs_program("git")
    made = tmp_path / "project"
    identity = ("-c", "user.name=x", "-c", "user.email=x@y")
    for command in (("init", "-q", made), ("-C", made, *identity, "commit", "-q", "--allow-empty", "-m", "first")):
        subprocess.run(["git", *command], check=True)
    return made


def test_git_daemon_serves_a_clone(harness: Harness, repository: Path, tmp_path: Path) -> None:
    options = f"--inetd, --export-all, --verbose, --log-destination=stderr, --base-path={repository.parent}"
    daemon = serving(harness, f"command: [git, daemon, {options}]")
    url = addresses(daemon)[0].replace("tcp", "git") + "/project"
    subprocess.run(["git", "clone", "-q", url, tmp_path / "clone"], check=True)
    shown = ["git", "-C", str(tmp_path / "clone"), "log", "--format=%s"]
    assert subprocess.run(shown, check=True, capture_output=True, text=True).stdout == "first\n"
    daemon.wait_log(r"forkd.program: git\[\d+\]: .*Request upload-pack for '/project'")
    daemon.wait_clients(0)
    assert daemon.status()["totals"]["errors"] == 0


# A socket's program, one at a time

ACCEPTS = """\
import os, socket, sys
with socket.socket(fileno=0) as listener:
    assert listener.getblocking()
    connection, _ = listener.accept()
    connection.sendall(b"%d\\n" % os.getpid())
    connection.recv(100)
sys.exit(3 if len(sys.argv) > 1 else 0)
"""


def test_waiting_program_has_the_listener_one_at_a_time(harness: Harness) -> None:
    script = harness.directory / "accepts.py"
    script.write_text(ACCEPTS)
    daemon = serving(harness, f"command: ['{sys.executable}', '{script}'], wait: true", workers=2)
    address = addresses(daemon)[0]
    first, second = harness.connect(address), harness.connect(address)
    with first.makefile("rb") as lines:
        pid = int(lines.readline())
    assert programs(daemon) == [pid]
    assert os.getpgid(pid) == pid
    first.close()
    with second.makefile("rb") as lines:
        assert int(lines.readline()) != pid
    assert len(programs(daemon)) == 1
    daemon.signal(signal.SIGTERM)
    daemon.wait_log("daemon state: draining")
    second.close()
    daemon.wait_log("the last worker is gone")


def test_waiting_program_that_fails_at_once_is_held_up(harness: Harness) -> None:
    daemon = serving(harness, "command: ['false'], wait: true")
    client = harness.connect(addresses(daemon)[0])
    eventually(lambda: daemon.status()["totals"]["errors"] > 20, what="some tries")
    assert daemon.status()["totals"]["errors"] < 30
    client.close()


def test_tftpd_serves_a_file_by_wait(harness: Harness) -> None:
    needs_root()
    needs_program("in.tftpd")
    needs_program("curl")
    (harness.directory / "page.txt").write_text("a page\n" * 1000)
    command = f"command: [in.tftpd, -s, '{harness.directory}', -u, root, --verbose], wait: true"
    daemon = serving(harness, f"address: 'udp://127.0.0.1:0', {command}", workers=2, settings=("drain_timeout=200ms",))
    url = addresses(daemon)[0].replace("udp", "tftp") + "/page.txt"
    for _ in range(2):
        done = subprocess.run(["curl", "-s", "-m", "20", url], capture_output=True, text=True, check=True)
        assert done.stdout == "a page\n" * 1000
    assert daemon.status()["totals"]["accepted"] == 1  # the program goes on for the next
