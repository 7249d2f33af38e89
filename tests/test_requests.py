"""What may be asked of the master and when it answers, and the control socket that carries it.

The requests ask a stand-in that notes what it was told to do. The control socket is a real one with real clients; they
wait with the selector that serves it, so that a test goes on when something has happened and at no other time.
"""

from __future__ import annotations

from typing import Any

import pytest

from forkd.config.units import MOST_WORKERS
from forkd.errors import BootError
from forkd.master.requests import Requests
from forkd.signals import Order
from forkd.states import Mode
from forkd.wire import Message

PATIENCE = 20.0  # seconds in which something must happen


class Stand:
    """A master that does nothing but note what it is asked."""

    def __init__(self) -> None:
        self.mode = Mode.RUNNING
        self.wanted = 2
        self.last_failure: BootError | None = None
        self.drain_timeout = 30.0
        self.is_settled = False
        self.told: list[object] = []

    def order(self, order: Order, source: str) -> None:
        self.told.append(order)

    def scale(self, wanted: int, source: str) -> None:
        self.told.append(wanted)
        self.wanted = wanted

    def settled(self) -> bool:
        return self.is_settled

    def status(self) -> dict[str, Any]:
        return {"state": self.mode.value}


class Asking:
    """Requests to such a master, and what they were answered."""

    def __init__(self) -> None:
        self.master = Stand()
        self.requests = Requests(self.master)

    def ask(self, message: Message) -> list[Message]:
        """Asks; the answers, of which more may come."""
        answers: list[Message] = []
        self.requests.answer(message, answers.append)
        return answers


@pytest.fixture
def asking() -> Asking:
    return Asking()


@pytest.mark.parametrize(
    "message", [{}, {"verb": "dance"}, {"verb": None}, {"verb": ["stop"]}, {"verb": "x" * 10_000}, {"workers": 3}]
)
def test_what_it_does_not_know_is_answered_at_once_in_few_words(asking: Asking, message: Message) -> None:
    [answer] = asking.ask(message)
    assert answer["ok"] is False
    assert str(message.get("verb"))[:50] in answer["error"]
    assert len(answer["error"]) < 200
    asking.requests.settle()
    assert asking.master.told == []


def test_the_status_is_answered_at_once_in_any_mode(asking: Asking) -> None:
    for mode in Mode:
        asking.master.mode = mode
        assert asking.ask({"verb": "status"}) == [{"ok": True, "status": {"state": mode.value}}]


@pytest.mark.parametrize("number", [0, -1, MOST_WORKERS + 1, 10**30, 2.0, "3", None, [3], {"n": 3}, True])
def test_a_number_of_workers_that_is_none_changes_nothing(asking: Asking, number: object) -> None:
    [answer] = asking.ask({"verb": "scale", "workers": number})
    assert answer["ok"] is False
    assert str(MOST_WORKERS) in answer["error"]
    assert asking.master.told == []


def test_scale_without_a_number_changes_nothing(asking: Asking) -> None:
    [answer] = asking.ask({"verb": "scale"})
    assert answer["ok"] is False
    assert asking.master.told == []


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.RUNNING])
def test_only_a_running_daemon_is_scaled(asking: Asking, mode: Mode) -> None:
    asking.master.mode = mode
    [answer] = asking.ask({"verb": "scale", "workers": 3})
    assert answer["ok"] is False
    assert mode.value in answer["error"]
    assert asking.master.told == []


@pytest.mark.parametrize("number", [1, 3, MOST_WORKERS])
def test_scale_is_answered_when_the_workers_are_there_and_once(asking: Asking, number: int) -> None:
    answers = asking.ask({"verb": "scale", "workers": number})
    assert asking.master.told == [number]
    asking.requests.settle()
    assert answers == []
    asking.master.is_settled = True
    asking.requests.settle()
    asking.requests.settle()
    assert answers == [{"ok": True, "workers": number}]


def test_scale_is_answered_with_the_first_failure_after_it(asking: Asking) -> None:
    asking.master.last_failure = BootError("an old story")
    answers = asking.ask({"verb": "scale", "workers": 3})
    asking.requests.settle()
    assert answers == []
    asking.master.last_failure = BootError("worker 3 could not boot")
    asking.requests.settle()
    assert answers == [{"ok": False, "error": "worker 3 could not boot"}]
    asking.master.is_settled = True
    asking.requests.settle()
    assert len(answers) == 1


def test_a_second_scale_ends_the_wait_of_the_first(asking: Asking) -> None:
    first = asking.ask({"verb": "scale", "workers": 3})
    second = asking.ask({"verb": "scale", "workers": 4})
    asking.requests.settle()
    assert [answer["ok"] for answer in first] == [False]
    assert "4" in first[0]["error"]
    asking.master.is_settled = True
    asking.requests.settle()
    assert second == [{"ok": True, "workers": 4}]
    assert len(first) == 1


def test_a_stop_ends_the_wait_of_a_scale(asking: Asking) -> None:
    answers = asking.ask({"verb": "scale", "workers": 3})
    asking.master.mode = Mode.DRAINING
    asking.master.is_settled = True
    asking.requests.settle()
    assert [answer["ok"] for answer in answers] == [False]
    assert "draining" in answers[0]["error"]


@pytest.mark.parametrize(
    ("how", "order"),
    [
        ({}, Order.STOP),
        ({"now": False}, Order.STOP),
        ({"now": "yes"}, Order.STOP),
        ({"now": 1}, Order.STOP),
        ({"now": True}, Order.QUIT),
    ],
)
def test_stop_is_answered_when_all_is_over(asking: Asking, how: Message, order: Order) -> None:
    answers = asking.ask({"verb": "stop", **how})
    assert asking.master.told == [order]
    assert [answer["ok"] for answer in answers] == [True]
    assert answers[0]["within"] > asking.master.drain_timeout
    for mode in (Mode.RUNNING, Mode.DRAINING, Mode.CLOSING):
        asking.master.mode, asking.master.is_settled = mode, True
        asking.requests.settle()
        assert len(answers) == 1
    asking.master.mode = Mode.OVER
    asking.requests.settle()
    asking.requests.settle()
    assert answers[1:] == [{"ok": True}]


def test_everybody_who_asked_for_the_stop_hears_of_it(asking: Asking) -> None:
    everybody = [asking.ask({"verb": "stop"}) for _ in range(3)]
    assert asking.master.told == [Order.STOP] * 3
    asking.master.mode = Mode.OVER
    asking.requests.settle()
    assert [answers[1:] for answers in everybody] == [[{"ok": True}]] * 3
