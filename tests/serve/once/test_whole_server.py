"""A whole server in single-connection mode: it accepts the one client as any, and its process ends with that."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clients import at_end, dial, refuses
from tests.support.once_process import OnceProcess

Make = Callable[..., OnceProcess]


def ask(client: socket.socket) -> int:
    """The pid of the process that answers."""
    client.sendall(b"you\n")
    return int(client.makefile("rb").readline().split()[0])


@pytest.mark.parametrize(
    ("handler", "told"), [("returned", ""), ("forever", ""), ("until_drain", "drained"), ("Object", "stopped")]
)
def test_server_has_its_one_client_and_stops(single: Make, tmp_path: Path, handler: str, told: str) -> None:
    one = single(f"whole:{handler}").start()
    with dial(one.address) as client:
        assert ask(client) == one.pid
        assert refuses(one.address)
        assert ask(client) == one.pid
    assert one.status() == 0
    assert not told or (tmp_path / told).exists()


@pytest.mark.parametrize("handler", ["Object", "taking_signals"])
def test_server_is_told_to_stop_with_its_process(single: Make, tmp_path: Path, handler: str) -> None:
    one = single(f"whole:{handler}").start()
    with dial(one.address) as client:
        ask(client)
        os.kill(one.pid, signal.SIGTERM)
        assert ask(client) == one.pid
        os.kill(one.pid, signal.SIGTERM)
        assert at_end(client)
    assert one.status() == 0
    assert handler != "Object" or (tmp_path / "stopped").exists()


def test_server_that_ends_before_its_client_came_has_failed(single: Make, tmp_path: Path) -> None:
    one = single("whole:gives_up").expect("RuntimeError: out of ideas", "has ended before its client came").start()
    (tmp_path / "give up").touch()
    assert one.status() == 1
    assert refuses(one.address)


def test_server_that_copies_its_socket_is_refused_a_client(single: Make) -> None:
    one = single("whole:copied").expect("has not accepted its client, maybe since it accepts from a copy").start()
    with dial(one.address) as client:
        assert at_end(client)
    assert one.status() == 1


def test_server_that_does_not_begin_is_told_by_its_starter(single: Make) -> None:
    result = single("whole:fails").command()
    assert result.returncode == 1
    assert "whole:fails could not begin to serve tcp://127.0.0.1:0: ValueError: no database" in result.stderr
