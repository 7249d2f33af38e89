"""The options of single-connection mode: foreground, networks, descriptor, files; and its signals."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.clients import at_end, dial, echoes, read, refuses
from tests.support.once_process import OnceProcess
from tests.support.processes import eventually, title

Make = Callable[..., OnceProcess]


# In the foreground


def test_foreground_process_prints_its_line_and_has_the_status(single: Make) -> None:
    one = single().foreground()
    assert one.process is not None
    assert one.pid == one.process.pid
    with dial(one.address) as client:
        assert echoes(client)
        assert refuses(one.address)
    assert one.status() == 0
    assert re.fullmatch(r"\S+ INFO echo once\[\d+\] forkd.once: serving client 127.0.0.1:\d+\n", one.text())


def test_foreground_process_has_status_1_when_a_handler_raises(single: Make) -> None:
    one = single("verdicts:in_streams").expect(r"ERROR .*: The streams handler failed", "ValueError: in streams")
    one.foreground()
    with dial(one.address) as client:
        client.sendall(b"\n")
        assert at_end(client)
    assert one.status() == 1


def test_foreground_process_has_status_124_without_a_client(single: Make) -> None:
    one = single(None, "--timeout", "50ms", "--json").open()
    assert one.process is not None
    assert one.process.stdout is not None
    found = json.loads(one.process.stdout.readline())
    assert (found["state"], found["pid"]) == ("listening", one.process.pid)
    assert one.status() == 124


# Networks


def test_stranger_is_refused_and_the_wait_goes_on(single: Make) -> None:
    one = single(None, "--from", "127.0.0.2", "--from", "10.0.0.0/8").start()
    for _ in range(2):
        with dial(one.address) as stranger:
            assert at_end(stranger)
    with socket.socket() as client:
        client.settimeout(20)
        client.bind(("127.0.0.2", 0))
        client.connect(("127.0.0.1", int(one.address.rpartition(":")[2])))
        assert echoes(client)
    assert one.status() == 0
    assert len(re.findall(r"WARNING .*: refused client 127.0.0.1:\d+ \(denied\)", one.text())) == 2


def test_the_listeners_own_networks_hold_for_one_client_too(single: Make, tmp_path: Path) -> None:
    settings = tmp_path / "strict.yaml"
    settings.write_text(
        "mode: once\nlisten: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo', deny: [127.0.0.1]}]\n"
    )
    one = single(settings, listen=None).start()
    with dial(one.address) as stranger:
        assert at_end(stranger)
    with socket.socket() as client:
        client.settimeout(20)
        client.bind(("127.0.0.2", 0))
        client.connect(("127.0.0.1", int(one.address.rpartition(":")[2])))
        assert echoes(client)
    assert one.status() == 0


@pytest.mark.parametrize(("address", "proxies"), [("tcp://127.0.0.1:0", "127.0.0.1"), ("unix:proxied", "unix")])
def test_client_of_a_proxy_is_the_one_that_is_served(single: Make, tmp_path: Path, address: str, proxies: str) -> None:
    settings = tmp_path / "proxied.yaml"
    address = address.replace("unix:", f"unix:{tmp_path}/")
    listener = f"{{address: '{address}', handler: 'behind:Who', proxy_protocol: [{proxies}], deny: [192.0.2.0/24]}}"
    settings.write_text(f"mode: once\nlisten: [{listener}]\n")
    one = single(settings, listen=None).start()
    header = "PROXY TCP4 {} 203.0.113.1 4711 7007\r\n"
    for refused in (b"no header\r\n", header.format("192.0.2.1").encode()):
        with dial(one.address) as proxy:
            proxy.sendall(refused)
            assert at_end(proxy)
    with dial(one.address) as silent, dial(one.address) as proxy:
        proxy.sendall(header.format("198.51.100.7").encode() + b"hello")
        assert b'"198.51.100.7", 4711' in proxy.makefile("rb", buffering=0).readline()
        assert proxy.recv(5) == b"hello"
        assert at_end(silent)
    assert one.status() == 0


def test_a_stranger_does_not_hold_the_time_up(single: Make) -> None:
    one = single(None, "--from", "::1", "--timeout", "2s").start()
    with dial(one.address) as stranger:
        assert at_end(stranger)
    assert one.status() == 124


def test_a_network_of_ipv6_is_one_too(single: Make) -> None:
    one = single(None, "--from", "::1", listen="tcp://[::1]:0").start()
    with dial(one.address) as client:
        assert echoes(client)
    assert one.status() == 0


# Which descriptor


def where(one: OnceProcess) -> tuple[int, str, str]:
    """The connection's descriptor, whether programs inherit it, and what stands at 0, as its handler sees it."""
    with dial(one.address) as client:
        number, inherited, stdin = client.makefile().readline().split()
        assert echoes(client)
    return int(number), inherited, stdin


