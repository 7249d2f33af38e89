"""A daemon that is started in a link to a release: after the link has moved, changes and new workers follow it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.clients import read
from tests.support.daemon import Daemon, Harness

_HANDLER = """
from forkd.builtin import Echo

class Says(Echo):
    def connection_made(self, transport):
        super().connection_made(transport)
        from lib import word
        transport.write(word.WORD)
"""


class Deployment:
    """A link `current` to one of several releases, and a daemon that is started there."""

    def __init__(self, harness: Harness, root: Path, *settings: str, python_path: str = "") -> None:
        self.harness, self.root, self.current = harness, root, root / "current"
        self.go_to("first")
        self.daemon: Daemon = harness.daemon(target="says:Says", workers=1, settings=settings)
        self.daemon.directory = self.current
        path = next(one for one in self.daemon.options if str(one).startswith("python_path="))
        self.daemon.options[self.daemon.options.index(path)] = f"python_path=[{python_path}]"

    def go_to(self, word: str) -> None:
        """Makes a release whose handler greets with a word, has the link lead there, and removes the one before."""
        release = self.root / word
        (release / "lib").mkdir(parents=True)
        (release / "says.py").write_text(_HANDLER)
        (release / "lib" / "word.py").write_text(f"WORD = {word.encode()!r}\n")
        before = self.current.resolve() if self.current.exists() else None
        (self.root / "next").symlink_to(release)
        (self.root / "next").replace(self.current)
        if before is not None:
            shutil.rmtree(before)

    def greets_with(self, word: str) -> bool:
        return read(self.harness.connect(self.daemon), len(word)).decode() == word


@pytest.mark.parametrize(("verb", "python_path"), [("start", ""), ("run", ""), ("start", ".")])
def test_changes_follow_the_link_to_a_release(
    harness: Harness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, python_path: str
) -> None:
    site = Deployment(harness, tmp_path, python_path=python_path)
    monkeypatch.setenv("PWD", str(site.current))  # as a shell does
    site.daemon.environment["PWD"] = str(site.current)
    daemon = site.daemon.start() if verb == "start" else site.daemon.run()
    assert site.greets_with("first")
    for word, change in (("other", "reload"), ("third", "upgrade"), ("fifth", "reload"), ("sixth", "restart")):
        if change != "restart" or verb == "start":
            site.go_to(word)
            result = daemon.command(change)
            assert result.returncode == 0, result.stderr
            assert site.greets_with(word), change
    assert daemon.status()["directory"] == str(site.current)
    site.go_to("later")
    daemon.expect("has ended: killed by SIGKILL")
    os.kill(worker := daemon.workers()[1], signal.SIGKILL)
    daemon.wait_workers(1, without=[worker])
    assert site.greets_with("later")


def test_working_directory_is_entered_again_by_each_generation(harness: Harness, tmp_path: Path) -> None:
    site = Deployment(harness, tmp_path, f"working_directory={tmp_path}/current")
    site.daemon.directory = tmp_path
    daemon = site.daemon.start()
    assert site.greets_with("first")
    for word, change in (("other", "reload"), ("third", "upgrade")):
        site.go_to(word)
        result = daemon.command(change)
        assert result.returncode == 0, result.stderr
        assert site.greets_with(word), change
        assert os.readlink(f"/proc/{daemon.workers()[1]}/cwd") == str(tmp_path / word)


def test_reload_where_the_directory_is_gone_says_so(harness: Harness, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    site = harness.daemon(workers=1)
    site.directory = gone
    daemon = site.start()
    gone.rmdir()
    site.directory = tmp_path
    daemon.expect("reload: failed", "upgrade: failed")
    for verb in ("reload", "upgrade"):
        result = daemon.command(verb)
        assert result.returncode == 1
        why = f"can't change to {gone}, where the daemon was started: No such file or directory"
        assert result.stderr == f"forkd: the {verb} failed, and tested goes on as before: {why}\n"
