"""Questions to workers: which are asked, when a question is over, and what a worker may answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from math import inf, nan
from typing import cast

import pytest

from forkd.master.spawn import HELPER, Worker
from forkd.master.status import peers_of
from forkd.master.workers import LARGEST_ANSWER, MOST_UNANSWERED, Question, Questions
from forkd.messages import AnswerEvent, PeersCommand, WorkerCommand, decode_command
from forkd.states import WorkerState
from forkd.system.channel import Channel, channel_pair
from forkd.system.scoreboard import Row

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
            self.workers.append(
                Worker(100 + slot, slot, 1, row, ours, -1, WorkerState.SERVING, since=0.0, forked_at=0.0)
            )

    def ask(self, within: float = FAR) -> Question:
        return self.questions.ask(self.workers, PeersCommand(), within)

    def answer(self, slot: int, number: int, found: object = 0) -> str:
        return self.questions.take_answer(self.workers[slot - 1], AnswerEvent(number, found))

    def received(self, slot: int) -> list[WorkerCommand]:
        return [decode_command(found) for found in self.ends[slot - 1].receive()]


@pytest.fixture
def pool() -> Iterator[Pool]:
    with ExitStack() as stack:
        yield Pool(stack, 3)


def test_question_is_over_when_every_worker_has_answered(pool: Pool) -> None:
    question, other = pool.ask(), pool.ask()
    assert question.number != other.number
    for slot in (1, 2, 3):
        assert pool.received(slot) == [PeersCommand(one.number) for one in (question, other)]
    assert pool.questions.forget_finished() == question.deadline
    for slot in (3, 1, 2):
        assert not question.is_over()
        assert pool.answer(slot, question.number, slot * 10) == ""
    assert question.is_over()
    assert question.answers == {101: 10, 102: 20, 103: 30}
    assert question.missing() == []
    assert pool.questions.forget_finished() == other.deadline
    assert not other.is_over()


def test_question_does_not_wait_for_an_ended_or_unread_worker(pool: Pool) -> None:
    question = pool.ask()
    pool.workers[0].state = WorkerState.GONE
    pool.workers[1].readable = False
    assert [worker.slot for worker in question.missing()] == [3]
    pool.answer(3, question.number, 1)
    assert question.is_over()
    assert question.answers == {103: 1}


def test_question_is_over_at_its_deadline_and_names_the_missing(pool: Pool) -> None:
    question = pool.ask(within=0)
    pool.answer(2, question.number, 1)
    assert question.is_over()
    assert [worker.slot for worker in question.missing()] == [1, 3]
    assert pool.questions.forget_finished() is None
    assert pool.answer(1, question.number) == ""  # late, but asked for
    assert question.answers == {102: 1}


def test_question_goes_only_to_workers_that_can_answer(pool: Pool) -> None:
    pool.workers[0].state, pool.workers[1].state, pool.workers[2].slot = WorkerState.BOOTING, WorkerState.KILLED, HELPER
    question = pool.ask()
    assert question.is_over()
    assert [pool.received(slot) for slot in (1, 2, 3)] == [[], [], []]
    pool.workers[0].state, pool.workers[1].state = WorkerState.DRAINING, WorkerState.CLOSING
    assert [worker.slot for worker in pool.ask().missing()] == [1, 2]


@pytest.mark.parametrize("number", [0, 1, 1 << 63])
def test_answer_to_no_question_is_told_to_be_one(pool: Pool, number: int) -> None:
    question = pool.ask()
    assert "without a question" in pool.answer(1, number)
    assert not question.is_over()
    assert question.answers == {}


def test_answer_is_taken_once_and_from_who_was_asked(pool: Pool) -> None:
    question = pool.ask()
    assert pool.answer(1, question.number, 5) == ""
    assert "without a question" in pool.answer(1, question.number, 6)
    assert question.answers == {101: 5}


def test_answer_that_is_too_large_counts_as_none(pool: Pool) -> None:
    question = pool.ask()
    assert str(LARGEST_ANSWER) in pool.answer(1, question.number, "x" * LARGEST_ANSWER)
    assert [worker.slot for worker in question.missing()] == [2, 3]
    assert question.answers == {}


def test_worker_that_owes_many_answers_is_not_asked(pool: Pool) -> None:
    questions = [pool.ask(within=0) for _ in range(MOST_UNANSWERED)]
    for question in questions:
        assert pool.answer(1, question.number) == pool.answer(2, question.number) == ""
    further = pool.ask()
    assert [worker.slot for worker in further.asked] == [1, 2]
    assert [worker.slot for worker in further.missing()] == [3, 1, 2]
    pool.answer(1, further.number), pool.answer(2, further.number)
    assert further.is_over()
    assert [worker.slot for worker in further.missing()] == [3]
    assert not pool.workers[2].channel.has_unsent
    pool.answer(3, questions[0].number)
    assert [worker.slot for worker in pool.ask().asked] == [1, 2, 3]


def test_question_does_not_wait_for_a_closed_channel(pool: Pool) -> None:
    pool.ends[0].close()
    question = pool.ask()
    assert [worker.slot for worker in question.missing()] == [2, 3]


@pytest.mark.parametrize("wrong", [-1, nan, inf, 1e300, 10**400, "1", None], ids=lambda one: str(one)[:5])
def test_peer_with_a_number_that_cannot_be_is_left_out(wrong: object) -> None:
    sound = ["udp://127.0.0.1:1", "127.0.0.1:2", 1.5, 0, 7, 8]
    claims = [[wrong if place == at else value for at, value in enumerate(sound)] for place in range(2, 6)]
    assert [one["datagrams_out"] for one in peers_of(1, 100, [*claims, sound])] == [8]
