"""How one generation gives way to the next: one change at a time, each with one outcome for every client that asked.

Whatever goes wrong leaves the generation that serves and its listeners as they were.

The children are not forked (`fake_reload`), the listeners are real sockets. Upgrades are in `test_upgrade_handover`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from forkd.errors import BootError, ForkdError
from forkd.master import reload
from forkd.master.plan import Candidate, Slot
from forkd.master.spawn import Exit
from forkd.messages import (
    BoundEvent,
    ChangedReply,
    ChildEvent,
    DifferencesEvent,
    DifferencesReply,
    ErrorReply,
    FailedEvent,
    JsonObject,
    KeptEvent,
    ReadyEvent,
)
from forkd.states import MasterState
from tests.support.fake_reload import LOG, V4, FakeReload, listener


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeReload]:
    before = os.listdir("/proc/self/fd")
    with ExitStack() as stack:
        made = FakeReload(tmp_path, stack)
        yield made
        made.end()
    assert os.listdir("/proc/self/fd") == before


def reached(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client, suppress(ConnectionRefusedError, FileNotFoundError):
        client.connect(str(path))
        return True
    return False


def untouched(fake: FakeReload) -> bool:
    """Whether the daemon is as it was before any change."""
    generation = fake.state.generation
    assert (generation.number, generation.settings, generation.bound) == (4, fake.settings, fake.bound)
    assert fake.state.wanted == 2
    assert reached(fake.path / "old")
    assert not (fake.path / "new").exists()
    assert "4 to 5" not in fake.log_files.told
    return not fake.changes.under_way


def test_reload_boots_a_candidate_that_then_takes_over(fake: FakeReload) -> None:
    asker = fake.ask("reload")
    assert (fake.changes.under_way, fake.changes.candidate) == ("reload", None)
    assert fake.changes.candidate_view(50.0) == Candidate(5, 0, 50.0)
    candidate = fake.boot()
    assert fake.changes.candidate_view(50.0) == Candidate(5, 3, 70.0)
    assert (candidate.number, candidate.settings.workers, candidate.log) == (5, 3, LOG)
    assert [one.address.scheme for one in candidate.bound] == ["tcp", "unix", "tcp"]
    fake.changes.advance(0.0)
    assert reached(fake.path / "old")
    assert reached(fake.path / "new")
    assert (fake.state.generation.number, asker) == (4, [])
    fake.pool.slots[4][1] = Slot(3, 7.0)
    fake.finish()
    assert asker == [ChangedReply(5, 3)]
    assert (fake.state.generation, fake.state.wanted) == (candidate, 3)
    assert (fake.changes.under_way, fake.changes.candidate, fake.changes.candidate_view(50.0)) == ("", None, None)
    assert fake.log_files.told == ["4 to 5"]
    assert 4 not in fake.pool.slots
    fake.changes.advance(0.0)
    assert len(asker) == 1


def test_reload_is_done_when_the_workers_before_it_take_no_more_clients(fake: FakeReload) -> None:
    asker = fake.ask("reload")
    fake.boot()
    fake.pool.replaced_take = True
    fake.finish(now=100.0)
    assert (fake.state.generation.number, asker) == (5, [])
    assert (fake.changes.under_way, fake.changes.candidate_view(50.0)) == ("reload", None)
    following = fake.ask("reload")
    assert fake.changes.advance(100.5) == 101.0
    assert (asker, len(fake.pool.helpers)) == ([], 1)
    fake.pool.replaced_take = False
    fake.changes.advance(100.6)
    assert asker == [ChangedReply(5, 3)]
    assert (following, len(fake.pool.helpers)) == ([], 2)


@pytest.mark.parametrize("way", ["their time is over", "the daemon stops"])
def test_workers_that_go_on_taking_clients_hold_up_no_reload(fake: FakeReload, way: str) -> None:
    asker = fake.ask("reload")
    fake.boot()
    fake.pool.replaced_take = True
    fake.finish(now=100.0)
    if way == "the daemon stops":
        fake.changes.cancel(way)
    else:
        fake.changes.advance(101.0)
    assert asker == [ChangedReply(5, 3)]
    assert not fake.changes.under_way
    assert fake.state.change_counts["success"] == 1


def test_listener_that_is_kept_is_the_same_socket(
    fake: FakeReload,
) -> None:
    kept = fake.bound[0].sockets[0]
    fake.ask("reload")
    candidate = fake.boot()
    assert candidate.bound[0].sockets == [kept]
    fake.finish()
    assert kept.fileno() >= 0
    assert not (fake.path / "old").exists()
    assert fake.bound[1].sockets[0].fileno() == -1
    assert reached(fake.path / "new")


def test_kept_listener_follows_new_settings_once_they_serve(fake: FakeReload) -> None:
    path = fake.path / "old"
    told = replace(fake.settings, listen=(listener(f"unix:{path}", mode=0o640),))
    path.chmod(0o600)
    fake.ask("reload")
    fake.say_settings(told)
    fake.say_kept(0, 1)
    fake.end_helper()
    assert path.stat().st_mode & 0o777 == 0o600
    fake.finish()
    assert path.stat().st_mode & 0o777 == 0o640


def test_listener_that_cannot_follow_does_not_stop_a_reload(fake: FakeReload, caplog: pytest.LogCaptureFixture) -> None:
    told = replace(fake.settings, listen=(listener(f"unix:{fake.path}/old", owner="no-such-user-here"),))
    asker = fake.ask("reload")
    fake.say_settings(told)
    fake.say_kept(0, 1)
    fake.end_helper()
    fake.finish()
    assert asker.succeeded == [True]
    assert "no-such-user-here" in caplog.text


def test_changes_asked_meanwhile_are_made_once_afterwards(fake: FakeReload) -> None:
    first = fake.ask("reload")
    others = [fake.ask("reload") for _ in range(3)]
    assert len(fake.pool.helpers) == 1
    fake.boot()
    fake.changes.advance(0.0)
    assert len(fake.pool.helpers) == 1
    fake.finish()
    assert [len(first), *map(len, others)] == [1, 0, 0, 0]
    assert len(fake.pool.helpers) == 2
    assert fake.changes.candidate_view(1.0) == Candidate(6, 0, 1.0)
    fake.end_helper(status=256)
    assert [one.succeeded for one in (first, *others)] == [[True]] + [[False]] * 3
    fake.changes.advance(0.0)
    assert len(fake.pool.helpers) == 2


@pytest.mark.parametrize("verbs", [["reload", "upgrade"], ["upgrade", "reload"], ["reload", "upgrade", "reload"]])
def test_upgrade_that_waits_does_all_that_a_reload_would(fake: FakeReload, verbs: list[str]) -> None:
    fake.ask("reload")
    for verb in verbs:
        fake.ask(verb)
    fake.fail_boot()
    fake.changes.advance(0.0)
    assert fake.changes.under_way == "upgrade"


def test_diff_is_answered_at_once_or_refused(fake: FakeReload) -> None:
    asker = fake.ask("diff")
    fake.say(DifferencesEvent(["workers: 2 -> 3"]))
    assert asker == []
    fake.end_helper()
    assert asker == [DifferencesReply(["workers: 2 -> 3"])]
    assert untouched(fake)
    fake.ask("reload")
    busy = fake.ask("diff")
    assert busy.succeeded == [False]
    assert "reload" in busy.errors[0]
    fake.fail_boot()
    fake.changes.advance(0.0)
    assert len(fake.pool.helpers) == 2


def test_change_waits_for_the_start_and_a_diff_does_not(fake: FakeReload) -> None:
    fake.state.master_state = MasterState.STARTING
    asker, curious = fake.ask("reload"), fake.ask("diff")
    fake.changes.advance(0.0)
    assert fake.pool.helpers == []
    assert curious.succeeded == [False]
    assert "starting" in curious.errors[0]
    fake.state.master_state = MasterState.RUNNING
    fake.changes.advance(0.0)
    assert fake.changes.under_way == "reload"
    assert asker == []


@pytest.mark.parametrize("state", [MasterState.DRAINING, MasterState.CLOSING, MasterState.OVER])
@pytest.mark.parametrize("verb", ["reload", "upgrade", "diff"])
def test_daemon_that_ends_changes_no_more(fake: FakeReload, state: MasterState, verb: str) -> None:
    fake.state.master_state = state
    assert fake.ask(verb) == [ErrorReply(f"the daemon is {state.value}")]
    assert untouched(fake)
    assert fake.pool.helpers == []


def to_the_helper(fake: FakeReload) -> None:
    """It has said nothing yet."""


def to_the_settings(fake: FakeReload) -> None:
    fake.say_settings()


def to_a_bound_listener(fake: FakeReload) -> None:
    fake.say_bound(fake.say_settings(), 1)


def to_the_candidate(fake: FakeReload) -> None:
    fake.boot()


POINTS = [to_the_helper, to_the_settings, to_a_bound_listener, to_the_candidate]


@pytest.mark.parametrize("come", POINTS)
@pytest.mark.parametrize("end", [lambda changes: changes.cancel("the daemon stops"), lambda changes: None])
def test_change_that_ends_on_its_way_closes_what_it_bound(
    fake: FakeReload, come: Callable[[FakeReload], None], end: Callable[[reload.Changes], None]
) -> None:
    asker, waiting = fake.ask("reload"), fake.ask("reload")
    come(fake)
    fresh = [*fake.changes.current.bound] if fake.changes.current else []
    fake.pool.slots[5][2] = Slot(1, 7.0)
    end(fake.changes)
    if fake.changes.current is not None:  # then a worker does
        fake.fail_boot()
        assert waiting == []
        fake.changes.cancel("the daemon stops")
    assert asker.succeeded == waiting.succeeded == [False]
    assert waiting.errors[0] == "the daemon stops"
    assert untouched(fake)
    assert [sock.fileno() for bound in fresh for sock in bound.sockets] == [-1] * len(fresh)
    assert ("discard 5" in fake.log_files.told) == (come is to_the_candidate)
    for late in ({"event": "settings"}, {"event": "failed"}):
        fake.say(late)
    if fake.helper.pid in fake.pool.workers:
        fake.end_helper()
    fake.changes.advance(0.0)
    assert untouched(fake)
    assert (len(asker), len(waiting), len(fake.pool.helpers)) == (1, 1, 1)


def says_why(fake: FakeReload) -> None:
    fake.say(FailedEvent("no such file", "line 1\nline 2"))
    fake.end_helper(256)


def leaves_words(fake: FakeReload) -> None:
    fake.helper.stderr_lines.extend(["Traceback", "  of it", "forkd: no such file"])
    fake.end_helper(256)


def is_killed(fake: FakeReload) -> None:
    fake.helper.cause = "no such file"
    fake.end_helper(9)


def finds_no_log(fake: FakeReload) -> None:
    fake.log_files.error = ForkdError("no such file")
    told = fake.say_settings()
    fake.say_kept(0, 0)
    for place in (1, 2):
        fake.say_bound(told, place)
    fake.end_helper()


@pytest.mark.parametrize("fails", [says_why, leaves_words, is_killed, finds_no_log])
def test_reason_of_a_failed_change_is_told(
    fake: FakeReload, fails: Callable[[FakeReload], None], caplog: pytest.LogCaptureFixture
) -> None:
    asker = fake.ask("reload")
    fails(fake)
    assert asker.errors == ["no such file"]
    assert "no such file" in caplog.text
    assert untouched(fake)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"event": "settings"},
        {"event": "settings", "settings": {"wokers": "1"}},
        {"event": "settings", "settings": [1]},
        {"event": "bound", "place": 1},
        {"event": "bound", "place": 1, "listener": {}},
        BoundEvent(7, {"wanted": "x", "address": "x", "sockets": 0, "inode": None}),
        BoundEvent(1, {"wanted": "x", "address": "tcp://a:1", "sockets": 1, "inode": None}),
        KeptEvent(7, 0),
        KeptEvent(1, 7),
        KeptEvent(1, 0),  # another address
        ReadyEvent(),
        {"event": "dance"},
    ],
)
def test_helper_that_talks_nonsense_ends_the_change(fake: FakeReload, nonsense: ChildEvent | JsonObject) -> None:
    asker = fake.ask("reload")
    fake.say_settings()
    fake.say(nonsense)
    assert asker.succeeded == [False]
    assert "invalid message" in asker.errors[0]
    assert untouched(fake)


@pytest.mark.parametrize("second", [KeptEvent(0, 1), KeptEvent(1, 0), BoundEvent(0, {"sockets": 0})])
def test_helper_that_names_a_listener_twice_ends_the_change(fake: FakeReload, second: ChildEvent) -> None:
    asker = fake.ask("reload")
    fake.say_settings(replace(fake.settings, listen=(listener(V4), listener(V4))))
    fake.say_kept(0, 0)
    assert asker == []
    fake.say(second)
    assert "invalid message" in asker.errors[0]
    assert untouched(fake)


def test_helper_of_a_failed_change_is_ignored_by_the_next(fake: FakeReload) -> None:
    fake.ask("reload")
    former = fake.helper
    fake.fail_boot()
    asker = fake.ask("reload")
    assert fake.helper.generation != former.generation
    fake.say({"event": "settings", "settings": {"wokers": "1"}}, former)
    fake.changes.helper_exited(former, Exit(former.pid, 256, 0))
    assert asker == []
    assert fake.boot().settings.workers == 3
    fake.finish()
    assert asker.succeeded == [True]


def test_helper_that_leaves_out_a_listener_ends_the_change(fake: FakeReload) -> None:
    asker = fake.ask("reload")
    fake.say_bound(fake.say_settings(), 1)
    fake.end_helper()
    assert asker.succeeded == [False]
    assert untouched(fake)


def test_helper_that_cannot_be_forked_ends_only_this_change(fake: FakeReload) -> None:
    fake.pool.fork_error = BootError("can't make a helper")
    assert fake.ask("reload").errors == ["can't make a helper"]
    assert untouched(fake)
    fake.pool.fork_error = None
    asker = fake.ask("reload")
    fake.boot()
    assert fake.pool.slots[5] == {}, "it begins with the failures of another"
    fake.finish()
    assert asker.succeeded == [True]


def test_failures_of_other_generations_do_not_end_a_change(fake: FakeReload) -> None:
    asker = fake.ask("reload")
    fake.boot()
    for number in (3, 4, 6):
        fake.changes.generation_failed(number, BootError("it has ended"))
    assert asker == []
    fake.finish()
    assert asker.succeeded == [True]


def test_generation_gets_a_number_that_no_living_worker_has(fake: FakeReload) -> None:
    fake.pool.add(1, 9)
    fake.ask("reload")
    assert fake.changes.candidate_view(1.0) == Candidate(10, 0, 1.0)
