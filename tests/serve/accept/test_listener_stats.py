"""What is taken down of connections that end: between which bounds they fall, and those that are not looked at."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from time import monotonic

import pytest

from forkd.serve.accept import listener_stats
from forkd.serve.accept.listener_stats import MOST_LOOKED_AT, Endings
from forkd.system.scoreboard import DURATION_BOUNDS, ListenerField, Row


@dataclass
class Stamps:
    bytes_in: int
    bytes_out: int


def cells() -> memoryview:
    found = Row.unshared().listener(0)
    assert found is not None
    return found


def test_connections_fall_between_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    found, now = cells(), monotonic()
    monkeypatch.setattr(listener_stats, "monotonic", lambda: now)  # a busy machine holds this up for ten milliseconds
    endings = Endings(found)
    sock = socket.socket()
    for seconds, came in ((0.0, 0), (0.05, 256), (0.06, 257), (7200.0, 1 << 31)):
        endings.measure(sock, now - seconds, Stamps(came, 0))
    sock.close()
    endings.measure(sock, now, None)  # a handler may have closed it
    assert found[ListenerField.BYTES_IN] == 0
    endings.reckon()
    durations = found[ListenerField.FIRST_DURATION : ListenerField.FIRST_SIZE]
    assert list(durations) == [2, 2, *[0] * (len(DURATION_BOUNDS) - 2), 1]
    assert list(found[ListenerField.FIRST_SIZE :]) == [3, 1, 0, 0, 0, 0, 1]
    assert found[ListenerField.BYTES_IN] == 256 + 257 + (1 << 31)
    assert found[ListenerField.MICROSECONDS] == pytest.approx(7200.11e6)


def test_those_not_looked_at_are_taken_to_be_like_the_others() -> None:
    found, now = cells(), monotonic()
    endings = Endings(found)
    with socket.socket() as sock:
        for number in range(3 * MOST_LOOKED_AT):
            endings.measure(sock, now - (30 if number % 2 else 0), Stamps(10, 20))
    endings.reckon()
    assert found[ListenerField.BYTES_IN] == 30 * MOST_LOOKED_AT
    assert found[ListenerField.BYTES_OUT] == 60 * MOST_LOOKED_AT
    assert sum(found[ListenerField.FIRST_DURATION : ListenerField.FIRST_SIZE]) == 3 * MOST_LOOKED_AT
    assert found[ListenerField.FIRST_DURATION + DURATION_BOUNDS.index(60.0)] == 3 * MOST_LOOKED_AT // 2
