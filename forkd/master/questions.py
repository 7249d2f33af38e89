"""Questions to the workers, all or some, whose answers come later or never.

Each has a number that no other one has, also over an upgrade. It is over when every worker that was asked has answered,
has died or is heard no more, or at its deadline. What a worker answers is a claim, at most `LARGEST` bytes of one; a
worker answers what it was asked, once, and all else it says is held against it (`crew`). One that owes many answers is
asked no more until it has given some.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from forkd.master.spawn import HELPER, Worker
from forkd.states import Life
from forkd.system.channel import ChannelClosed
from forkd.wire import Message, encode

#: Bytes of an answer at most.
LARGEST = 1 << 16

#: Answers that a worker may owe. So few questions always fit into its channel, whether it reads them or not.
MOST_OWED = 64

#: Seconds within which a worker whose loop turns answers.
WITHIN = 5.0

_ANSWERING = (Life.SERVING, Life.DRAINING, Life.CLOSING)


@dataclass(slots=True)
class Question:
    """One that was asked.

    Attributes:
        number: its number.
        deadline: when it is over at the latest, on the monotonic clock.
        asked: of whom an answer is awaited.
        silent: who was not asked, because it owes too many answers.
        found: the answers by pid, as they were claimed.
    """

    number: int
    deadline: float
    asked: list[Worker] = field(default_factory=list)
    silent: list[Worker] = field(default_factory=list)
    found: dict[int, object] = field(default_factory=dict)

    def missing(self) -> list[Worker]:
        """Who lives, could answer, and has not."""
        asked = [one for one in self.asked if self.number in one.owes and one.heard and one.life is not Life.GONE]
        return self.silent + asked

    def is_over(self) -> bool:
        """Whether nothing is to be waited for any more."""
        return len(self.missing()) == len(self.silent) or time.monotonic() >= self.deadline


class Questions:
    """All that are asked."""

    def __init__(self) -> None:
        self._numbers = itertools.count(time.monotonic_ns())
        self._open: dict[int, Question] = {}

    def ask(self, workers: Iterable[Worker], what: Message, within: float = WITHIN) -> Question:
        """Asks those of the workers that can have an answer.

        Args:
            workers: whom.
            what: the question, `order` and what belongs to it; a few hundred bytes at most.
            within: seconds until it is over at the latest.
        """
        question = Question(next(self._numbers), time.monotonic() + within)
        self._open[question.number] = question
        for worker in workers:
            if worker.slot == HELPER or worker.life not in _ANSWERING or not worker.heard:
                continue
            if len(worker.owes) >= MOST_OWED:
                question.silent.append(worker)
                continue
            try:
                worker.channel.send({**what, "number": question.number})
            except ChannelClosed:  # it is dead or as good as that, which its burial will tell
                continue
            worker.owes.add(question.number)
            question.asked.append(worker)
        return question

    def answered(self, worker: Worker, message: Message) -> str:
        """Takes an answer; what is wrong with it, empty where it is as it should be."""
        number = message.get("number")
        if not isinstance(number, int) or number not in worker.owes:
            return "an answer to what it was not asked"
        worker.owes.discard(number)
        if len(encode(message)) > LARGEST:
            return f"an answer of more than {LARGEST} bytes"
        question = self._open.get(number)
        if question is not None:  # else it comes too late
            question.found[worker.pid] = message.get("found")
        return ""

    def settle(self) -> float | None:
        """Forgets those that are over; when the next one is at the latest, None for never."""
        self._open = {number: question for number, question in self._open.items() if not question.is_over()}
        return min((question.deadline for question in self._open.values()), default=None)
