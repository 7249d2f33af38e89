"""Questions to workers: who is asked, when a question is over, and what a worker may answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import cast

import pytest

from forkd.master.questions import LARGEST, MOST_OWED, Question, Questions
from forkd.master.spawn import HELPER, Worker
from forkd.states import Life
from forkd.system.channel import Channel, channel_pair
from forkd.system.scoreboard import Row
from forkd.wire import Message

FAR = 3600.0


class Pool:
    """Workers that serve, and their ends of the channels."""

    def __init__(self, stack: ExitStack, count: int) -> None:
        self.questions = Questions()
        self.workers: list[Worker] = []
        self.ends: list[Channel] = []
        for slot in range(1, count + 1):
            ours, theirs = channel_pair()
            stack.callback(ours.close)
            stack.callback(theirs.close)
            self.ends.append(theirs)
            row = cast(Row, None)
            self.workers.append(Worker(100 + slot, slot, 1, row, ours, -1, Life.SERVING, since=0.0, born=0.0))

    def ask(self, within: float = FAR) -> Question:
        return self.questions.ask(self.workers, {"order": "count", "of": "x"}, within)

    def answer(self, slot: int, number: object, found: object = 0) -> str:
        return self.questions.answered(self.workers[slot - 1], {"event": "answer", "number": number, "found": found})

    def heard(self, slot: int) -> list[Message]:
        return self.ends[slot - 1].receive()


@pytest.fixture
def pool() -> Iterator[Pool]:
    with ExitStack() as stack:
        yield Pool(stack, 3)


def test_all_are_asked_with_a_number_and_it_is_over_when_all_have_answered(pool: Pool) -> None:
    question, other = pool.ask(), pool.ask()
    assert question.number != other.number
    for slot in (1, 2, 3):
        asked = {"order": "count", "of": "x"}
        assert pool.heard(slot) == [asked | {"number": one.number} for one in (question, other)]
    assert pool.questions.settle() == question.deadline
    for slot in (3, 1, 2):
        assert not question.is_over()
        assert pool.answer(slot, question.number, slot * 10) == ""
    assert question.is_over()
    assert question.found == {101: 10, 102: 20, 103: 30}
    assert question.missing() == []
    assert pool.questions.settle() == other.deadline
    assert not other.is_over()


def test_who_dies_or_is_heard_no_more_is_waited_for_no_longer(pool: Pool) -> None:
    question = pool.ask()
    pool.workers[0].life = Life.GONE
    pool.workers[1].heard = False
    assert [worker.slot for worker in question.missing()] == [3]
    pool.answer(3, question.number, 1)
    assert question.is_over()
    assert question.found == {103: 1}


def test_at_its_deadline_it_is_over_and_tells_who_is_missing(pool: Pool) -> None:
    question = pool.ask(within=0)
    pool.answer(2, question.number, 1)
    assert question.is_over()
    assert [worker.slot for worker in question.missing()] == [1, 3]
    assert pool.questions.settle() is None
    assert pool.answer(1, question.number) == ""  # late, but asked for
    assert question.found == {102: 1}


def test_only_those_that_can_have_an_answer_are_asked(pool: Pool) -> None:
    pool.workers[0].life, pool.workers[1].life, pool.workers[2].slot = Life.BOOTING, Life.KILLED, HELPER
    question = pool.ask()
    assert question.is_over()
    assert [pool.heard(slot) for slot in (1, 2, 3)] == [[], [], []]
    pool.workers[0].life, pool.workers[1].life = Life.DRAINING, Life.CLOSING
    assert [worker.slot for worker in pool.ask().missing()] == [1, 2]


@pytest.mark.parametrize("number", [None, 0, True, "1", [], {}, 1.5])
def test_an_answer_to_no_question_is_told_to_be_one(pool: Pool, number: object) -> None:
    question = pool.ask()
    assert "not asked" in pool.answer(1, number)
    assert not question.is_over()
    assert question.found == {}


def test_an_answer_is_taken_once_and_from_who_was_asked(pool: Pool) -> None:
    question = pool.ask()
    assert pool.answer(1, question.number, 5) == ""
    assert "not asked" in pool.answer(1, question.number, 6)
    assert question.found == {101: 5}


def test_an_answer_that_is_too_large_counts_as_none_and_is_waited_for_no_longer(pool: Pool) -> None:
    question = pool.ask()
    assert str(LARGEST) in pool.answer(1, question.number, "x" * LARGEST)
    assert [worker.slot for worker in question.missing()] == [2, 3]
    assert question.found == {}


def test_who_owes_too_many_answers_is_asked_no_more_until_it_has_given_some(pool: Pool) -> None:
    questions = [pool.ask(within=0) for _ in range(MOST_OWED)]
    for question in questions:
        assert pool.answer(1, question.number) == pool.answer(2, question.number) == ""
    further = pool.ask()
    assert [worker.slot for worker in further.asked] == [1, 2]
    assert [worker.slot for worker in further.missing()] == [3, 1, 2]
    pool.answer(1, further.number), pool.answer(2, further.number)
    assert further.is_over()
    assert [worker.slot for worker in further.missing()] == [3]
    assert not pool.workers[2].channel.waiting
    pool.answer(3, questions[0].number)
    assert [worker.slot for worker in pool.ask().asked] == [1, 2, 3]


def test_one_that_is_gone_is_not_waited_for(pool: Pool) -> None:
    pool.ends[0].close()
    question = pool.ask()
    assert [worker.slot for worker in question.missing()] == [2, 3]