def listener_of(one: OnceProcess) -> int:
    """The descriptor of the listener: the socket with the inode that /proc/net/tcp has for the port."""
    port = int(one.address.rpartition(":")[2])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(fields[9] for fields in lines if fields[1].endswith(f":{port:04X}") and fields[3] == "0A")
    numbers = os.listdir(f"/proc/{one.pid}/fd")
    return int(next(one_ for one_ in numbers if os.readlink(f"/proc/{one.pid}/fd/{one_}") == f"socket:[{inode}]"))


def test_the_connection_takes_over_the_listeners_descriptor(single: Make) -> None:
    one = single("verdicts:Where", "--adopt").start()
    listener = listener_of(one)
    assert where(one) == (listener, "True", "/dev/null")
    assert one.status() == 0


def test_connection_has_another_descriptor_without_adopt(single: Make) -> None:
    one = single("verdicts:Where").start()
    listener = listener_of(one)
    number, inherited, _ = where(one)
    assert number != listener
    assert inherited == "False"
    assert one.status() == 0


@pytest.mark.parametrize("number", [0, 3, 4, 77])
@pytest.mark.parametrize("more", [[], ["--adopt"]])
def test_the_connection_gets_the_number_that_was_chosen(single: Make, number: int, more: list[str]) -> None:
    one = single("verdicts:Where", "--fd", number, *more).start()
    found, inherited, stdin = where(one)
    assert (found, inherited, stdin == "/dev/null") == (number, "True", number != 0)
    assert one.status() == 0


def test_descriptor_that_can_not_be_had_is_told(single: Make) -> None:
    reader, writer = os.pipe()
    taken = single(None, "--fd", writer).command(pass_fds=(writer,))
    os.close(reader)
    os.close(writer)
    assert (taken.returncode, taken.stderr) == (
        1,
        f"forkd: once.fd: descriptor {writer} is open already; take another one\n",
    )
    beyond = single(None, "--fd", 65535).command()
    assert beyond.returncode in (0, 1)
    if beyond.returncode == 1:
        assert beyond.stderr == "forkd: once.fd: 65535 can't be had: Bad file descriptor (ulimit -n)\n"
    else:
        made = single()
        made.read_line(beyond.stdout)
        dial(made.address).close()
        assert made.status() == 0


# Files


def test_the_pid_file_is_there_while_it_is_ready(single: Make, tmp_path: Path) -> None:
    file = tmp_path / "one.pid"
    one = single(None, "--pid-file", file).start()
    assert file.read_text() == f"{one.pid}\n"
    with dial(one.address) as client:
        assert echoes(client)
        assert file.exists()
    assert one.status() == 0
    assert not file.exists()


def test_a_pid_file_that_a_dead_one_left_is_taken_over(single: Make, tmp_path: Path) -> None:
    file = tmp_path / "one.pid"
    file.write_text("12345678\n")
    one = single(None, "--pid-file", file, "--timeout", "1ms").start()
    assert one.status() == 124
    assert not file.exists()


