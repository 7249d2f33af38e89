"""The end of a worker is an interpreter's: threads, atexit functions and open files have theirs."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.support.clients import echoes
from tests.support.daemon import STOOD_STILL, Daemon, Harness
from tests.support.once_process import OnceProcess
from tests.support.processes import wait_end


def leaving(harness: Harness, *settings: str) -> Daemon:
    environment = {"ENDINGS": str(harness.directory)}
    daemon = harness.daemon(target="endings:Leaves", workers=1, settings=settings, environment=environment)
    return daemon.run()


def check_ended(directory: Path, pid: int, word: bytes, *, packed: bool = True) -> None:
    assert (directory / f"{pid}.atexit").read_text() == "called"
    assert (directory / f"{pid}.text").read_bytes() == (directory / f"{pid}.binary").read_bytes() == word
    assert (directory / f"{pid}.pool").exists()
    if packed:
        assert gzip.decompress((directory / f"{pid}.gz").read_bytes()) == word


@pytest.mark.parametrize("how", ["stop", "reload", "now"])
def test_worker_ends_as_an_interpreter_does(harness: Harness, how: str) -> None:
    daemon = leaving(harness)
    (pid,) = daemon.workers().values()
    with harness.connect(daemon) as client:
        assert echoes(client, b"word")
    daemon.wait_clients(0)
    result = daemon.command("stop", "--now") if how == "now" else daemon.command(how)
    assert result.returncode == 0, result.stderr
    wait_end(pid)
    check_ended(harness.directory, pid, b"word")


@pytest.mark.parametrize(
    ("word", "said"),
    [(b"stuck", "threads of the handler still run: stays"), (b"atexit", "its atexit functions still run")],
)
def test_worker_whose_end_takes_too_long_ends_in_time(harness: Harness, word: bytes, said: str) -> None:
    daemon = leaving(harness, "drain_timeout=1s", "stall_timeout=900ms")
    daemon.allow(STOOD_STILL)
    (pid,) = daemon.workers().values()
    with harness.connect(daemon) as client:
        assert echoes(client, word)
    assert daemon.command("stop").returncode == 0
    check_ended(harness.directory, pid, word)
    assert any(f"ending, though {said}" in one for one in daemon.records())
    assert any("has ended: exit status 0" in one for one in daemon.records())


@pytest.mark.parametrize("foreground", [False, True])
def test_once_ends_as_an_interpreter_does(harness: Harness, monkeypatch: pytest.MonkeyPatch, foreground: bool) -> None:
    monkeypatch.setenv("ENDINGS", str(harness.directory))
    once = OnceProcess(harness, "endings:Leaves")
    once = once.foreground() if foreground else once.start()
    with harness.connect(once.address) as client:
        assert echoes(client, b"word")
    assert once.status() == 0
    check_ended(harness.directory, once.pid, b"word", packed=not foreground)  # an interpreter may close it too late
    assert (
        harness.directory / f"{once.pid}.garbage"
    ).exists() is foreground  # one in the background leaves by os._exit
