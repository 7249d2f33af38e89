"""What may be asked of the master and when it answers.

The requests ask a stand-in that notes what it was told to do. The socket that carries them is in `test_control_socket`.
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

from forkd import MOST_WORKERS
from forkd.config.settings import Settings
from forkd.errors import BootError
from forkd.master import commands
from forkd.master.commands import Requests
from forkd.master.control_socket import ControlClient
from forkd.master.generation import Generation
from forkd.master.plan import GRACE, STACKS
from forkd.master.spawn import Worker
from forkd.master.state import DaemonState
from forkd.master.upgrade import LaunchContext
from forkd.master.workers import DRAINING_SECONDS, Question
from forkd.messages import (
    AcceptedReply,
    ClientsReply,
    DoneReply,
    ErrorReply,
    HandOverReply,
    JsonObject,
    KillCommand,
    KilledReply,
    Query,
    Reply,
    ScaledReply,
    StatusReply,
)
from forkd.signals import Command
from forkd.states import MasterState, WorkerState
from forkd.system.channel import Channel
from forkd.system.notify import Notifier
from forkd.system.scoreboard import Row


@dataclass
class Stand:
    """The state of a master, as far as it is asked about; also its control socket and its pool."""

    master_state: MasterState = MasterState.RUNNING
    wanted: int = 2
    last_failure: BootError | None = None
    superseded: bool = False
    displaced: bool = False
    all_served: bool = False
    notifier: Notifier = field(default_factory=lambda: Notifier({}))
    stop_timeout: float = 36.0
    drained: bool = False
    accepting: bool = False  # whether a worker takes clients
    board: Any = None
    launch: LaunchContext = field(default_factory=lambda: LaunchContext("/", detached=True, lock=-1))
    generation: Generation = field(default_factory=lambda: Generation(1, Settings(listen=()), [], -1))
    told: list[object] = field(default_factory=list)

    def all_serve(self) -> bool:
        return self.all_served

    @property
    def control(self) -> Stand:
        return self

    @property
    def pool(self) -> Stand:
        return self

    def take_clients(self) -> bool:
        return self.accepting

    def ask(self, query: Query) -> Question:
        self.told.append(query)
        self.question = Question(7, monotonic() + 3600, [worker(slot) for slot in (1, 2)])
        return self.question


class Master:
    """A master that does nothing but note what it is asked."""

    def __init__(self) -> None:
        self.stand = Stand()
        self.state = cast(DaemonState, self.stand)
        self.told = self.stand.told

    def obey(self, command: Command, source: str) -> None:
        self.told.append((command, source))

    def drain(self, *, drained: bool, source: str) -> None:
        self.stand.drained = drained

    def scale(self, wanted: int, source: str) -> str:
        self.told.append(wanted)
        self.stand.wanted = wanted
        return ""

    def change(self, verb: str, client: ControlClient | None = None) -> None:
        self.told.append((verb, client))

    def hand_over(self, client: ControlClient) -> None:
        self.told.append(client)
        client.reply(HandOverReply([]), [7, 8])

    def status(self) -> dict[str, Any]:
        return {"state": self.stand.master_state.value}

    @property
    def commands(self) -> list[Command]:
        return [told[0] for told in self.told if isinstance(told, tuple)]


class Client(list[Reply]):
    """What a client was answered; it may go away."""

    descriptor = 5
    descriptors: Sequence[int] = ()
    is_kept = False
    is_owner = True

    def reply(self, reply: Reply, descriptors: Sequence[int] = ()) -> None:
        self.append(reply)
        self.descriptors = descriptors

    def fileno(self) -> int:
        return self.descriptor

    def keep(self) -> None:
        self.is_kept = True


def worker(slot: int) -> Worker:
    channel = cast(Channel, None)
    return Worker(100 + slot, slot, 1, cast(Row, None), channel, -1, WorkerState.SERVING, 0.0, 0.0, unanswered={7})


class Asking:
    """Requests to such a master, and what they were answered."""

    def __init__(self) -> None:
        self.master = Master()
        self.stand = self.master.stand
        self.requests = Requests(self.master)

    def ask(self, message: JsonObject) -> Client:
        """Asks; the answers, of which more may come."""
        client = Client()
        self.requests.answer(message, client)
        return client


def error_of(reply: Reply) -> str:
    assert isinstance(reply, ErrorReply)
    return reply.error


def within(reply: Reply) -> float:
    assert isinstance(reply, AcceptedReply)
    return reply.within


@pytest.fixture
def asking() -> Asking:
    return Asking()


@pytest.mark.parametrize(
    "message", [{}, {"verb": "dance"}, {"verb": None}, {"verb": ["stop"]}, {"verb": "x" * 10_000}, {"workers": 3}]
)
def test_unknown_request_is_answered_at_once_in_few_words(asking: Asking, message: JsonObject) -> None:
    [answer] = asking.ask(message)
    verb = message.get("verb")
    assert (verb[:50] if isinstance(verb, str) else "verb") in error_of(answer)
    assert len(error_of(answer)) < 200
    asking.requests.answer_waiting()
    assert asking.master.told == []


def test_status_is_answered_at_once_in_any_mode(asking: Asking) -> None:
    for state in MasterState:
        asking.stand.master_state = state
        assert asking.ask({"verb": "status"}) == [StatusReply({"state": state.value})]


@pytest.mark.parametrize("number", [0, -1, MOST_WORKERS + 1, 10**30, 2.0, "3", None, [3], {"n": 3}, True])
def test_number_of_workers_that_is_none_changes_nothing(asking: Asking, number: object) -> None:
    [answer] = asking.ask({"verb": "scale", "workers": number})
    assert str(MOST_WORKERS) in error_of(answer)
    assert asking.master.told == []


def test_scale_without_a_number_changes_nothing(asking: Asking) -> None:
    [answer] = asking.ask({"verb": "scale"})
    assert str(MOST_WORKERS) in error_of(answer)
    assert asking.master.told == []


@pytest.mark.parametrize("state", [state for state in MasterState if state is not MasterState.RUNNING])
def test_scale_is_refused_unless_the_daemon_runs(asking: Asking, state: MasterState) -> None:
    asking.stand.master_state = state
    [answer] = asking.ask({"verb": "scale", "workers": 3})
    assert state.value in error_of(answer)
    assert asking.master.told == []


@pytest.mark.parametrize("number", [1, 3, MOST_WORKERS])
def test_scale_is_answered_when_the_workers_are_there_and_once(asking: Asking, number: int) -> None:
    answers = asking.ask({"verb": "scale", "workers": number})
    assert asking.master.told == [number]
    asking.requests.answer_waiting()
    assert answers == []
    asking.stand.all_served = True
    asking.requests.answer_waiting()
    asking.requests.answer_waiting()
    assert answers == [ScaledReply(number)]


def test_scale_is_answered_with_the_first_failure_after_it(asking: Asking) -> None:
    asking.stand.last_failure = BootError("an old story")
    answers = asking.ask({"verb": "scale", "workers": 3})
    asking.requests.answer_waiting()
    assert answers == []
    asking.stand.last_failure = BootError("worker 3 could not boot")
    asking.requests.answer_waiting()
    assert answers == [ErrorReply("worker 3 could not boot")]
    asking.stand.all_served = True
    asking.requests.answer_waiting()
    assert len(answers) == 1


def test_second_scale_ends_the_wait_of_the_first(asking: Asking) -> None:
    first = asking.ask({"verb": "scale", "workers": 3})
    second = asking.ask({"verb": "scale", "workers": 4})
    asking.requests.answer_waiting()
    assert ["4" in error_of(answer) for answer in first] == [True]
    asking.stand.all_served = True
    asking.requests.answer_waiting()
    assert second == [ScaledReply(4)]
    assert len(first) == 1


def test_stop_ends_the_wait_of_a_scale(asking: Asking) -> None:
    answers = asking.ask({"verb": "scale", "workers": 3})
    asking.stand.master_state = MasterState.DRAINING
    asking.stand.all_served = True
    asking.requests.answer_waiting()
    assert ["draining" in error_of(answer) for answer in answers] == [True]


@pytest.mark.parametrize(
    ("how", "order"),
    [
        ({}, Command.STOP),
        ({"now": False}, Command.STOP),
        ({"now": True}, Command.QUIT),
    ],
)
def test_stop_is_answered_when_all_is_over(asking: Asking, how: JsonObject, order: Command) -> None:
    answers = asking.ask({"verb": "stop", **how})
    assert asking.master.commands == [order]
    assert not asking.stand.superseded
    assert len(answers) == 1
    assert within(answers[0]) >= asking.stand.generation.settings.drain_timeout + 2 * (GRACE + STACKS)
    for state in (MasterState.RUNNING, MasterState.LEAVING, MasterState.DRAINING, MasterState.CLOSING):
        asking.stand.master_state, asking.stand.all_served = state, True
        asking.requests.answer_waiting()
        assert len(answers) == 1
    asking.stand.master_state = MasterState.OVER
    asking.requests.answer_waiting()
    asking.requests.answer_waiting()
    assert answers[1:] == [DoneReply()]


def test_drain_and_its_end_are_done_at_once(asking: Asking) -> None:
    for _ in range(2):
        assert (asking.ask({"verb": "drain"}), asking.stand.drained) == ([DoneReply()], True)
    for _ in range(2):
        assert (asking.ask({"verb": "resume"}), asking.stand.drained) == ([DoneReply()], False)


@pytest.mark.parametrize("verb", ["drain", "resume"])
@pytest.mark.parametrize("state", [state for state in MasterState if state is not MasterState.RUNNING])
def test_drain_is_refused_unless_the_daemon_runs(asking: Asking, verb: str, state: MasterState) -> None:
    asking.stand.master_state, asking.stand.drained = state, verb == "resume"
    assert asking.ask({"verb": verb}) == [ErrorReply(f"the daemon is {state.value}")]
    assert asking.stand.drained == (verb == "resume")


def test_drain_is_refused_while_a_restart_is_under_way(asking: Asking) -> None:
    asking.ask({"verb": "hand over"})
    assert asking.ask({"verb": "drain"}) == [ErrorReply("a restart is under way")]
    assert not asking.stand.drained


def test_stop_is_answered_to_every_client_that_asked(asking: Asking) -> None:
    everybody = [asking.ask({"verb": "stop"}) for _ in range(3)]
    assert asking.master.commands == [Command.STOP] * 3
    asking.stand.master_state = MasterState.OVER
    asking.requests.answer_waiting()
    assert [answers[1:] for answers in everybody] == [[DoneReply()]] * 3


@pytest.mark.parametrize("verb", ["reload", "upgrade", "diff"])
@pytest.mark.parametrize("state", MasterState)
def test_change_is_accepted_with_its_longest_time(asking: Asking, verb: str, state: MasterState) -> None:
    asking.stand.master_state = state
    answers = asking.ask({"verb": verb})
    assert asking.master.told == [(verb, answers)]
    assert len(answers) == 1
    assert within(answers[0]) > 2 * asking.stand.generation.settings.boot_timeout
    asking.stand.all_served = True
    asking.requests.answer_waiting()
    assert len(answers) == 1


@pytest.mark.parametrize("state", [state for state in MasterState if state is not MasterState.RUNNING])
def test_hand_over_is_refused_unless_the_daemon_runs(asking: Asking, state: MasterState) -> None:
    asking.stand.master_state = state
    answers = asking.ask({"verb": "hand over"})
    assert answers == [ErrorReply(f"the daemon is {state.value}")]
    assert asking.master.told == []


def test_second_successor_is_refused_until_the_first_has_gone(asking: Asking) -> None:
    successor = asking.ask({"verb": "hand over"})
    assert asking.requests.succession
    assert asking.ask({"verb": "hand over"}) == [ErrorReply("another change is under way: restart")]
    successor.descriptor = -1
    assert not asking.requests.succession
    assert asking.ask({"verb": "hand over"}) == [HandOverReply([])]


def test_hand_over_is_refused_during_a_change(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking.master, "status", lambda: {"change": "reload"})
    assert asking.ask({"verb": "hand over"}) == [ErrorReply("another change is under way: reload")]
    assert not asking.requests.succession


def test_successor_may_go_again_and_nothing_has_changed(asking: Asking) -> None:
    successor = asking.ask({"verb": "hand over"})
    assert successor == [HandOverReply([])]
    assert successor.descriptors == [7, 8]
    asking.requests.answer_waiting()
    successor.descriptor = -1
    asking.requests.answer_waiting()
    assert asking.master.commands == []
    assert not asking.stand.superseded


def test_successor_that_took_the_place_and_died_has_succeeded(asking: Asking) -> None:
    successor = asking.ask({"verb": "hand over"})
    asking.stand.displaced = True
    asking.requests.answer_waiting()
    assert asking.master.commands == []
    successor.descriptor = -1
    asking.requests.answer_waiting()
    assert asking.stand.superseded
    asking.requests.answer_waiting()
    assert asking.master.commands == [Command.STOP]


def test_successor_that_says_so_stops_the_daemon_once(asking: Asking) -> None:
    """A second order to stop would cut the clients that may finish."""
    successor = asking.ask({"verb": "hand over"})
    asking.stand.displaced = True
    asking.requests.answer({"verb": "stop", "succeeded": True}, successor)
    assert asking.stand.superseded
    asking.stand.master_state = MasterState.DRAINING
    successor.descriptor = -1
    asking.requests.answer_waiting()
    asking.requests.answer_waiting()
    assert asking.master.told[1:] == [(Command.STOP, "forkd restart")]


@pytest.mark.parametrize("stands", [False, True])
def test_restart_is_answered_when_no_worker_takes_clients(
    asking: Asking, monkeypatch: pytest.MonkeyPatch, *, stands: bool
) -> None:
    asking.stand.accepting = True
    now = monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now)
    client = asking.ask({"verb": "stop", "succeeded": True})
    again = asking.requests.answer_waiting()
    assert (client, again) == ([], now + DRAINING_SECONDS)
    if stands:
        now += DRAINING_SECONDS
    else:
        asking.stand.accepting = False
    assert asking.requests.answer_waiting() is None
    assert client == [AcceptedReply(36.0)]
    asking.stand.master_state = MasterState.OVER
    asking.requests.answer_waiting()
    assert client == [AcceptedReply(36.0), DoneReply()]


def test_stop_before_the_successor_went_is_not_hastened(asking: Asking) -> None:
    successor = asking.ask({"verb": "hand over"})
    asking.stand.displaced, asking.stand.master_state = True, MasterState.DRAINING
    successor.descriptor = -1
    asking.requests.answer_waiting()
    assert asking.stand.superseded
    assert asking.master.commands == []


def test_stop_is_no_succession_unless_it_says_so(asking: Asking) -> None:
    asking.ask({"verb": "stop", "succeeded": False})
    assert not asking.stand.superseded
    assert asking.master.told == [(Command.STOP, "forkd stop")]


@pytest.mark.parametrize(
    "how", [{"succeeded": None}, {"succeeded": 1}, {"succeeded": "yes"}, {"now": "yes"}, {"now": 1}]
)
def test_stop_with_a_flag_that_is_none_stops_nothing(asking: Asking, how: JsonObject) -> None:
    [answer] = asking.ask({"verb": "stop", **how})
    assert "true or false is wanted" in error_of(answer)
    assert not asking.stand.superseded
    assert asking.master.told == []


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
def test_kill_without_a_client_or_network_asks_no_worker(asking: Asking, message: JsonObject, said: str) -> None:
    [answer] = asking.ask({"verb": "kill", **message})
    assert said in error_of(answer)
    assert len(error_of(answer)) <= 200
    assert asking.master.told == []


@pytest.mark.parametrize("what", [{"cookie": 7}, {"network": "10.0.0.0/8"}])
def test_kill_is_answered_when_all_workers_have_answered(asking: Asking, what: JsonObject) -> None:
    client = asking.ask({"verb": "kill", **what})
    assert asking.master.told == [KillCommand(**what)]
    question = asking.stand.question
    for one, found in zip(question.asked, (2, 3), strict=True):
        asking.requests.answer_waiting()
        assert client == []
        one.unanswered.clear()
        question.answers[one.pid] = found
    asking.requests.answer_waiting()
    assert client == [KilledReply(5, [])]


def test_claimed_number_of_closed_clients_is_bounded(asking: Asking) -> None:
    client = asking.ask({"verb": "kill", "cookie": 7})
    question = asking.stand.question
    for one, found in zip(question.asked, (-5, "many"), strict=True):
        one.unanswered.clear()
        question.answers[one.pid] = found
    asking.requests.answer_waiting()
    assert client == [KilledReply(0, [])]


def test_kill_that_is_not_answered_in_time_names_who_is_silent(asking: Asking) -> None:
    client = asking.ask({"verb": "kill", "cookie": 7})
    question = asking.stand.question
    question.asked[0].unanswered.clear()
    question.answers[101] = 1
    question.deadline = 0.0
    asking.requests.answer_waiting()
    assert client == [KilledReply(1, [{"slot": 2, "pid": 102}])]


def test_clients_are_answered_also_without_a_descriptor(asking: Asking, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ClientsReply(1, [], [], [])
    monkeypatch.setattr(commands, "clients_of", lambda state: found)
    asking.stand.board = SimpleNamespace(regions=SimpleNamespace(descriptor=-1))
    client = asking.ask({"verb": "clients"})
    assert (client, client.descriptors) == ([found], ())
    with tempfile.TemporaryFile() as file:
        asking.stand.board.regions.descriptor = file.fileno()
        client = asking.ask({"verb": "clients"})
        assert (client, len(client.descriptors)) == ([found], 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(client.descriptors[0])  # sent, and not kept
