"""What processes and programs that a handler starts have of their worker: nothing of forkd's."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from tests.support.clients import at_end, echoes, is_free
from tests.support.daemon import Daemon, Harness
from tests.support.processes import alive, eventually


def ask(client: socket.socket, word: bytes) -> str:
    """The line that the handler answers."""
    client.sendall(word)
    with client.makefile("rb") as lines:
        return lines.readline().decode().rstrip("\n")


def forking(harness: Harness, *settings: str) -> Daemon:
    return harness.daemon(target="forks:Forks", workers=1, settings=settings).run()


@pytest.mark.parametrize("how", [b"fork", b"pool"])
def test_forked_child_has_nothing_of_its_worker(harness: Harness, how: bytes) -> None:
    daemon = forking(harness)
    (pid,) = daemon.workers().values()
    client, other = harness.connect(daemon), harness.connect(daemon)
    assert echoes(other)
    child, title, descriptors, handled, _ = ask(client, how).split("|")
    assert int(child) != pid
    assert title == "forkd: tested worker 1 child"
    assert descriptors == ""
    assert handled == f"[{int(signal.SIGINT)}] -1"
    assert echoes(client)
    assert echoes(other)
    assert list(daemon.workers().values()) == [pid]


def test_pool_of_a_handler_does_not_hold_the_port(harness: Harness) -> None:
    daemon = forking(harness)
    address = daemon.address
    with harness.connect(daemon) as client:
        pool = int(ask(client, b"pool").partition("|")[0])
    assert daemon.command("reload").returncode == 0
    assert daemon.command("stop").returncode == 0
    assert is_free(address)
    eventually(lambda: not alive(pool), what="the end of the pool's process")


def test_client_sees_its_end_while_a_pool_lives(harness: Harness) -> None:
    daemon = forking(harness)
    waiting, client = harness.connect(daemon), harness.connect(daemon)
    assert echoes(waiting)
    ask(client, b"pool")
    waiting.shutdown(socket.SHUT_WR)
    assert at_end(waiting)


def test_child_that_comes_back_ends_with_an_error(harness: Harness) -> None:
    daemon = forking(harness)
    client = harness.connect(daemon)
    daemon.expect("worker 1 child.* a process that the handler has forked came back from it, and ends")
    assert ask(client, b"back") == "back"
    assert echoes(client)
    assert (daemon.run_directory / "control.sock").exists()


def test_program_of_a_handler_ignores_no_signal(harness: Harness) -> None:
    daemon = forking(harness)
    (pid,) = daemon.workers().values()
    ignored = int(ask(harness.connect(daemon), b"ignored").split()[1], 16)
    names = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)
    assert [one.name for one in names if ignored >> (one - 1) & 1] == []
    assert ignored >> (signal.SIGRTMIN - 1) & 1 == 0
    client = harness.connect(daemon)
    for signum in names:
        os.kill(pid, signum)
        assert echoes(client)
    assert list(daemon.workers().values()) == [pid]


def test_program_with_a_preexec_function_gets_the_connection(harness: Harness) -> None:
    daemon = forking(harness)
    assert ask(harness.connect(daemon), b"program") == "by hand"


@pytest.mark.parametrize("what", [b"sleep", b"stubborn"])
def test_what_a_worker_leaves_is_ended_and_logged(harness: Harness, what: bytes) -> None:
    daemon = forking(harness)
    (pid,) = daemon.workers().values()
    left = int(ask(harness.connect(daemon), what))
    os.kill(pid, signal.SIGKILL)
    daemon.expect("has ended: killed by SIGKILL")
    daemon.wait_log(rf"worker 1 \(pid {pid}\) has left processes, which are ended: .*\(pid {left}\)")
    eventually(lambda: not alive(left), what="its end")
    daemon.wait_workers(1, without=[pid])


def test_stop_ends_what_workers_have_left(harness: Harness) -> None:
    daemon = forking(harness)
    with harness.connect(daemon) as client:
        left = int(ask(client, b"sleep"))
    assert daemon.command("stop").returncode == 0
    assert not alive(left)


def test_what_a_worker_leaves_may_stay(harness: Harness) -> None:
    daemon = forking(harness, "orphans=leave")
    with harness.connect(daemon) as client:
        left = int(ask(client, b"sleep"))
    assert daemon.command("stop").returncode == 0
    assert alive(left)
    assert any(f"has left processes running: sleep (pid {left})" in one for one in daemon.records())
    os.kill(left, signal.SIGKILL)


def test_what_a_worker_leaves_ends_with_the_master(harness: Harness) -> None:
    daemon = forking(harness)
    with harness.connect(daemon) as client:
        left = int(ask(client, b"sleep"))
    daemon.expect("the master is gone")
    os.kill(daemon.pid, signal.SIGKILL)
    eventually(lambda: not alive(left), what="its end")
    for file in daemon.run_directory.iterdir():
        file.unlink()


FORKS_AT_BOOT = """
import os


def fork(error):
    if (pid := os.fork()) == 0:
        raise error
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


found = [fork(SystemExit(5))]


def setup():
    found.append(fork(SystemExit(6)))


def make():
    found.append(fork(ValueError("of a child")))
    return handle


async def handle(reader, writer):
    writer.write(str(found).encode())
"""


def test_process_that_a_boot_forks_ends_by_what_it_raises(harness: Harness) -> None:
    (harness.directory / "boots.py").write_text(FORKS_AT_BOOT)
    settings = ("setup=boots:setup", "listen.factory=true")
    daemon = harness.daemon(target="boots:make", workers=1, settings=settings).start()
    assert harness.connect(daemon).recv(100) == b"[5, 6, 1]"
    daemon.expect("worker 1 .* output: Traceback")
    daemon.wait_log("ValueError: of a child")
