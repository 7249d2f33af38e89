"""The children of the master, as it lives with them: what they say and write is taken, bounded and believed of nobody
but the one that says it. How they end is in `test_crew_ends`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise

import pytest
from crewing import Deck
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forkd import signals
from forkd.master.backoff import Slot
from forkd.master.spawn import HELPER, LAST_WORDS
from forkd.states import Life, Turn
from forkd.system.scoreboard import Field

LINE = 4096  # characters of one line at most


@pytest.fixture
def deck() -> Iterator[Deck]:
    with ExitStack() as stack:
        made = Deck(stack)
        yield made
        made.close()


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged on behalf of a child's standard error."""
    return [record.getMessage() for record in caplog.records if "on stderr" in record.getMessage()]


def test_a_child_serves_when_it_says_that_it_is_ready_and_says_so_once(deck: Deck) -> None:
    child = deck.child(slot=2, generation=3)
    assert (child.worker.life, child.worker.ready_at) == (Life.BOOTING, None)
    child.say({"event": "ready"})
    deck.hear()
    first = child.worker.ready_at
    assert child.worker.life is Life.SERVING
    assert first is not None
    assert first >= child.worker.born
    child.say({"event": "ready"})
    deck.hear()
    assert (child.worker.life, child.worker.ready_at) == (Life.SERVING, first)


@pytest.mark.parametrize("life", [Life.DRAINING, Life.CLOSING, Life.KILLED])
def test_who_was_told_to_end_is_not_ready_any_more(deck: Deck, life: Life) -> None:
    child = deck.child()
    child.worker.life = life
    child.say({"event": "ready"})
    deck.hear()
    assert (child.worker.life, child.worker.ready_at) == (life, None)


def test_why_it_could_not_boot_is_kept_and_so_is_not_all_that_it_says(deck: Deck) -> None:
    child, flood = deck.child(), deck.child(slot=2)
    child.say({"event": "failed", "reason": "no module", "details": "Traceback\n  of it"})
    flood.say({"event": "failed", "reason": "x" * 60_000, "details": "y" * 60_000})
    deck.hear()
    assert child.worker.cause == "could not boot: no module"
    assert child.worker.failure is not None
    assert (str(child.worker.failure), child.worker.failure.details) == (
        "worker 1 could not boot: no module",
        "Traceback\n  of it",
    )
    assert flood.worker.failure is not None
    assert len(str(flood.worker.failure)) + len(flood.worker.failure.details) < 50_000


def test_why_it_is_worn_is_kept_in_few_words(deck: Deck) -> None:
    child, flood = deck.child(life=Life.SERVING), deck.child(slot=2, life=Life.SERVING)
    child.say({"event": "worn", "why": "100 connections"})
    flood.say({"event": "worn", "why": "x" * 100_000})
    deck.hear()
    assert child.worker.worn == "100 connections"
    assert 0 < len(flood.worker.worn) <= 200
    assert {view.slot: view.worn for view in deck.crew.views(1e9)}[1] == "100 connections"


