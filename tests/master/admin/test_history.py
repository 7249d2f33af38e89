"""The ring of the last ten minutes: its grid, its rates, and what JSON is made of it."""

from __future__ import annotations

import json
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forkd.master.admin.history import STEP, History
from forkd.master.state import MOST_MOMENTS, DaemonState, Moment
from tests.support.admin import ask
from tests.support.clients import echoes
from tests.support.daemon import Harness


class Drawn(History):
    """One whose samples are made up: a client and ten accepted ones more each time; a listener that comes late."""

    def __init__(self) -> None:
        super().__init__(cast(DaemonState, SimpleNamespace(moments=deque(maxlen=MOST_MOMENTS))))
        self.taken = 0

    def _sample(self, now: float) -> Moment:
        self.taken += 1
        listeners = {"tcp://late:1": (1, 5 * self.taken, 2)} if self.taken > 1 else {}
        return Moment(now, self.taken, {"accepted": 10 * self.taken}, listeners)


def test_samples_are_on_a_grid_however_late_the_master_is() -> None:
    drawn = Drawn()
    assert drawn.advance(101.0) == 105.0
    assert drawn.advance(104.9) == 105.0
    assert drawn.advance(105.0) == 110.0
    assert drawn.advance(131.5) == 135.0  # the machine was suspended
    assert drawn.taken == 3


def test_ring_holds_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn()
    for number in range(500):
        drawn.advance(STEP * number)
    monkeypatch.setattr("forkd.master.admin.history.time.monotonic", lambda: STEP * 500)
    told = drawn.tell()
    assert len(told["ages"]) == MOST_MOMENTS + 1
    assert (told["ages"][0], told["ages"][-1]) == (STEP * MOST_MOMENTS, 0)


def test_rates_are_by_time_and_never_below_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn()
    drawn.advance(100.0)
    drawn.advance(105.0)
    monkeypatch.setattr("forkd.master.admin.history.time.monotonic", lambda: 107.5)
    told: dict[str, Any] = drawn.tell()
    assert (told["clients"], told["rates"]) == ([1, 2, 3], {"accepted": [2.0, 4.0]})
    (late,) = told["listeners"]
    assert late == {"address": "tcp://late:1", "connections": [0, 1, 1], "queue": [0, 2, 2], "rate": [2.0, 2.0]}
    drawn.taken = 0  # as where what was counted is lost
    assert drawn.tell()["rates"] == {"accepted": [2.0, 0.0]}


def test_history_goes_on_after_an_upgrade(harness: Harness) -> None:
    daemon = harness.daemon(settings=("admin.address=tcp://127.0.0.1:0",)).start()
    clients = [harness.connect(daemon) for _ in range(2)]
    assert all(map(echoes, clients))
    before = json.loads(ask(daemon, "/history.json").body)
    assert daemon.command("upgrade").returncode == 0
    after = json.loads(ask(daemon, "/history.json").body)
    assert (after["clients"][0], after["clients"][-1]) == (0, 2)  # the first sample is of the time before the clients
    assert len(after["ages"]) > len(before["ages"])
    assert [len(one["connections"]) for one in after["listeners"]] == [len(after["ages"])]


def test_daemon_tells_its_history_and_its_oldest_clients(harness: Harness) -> None:
    daemon = harness.daemon(settings=("admin.address=tcp://127.0.0.1:0",)).start()
    client = harness.connect(daemon)
    assert echoes(client)
    told = json.loads(ask(daemon, "/history.json").body)
    assert (told["clients"][-1], told["listeners"][0]["connections"][-1]) == (1, 1)
    clients = json.loads(ask(daemon, "/clients.json").body)
    host, port = client.getsockname()
    assert [one["client"] for one in clients["clients"]] == [f"{host}:{port}"]
    assert (clients["total"], clients["why_none"]) == (1, "")
