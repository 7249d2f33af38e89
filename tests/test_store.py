"""What the service manager keeps: listeners outlive a master that is killed, with the clients who wait in them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from clients import dial, echoes, refuses
from harness import Daemon, Harness
from manager import Manager, under
from processes import PATIENCE, wait_end

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.system.bound import BoundListener
from forkd.system.store import names_of

ANY = "tcp://127.0.0.1:0"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    with contextlib.closing(Manager(str(tmp_path / "notify"))) as made:
        yield made


def kill(daemon: Daemon) -> None:
    """Kills the whole daemon at once, so that no worker can remark on it."""
    workers = daemon.workers().values()
    assert daemon.process is not None
    os.killpg(daemon.process.pid, signal.SIGKILL)
    daemon.process.wait(PATIENCE)
    for pid in workers:
        wait_end(pid)


def test_a_master_that_was_killed_comes_back_with_its_ports_and_whoever_waits(
    harness: Harness, manager: Manager, tmp_path: Path
) -> None:
    listen = (ANY, f"unix:{tmp_path}/with: 100%|é.sock", ANY, "unix:@forkd-test-stored")
    first = under(manager, harness, listen=listen).run()
    manager.until("READY")
    addresses = [one["address"] for one in first.status()["listeners"]]
    kill(first)
    waiting = [harness.connect(address) for address in addresses]
    second = under(manager, harness, listen=listen)
    manager.hand_back(second)
    assert [one["address"] for one in second.status()["listeners"]] == addresses
    assert all(echoes(client) for client in waiting)
    heard = len(manager.heard)
    manager.until("READY")
    assert [one for one in manager.heard[heard:] if "FDNAME" in one] == []  # it has them


def test_names_are_such_as_systemd_takes(harness: Harness, manager: Manager, tmp_path: Path) -> None:
    long = f"unix:{tmp_path}/{'é' * 20}"
    under(manager, harness, listen=("tcp://localhost:0", "tcp://[::1]:0", f"unix:{tmp_path}/a: %b", long)).run()
    manager.until("READY")
    assert len(manager.store) == 4
    assert all(re.fullmatch(r"forkd [!-9;-~]+ [0-9-]+ 0", name) for name in manager.store)
    assert all(len(name) <= 255 for name in manager.store)


def test_an_address_too_long_for_a_name_is_not_kept() -> None:
    address = parse_address(f"unix:/{'é' * 53}")
    assert names_of([BoundListener(Listener(address=address, handler=""), address, [], (1, 2))]) == {}


def test_what_a_reload_takes_away_is_not_kept_and_what_it_brings_is(harness: Harness, manager: Manager) -> None:
    daemon = under(manager, harness, target="./told.yaml", listen=(), workers=None)
    file = daemon.directory / "told.yaml"

    def write(*addresses: str) -> None:
        lines = "".join(f"- {{address: '{one}', handler: 'forkd.builtin:Echo'}}\n" for one in addresses)
        file.write_text(f"workers: 1\nlisten:\n{lines}")

    write(ANY, "unix:@forkd-test-before")
    daemon.run()
    manager.until("READY")
    address = daemon.address
    before = set(manager.store)
    write(address, "unix:@forkd-test-after")  # the one that it has, by the port that it got
    daemon.signal(signal.SIGHUP)
    manager.until("RELOADING")
    manager.until("READY")
    assert not before & set(manager.store)
    assert [name.rsplit(" ", 2)[0] for name in sorted(manager.store)] == [
        f"forkd {address.replace(':', '%3A')}",
        "forkd unix%3A@forkd-test-after",
    ]


def test_another_image_of_the_master_has_them_kept_too(harness: Harness, manager: Manager) -> None:
    first = under(manager, harness).run()
    manager.until("READY")
    address = first.address
    first.signal(signal.SIGUSR2)
    manager.until("RELOADING")
    manager.until("READY")
    assert [len(kept) for kept in manager.store.values()] == [1]
    kill(first)
    waiting = harness.connect(address)
    manager.hand_back(under(manager, harness))
    assert echoes(waiting)


def test_what_was_kept_and_is_not_wanted_any_more_is_closed(harness: Harness, manager: Manager, tmp_path: Path) -> None:
    path = tmp_path / "old.sock"
    first = under(manager, harness, listen=(ANY, f"unix:{path}", "unix:@forkd-test-stays")).run()
    manager.until("READY")
    address = first.address
    kill(first)
    first.held.clear()
    second = under(manager, harness, listen=("unix:@forkd-test-stays",))
    manager.hand_back(second)
    manager.until("READY")
    assert [name.split()[1] for name in manager.store] == ["unix%3A@forkd-test-stays"]
    assert refuses(address)
    assert not path.exists()


def test_a_path_that_is_another_socket_by_now_is_bound_anew(harness: Harness, manager: Manager, tmp_path: Path) -> None:
    path = tmp_path / "taken.sock"
    first = under(manager, harness, listen=(f"unix:{path}",)).run()
    manager.until("READY")
    (before,) = manager.store
    kill(first)
    path.unlink()
    second = under(manager, harness, listen=(f"unix:{path}",))
    manager.hand_back(second)
    manager.until("READY")
    assert [*manager.store] != [before]
    assert len(manager.store) == 1
    with dial(f"unix:{path}") as client:
        assert echoes(client)


def test_no_fd_address_means_what_was_only_kept(harness: Harness, manager: Manager) -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:
        with socket.create_server(("127.0.0.1", 0)) as old:
            manager.store = {
                f"forkd tcp%3A//127.0.0.1%3A0 {old.getsockname()[1]} 0": [os.dup(old.fileno())],
                "forkd of another version": [os.dup(old.fileno())],
                "web": [os.dup(web.fileno())],
            }
        daemon = under(manager, harness, listen=("fd:",))
        manager.hand_back(daemon)
        assert daemon.address == f"tcp://127.0.0.1:{web.getsockname()[1]}"
        assert echoes(harness.connect(daemon))
        daemon.held.clear()  # it is the test's
        manager.until("READY")
        assert [*manager.store] == ["web"]