@pytest.mark.parametrize("message", [{}, {"event": None}, {"event": ["ready"]}, {"event": "dance"}, {"order": "stop"}])
def test_what_nobody_understands_changes_nothing(
    deck: Deck, message: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    child = deck.child(life=Life.SERVING)
    before = repr(child.worker)
    child.say(message)
    deck.hear()
    assert child.worker.strange > 0  # it is counted, so that a flood of it has an end
    child.worker.strange = 0
    assert repr(child.worker) == before
    assert "nobody understands" in caplog.text


@pytest.mark.parametrize("event", [{"event": "failed"}, {"event": "failed", "reason": 1}, {"event": "worn"}])
def test_what_lacks_a_reason_does_no_harm(deck: Deck, event: dict[str, object]) -> None:
    child = deck.child()
    child.say(event)
    deck.hear()
    assert child.worker.cause or child.worker.worn


def test_who_talks_garbage_is_heard_no_more_and_others_are(deck: Deck) -> None:
    bad, good = deck.child(), deck.child(slot=2)
    bad.channel.send({"event": "ready"})
    os.write(bad.channel.fileno(), b"garbage\n")
    deck.hear()
    assert not bad.worker.heard
    assert bad.worker.channel.fileno() == -1
    assert bad.worker.pid in deck.crew.workers
    good.say({"event": "ready"})
    deck.hear()
    assert good.worker.life is Life.SERVING


def test_lines_on_standard_error_are_logged_with_who_wrote_them_and_kept(
    deck: Deck, caplog: pytest.LogCaptureFixture
) -> None:
    child = deck.child(slot=3)
    child.write(b"first\nsecond\n")
    deck.hear()
    child.write(b"third\n")
    deck.hear()
    who = f"worker 3 (pid {child.worker.pid}) on stderr: "
    assert logged(caplog) == [f"{who}first\nsecond", f"{who}third"]
    assert [*child.worker.words] == ["first", "second", "third"]


def test_a_line_that_has_not_ended_waits_for_its_end(deck: Deck, caplog: pytest.LogCaptureFixture) -> None:
    child = deck.child()
    for part in (b"un", b"finish"):
        child.write(part)
        deck.hear()
        assert logged(caplog) == []
    assert child.worker.unfinished == "unfinish"
    child.write(b"ed\nnext")
    deck.hear()
    assert [*child.worker.words] == ["unfinished"]
    assert child.worker.unfinished == "next"
    child.leave()
    deck.hear()
    assert [*child.worker.words] == ["unfinished", "next"]
    assert [line.rpartition(": ")[2] for line in logged(caplog)] == ["unfinished", "next"]
    assert (child.worker.stderr, child.worker.unfinished) == (-1, "")


def test_what_is_kept_of_a_flood_is_bounded(deck: Deck) -> None:
    child = deck.child()
    for data in (b"x" * 10_000, b"\n" + b"y" * 50_000, b"z\n" * 5000, b"w" * LINE):
        child.write(data)
        deck.hear()
        assert len(child.worker.unfinished) <= LINE
        assert len(child.worker.words) <= LAST_WORDS
        assert max(map(len, child.worker.words), default=0) <= LINE
    assert set(child.worker.words) == {"z"}


def test_what_is_no_text_is_kept_as_what_it_was(deck: Deck, caplog: pytest.LogCaptureFixture) -> None:
    child = deck.child()
    child.write(b"\xff\xfe ok\n")
    deck.hear()
    assert [*child.worker.words] == ["\\xff\\xfe ok"]
    assert logged(caplog)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.text("ab \t", max_size=8), max_size=15), cuts=st.lists(st.integers(0, 130), max_size=6))
def test_lines_are_the_same_however_they_are_chunked(deck: Deck, lines: list[str], cuts: list[int]) -> None:
    child = deck.child()
    data = "".join(f"{line}\n" for line in lines).encode()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        child.write(data[start:end])
        deck.hear()
    assert [*child.worker.words] == lines
    child.worker.row.clear()


def test_a_helpers_words_are_kept_for_who_waits_for_it_and_not_logged(
    deck: Deck, caplog: pytest.LogCaptureFixture
) -> None:
    said: list[object] = []
    deck.crew.helper_said = lambda worker, message: said.append((worker.pid, message))
    helper = deck.child(HELPER, generation=2)
    helper.write(b"forkd: no such file\n")
    helper.say({"event": "ready"})
    deck.hear()
    assert [*helper.worker.words] == ["forkd: no such file"]
    assert logged(caplog) == []
    assert said == [(helper.worker.pid, {"event": "ready"})]
    assert helper.worker.life is Life.BOOTING


def test_a_heartbeat_from_the_future_is_of_now(deck: Deck) -> None:
    child, other = deck.child(), deck.child(slot=2)
    child.worker.row[Field.HEARTBEAT] = 10**18
    other.worker.row[Field.HEARTBEAT] = 1_500_000_000
    assert [view.beat for view in deck.crew.views(7.0)] == [7.0, 1.5]


def test_the_plan_sees_what_there_is(deck: Deck) -> None:
    child = deck.child(slot=4, generation=2, life=Life.SERVING)
    child.worker.dumped = 3.0
    (view,) = deck.crew.views(time.monotonic())
    worker = child.worker
    assert (view.pid, view.slot, view.life, view.since, view.generation, view.dumped, view.worn) == (
        worker.pid, 4, Life.SERVING, worker.since, 2, 3.0, "",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("children", "whole"),
    [
        ([(1, 1, Life.SERVING), (2, 1, Life.SERVING)], True),
        ([(1, 1, Life.SERVING)], False),
        ([(1, 1, Life.SERVING), (2, 1, Life.BOOTING)], False),
        ([(1, 1, Life.SERVING), (1, 1, Life.SERVING)], False),
        ([(1, 1, Life.SERVING), (2, 1, Life.SERVING), (3, 1, Life.SERVING)], False),
        ([(1, 1, Life.SERVING), (2, 1, Life.SERVING), (2, 1, Life.BOOTING)], False),
        ([(1, 1, Life.SERVING), (2, 1, Life.SERVING), (2, 1, Life.DRAINING)], True),
        ([(1, 1, Life.SERVING), (2, 1, Life.SERVING), (1, 2, Life.BOOTING)], True),
        ([(1, 1, Life.SERVING), (2, 2, Life.SERVING)], False),
        ([(1, 1, Life.SERVING), (2, 1, Life.SERVING), (HELPER, 1, Life.BOOTING)], True),
    ],
)
def test_a_generation_serves_when_all_of_it_and_nobody_else_does(
    deck: Deck, children: list[tuple[int, int, Life]], whole: bool
) -> None:
    for slot, generation, life in children:
        deck.child(slot, generation, life)
    assert deck.crew.serves(1, 2) == whole