def test_pid_file_of_a_live_process_is_not_taken_over(single: Make, tmp_path: Path) -> None:
    file = tmp_path / "one.pid"
    one = single(None, "--pid-file", file).start()
    again = single(None, "--pid-file", file).command()
    assert (again.returncode, again.stderr) == (1, f"forkd: echo is already running, pid {one.pid}\n")
    assert file.read_text() == f"{one.pid}\n"
    dial(one.address).close()
    assert one.status() == 0


def test_a_symbolic_link_for_a_pid_file_is_refused(single: Make, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "one.pid").symlink_to(tmp_path / "precious")
    result = single(None, "--pid-file", tmp_path / "one.pid").command()
    assert result.returncode == 1
    assert result.stderr.startswith(f"forkd: can't open the pid file {tmp_path}/one.pid: ")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_pid_file_where_there_is_no_directory_is_told(single: Make, tmp_path: Path) -> None:
    result = single(None, "--pid-file", tmp_path / "no" / "one.pid").command()
    assert result.returncode == 1
    assert result.stderr.startswith(f"forkd: can't make the pid file {tmp_path}/no/one.pid")


def test_log_goes_where_the_option_says(single: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = single(None, "--log", tmp_path / "mine.log").foreground()
    dial(one.address).close()
    assert one.status() == 0
    assert "serving client" in (tmp_path / "mine.log").read_text()
    assert one.text() == ""


def test_title_says_what_the_process_does(single: Make) -> None:
    one = single(None, "--name", "tested").start()
    assert title(one.pid) == "forkd: tested once (waiting)"
    with dial(one.address) as client:
        assert echoes(client)
        assert title(one.pid) == "forkd: tested once (serving)"
    assert one.status() == 0


# Signals


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_stop_before_the_client_has_come_ends_it_at_once(single: Make, signum: int) -> None:
    one = single().start()
    os.kill(one.pid, signum)
    assert one.status() == 0
    assert refuses(one.address)


@pytest.fixture
def careless_parent() -> Iterator[None]:
    """Has children begin with all signals blocked, and SIGCHLD ignored."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    action = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, action)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.usefixtures("careless_parent")
def test_signals_that_a_parent_has_blocked_or_ignored_come(single: Make) -> None:
    one = single().open()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # to learn of its end
    assert one.process is not None
    assert one.process.stdout is not None
    one.read_line(one.process.stdout.readline().decode())
    found = dict(line.split(":\t") for line in Path(f"/proc/{one.pid}/status").read_text().splitlines())
    assert int(found["SigBlk"], 16) == 0
    assert not int(found["SigIgn"], 16) & 1 << signal.SIGCHLD - 1
    os.kill(one.pid, signal.SIGTERM)
    assert one.status() == 0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("handler", ["polite:Polite", "polite:polite_streams"])
def test_a_stop_asks_the_handler_to_end(single: Make, handler: str, signum: int) -> None:
    one = single(handler).start()
    with dial(one.address) as client:
        assert echoes(client)
        os.kill(one.pid, signum)
        assert read(client, 8) == b"goodbye"
    assert one.status() == 0


def test_client_that_stays_is_served_until_the_drain_timeout(single: Make) -> None:
    one = single("polite:Curious", "--set", "drain_timeout=2s").start()
    with dial(one.address) as client:
        client.sendall(b"?")
        assert read(client, 2) == b"00"
        os.kill(one.pid, signal.SIGTERM)

        def drains() -> bool:
            client.sendall(b"?")
            return read(client, 2) == b"11"

        eventually(drains, what="the drain")
        assert at_end(client)
    assert one.status() == 0


def test_a_second_stop_closes_at_once(single: Make) -> None:
    one = single("polite:Curious", "--set", "drain_timeout=1h").start()
    with dial(one.address) as client:
        os.kill(one.pid, signal.SIGTERM)

        def drains() -> bool:
            client.sendall(b"?")
            return read(client, 2) == b"11"

        eventually(drains, what="the drain")
        os.kill(one.pid, signal.SIGTERM)
        assert at_end(client)
    assert one.status() == 0
