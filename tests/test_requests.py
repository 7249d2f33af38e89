"""What may be asked of the master and when it answers.

The requests ask a stand-in that notes what it was told to do. The socket that carries them is in `test_control`.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forkd.config.options import Settings
from forkd.config.units import MOST_WORKERS
from forkd.errors import BootError
from forkd.master import requests
from forkd.master.control import Reply
from forkd.master.generation import Generation
from forkd.master.plan import GRACE, STACKS
from forkd.master.questions import Question
from forkd.master.requests import Requests
from forkd.master.spawn import Worker
from forkd.master.state import State
from forkd.signals import Order
from forkd.states import Life, Mode
from forkd.system.channel import Channel
from forkd.system.notify import Notifier
from forkd.system.scoreboard import Row
from forkd.wire import Message


@dataclass
class Stand:
    """The state of a master, as far as it is asked about; also its control socket."""

    mode: Mode = Mode.RUNNING
    wanted: int = 2
    last_failure: BootError | None = None
    succeeded: bool = False
    displaced: bool = False
    is_settled: bool = False
    notifier: Notifier = field(default_factory=lambda: Notifier({}))
    drain_timeout: float = 30.0
    board: Any = None
    generation: Generation = field(default_factory=lambda: Generation(1, Settings(listen=()), [], -1))

    def settled(self) -> bool:
        return self.is_settled

    @property
    def control(self) -> Stand:
        return self


class Master:
    """A master that does nothing but note what it is asked."""

    def __init__(self) -> None:
        self.stand = Stand()
        self.state = cast(State, self.stand)
        self.told: list[object] = []

    def order(self, order: Order, source: str) -> None:
        self.told.append((order, source))

    def scale(self, wanted: int, source: str) -> None:
        self.told.append(wanted)
        self.stand.wanted = wanted

    def change(self, verb: str, reply: Reply | None = None) -> None:
        self.told.append((verb, reply))

    def hand_over(self, reply: Reply) -> None:
        self.told.append(reply)
        reply({"ok": True, "listeners": []}, [7, 8])

    def status(self) -> dict[str, Any]:
        return {"state": self.stand.mode.value}

    def ask_workers(self, what: Message) -> Question:
        self.told.append(what)
        self.question = Question(7, monotonic() + 3600, [worker(slot) for slot in (1, 2)])
        return self.question

    @property
    def orders(self) -> list[Order]:
        return [told[0] for told in self.told if isinstance(told, tuple)]


class Client(list[Message]):
    """What a client was answered; it may go away."""

    descriptor = 5
    descriptors: Sequence[int] = ()

    def __call__(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        self.append(message)
        self.descriptors = descriptors

    def fileno(self) -> int:
        return self.descriptor


def worker(slot: int) -> Worker:
    channel = cast(Channel, None)
    return Worker(100 + slot, slot, 1, cast(Row, None), channel, -1, Life.SERVING, 0.0, 0.0, owes={7})


class Asking:
    """Requests to such a master, and what they were answered."""

    def __init__(self) -> None:
        self.master = Master()
        self.stand = self.master.stand
        self.requests = Requests(self.master)

    def ask(self, message: Message) -> Client:
        """Asks; the answers, of which more may come."""
        client = Client()
        self.requests.answer(message, client)
        return client


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
        asking.stand.mode = mode
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
    asking.stand.mode = mode
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
    asking.stand.is_settled = True
    asking.requests.settle()
    asking.requests.settle()
    assert answers == [{"ok": True, "workers": number}]


def test_scale_is_answered_with_the_first_failure_after_it(asking: Asking) -> None:
    asking.stand.last_failure = BootError("an old story")
    answers = asking.ask({"verb": "scale", "workers": 3})
    asking.requests.settle()
    assert answers == []
    asking.stand.last_failure = BootError("worker 3 could not boot")
    asking.requests.settle()
    assert answers == [{"ok": False, "error": "worker 3 could not boot"}]
    asking.stand.is_settled = True
    asking.requests.settle()
    assert len(answers) == 1


def test_a_second_scale_ends_the_wait_of_the_first(asking: Asking) -> None:
    first = asking.ask({"verb": "scale", "workers": 3})
    second = asking.ask({"verb": "scale", "workers": 4})
    asking.requests.settle()
    assert [answer["ok"] for answer in first] == [False]
    assert "4" in first[0]["error"]
    asking.stand.is_settled = True
    asking.requests.settle()
    assert second == [{"ok": True, "workers": 4}]
    assert len(first) == 1


def test_a_stop_ends_the_wait_of_a_scale(asking: Asking) -> None:
    answers = asking.ask({"verb": "scale", "workers": 3})
    asking.stand.mode = Mode.DRAINING
    asking.stand.is_settled = True
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
    assert asking.master.orders == [order]
    assert not asking.stand.succeeded
    assert [answer["ok"] for answer in answers] == [True]
    assert answers[0]["within"] >= asking.stand.generation.settings.drain_timeout + 2 * (GRACE + STACKS)
    for mode in (Mode.RUNNING, Mode.DRAINING, Mode.CLOSING):
        asking.stand.mode, asking.stand.is_settled = mode, True
        asking.requests.settle()
        assert len(answers) == 1
    asking.stand.mode = Mode.OVER
    asking.requests.settle()
    asking.requests.settle()
    assert answers[1:] == [{"ok": True}]


def test_everybody_who_asked_for_the_stop_hears_of_it(asking: Asking) -> None:
    everybody = [asking.ask({"verb": "stop"}) for _ in range(3)]
    assert asking.master.orders == [Order.STOP] * 3
    asking.stand.mode = Mode.OVER
    asking.requests.settle()
    assert [answers[1:] for answers in everybody] == [[{"ok": True}]] * 3


@pytest.mark.parametrize("verb", ["reload", "upgrade", "diff"])
@pytest.mark.parametrize("mode", Mode)
def test_a_change_is_announced_with_its_longest_time_and_its_outcome_is_left_to_whoever_makes_it(
    asking: Asking, verb: str, mode: Mode
) -> None:
    asking.stand.mode = mode
    answers = asking.ask({"verb": verb})
    assert asking.master.told == [(verb, answers)]
    assert [answer["ok"] for answer in answers] == [True]
    assert answers[0]["within"] > 2 * asking.stand.generation.settings.boot_timeout
    asking.stand.is_settled = True
    asking.requests.settle()
    assert len(answers) == 1


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.RUNNING])
def test_only_a_running_daemon_hands_over(asking: Asking, mode: Mode) -> None:
    asking.stand.mode = mode
    answers = asking.ask({"verb": "hand over"})
    assert answers == [{"ok": False, "error": f"the daemon is {mode.value}"}]
    assert asking.master.told == []


def test_a_second_heir_is_refused_until_the_first_has_gone(asking: Asking) -> None:
    heir = asking.ask({"verb": "hand over"})
    assert asking.requests.succession
    assert asking.ask({"verb": "hand over"}) == [{"ok": False, "error": "another change is under way: restart"}]
    heir.descriptor = -1
    assert not asking.requests.succession
    assert asking.ask({"verb": "hand over"})[0]["ok"]


def test_nobody_succeeds_a_master_that_changes(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.master, "status", lambda: {"change": "reload"})
    assert asking.ask({"verb": "hand over"}) == [{"ok": False, "error": "another change is under way: reload"}]
    assert not asking.requests.succession


def test_who_is_handed_over_to_may_go_again_and_nothing_has_changed(asking: Asking) -> None:
    heir = asking.ask({"verb": "hand over"})
    assert heir == [{"ok": True, "listeners": []}]
    assert heir.descriptors == [7, 8]
    asking.requests.settle()
    heir.descriptor = -1
    asking.requests.settle()
    assert asking.master.orders == []
    assert not asking.stand.succeeded


def test_an_heir_that_took_the_place_and_died_before_he_said_so_is_succeeded_all_the_same(asking: Asking) -> None:
    heir = asking.ask({"verb": "hand over"})
    asking.stand.displaced = True
    asking.requests.settle()
    assert asking.master.orders == []
    heir.descriptor = -1
    asking.requests.settle()
    assert asking.stand.succeeded
    asking.requests.settle()
    assert asking.master.orders == [Order.STOP]


def test_the_heirs_word_that_he_has_succeeded_stops_the_daemon_once_though_he_goes_then(asking: Asking) -> None:
    """A second order to stop would cut the clients that may finish."""
    heir = asking.ask({"verb": "hand over"})
    asking.stand.displaced = True
    asking.requests.answer({"verb": "stop", "succeeded": True}, heir)
    assert asking.stand.succeeded
    asking.stand.mode = Mode.DRAINING
    heir.descriptor = -1
    asking.requests.settle()
    asking.requests.settle()
    assert asking.master.told[1:] == [(Order.STOP, "forkd restart")]


def test_a_stop_that_came_before_the_heir_went_is_not_hastened_by_it(asking: Asking) -> None:
    heir = asking.ask({"verb": "hand over"})
    asking.stand.displaced, asking.stand.mode = True, Mode.DRAINING
    heir.descriptor = -1
    asking.requests.settle()
    assert asking.stand.succeeded
    assert asking.master.orders == []


@pytest.mark.parametrize("said", [False, None, 1, "yes"])
def test_a_stop_is_no_succession_unless_it_says_so(asking: Asking, said: object) -> None:
    asking.ask({"verb": "stop", "succeeded": said})
    assert not asking.stand.succeeded
    assert asking.master.told == [(Order.STOP, "forkd stop")]


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({}, "the ID of a connection is wanted, or a network"),
        ({"cookie": 0}, "wanted"),
        ({"cookie": -1}, "wanted"),
        ({"cookie": 1 << 64}, "wanted"),
        ({"cookie": "7"}, "wanted"),
        ({"cookie": 1.5}, "wanted"),
        ({"network": 7}, "wanted"),
        ({"network": "10.0.0.1/8"}, "did you mean 10.0.0.0/8?"),
        ({"network": "x" * 100_000}, "is not a network"),
    ],
)
def test_a_kill_of_nobody_in_particular_asks_no_worker(asking: Asking, message: Message, said: str) -> None:
    [answer] = asking.ask({"verb": "kill", **message})
    assert answer["ok"] is False
    assert said in answer["error"]
    assert len(answer["error"]) <= 200
    assert asking.master.told == []


@pytest.mark.parametrize("what", [{"cookie": 7}, {"network": "10.0.0.0/8"}])
def test_a_kill_is_answered_when_all_workers_have_answered(asking: Asking, what: Message) -> None:
    client = asking.ask({"verb": "kill", **what})
    assert asking.master.told == [{"order": "kill", **what}]
    question = asking.master.question
    for one, found in zip(question.asked, (2, 3), strict=True):
        asking.requests.settle()
        assert client == []
        one.owes.clear()
        question.found[one.pid] = found
    asking.requests.settle()
    assert client == [{"ok": True, "closed": 5, "silent": []}]


def test_what_a_worker_claims_to_have_killed_is_believed_within_bounds(asking: Asking) -> None:
    client = asking.ask({"verb": "kill", "cookie": 7})
    question = asking.master.question
    for one, found in zip(question.asked, (-5, "many"), strict=True):
        one.owes.clear()
        question.found[one.pid] = found
    asking.requests.settle()
    assert client == [{"ok": True, "closed": 0, "silent": []}]


def test_a_kill_that_is_not_answered_in_time_names_who_is_silent(asking: Asking) -> None:
    client = asking.ask({"verb": "kill", "cookie": 7})
    question = asking.master.question
    question.asked[0].owes.clear()
    question.found[101] = 1
    question.deadline = 0.0
    asking.requests.settle()
    assert client == [{"ok": True, "closed": 1, "silent": [{"slot": 2, "pid": 102}]}]


def test_who_wants_the_clients_is_told_where_they_are_also_without_a_descriptor_to_give(
    asking: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "whereabouts", lambda state: {"pid": 1})
    asking.stand.board = SimpleNamespace(regions=SimpleNamespace(descriptor=-1))
    client = asking.ask({"verb": "clients"})
    assert (client, client.descriptors) == ([{"ok": True, "pid": 1}], ())
    with tempfile.TemporaryFile() as file:
        asking.stand.board.regions.descriptor = file.fileno()
        client = asking.ask({"verb": "clients"})
        assert (client, len(client.descriptors)) == ([{"ok": True, "pid": 1}], 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(client.descriptors[0])  # sent, and not kept
