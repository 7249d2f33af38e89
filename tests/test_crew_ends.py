"""How the children of the master end: what is kept of each, whose fault it was, what that means for its slot, and who
is told.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from crewing import Child, Deck

from forkd import signals
from forkd.master import crew
from forkd.master.backoff import HEALTHY
from forkd.master.crew import REMEMBERED
from forkd.master.spawn import HELPER, LAST_WORDS, Exit, Worker
from forkd.states import Life, Turn
from forkd.system.scoreboard import NOBODY, Field

EXIT_3 = 3 << 8  # as wait(2) has it
SEGFAULT = int(signal.SIGSEGV)
KILLED = int(signal.SIGKILL)


@pytest.fixture
def deck() -> Iterator[Deck]:
    with ExitStack() as stack:
        made = Deck(stack)
        yield made
        made.close()


def serving(deck: Deck, slot: int = 1, generation: int = 1, since: float = 0.0) -> Child:
    """A child that has served for so many seconds."""
    child = deck.child(slot, generation, Life.SERVING)
    child.worker.ready_at = time.monotonic() - since
    return child


def test_a_worker_that_dies_is_failed_certified_and_its_row_is_nobodys(
    deck: Deck, caplog: pytest.LogCaptureFixture
) -> None:
    child = serving(deck, slot=2, generation=4)
    child.worker.row[Field.ACCEPTED], child.worker.row[Field.CLOSED] = 7, 2
    child.write(b"oh\n")
    deck.end(child, SEGFAULT)
    assert deck.crew.workers == {}
    assert child.worker.life is Life.GONE
    (death,) = deck.crew.deaths
    assert (death["slot"], death["generation"], death["pid"], death["expected"]) == (2, 4, child.worker.pid, False)
    assert (death["exit"], death["code"], death["clients"]) == ("killed by SIGSEGV", -SEGFAULT, 5)
    assert death["words"] == ["oh"]
    assert (child.worker.row[Field.PID], child.worker.row[Field.LOAD]) == (0, NOBODY)
    ((number, error, had_served),) = deck.failures
    assert (number, str(error), had_served) == (4, "worker 2 has ended: killed by SIGSEGV", True)
    assert deck.crew.slots[4][2].failures == 1
    assert [record.levelno for record in caplog.records][-1] == logging.ERROR
    assert not deck.selector.select(0)


@pytest.mark.parametrize("turn", [Turn.RETIRE, Turn.CLOSE])
@pytest.mark.parametrize("status", [0, EXIT_3, int(signal.SIGTERM)])
def test_who_was_told_to_end_has_done_nothing_wrong(
    deck: Deck, turn: Turn, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    child = serving(deck)
    deck.crew.tell(child.worker, turn, signals.DRAIN, "the daemon stops")
    deck.end(child, status)
    assert [(death["expected"], death["cause"]) for death in deck.crew.deaths] == [(True, "the daemon stops")]
    assert deck.failures == []
    assert deck.crew.slots[1] == {}
    assert [record.levelno for record in caplog.records if "has ended" in record.getMessage()] == [logging.INFO]


def test_who_had_to_be_killed_after_that_is_no_failure_of_the_slot_but_told_as_an_error(
    deck: Deck, caplog: pytest.LogCaptureFixture
) -> None:
    child = serving(deck)
    deck.crew.tell(child.worker, Turn.RETIRE, signals.DRAIN)
    deck.crew.tell(child.worker, Turn.KILL, signals.KILL, "it did not end by its drain deadline")
    deck.end(child, KILLED)
    assert deck.failures == []
    assert deck.crew.slots[1] == {}
    (death,) = deck.crew.deaths
    assert (death["expected"], death["cause"]) == (False, "it did not end by its drain deadline")
    assert caplog.records[-1].levelno == logging.ERROR


def test_who_ends_well_unasked_is_a_failure_but_no_error(deck: Deck, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    deck.end(serving(deck), 0)
    assert len(deck.failures) == 1
    assert deck.crew.slots[1][1].failures == 1
    assert caplog.records[-1].levelno == logging.INFO


@pytest.mark.parametrize(("served", "failures"), [(HEALTHY + 1.0, 1), (0.0, 2)])
def test_a_healthy_life_makes_the_next_failure_the_first(deck: Deck, served: float, failures: int) -> None:
    deck.end(serving(deck), SEGFAULT)
    deck.end(serving(deck, since=served), SEGFAULT)
    assert deck.crew.slots[1][1].failures == failures


def test_the_luck_of_a_slot_is_that_of_its_generation(deck: Deck) -> None:
    deck.end(serving(deck, generation=1), SEGFAULT)
    deck.end(serving(deck, generation=2), SEGFAULT)
    assert [deck.crew.slots[number][1].failures for number in (1, 2)] == [1, 1]


def could_not_boot(child: Child) -> None:
    child.say({"event": "failed", "reason": "no module", "details": "Traceback\n  of it"})


def crashed(child: Child) -> None:
    child.write(b"Traceback\n  of it\n")


@pytest.mark.parametrize(
    ("before", "reason", "cause"),
    [
        (could_not_boot, "worker 1 could not boot: no module", "could not boot: no module"),
        (crashed, "worker 1 ended before it was ready: exit status 3", "it ended before it was ready"),
    ],
)
def test_why_a_worker_could_not_boot_is_told_with_its_last_words(
    deck: Deck, before: object, reason: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    child = deck.child()
    before(child)  # type: ignore[operator]
    deck.end(child, EXIT_3)  # with all of it unheard yet
    ((_, error, had_served),) = deck.failures
    assert (str(error), error.details.rstrip(), had_served) == (reason, "Traceback\n  of it", False)
    assert deck.crew.deaths[0]["cause"] == cause
    assert "of it" in caplog.text


def test_a_worker_that_was_killed_while_it_booted_has_the_masters_reason(deck: Deck) -> None:
    child = deck.child()
    child.write(b"stack of MainThread\n")
    deck.crew.tell(child.worker, Turn.KILL, signals.KILL, "it was not ready by its boot_timeout")
    deck.end(child, KILLED)
    ((_, error, _),) = deck.failures
    assert str(error) == "worker 1 could not boot: it was not ready by its boot_timeout"
    assert error.details == "stack of MainThread"
    assert deck.crew.slots[1][1].failures == 1


@pytest.mark.parametrize(
    ("before", "after", "killer"), [(3, 4, "kernel"), (3, 3, ""), (None, 4, ""), (3, None, ""), (None, None, "")]
)
def test_the_kernel_is_named_where_its_count_of_kills_has_grown(
    monkeypatch: pytest.MonkeyPatch, before: int | None, after: int | None, killer: str
) -> None:
    monkeypatch.setattr(crew, "oom_kills", lambda: before)
    with ExitStack() as stack:
        deck = Deck(stack)
        monkeypatch.setattr(crew, "oom_kills", lambda: after)
        deck.end(serving(deck), KILLED)
        deck.end(serving(deck), KILLED)
        assert [killer in death["cause"] for death in deck.crew.deaths] == [True, not killer]
        assert [bool(death["cause"]) for death in deck.crew.deaths] == [bool(killer), False]
        assert [killer in str(error) for _, error, _ in deck.failures] == [True, not killer]
        deck.close()


def test_the_masters_own_kill_is_not_the_kernels(deck: Deck, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "oom_kills", lambda: 10**9)
    child = serving(deck)
    deck.crew.tell(child.worker, Turn.KILL, signals.KILL, "its loop stood still")
    deck.end(child, KILLED)
    assert deck.crew.deaths[0]["cause"] == "its loop stood still"


def test_last_words_are_read_though_children_of_its_own_hold_the_pipe_open(deck: Deck) -> None:
    child = deck.child()
    child.say({"event": "failed", "reason": "no module", "details": ""})
    child.write(b"first\nunfinished")
    deck.bury(child, EXIT_3)
    assert [*child.worker.words] == ["first", "unfinished"]
    assert str(deck.failures[0][1]) == "worker 1 could not boot: no module"
    assert (child.worker.stderr, child.worker.channel.fileno(), child.worker.heard) == (-1, -1, False)
    assert not deck.selector.get_map()


def test_who_writes_without_end_after_its_death_holds_nobody_up(deck: Deck) -> None:
    """A program that the worker started, say: it has the pipe, and is faster than the master."""
    child = deck.child()
    reader, writer = child.worker.stderr, os.open("/dev/zero", os.O_RDONLY)
    os.dup2(writer, reader)  # what is read there never ends
    os.close(writer)
    deck.bury(child, EXIT_3)
    assert child.worker.stderr == -1
    assert len(child.worker.words) <= LAST_WORDS


def test_what_has_ended_is_heard_no_more_by_an_event_of_the_same_round(deck: Deck) -> None:
    child = deck.child()
    child.say({"event": "ready"})
    child.write(b"word\n")
    events = deck.selector.select(0)
    assert len(events) == 2
    deck.end(child, EXIT_3)
    known = list(deck.failures)
    for key, mask in events:
        key.data(mask)
    assert child.worker.life is Life.GONE
    assert deck.failures == known


def test_the_latest_deaths_alone_are_remembered(deck: Deck) -> None:
    pids = []
    for _ in range(REMEMBERED + 5):
        child = serving(deck)
        pids.append(child.worker.pid)
        deck.end(child, SEGFAULT)
    assert [death["pid"] for death in deck.crew.deaths] == pids[5:]


def test_what_a_worker_claims_of_its_clients_makes_no_negative_number(deck: Deck) -> None:
    child = serving(deck)
    child.worker.row[Field.CLOSED] = 9
    deck.end(child, SEGFAULT)
    assert deck.crew.deaths[0]["clients"] == 0


def test_several_ends_are_seen_to_at_once_and_strangers_are_passed_over(deck: Deck) -> None:
    """As PID 1 of a container the master inherits orphans."""
    children = [serving(deck, slot) for slot in (1, 2, 3)]
    for child in children[1:]:
        child.leave()
        deck.spawner.ended += [Exit(77, 0, 0), Exit(child.worker.pid, SEGFAULT, 0)]
    deck.crew.reap()
    assert list(deck.crew.workers) == [children[0].worker.pid]
    assert [death["slot"] for death in deck.crew.deaths] == [2, 3]


def test_a_helpers_end_is_for_who_waits_for_it_and_no_death(deck: Deck) -> None:
    told: list[tuple[Worker, Exit, list[str]]] = []
    said: list[object] = []
    deck.crew.helper_said = lambda worker, message: said.append(message)
    deck.crew.helper_ended = lambda worker, ended: told.append((worker, ended, [*worker.words]))
    helper = deck.child(HELPER, generation=2)
    helper.say({"event": "settings"})
    helper.write(b"forkd: no such file\n")
    deck.end(helper, EXIT_3)
    ((worker, ended, words),) = told
    assert (worker, ended.code, words, said) == (
        helper.worker, 3, ["forkd: no such file"], [{"event": "settings"}],
    )  # fmt: skip
    assert (list(deck.crew.deaths), deck.failures, dict(deck.crew.slots)) == ([], [], {})
    assert helper.worker.row[Field.PID] == 0
    assert deck.crew.workers == {}


def test_the_row_of_a_helper_is_free_again_though_its_end_brings_an_error(deck: Deck) -> None:
    def fail(worker: Worker, ended: Exit) -> None:
        raise RuntimeError("of a bug")

    deck.crew.helper_ended = fail
    helper = deck.child(HELPER)
    with pytest.raises(RuntimeError, match="of a bug"):
        deck.end(helper)
    assert helper.worker.row[Field.PID] == 0
