"""The pages by themselves: what takes time to make is kept for a while, and a mistake does not end the master."""

from __future__ import annotations

import selectors
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forkd.master.admin.history import History
from forkd.master.admin.metrics import Metrics
from forkd.master.admin.pages import Pages
from forkd.master.admin.server import AdminServer
from forkd.master.state import DaemonState
from tests.support.clients import at_end


class Told:
    """A master whose state takes a while to tell, by a clock of its own."""

    state = cast(DaemonState, None)

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.asked = 0
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def status(self) -> dict[str, Any]:
        self.asked += 1
        self.now += self.seconds
        if not self.seconds:
            raise OSError("no descriptor is left")
        return {"asked": self.asked, "workers": []}


@pytest.mark.parametrize(("cost", "kept"), [(0.01, 0.1), (0.5, 1.0)])
def test_dear_page_is_kept_for_ten_times_its_cost(monkeypatch: pytest.MonkeyPatch, cost: float, kept: float) -> None:
    master = Told(cost)
    monkeypatch.setattr("forkd.master.admin.pages.time", master)
    pages = Pages(master, Metrics(master.state), History(master.state))
    for later, asked in ((0.0, 1), (kept - cost - 0.001, 1), (0.002, 2)):
        master.now += later
        assert pages.find(b"/status.json", "").status == 200
        assert master.asked == asked


def test_page_that_fails_is_told_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    master = Told()
    assert Pages(master, Metrics(master.state), History(master.state)).find(b"/status.json", "").status == 500
    assert "status can't be told" in caplog.text


def test_page_that_takes_no_time_may_fail_too(caplog: pytest.LogCaptureFixture) -> None:
    master = Told()  # it has no state
    assert Pages(master, Metrics(master.state), History(master.state)).find(b"/ready", "").status == 500
    assert "/ready can't be told" in caplog.text


@pytest.mark.parametrize(
    ("target", "status"),
    [(b"/live", 200), (b"/live?x", 200), (b"http://h:1/live?x", 200), (b"HTTPS://h", 200), (b"/http://h/live", 404)],
)
def test_target_may_have_a_server_and_a_query(target: bytes, status: int) -> None:
    master = Told()
    assert Pages(master, Metrics(master.state), History(master.state)).find(target, "").status == status


def test_mistake_in_what_is_told_does_not_end_the_master(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OverflowError("too large")

    for what in ("statsd.StatsdSender.advance", "statsd.StatsdSender.push", "history.History.advance"):
        monkeypatch.setattr(f"forkd.master.admin.{what}", fail)
    monkeypatch.setattr(Pages, "find", fail)
    with socket.create_server(("127.0.0.1", 0)) as listening, selectors.DefaultSelector() as selector:
        settings = SimpleNamespace(admin=SimpleNamespace(address="here", allow=()))
        service = SimpleNamespace(sockets=[listening], listener=SimpleNamespace(handler="admin"), address="here")
        generation = SimpleNamespace(settings=settings, services=[service])
        state = SimpleNamespace(generation=generation, superseded=False, control=SimpleNamespace(beside=False))
        server = AdminServer(cast(Any, SimpleNamespace(state=state)), selector)
        assert server.advance(5.0) == 15.0
        with socket.create_connection(listening.getsockname()) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            for _ in range(2):  # it is taken in, then read from
                for key, mask in selector.select(10):
                    key.data(mask)
            assert at_end(client)
        server.finish()
        server.close()
    for what in ("statsd", "history", "an answer"):
        assert f"admin: {what} can't be told" in caplog.text
