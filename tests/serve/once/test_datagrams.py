"""Single-connection mode for datagrams: the first sender is the client, its socket connected to it."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable

import pytest

from tests.support.clients import datagram_client, endpoint, is_free
from tests.support.once_process import OnceProcess
from tests.support.processes import eventually

UDP = "udp://127.0.0.1:0"
Make = Callable[..., OnceProcess]


@pytest.mark.parametrize("foreground", [False, True])
def test_first_sender_is_served_and_no_other(single: Make, foreground: bool) -> None:
    one = single("grams:Talk", listen=UDP)
    one.foreground() if foreground else one.start()
    with datagram_client(one.address) as first, datagram_client(one.address) as second:
        first.send(b"one")
        assert first.recv(100) == b"heard one"
        second.send(b"two")
        with pytest.raises(ConnectionRefusedError):
            second.recv(100)
        first.send(b"bye")
        assert first.recv(100) == b"heard bye"
        assert one.status() == 0
    assert is_free(one.address)


def test_datagrams_of_others_before_the_connect_are_dropped(single: Make) -> None:
    one = single("grams:Talk", listen=UDP).start()
    os.kill(one.pid, signal.SIGSTOP)
    with datagram_client(one.address) as first, datagram_client(one.address) as second:
        first.send(b"one")
        second.send(b"raise")
        first.send(b"two")
        os.kill(one.pid, signal.SIGCONT)
        assert [first.recv(100), first.recv(100)] == [b"heard one", b"heard two"]
        first.send(b"bye")
        assert one.status() == 0


def test_exception_of_the_handler_makes_the_status_1(single: Make) -> None:
    one = single("grams:Talk", listen=UDP).expect("ValueError: as asked").start()
    with datagram_client(one.address) as client:
        client.send(b"raise")
        client.send(b"bye")
        assert client.recv(100) == b"heard bye"
    assert one.status() == 1


def test_status_is_124_when_no_datagram_comes_in_time(single: Make) -> None:
    one = single("grams:Talk", "--timeout", "50ms", listen=UDP).start()
    assert one.status() == 124


def test_sender_must_be_in_the_networks_allowed(single: Make) -> None:
    one = single("grams:Talk", "--from", "127.0.0.2", listen="udp://0.0.0.0:0").start()
    where = ("127.0.0.1", endpoint(one.address)[1][1])
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as friend,
    ):
        stranger.sendto(b"raise", where)
        one.wait_log("refused client")
        friend.bind(("127.0.0.2", 0))
        friend.settimeout(20)
        friend.sendto(b"bye", where)
        assert friend.recv(100) == b"heard bye"
    assert one.status() == 0


def test_a_stop_ends_it_before_and_with_its_client(single: Make) -> None:
    waiting, serving = single("grams:Talk", listen=UDP), single("grams:Talk", listen=UDP)
    waiting.foreground()
    os.kill(waiting.pid, signal.SIGTERM)
    assert waiting.status() == 0
    serving.foreground()
    with datagram_client(serving.address) as client:
        client.send(b"x")
        assert client.recv(100) == b"heard x"
        os.kill(serving.pid, signal.SIGTERM)
        assert serving.status() == 0


def test_an_inherited_socket_as_inetd_waits_with_is_served(single: Make) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        one = single("grams:Talk", listen="fd:0").open(stdin=sock)
        with datagram_client(f"udp://127.0.0.1:{sock.getsockname()[1]}") as client:
            client.send(b"bye")
            assert client.recv(100) == b"heard bye"
            assert one.status() == 0


def test_unix_socket_serves_its_first_sender_with_a_name(single: Make) -> None:
    one = single("grams:Talk", listen=f"unix-dgram:@forkd-test-{os.getpid()}").start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as nameless, datagram_client(one.address) as client:
        nameless.sendto(b"raise", endpoint(one.address)[1])
        client.send(b"bye")
        assert client.recv(100) == b"heard bye"
    assert one.status() == 0
    eventually(lambda: is_free(one.address), what="its end")


@pytest.mark.parametrize(
    ("settings", "reason", "error"),
    [(("idle=400ms",), "idle", "IdleTimeout"), (("idle=off", "lifetime=700ms"), "lifetime", "LifetimeOver")],
)
def test_a_client_whose_time_is_over_is_ended(single: Make, settings: tuple[str, ...], reason: str, error: str) -> None:
    options = [word for setting in settings for word in ("--set", f"listen.timeouts.{setting}")]
    one = single("grams:Talk", *options, listen=UDP).start()
    with datagram_client(one.address) as client:
        client.send(b"one")
        assert client.recv(100) == b"heard one"
        assert one.status() == 0
    log = one.log.read_text()
    assert re.search(rf"closed client 127.0.0.1:\d+ \({reason}\): it ", log)
    assert f"lost by {error}" in log
