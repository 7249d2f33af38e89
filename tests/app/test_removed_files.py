"""Files of a daemon that something has removed, as a cleaner of temporary directories does: they are made again."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.support.clients import datagram_client, echoes
from tests.support.daemon import Harness
from tests.support.processes import eventually


@pytest.mark.parametrize("what", ["control.sock", "pid", "."])
def test_files_of_the_run_directory_are_made_again(harness: Harness, what: str) -> None:
    daemon = harness.daemon(workers=1).start()
    pid = daemon.pid
    if what == ".":
        shutil.rmtree(daemon.run_directory)
    else:
        (daemon.run_directory / what).unlink()
    result = daemon.command("status")  # at once, before they are there again
    assert (result.returncode, f"tested: running, pid {pid}," in result.stdout) == (0, True), result
    eventually((daemon.run_directory / "pid").exists, what="the pid file")
    assert (daemon.run_directory / "pid").read_text() == f"{pid}\n"
    assert daemon.command("start").stdout == f"tested is already running, pid {pid}\n"
    assert daemon.command("upgrade").returncode == 0
    daemon.wait_log("run directory: files were removed, and are made again")
    assert daemon.command("stop").stdout == f"tested stopped, pid {pid}\n"
    assert list(daemon.run_directory.iterdir()) == []


@pytest.mark.parametrize("how", ["unlink", "rename", "replace"])
def test_path_of_a_listener_is_made_again(harness: Harness, tmp_path: Path, how: str) -> None:
    path = tmp_path / "sock"
    settings = tmp_path / "settings.yaml"
    limits = "limits: {connections: 9}"
    settings.write_text(f"listen: [{{address: 'unix:{path}', handler: 'forkd.builtin:Echo', mode: '600', {limits}}}]\n")
    daemon = harness.daemon(target=settings, listen=()).start()
    workers, client, before = daemon.workers(), harness.connect(daemon), path.stat()
    if how == "unlink":
        path.unlink()
    elif how == "rename":
        path.rename(tmp_path / "elsewhere")
    else:  # by a socket file that nobody serves
        path.unlink()
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    daemon.wait_log(f"listener unix:{path}: its path was removed by another process, and is set right")
    assert (path.stat().st_mode, path.stat().st_uid) == (before.st_mode, before.st_uid)
    new = [harness.connect(daemon) for _ in range(6)]
    assert all(echoes(one) for one in (client, *new))
    assert (daemon.workers(), daemon.status()["state"]) == (workers, "running")
    for verb in ("upgrade", "restart") if how == "unlink" else ():
        assert daemon.command(verb).returncode == 0
        assert echoes(harness.connect(daemon))
    assert daemon.command("stop", "--now").returncode == 0
    assert not path.exists()


def test_path_that_cannot_be_made_again_is_degraded(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    daemon = harness.daemon(listen=(f"unix:{path}",)).start()
    client = harness.connect(daemon)
    path.unlink()
    path.write_text("not a socket")
    text = f"unix:{path}: its path was removed, and it can't be made again: unix:{path} is in use by a file that is"
    daemon.expect(text)
    daemon.wait_log(text)
    status = daemon.status()
    assert (status["state"], status["reason"]) == ("degraded", f"{text} not a socket")
    assert path.read_text() == "not a socket"
    path.unlink()
    status = daemon.status()
    eventually(lambda: daemon.status()["state"] == "running", what="the path")
    assert echoes(harness.connect(daemon))
    assert echoes(client)


def test_path_of_a_datagram_listener_is_made_again(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    daemon = harness.daemon(target="hostile:Datagrams", listen=(f"unix-dgram:{path}",)).start()
    workers = daemon.workers()
    path.unlink()
    daemon.wait_log("its path was removed")
    daemon.wait_workers(2, without=workers.values())
    with datagram_client(f"unix-dgram:{path}") as client:
        client.send(b"there")
        assert client.recv(100) == b"there"


@pytest.mark.parametrize("verb", ["reload", "upgrade", "restart"])
def test_change_makes_the_path_of_a_listener_again(harness: Harness, tmp_path: Path, verb: str) -> None:
    path = tmp_path / "sock"
    daemon = harness.daemon(workers=1, listen=(f"unix:{path}",)).start()
    client = harness.connect(daemon)
    path.unlink()
    result = daemon.command(verb)
    assert result.returncode == 0, result.stderr
    assert echoes(harness.connect(daemon))
    assert echoes(client)
    assert daemon.status()["state"] == "running"
    assert daemon.command("stop", "--now").returncode == 0
    assert not path.exists()
