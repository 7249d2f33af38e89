"""How one generation gives way to the next: one change at a time, each with one outcome for everybody who asked, and
whatever goes wrong leaves the generation that serves and its listeners as they were.

The children are made up (`changing`), the listeners are real sockets. Upgrades are in `test_change_upgrades`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from changes import LOG, Stage, listener

from forkd.errors import ForkdError
from forkd.master import change
from forkd.master.backoff import Slot
from forkd.master.plan import Candidate
from forkd.master.spawn import Exit
from forkd.states import Mode


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    before = os.listdir("/proc/self/fd")
    with ExitStack() as stack:
        made = Stage(tmp_path, stack)
        yield made
        made.end()
    assert os.listdir("/proc/self/fd") == before


def reached(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client, suppress(ConnectionRefusedError, FileNotFoundError):
        client.connect(str(path))
        return True
    return False


def untouched(stage: Stage) -> bool:
    """Whether the daemon is as it was before any change."""
    generation = stage.state.generation
    assert (generation.number, generation.settings, generation.bound) == (4, stage.settings, stage.bound)
    assert stage.state.wanted == 2
    assert reached(stage.path / "old")
    assert not (stage.path / "new").exists()
    assert "4 to 5" not in stage.logbook.told
    return not stage.changes.under_way


def test_a_reload_boots_a_candidate_beside_the_one_that_serves_and_then_it_takes_over(stage: Stage) -> None:
    asker = stage.ask("reload")
    assert (stage.changes.under_way, stage.changes.generation) == ("reload", None)
    assert stage.changes.candidate(50.0) == Candidate(5, 0, 50.0)
    candidate = stage.boot()
    assert stage.changes.candidate(50.0) == Candidate(5, 3, 70.0)
    assert (candidate.number, candidate.settings.workers, candidate.log) == (5, 3, LOG)
    assert [one.address.scheme for one in candidate.bound] == ["tcp", "unix", "tcp"]
    stage.changes.look()
    assert reached(stage.path / "old")
    assert reached(stage.path / "new")
    assert (stage.state.generation.number, asker) == (4, [])
    stage.crew.slots[4][1] = Slot(3, 7.0)
    stage.finish()
    assert asker == [{"ok": True, "generation": 5, "workers": 3}]
    assert (stage.state.generation, stage.state.wanted) == (candidate, 3)
    assert (stage.changes.under_way, stage.changes.generation, stage.changes.candidate(50.0)) == ("", None, None)
    assert stage.logbook.told == ["4 to 5"]
    assert 4 not in stage.crew.slots
    stage.changes.look()
    assert len(asker) == 1


def test_a_listener_that_is_kept_is_the_same_socket_and_one_that_is_not_is_closed_when_all_is_done(
    stage: Stage,
) -> None:
    kept = stage.bound[0].sockets[0]
    stage.ask("reload")
    candidate = stage.boot()
    assert candidate.bound[0].sockets == [kept]
    stage.finish()
    assert kept.fileno() >= 0
    assert not (stage.path / "old").exists()
    assert stage.bound[1].sockets[0].fileno() == -1
    assert reached(stage.path / "new")


def test_a_kept_listener_follows_its_new_settings_only_when_they_serve(stage: Stage) -> None:
    path = stage.path / "old"
    told = replace(stage.settings, listen=(listener(f"unix:{path}", mode=0o640),))
    path.chmod(0o600)
    stage.ask("reload")
    stage.say_settings(told)
    stage.end_helper()
    assert path.stat().st_mode & 0o777 == 0o600
    stage.finish()
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_listener_that_can_not_follow_its_settings_is_no_reason_to_stop_half_way(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    told = replace(stage.settings, listen=(listener(f"unix:{stage.path}/old", owner="no-such-user-here"),))
    asker = stage.ask("reload")
    stage.say_settings(told)
    stage.end_helper()
    stage.finish()
    assert [answer["ok"] for answer in asker] == [True]
    assert "no-such-user-here" in caplog.text


def test_what_is_asked_meanwhile_is_done_once_afterwards_for_all_who_asked(stage: Stage) -> None:
    first = stage.ask("reload")
    others = [stage.ask("reload") for _ in range(3)]
    assert len(stage.crew.helpers) == 1
    stage.boot()
    stage.changes.look()
    assert len(stage.crew.helpers) == 1
    stage.finish()
    assert [len(first), *map(len, others)] == [1, 0, 0, 0]
    stage.changes.look()
    assert len(stage.crew.helpers) == 2
    assert stage.changes.candidate(1.0) == Candidate(6, 0, 1.0)
    stage.end_helper(status=256)
    assert [[answer["ok"] for answer in one] for one in (first, *others)] == [[True]] + [[False]] * 3
    stage.changes.look()
    assert len(stage.crew.helpers) == 2


@pytest.mark.parametrize("verbs", [["reload", "upgrade"], ["upgrade", "reload"], ["reload", "upgrade", "reload"]])
def test_an_upgrade_that_waits_does_all_that_a_reload_would(stage: Stage, verbs: list[str]) -> None:
    stage.ask("reload")
    for verb in verbs:
        stage.ask(verb)
    stage.fail_boot()
    stage.changes.look()
    assert stage.changes.under_way == "upgrade"


def test_what_a_reload_would_change_is_told_at_once_or_not_at_all(stage: Stage) -> None:
    asker = stage.ask("diff")
    stage.say({"event": "differences", "differences": ["workers: 2 -> 3"]})
    assert asker == []
    stage.end_helper()
    assert [(answer["ok"], answer["differences"]) for answer in asker] == [(True, ["workers: 2 -> 3"])]
    assert untouched(stage)
    stage.ask("reload")
    busy = stage.ask("diff")
    assert [answer["ok"] for answer in busy] == [False]
    assert "reload" in busy[0]["error"]
    stage.fail_boot()
    stage.changes.look()
    assert len(stage.crew.helpers) == 2


def test_while_the_daemon_starts_a_change_waits_and_a_question_does_not(stage: Stage) -> None:
    stage.state.mode = Mode.STARTING
    asker, curious = stage.ask("reload"), stage.ask("diff")
    stage.changes.look()
    assert stage.crew.helpers == []
    assert [answer["ok"] for answer in curious] == [False]
    assert "starting" in curious[0]["error"]
    stage.state.mode = Mode.RUNNING
    stage.changes.look()
    assert stage.changes.under_way == "reload"
    assert asker == []


@pytest.mark.parametrize("mode", [Mode.DRAINING, Mode.CLOSING, Mode.OVER])
@pytest.mark.parametrize("verb", ["reload", "upgrade", "diff"])
def test_a_daemon_that_ends_changes_no_more(stage: Stage, mode: Mode, verb: str) -> None:
    stage.state.mode = mode
    assert stage.ask(verb) == [{"ok": False, "error": f"the daemon is {mode.value}"}]
    assert untouched(stage)
    assert stage.crew.helpers == []


def to_the_helper(stage: Stage) -> None:
    """It has said nothing yet."""


def to_the_settings(stage: Stage) -> None:
    stage.say_settings()


def to_a_bound_listener(stage: Stage) -> None:
    stage.say_bound(stage.say_settings(), 1)


def to_the_candidate(stage: Stage) -> None:
    stage.boot()


STAGES = [to_the_helper, to_the_settings, to_a_bound_listener, to_the_candidate]


@pytest.mark.parametrize("come", STAGES)
@pytest.mark.parametrize("end", [lambda changes: changes.give_up("the daemon stops"), lambda changes: None])
def test_whatever_ends_a_change_on_its_way_closes_what_was_bound_for_it_and_is_told_once(
    stage: Stage, come: Callable[[Stage], None], end: Callable[[change.Changes], None]
) -> None:
    asker, waiting = stage.ask("reload"), stage.ask("reload")
    come(stage)
    fresh = [*stage.changes.current.fresh.values()] if stage.changes.current else []
    stage.crew.slots[5][2] = Slot(1, 7.0)
    end(stage.changes)
    if stage.changes.current is not None:  # then a worker does
        stage.fail_boot()
        assert waiting == []
        stage.changes.give_up("the daemon stops")
    assert [answer["ok"] for answer in asker] == [answer["ok"] for answer in waiting] == [False]
    assert waiting[0]["error"] == "the daemon stops"
    assert untouched(stage)
    assert [sock.fileno() for bound in fresh for sock in bound.sockets] == [-1] * len(fresh)
    assert ("close 5" in stage.logbook.told) == (come is to_the_candidate)
    for late in ({"event": "settings"}, {"event": "failed"}):
        stage.say(late)
    if stage.helper.pid in stage.crew.workers:
        stage.end_helper()
    stage.changes.look()
    assert untouched(stage)
    assert (len(asker), len(waiting), len(stage.crew.helpers)) == (1, 1, 1)


def says_why(stage: Stage) -> None:
    stage.say({"event": "failed", "reason": "no such file", "details": "line 1\nline 2"})
    stage.end_helper(256)


def leaves_words(stage: Stage) -> None:
    stage.helper.words.extend(["Traceback", "  of it", "forkd: no such file"])
    stage.end_helper(256)


def is_killed(stage: Stage) -> None:
    stage.helper.cause = "no such file"
    stage.end_helper(9)


def finds_no_log(stage: Stage) -> None:
    stage.logbook.error = ForkdError("no such file")
    told = stage.say_settings()
    for place in (1, 2):
        stage.say_bound(told, place)
    stage.end_helper()


@pytest.mark.parametrize("fails", [says_why, leaves_words, is_killed, finds_no_log])
def test_why_a_change_failed_is_told_in_the_words_of_who_knows(
    stage: Stage, fails: Callable[[Stage], None], caplog: pytest.LogCaptureFixture
) -> None:
    asker = stage.ask("reload")
    fails(stage)
    assert [(answer["ok"], answer["error"]) for answer in asker] == [(False, "no such file")]
    assert "no such file" in caplog.text
    assert untouched(stage)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"event": "settings"},
        {"event": "settings", "settings": {"wokers": "1"}},
        {"event": "settings", "settings": [1]},
        {"event": "bound", "place": 1},
        {"event": "bound", "place": 7, "wanted": "x", "address": "x", "sockets": 0, "inode": None},
        {"event": "bound", "place": 1, "wanted": "x", "address": "tcp://a:1", "sockets": 1, "inode": None},
    ],
)
def test_a_helper_that_talks_nonsense_ends_the_change(stage: Stage, nonsense: dict[str, object]) -> None:
    asker = stage.ask("reload")
    stage.say_settings()
    stage.say(nonsense)
    assert [answer["ok"] for answer in asker] == [False]
    assert "nobody understands" in asker[0]["error"]
    assert untouched(stage)


def test_the_helper_of_a_change_that_has_failed_has_no_say_in_the_next(stage: Stage) -> None:
    stage.ask("reload")
    former = stage.helper
    stage.fail_boot()
    asker = stage.ask("reload")
    assert stage.helper.generation != former.generation
    stage.say({"event": "settings", "settings": {"wokers": "1"}}, former)
    stage.crew.helper_ended(former, Exit(former.pid, 256, 0))
    assert asker == []
    assert stage.boot().settings.workers == 3
    stage.finish()
    assert [answer["ok"] for answer in asker] == [True]


def test_a_helper_that_is_silent_about_a_listener_ends_the_change(stage: Stage) -> None:
    asker = stage.ask("reload")
    stage.say_bound(stage.say_settings(), 1)
    stage.end_helper()
    assert [answer["ok"] for answer in asker] == [False]
    assert untouched(stage)


def test_a_helper_that_can_not_be_forked_ends_the_change_and_the_next_one_has_its_chance(stage: Stage) -> None:
    stage.crew.forks = lambda number: stage.changes.failed(number, change.BootError("can't make a helper"))
    assert [answer["error"] for answer in stage.ask("reload")] == ["can't make a helper"]
    assert untouched(stage)
    stage.crew.forks = None
    asker = stage.ask("reload")
    stage.boot()
    assert stage.crew.slots[5] == {}, "it begins with the bad luck of another"
    stage.finish()
    assert [answer["ok"] for answer in asker] == [True]


def test_the_fate_of_other_generations_is_no_matter_for_a_change(stage: Stage) -> None:
    asker = stage.ask("reload")
    stage.boot()
    for number in (3, 4, 6):
        stage.changes.failed(number, change.BootError("it has ended"))
    assert asker == []
    stage.finish()
    assert [answer["ok"] for answer in asker] == [True]


def test_a_generation_gets_a_number_that_no_living_worker_has(stage: Stage) -> None:
    stage.crew.add(1, 9)
    stage.ask("reload")
    assert stage.changes.candidate(1.0) == Candidate(10, 0, 1.0)