def test_who_is_told_something_begins_another_life_and_every_reason_is_kept(deck: Deck) -> None:
    worker = deck.child(life=Life.SERVING).worker
    since = worker.since
    deck.crew.tell(worker, Turn.RETIRE, signals.DRAIN, "another generation serves")
    assert (worker.life, worker.cause, worker.since > since) == (Life.DRAINING, "another generation serves", True)
    deck.crew.tell(worker, Turn.KILL, signals.KILL, "it did not end")
    assert (worker.life, worker.killed_as) == (Life.KILLED, Life.DRAINING)
    deck.crew.tell(worker, Turn.KILL, signals.KILL, "again")
    assert worker.killed_as is Life.DRAINING
    assert worker.cause == "another generation serves; it did not end; again"
    assert deck.spawner.signalled == [(worker.pid, signals.DRAIN), *[(worker.pid, signals.KILL)] * 2]


def test_who_is_told_to_write_its_stacks_goes_on_with_its_life(deck: Deck, caplog: pytest.LogCaptureFixture) -> None:
    worker = deck.child(life=Life.SERVING).worker
    before = (worker.life, worker.since, worker.cause)
    asked = time.monotonic()
    deck.crew.dump(worker, "its loop stood still")
    assert asked <= worker.dumped <= time.monotonic()
    assert (worker.life, worker.since, worker.cause) == before
    assert deck.spawner.signalled == [(worker.pid, signals.DUMP)]
    assert f"worker 1 (pid {worker.pid}): its loop stood still; these are its stacks" in caplog.text


def test_all_but_helpers_and_the_deaf_are_told_what_comes_with_descriptors(
    deck: Deck, caplog: pytest.LogCaptureFixture
) -> None:
    hearing, gone, deaf, helper = deck.child(1), deck.child(2), deck.child(3), deck.child(HELPER)
    deaf.channel.close()
    deck.hear()
    gone.channel.close()
    reader, writer = os.pipe()
    deck.crew.send_all({"order": "log"}, [writer])
    os.close(writer)
    assert hearing.channel.receive() == [{"order": "log"}]
    os.write(hearing.channel.descriptors[0], b"written")
    assert os.read(reader, 100) == b"written"
    os.close(reader)
    assert helper.channel.receive() == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"worker 2 (pid {gone.worker.pid})" in caplog.text


@pytest.mark.parametrize("error", [BlockingIOError(11, "try again"), OverflowError("all rows are taken")])
@pytest.mark.parametrize(("slot", "who"), [(2, "worker 2"), (HELPER, "a helper")])
def test_a_child_that_can_not_be_made_is_a_failure_and_its_slot_waits(
    deck: Deck, error: Exception, slot: int, who: str
) -> None:
    deck.spawner.error = error
    for attempt in (1, 2):
        before = time.monotonic()
        deck.crew.spawn(slot, 5, lambda row, channel: 0)
        found = deck.crew.slots[5][slot]
        assert found.failures == attempt
        assert found.retry_at > before
    assert deck.crew.workers == {}
    assert [(number, had_served) for number, _, had_served in deck.failures] == [(5, False)] * 2
    assert str(deck.failures[0][1]) == f"can't make {who}: {error}"
    assert deck.crew.slots[4].get(slot, Slot()) == Slot()


def test_abandoning_closes_all_that_the_crew_holds(deck: Deck) -> None:
    children = [deck.child(slot) for slot in (1, 2)]
    deck.crew.abandon()
    for child in children:
        assert child.worker.channel.fileno() == -1
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(child.worker.stderr)
        child.worker.stderr = -1
    assert deck.spawner.signalled == []
