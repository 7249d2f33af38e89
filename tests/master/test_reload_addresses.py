"""Reloads and restarts from one address to another of the same port, which the daemon itself has."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.clients import datagram_client, dial, echoes, refuses, unshared_port
from tests.support.daemon import Harness

V4, ALL4, NAME, V6, ALL6 = "127.0.0.1", "0.0.0.0", "localhost", "[::1]", "[::]"
HANDLERS = {"tcp": "Echo", "udp": "DatagramEcho"}


class Site:
    """A daemon whose one listener moves."""

    def __init__(self, harness: Harness, directory: Path, scheme: str, host: str, *more: str) -> None:
        self.file, self.scheme, self.more = directory / "settings.yaml", scheme, more
        self.port = unshared_port()
        self.write(host, self.port)
        self.daemon = harness.daemon(target=self.file, listen=(), workers=1).start()

    def write(self, host: str, port: int) -> None:
        where, handler = f"{self.scheme}://{host}:{port}", HANDLERS[self.scheme]
        self.file.write_text(f"listen:\n  - {{address: '{where}', handler: 'forkd.builtin:{handler}'}}\n")

    def move(self, host: str, verb: str = "reload") -> None:
        self.write(host, self.port)
        result = self.daemon.command(verb)
        assert result.returncode == 0, result.stderr

    def at(self, host: str) -> str:
        return f"{self.scheme}://{host}:{self.port}"


@contextmanager
def coming_and_going(where: str) -> Iterator[list[str]]:
    """A client after the other for a while; what became of those that were not served."""
    stop, lost = threading.Event(), list[str]()

    def run() -> None:
        while not stop.is_set():
            try:
                with dial(where) as sock:
                    assert echoes(sock)
            except (OSError, AssertionError) as error:
                lost.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield lost
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("verb", ["reload", "restart"])
def test_tcp_moves_to_all_addresses_and_back(harness: Harness, tmp_path: Path, verb: str) -> None:
    site = Site(harness, tmp_path, "tcp", V4)
    client = harness.connect(site.at(V4))
    with coming_and_going(site.at(V4)) as lost:
        site.move(ALL4, verb)
        assert echoes(harness.connect(site.at("127.0.0.2")))
        site.move(V4, verb)
        assert refuses(site.at("127.0.0.2"))
    assert lost == []
    assert echoes(client)


@pytest.mark.parametrize("scheme", ["tcp", "udp"])
def test_listener_moves_between_addresses_of_one_port(harness: Harness, tmp_path: Path, scheme: str) -> None:
    site = Site(harness, tmp_path, scheme, V4)
    for host in (NAME, ALL4, NAME, V6, ALL6, V6, NAME, V4):
        site.move(host)
        assert site.daemon.address == site.at(host)
        where = site.at(V6 if ":" in host else V4)
        if scheme == "tcp":
            assert echoes(harness.connect(where))
        else:
            with datagram_client(where) as client:
                client.send(b"there")
                assert client.recv(10) == b"there"


def test_move_that_fails_leaves_the_listener_as_it_was(harness: Harness, tmp_path: Path) -> None:
    site = Site(harness, tmp_path, "tcp", V4)
    site.write(ALL4, site.port)
    site.file.write_text(site.file.read_text().replace("Echo", "Nothing"))
    site.daemon.expect("reload: failed", "could not boot")
    assert site.daemon.command("reload").returncode != 0
    assert refuses(site.at("127.0.0.2"))
    assert echoes(harness.connect(site.at(V4)))


def test_port_of_another_daemon_is_in_use_all_the_same(harness: Harness, tmp_path: Path) -> None:
    site = Site(harness, tmp_path, "tcp", V4)
    with socket.create_server(("127.0.0.2", site.port)):
        site.write(ALL4, site.port)
        site.daemon.expect("reload: failed, and nothing has changed: .* is in use")
        result = site.daemon.command("reload")
        assert (result.returncode, "is in use by" in result.stderr) == (1, True)
    site.move(ALL4)
    assert echoes(harness.connect(site.at("127.0.0.2")))
