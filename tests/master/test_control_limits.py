"""What is too much for the control channel of a running daemon: long texts, floods of requests, silent clients."""

from __future__ import annotations

import contextlib
import json

from tests.support.clients import dial
from tests.support.daemon import Daemon, Harness

GOOD = "from forkd.builtin import Echo"
FAILS = "raise RuntimeError('\u0436' * 20_000)"


def handler(harness: Harness, text: str) -> None:
    (harness.directory / "says.py").write_text(text)


def control(daemon: Daemon) -> str:
    return f"unix:{daemon.run_directory / 'control.sock'}"


def answers(daemon: Daemon, *commands: tuple[str, ...]) -> None:
    for command in commands:
        result = daemon.command(*command)
        assert (result.returncode, result.stderr) == (0, ""), command


def test_control_answers_after_deaths_with_long_reasons(harness: Harness) -> None:
    handler(harness, GOOD)
    daemon = harness.daemon(target="says:Echo", workers=1).start()
    daemon.expect("has ended", "could not boot", "reload: failed")
    handler(harness, FAILS)
    for _ in range(6):
        with dial(control(daemon)) as sock, sock.makefile() as replies:
            sock.sendall(b'{"verb": "reload"}\n')
            assert json.loads(replies.readline())["ok"]
            assert not json.loads(replies.readline())["ok"]
    handler(harness, GOOD)
    answers(daemon, ("status",), ("status", "--json"), ("scale", "2"), ("restart",), ("stop",))


def test_control_flood_of_one_client_holds_up_no_other(harness: Harness) -> None:
    daemon = harness.daemon().run()
    with dial(control(daemon)) as flood:
        flood.sendall(b'{"verb": "status"}\n' * 3600)
        assert daemon.status()["state"] == "running"
        with contextlib.suppress(ConnectionResetError):
            while flood.recv(65536):
                pass
    assert "closed a client that sent more than 32 requests at once" in daemon.log.read_text()


def test_control_is_not_locked_by_silent_clients(harness: Harness) -> None:
    daemon = harness.daemon().run()
    for _ in range(40):
        harness.connect(control(daemon))
    answers(daemon, ("status",), ("scale", "1"))
    assert len(daemon.workers()) == 1
    answers(daemon, ("stop",))
