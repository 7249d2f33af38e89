"""Upgrades: what is handed over to the next image of the master, which clients it answers, and that an image that can't
run changes nothing. execve(2) itself is replaced: it notes what it was called with, and fails.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkd import RESUME
from forkd.errors import ForkdError
from forkd.master import reload, upgrade
from forkd.master.upgrade import MasterSnapshot
from forkd.messages import ChangedReply
from forkd.states import MasterState
from tests.support.fake_reload import Asker, FakeReload


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeReload]:
    with ExitStack() as stack:
        made = FakeReload(tmp_path, stack)
        yield made
        made.end()


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """The clients that were handed over, by an image that does not come; a real one would not return."""
    clients: list[Sequence[int]] = []

    def replace_image(snapshot: MasterSnapshot) -> NoReturn:
        clients.append(snapshot.clients)
        raise ForkdError("can't run python: Exec format error")

    monkeypatch.setattr(reload, "replace_image", replace_image)
    return clients


def test_upgrade_replaces_the_image_after_the_dry_run(fake: FakeReload, handed: list[Sequence[int]]) -> None:
    fake.ask("upgrade", descriptor=30)
    assert handed == []
    fake.end_helper()
    assert handed == [[30]]


def test_those_who_have_left_are_not_handed_over(fake: FakeReload, handed: list[Sequence[int]]) -> None:
    fake.ask("upgrade", descriptor=-1)
    fake.changes.ask("reload")
    fake.end_helper()
    assert handed == [[]]


@pytest.mark.parametrize("verb", ["reload", "upgrade"])
def test_client_of_the_next_change_is_handed_over_too(fake: FakeReload, handed: list[Sequence[int]], verb: str) -> None:
    fake.ask("upgrade", descriptor=30)
    fake.ask(verb, descriptor=31)
    fake.ask("reload", descriptor=32)
    fake.end_helper()
    assert handed == [[30, 31, 32]]


def test_upgrade_without_a_new_image_fails_and_the_next_begins(fake: FakeReload, handed: list[Sequence[int]]) -> None:
    asker, waiting = fake.ask("upgrade"), fake.ask("reload")
    fake.end_helper()
    assert asker.errors == ["can't run python: Exec format error"]
    assert waiting == []
    fake.changes.advance(0.0)
    assert fake.changes.under_way == "reload"
    fake.boot()
    fake.finish()
    assert waiting.succeeded == [True]


def test_helper_that_finds_the_new_code_broken_keeps_the_old(fake: FakeReload, handed: list[Sequence[int]]) -> None:
    asker = fake.ask("upgrade", descriptor=30)
    fake.helper.stderr_lines.append("forkd: No module named 'chat'")
    fake.end_helper(256)
    assert asker.errors == ["No module named 'chat'"]
    assert handed == []


def test_new_image_reloads_and_answers_those_that_waited(fake: FakeReload) -> None:
    askers = [Asker(), Asker()]
    fake.changes.resume(list(askers))
    assert fake.changes.under_way == "reload"
    fake.boot()
    fake.finish()
    assert askers == [[ChangedReply(5, 3)]] * 2


def test_helper_tries_the_image_or_prepares_the_reload(fake: FakeReload, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[object] = []

    def try_image(snapshot: object, file: int) -> int:
        tried.append(snapshot)
        return 11

    monkeypatch.setattr(reload, "signal_when_parent_dies", lambda signum, parent: True)
    monkeypatch.setattr(upgrade, "try_image", try_image)
    row, channel = cast(Any, object()), cast(Any, object())
    fake.ask("reload")
    assert fake.pool.mains[-1](row, channel) == 17
    assert fake.prepared == [(fake.state.generation, "reload", channel)]
    fake.fail_boot()
    fake.ask("upgrade")
    monkeypatch.setattr(type(fake.state), "snapshot", lambda self, *clients: ("all", *clients))
    assert fake.pool.mains[-1](row, channel) == 11
    assert tried == [("all",)]


STEPS = st.lists(st.sampled_from(["reload", "upgrade", "diff", "boot", "finish", "fail", "look", "stop"]), max_size=25)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=STEPS)
def test_client_gets_one_outcome_whatever_happens(
    tmp_path: Path, handed: list[Sequence[int]], steps: list[str]
) -> None:
    with ExitStack() as stack:
        fake = FakeReload(tmp_path, stack)
        askers: list[Asker] = []
        for step in steps:
            current = fake.changes.current
            if step in ("reload", "upgrade", "diff"):
                askers.append(fake.ask(step))
            elif step == "stop":
                fake.state.master_state = MasterState.DRAINING
                fake.changes.cancel("the daemon stops")
            elif step == "look":
                fake.changes.advance(0.0)
            elif current is not None and step == "fail":
                fake.fail_boot()
            elif current is not None and step == "boot" and fake.helper.pid in fake.pool.workers:
                if current.verb == "reload":
                    fake.say_settings(fake.settings)
                fake.end_helper()
            elif current is not None and step == "finish" and current.candidate is not None:
                fake.finish()
            assert all(len(asker) <= 1 for asker in askers)
        fake.end()
        assert [len(asker) for asker in askers] == [1] * len(askers)


class Called:
    """What execve(2) was called with, and how the process was then."""

    def __init__(self) -> None:
        self.arguments: list[str] = []
        self.state = ""
        self.directory = ""
        self.inheritable: dict[int, bool] = {}
        self.blocked: set[int] = set()

    def __call__(self, program: str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
        self.arguments, self.state, self.directory = [program, *arguments], environment[RESUME], os.getcwd()
        numbers = [int(name) for name in os.listdir("/proc/self/fd")]
        for number in numbers:
            try:
                self.inheritable[number] = os.get_inheritable(number)
            except OSError:  # that of the listing itself
                continue
        self.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        raise OSError(errno.ENOEXEC, os.strerror(errno.ENOEXEC), program)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    made = Called()
    monkeypatch.setattr(os, "execve", made)
    return made


def estate(directory: Path, *descriptors: int) -> MasterSnapshot:
    """A snapshot of these descriptors, which writes itself as a word."""

    def write(descriptor: int) -> int:
        written = os.memfd_create("state")
        os.set_inheritable(written, False)
        os.write(written, b"state")
        return written

    launch = SimpleNamespace(directory=str(directory))
    return cast(MasterSnapshot, SimpleNamespace(launch=launch, descriptors=lambda: list(descriptors), write=write))


def test_new_image_gets_command_line_descriptors_and_signals(tmp_path: Path, called: Called) -> None:
    before, here = os.listdir("/proc/self/fd"), os.getcwd()
    one, other = os.pipe()
    with pytest.raises(ForkdError, match=f"^can't run {sys.executable}: Exec format error$"):
        upgrade.replace_image(estate(tmp_path, one))
    assert called.arguments == [sys.executable, sys.executable, *sys.orig_argv[1:]]
    assert called.directory == str(tmp_path)
    assert (called.inheritable[one], called.inheritable[other]) == (True, False)
    assert called.inheritable[int(called.state)]
    assert {signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD} <= called.blocked
    # And since it did not come, everything is as it was.
    assert not os.get_inheritable(one)
    assert os.getcwd() == here
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.close(one)
    os.close(other)
    assert os.listdir("/proc/self/fd") == before
    assert RESUME not in os.environ


def test_upgrade_without_its_working_directory_stays_in_it(
    tmp_path: Path, called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    with monkeypatch.context() as patched:
        patched.chdir(gone)
        gone.rmdir()
        gone.mkdir()  # another one, where the start's path leads to
        with pytest.raises(ForkdError, match="Exec format error"):
            upgrade.replace_image(estate(gone))
        with pytest.raises(FileNotFoundError):
            Path.cwd()


def test_upgrade_fails_where_the_start_directory_is_gone(tmp_path: Path, called: Called) -> None:
    here = os.getcwd()
    with pytest.raises(ForkdError, match=f"^can't change to {tmp_path}/gone, where the daemon was started: No such"):
        upgrade.replace_image(estate(tmp_path / "gone"))
    assert called.arguments == []
    assert os.getcwd() == here


def test_dry_run_says_that_it_is_one_and_ignores_no_signal(
    tmp_path: Path, called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers: dict[int, object] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    with pytest.raises(ForkdError):
        upgrade.try_image(estate(tmp_path))
    trial, number = called.state.split(":")
    assert trial == "check"
    assert called.inheritable[int(number)]
    assert set(handlers.values()) == {signal.SIG_DFL}
    assert set(handlers) == {signal.SIGPIPE}  # of the others none is ignored, and handlers end with execve(2)
    os.close(int(number))
