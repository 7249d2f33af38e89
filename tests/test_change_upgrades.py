"""Upgrades: what is handed over to the next image of the master, to whom it answers, and that an image which can't be
had leaves everything as it was. execve(2) itself is made up: it notes what it was called with, and fails.
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
from changes import Asker, Stage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkd.errors import ForkdError
from forkd.master import change, upgrade
from forkd.master.heritage import Heritage
from forkd.states import Mode
from forkd.wire import RESUME


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with ExitStack() as stack:
        made = Stage(tmp_path, stack)
        yield made
        made.end()


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[int]]:
    """The clients that were handed over, by an image that does not come; a real one would not return."""
    clients: list[Sequence[int]] = []

    def replace_image(heritage: Heritage) -> NoReturn:
        clients.append(heritage.clients)
        raise ForkdError("can't run python: Exec format error")

    monkeypatch.setattr(change, "replace_image", replace_image)
    return clients


def test_an_upgrade_goes_over_when_a_helper_has_tried_it_and_takes_along_who_waits(
    stage: Stage, handed: list[Sequence[int]]
) -> None:
    stage.ask("upgrade", descriptor=30)
    assert handed == []
    stage.end_helper()
    assert handed == [[30]]


def test_those_who_have_left_are_not_handed_over(stage: Stage, handed: list[Sequence[int]]) -> None:
    stage.ask("upgrade", descriptor=-1)
    stage.changes.ask("reload")
    stage.end_helper()
    assert handed == [[]]


@pytest.mark.parametrize("verb", ["reload", "upgrade"])
def test_who_waits_for_his_turn_is_handed_over_too_since_the_new_image_does_what_he_asked(
    stage: Stage, handed: list[Sequence[int]], verb: str
) -> None:
    stage.ask("upgrade", descriptor=30)
    stage.ask(verb, descriptor=31)
    stage.ask("reload", descriptor=32)
    stage.end_helper()
    assert handed == [[30, 31, 32]]


def test_without_a_new_image_the_upgrade_has_failed_and_who_waits_has_his_turn(
    stage: Stage, handed: list[Sequence[int]]
) -> None:
    asker, waiting = stage.ask("upgrade"), stage.ask("reload")
    stage.end_helper()
    assert [(answer["ok"], answer["error"]) for answer in asker] == [(False, "can't run python: Exec format error")]
    assert waiting == []
    stage.changes.look()
    assert stage.changes.under_way == "reload"
    stage.boot()
    stage.finish()
    assert [answer["ok"] for answer in waiting] == [True]


def test_a_helper_that_finds_the_new_code_broken_keeps_the_old(stage: Stage, handed: list[Sequence[int]]) -> None:
    asker = stage.ask("upgrade", descriptor=30)
    stage.helper.words.append("forkd: No module named 'chat'")
    stage.end_helper(256)
    assert [(answer["ok"], answer["error"]) for answer in asker] == [(False, "No module named 'chat'")]
    assert handed == []


def test_the_new_image_goes_on_with_a_reload_and_answers_who_waited(stage: Stage) -> None:
    askers = [Asker(), Asker()]
    stage.changes.resume(list(askers))
    assert stage.changes.under_way == "reload"
    stage.boot()
    stage.finish()
    assert askers == [[{"ok": True, "generation": 5, "workers": 3}]] * 2


def test_a_helper_tries_the_image_or_prepares_the_reload(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Heritage] = []
    monkeypatch.setattr(change, "signal_when_parent_dies", lambda signum, parent: True)
    monkeypatch.setattr(upgrade, "try_image", lambda heritage: tried.append(heritage) or 11)
    row, channel = cast(Any, object()), cast(Any, object())
    stage.ask("reload")
    assert stage.crew.mains[-1](row, channel) == 17
    assert stage.prepared == [(stage.state.generation, "reload", channel)]
    stage.fail_boot()
    stage.ask("upgrade")
    monkeypatch.setattr(type(stage.state), "heritage", lambda self, clients: ("all", clients))
    assert stage.crew.mains[-1](row, channel) == 11
    assert tried == [("all", [])]


STEPS = st.lists(st.sampled_from(["reload", "upgrade", "diff", "boot", "finish", "fail", "look", "stop"]), max_size=25)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS)
def test_whoever_asks_gets_one_outcome_whatever_happens(
    tmp_path: Path, handed: list[Sequence[int]], steps: list[str]
) -> None:
    with ExitStack() as stack:
        stage = Stage(tmp_path, stack)
        askers: list[Asker] = []
        for step in steps:
            current = stage.changes.current
            if step in ("reload", "upgrade", "diff"):
                askers.append(stage.ask(step))
            elif step == "stop":
                stage.state.mode = Mode.DRAINING
                stage.changes.give_up("the daemon stops")
            elif step == "look":
                stage.changes.look()
            elif current is not None and step == "fail":
                stage.fail_boot()
            elif current is not None and step == "boot" and stage.helper.pid in stage.crew.workers:
                if current.verb == "reload":
                    stage.say_settings(stage.settings)
                stage.end_helper()
            elif current is not None and step == "finish" and current.candidate is not None:
                stage.finish()
            assert all(len(asker) <= 1 for asker in askers)
        stage.end()
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
    monkeypatch.setattr(upgrade.os, "execve", made)
    return made


def estate(directory: Path, *descriptors: int) -> Heritage:
    """A heritage of these descriptors, which writes itself as a word."""

    def write() -> int:
        written = os.memfd_create("state")
        os.set_inheritable(written, False)
        os.write(written, b"state")
        return written

    place = SimpleNamespace(directory=str(directory))
    return cast(Heritage, SimpleNamespace(place=place, descriptors=lambda: list(descriptors), write=write))


def test_the_new_image_gets_the_command_line_and_the_descriptors_and_signals_wait_for_it(
    tmp_path: Path, called: Called
) -> None:
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


def test_where_the_working_directory_is_gone_the_master_tries_and_stays_in_it(
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


def test_where_it_was_started_is_gone_there_is_no_upgrade(tmp_path: Path, called: Called) -> None:
    here = os.getcwd()
    with pytest.raises(ForkdError, match=f"^can't run {tmp_path}/gone: No such file or directory$"):
        upgrade.replace_image(estate(tmp_path / "gone"))
    assert called.arguments == []
    assert os.getcwd() == here


def test_a_trial_says_that_it_is_one_and_ignores_no_signal_that_its_image_would_not(
    tmp_path: Path, called: Called, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers: dict[int, object] = {}
    monkeypatch.setattr(upgrade.signal, "signal", handlers.__setitem__)
    with pytest.raises(ForkdError):
        upgrade.try_image(estate(tmp_path))
    trial, number = called.state.split(":")
    assert trial == "check"
    assert called.inheritable[int(number)]
    assert set(handlers.values()) == {signal.SIG_DFL}
    assert {signal.SIGHUP, signal.SIGUSR2, signal.SIGPIPE} <= set(handlers)
    os.close(int(number))
