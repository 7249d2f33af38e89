"""Metrics that are pushed: each event is told once, whatever becomes of the daemon."""

from __future__ import annotations

import errno
import re
import socket
from types import SimpleNamespace
from typing import Any

import pytest

from forkd.config.address import Address
from forkd.master.admin.metrics import COUNTER, Family, Sample
from forkd.master.admin.statsd import StatsdSender
from tests.support.changing_daemon import Changing
from tests.support.daemon import Harness
from tests.support.processes import DEADLINE

ACCEPTED = re.compile(rb"^forkd\.tested\.connections_accepted\.\d+:(\d+)\|c$", re.MULTILINE)


def test_statsd_is_told_each_event_once(harness: Harness) -> None:
    receiver = harness.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    receiver.bind(("127.0.0.1", 0))
    receiver.settimeout(DEADLINE)
    site = Changing(harness, statsd=f"localhost:{receiver.getsockname()[1]}")
    daemon = site.daemon.start()
    for _ in range(5):
        site.greet()
    assert daemon.command("upgrade").returncode == 0
    site.greet()
    daemon.stop()
    text = b""
    while sum(map(int, ACCEPTED.findall(text))) < 6:
        text += receiver.recv(1 << 16) + b"\n"
    receiver.setblocking(False)
    try:
        while True:
            text += receiver.recv(1 << 16) + b"\n"
    except BlockingIOError:
        pass
    assert sum(map(int, ACCEPTED.findall(text))) == 6
    assert b"\nforkd.tested.generation:2|g\n" in text
    assert max(map(len, text.splitlines())) < 200


def state_with(address: Address) -> Any:
    settings = SimpleNamespace(name="tested", statsd=address)
    return SimpleNamespace(generation=SimpleNamespace(settings=settings), pushed={"": 0})


def test_statsd_that_no_socket_leads_to_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "no IPv6 here")

    monkeypatch.setattr("forkd.master.admin.statsd.socket.socket", refuse)
    metrics: Any = SimpleNamespace(collect=list)
    assert StatsdSender(state_with(Address("udp", "::1", 8125)), metrics).advance(0.0) is None


def test_statsd_is_told_once_of_labels_that_get_the_same_name(harness: Harness) -> None:
    receiver = harness.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    receiver.bind(("127.0.0.1", 0))
    receiver.setblocking(False)
    state = state_with(Address("udp", *receiver.getsockname()))
    family = Family("pages", COUNTER, "Pages.", ("path",))
    counted = {"/a": 3.0, "a/": 5.0, "_a": 0.0}
    metrics: Any = SimpleNamespace(
        collect=lambda: [Sample("pages", (one,), n, (), family) for one, n in counted.items()]
    )
    sender = StatsdSender(state, metrics)
    sender.advance(0.0)
    sender.push()
    assert receiver.recv(1 << 16) == b"forkd.tested.pages._a:3|c\nforkd.tested.pages.a_:5|c"
    counted["_a"] = 1.0
    sender.push()
    assert receiver.recv(1 << 16) == b"forkd.tested.pages._a:1|c"
    sender.close()


def test_statsd_host_that_is_none_fails_the_reload(harness: Harness) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    daemon.expect("reload: failed, and nothing has changed: statsd: nowhere.invalid can't be found")
    site.write(statsd="nowhere.invalid:8125")
    assert daemon.command("reload").returncode == 1
    found = daemon.command("check")
    assert (found.returncode, "statsd: nowhere.invalid can't be found" in found.stderr) == (78, True)
