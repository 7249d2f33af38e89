"""Single-connection mode in the background: one client, one process, and its exit status.

What every test wants besides, that no process, file or port is left, the fixtures check.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clients import at_end, dial, echoes, read, refuses
from tests.support.daemon import Harness, forkd
from tests.support.once_process import OnceProcess, path_of
from tests.support.processes import alive, eventually, stat_of, wait_end

Make = Callable[..., OnceProcess]


def program(name: str, address: str) -> list[str]:
    host, port = address.removeprefix("tcp://").split(":")
    return ["socat", "-t", "5", "-", f"tcp:{host}:{port}"] if name == "socat" else ["nc", "-N", host, port]


@pytest.mark.parametrize("client", ["nc", "socat"])
def test_process_serves_one_client_and_ends_well(single: Make, client: str) -> None:
    one = single().start()
    answer = subprocess.run(program(client, one.address), input=b"hello\n", capture_output=True, timeout=30, check=True)
    assert answer.stdout == b"hello\n"
    assert one.status() == 0


def test_printed_address_is_listened_on_already(single: Make) -> None:
    """`forkd` in the harness reads both outputs to their end, so the child does not keep them open."""
    one = single().start()
    assert alive(one.pid)
    with dial(one.address) as client:
        assert echoes(client)
    assert one.status() == 0


def test_the_address_and_the_pid_can_be_had_as_an_object(single: Make) -> None:
    one = single()
    result = one.command("--json")
    found = json.loads(result.stdout)
    assert found == {"state": "listening", "address": found["address"], "pid": found["pid"]}
    one.address, one.pid = found["address"], found["pid"]
    dial(one.address).close()
    assert one.status() == 0


def test_child_has_its_own_session_and_nothing_of_its_starter(single: Make) -> None:
    reader, writer = os.pipe()
    try:
        one = single()
        one.read_line(one.command(pass_fds=(writer,)).stdout)
        fields = Path(f"/proc/{one.pid}/stat").read_text().rpartition(")")[2].split()
        assert (fields[3], fields[4]) == (str(one.pid), "0")  # session, tty_nr
        found = links(one.pid)
        assert (found["0"], found["1"], found["2"]) == ("/dev/null", str(one.log), str(one.log))
        assert [link for link in found.values() if link.startswith("pipe:")] == []
        assert sum(link.startswith("socket:") for link in found.values()) == 3  # the listener, and asyncio's own pair
    finally:
        os.close(reader)
        os.close(writer)
    dial(one.address).close()
    assert one.status() == 0


def test_second_client_is_refused_once_the_first_is_in(single: Make) -> None:
    one = single().start()
    with dial(one.address) as client:
        assert echoes(client)
        assert refuses(one.address)
        assert echoes(client)
    assert one.status() == 0


def test_a_second_client_that_sat_in_the_backlog_is_refused_too(single: Make) -> None:
    one = single().start()
    os.kill(one.pid, signal.SIGSTOP)
    eventually(lambda: (stat_of(one.pid) or ("",))[0] == "T", what="the stop")
    with dial(one.address) as first, dial(one.address) as second:
        os.kill(one.pid, signal.SIGCONT)
        assert echoes(first)
        assert at_end(second)
        assert echoes(first)
    assert one.status() == 0


def test_a_unix_sockets_path_is_gone_when_the_client_is_in(single: Make, tmp_path: Path) -> None:
    one = single(listen=f"unix:{tmp_path}/s").start()
    assert one.address == f"unix:{tmp_path}/s"
    with dial(one.address) as client:
        assert echoes(client)
        assert not path_of(one.address).exists()
    assert one.status() == 0


def test_host_with_several_addresses_serves_one_client(single: Make) -> None:
    one = single(listen="tcp://localhost:0").start()
    port = one.address.rpartition(":")[2]
    with dial(f"tcp://127.0.0.1:{port}") as client:
        assert echoes(client)
        assert refuses(f"tcp://127.0.0.1:{port}")
    assert one.status() == 0
    one.address = ""  # by a name, which the check at the end does not look up


@pytest.mark.parametrize("form", ["AsClass", "from_factory", "as_streams"])
def test_every_form_of_handler_works_in_it(single: Make, form: str) -> None:
    one = single(f"forms:{form}").start()
    with dial(one.address) as client:
        assert client.makefile("rb").readline().endswith(b"\n")
        assert echoes(client)
    assert one.status() == 0


RAISING = {
    "InConnectionMade": "in connection_made",
    "InDataReceived": "in data_received",
    "InEofReceived": "in eof_received",
    "InConnectionLost": "in connection_lost",
    "InCallback": "in callback",
    "in_factory": "in factory",
    "in_streams": "in streams",
    "after_its_client": "after its client",
}


@pytest.mark.parametrize("handler", RAISING)
def test_exception_of_a_handler_is_logged_and_the_status_is_1(single: Make, handler: str) -> None:
    one = single(f"verdicts:{handler}").expect(rf"(?s)ERROR \S+ once\[.*Traceback.*ValueError: {RAISING[handler]}")
    one.start()
    with dial(one.address) as client, contextlib.suppress(OSError):
        client.sendall(b"hello\n")
        client.shutdown(socket.SHUT_WR)
        while client.recv(4096):
            pass
    assert one.status() == 1


@pytest.mark.parametrize("handler", ["verdicts:Exits", "verdicts:exits_by_streams"])
def test_a_handler_may_exit_with_a_status_of_its_own(single: Make, handler: str) -> None:
    one = single(handler).start()
    with dial(one.address) as client:
        client.sendall(b"7\n")
        assert at_end(client)
    assert one.status() == 7


def test_reset_by_the_client_is_no_error_of_the_handler(single: Make) -> None:
    one = single().start()
    client = dial(one.address)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.close()
    assert one.status() == 0


def test_a_handler_is_waited_for_when_its_client_has_gone(single: Make) -> None:
    one = single("forms:with_farewell").start()
    dial(one.address).close()
    assert one.status() == 0
    assert "said farewell" in one.text()


def test_prints_of_a_handler_go_to_the_log(single: Make) -> None:
    one = single("verdicts:prints").start()
    with dial(one.address) as client:
        client.sendall(b"some words\n")
        assert read(client, 5) == b"done\n"
    assert one.status() == 0
    assert "printed: some words\n" in one.text()
    assert "complained\n" in one.text()


def test_status_is_124_when_no_client_comes_in_time(single: Make) -> None:
    one = single(None, "--timeout", "50ms").start()
    assert one.status() == 124
    assert "no client came within 0.05 s" in one.text()
    assert refuses(one.address)


def test_client_that_came_in_time_may_stay(single: Make) -> None:
    one = single(None, "--timeout", "3s").start()
    with dial(one.address) as client:
        assert echoes(client)
        late = single(None, "--timeout", "3200ms").start()
        assert late.status() == 124
        assert echoes(client)
    assert one.status() == 0


# What can't come up


def refused(one: OnceProcess, status: int, *more: object) -> str:
    result = one.command(*more)
    assert (result.returncode, result.stdout) == (status, "")
    assert list(one.harness.directory.glob("*.sock")) == []
    return result.stderr


@pytest.mark.parametrize("more", [(), ("--foreground",)])
def test_handler_that_can_not_be_imported_has_its_traceback(
    single: Make, tmp_path: Path, more: tuple[str, ...]
) -> None:
    (tmp_path / "broken.py").write_text("def fail():\n    raise OSError('no database')\n\nfail()\n")
    said = refused(single("broken:Handler", listen=f"unix:{tmp_path}/s.sock"), 1, *more)
    assert said.startswith("Traceback (most recent call last):\n")
    assert f'File "{tmp_path}/broken.py", line 4' in said
    assert said.endswith("forkd: broken:Handler: importing broken failed: OSError: no database\n")


def test_a_handler_that_ends_the_process_is_told(single: Make, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import os\nos._exit(7)\n")
    said = refused(single("broken:Handler", listen=f"unix:{tmp_path}/s.sock"), 1)
    assert said == "forkd: it ended without a word\n"


def test_a_handler_that_takes_too_long_to_import_is_killed(single: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    one = single("gate:Echo", listen=f"unix:{tmp_path}/s.sock")
    said = refused(one, 1, "--set", "boot_timeout=200ms")
    assert said == "forkd: importing the handler took longer than boot_timeout\n"


def test_an_address_in_use_is_told(single: Make) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        address = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        assert f"forkd: {address} is in use by " in refused(single(listen=address), 1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--timeout", "5"], "--timeout: once.timeout: '5' has no unit; did you mean 5s?"),
        (["--from", "10.1.2.3/8"], "--from: once.from[0]: '10.1.2.3/8' is not a network; did you mean 10.0.0.0/8?"),
        (["--fd", "2"], "--fd: once.fd: 2 is where forkd's own output goes; take 0, or a number from 3 on"),
        (["--fd", "x"], "--fd: once.fd: 'x' is not a whole number"),
        (["--rendezvous", "unix:/x"], "--rendezvous: once.rendezvous: 'unix:/x' can't be connected to; write tcp://"),
        (["--listen", "tcp://127.0.0.1:0"], "listen: mode once serves one client at one address, and here are 2"),
    ],
)
def test_wrong_settings_are_told_with_their_option(single: Make, options: list[str], said: str) -> None:
    stderr = refused(single(), 78, *options)
    assert said in stderr
    assert stderr.endswith("forkd: 1 mistake in the settings\n")


def test_command_line_has_no_option_for_workers(harness: Harness) -> None:
    result = forkd("once", "--workers", "3", cwd=harness.directory)
    assert result.returncode == 64
    assert "unrecognized arguments: --workers" in result.stderr


def test_interrupted_starter_leaves_no_process(single: Make, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    one = single("gate:Echo", "--log", tmp_path / "once.log", listen=f"unix:{tmp_path}/s.sock")
    command = [sys.executable, "-m", "forkd", *map(str, one.arguments)]
    with (
        open(tmp_path / "gate", "r+b", buffering=0) as gate,
        subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process,
    ):
        child = eventually(lambda: children(process.pid), what="the fork")[0]
        # Python loses an interrupt that comes while it forks; by now it waits for its child.
        eventually(lambda: not any(link.startswith("socket:") for link in links(process.pid).values()), what="the wait")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        gate.write(b"1")
        wait_end(child)
    assert not (tmp_path / "s.sock").exists()


def links(pid: int) -> dict[str, str]:
    """What each descriptor of a process leads to."""
    found = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            found[number] = os.readlink(f"/proc/{pid}/fd/{number}")
    return found


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
