"""What the service manager keeps: listeners outlive a master that is killed, with the clients that wait in them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.system.fdstore import store_names
from forkd.system.listeners import BoundListener
from forkd.system.unix_paths import OwnedPath
from tests.support.clients import dial, echoes, refuses
from tests.support.daemon import Daemon, Harness
from tests.support.processes import DEADLINE, children, eventually, stat_of, wait_end
from tests.support.service_manager import FakeManager, managed_daemon

ANY = "tcp://127.0.0.1:0"


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[FakeManager]:
    with contextlib.closing(FakeManager(str(tmp_path / "notify"))) as made:
        yield made


def kill(daemon: Daemon) -> None:
    """Kills the whole daemon at once, so that no worker can remark on it, nor one of the image before."""
    assert daemon.process is not None
    master = daemon.process.pid
    os.kill(master, signal.SIGSTOP)  # it must not fork meanwhile
    eventually(lambda: (found := stat_of(master)) and found[0] == "T")
    workers = children(master)
    for pid in workers:  # each is in a process group of its own
        os.kill(pid, signal.SIGSTOP)
    eventually(lambda: set(children(master).values()) <= {"T", "Z"})
    for pid in (*workers, master):
        os.kill(pid, signal.SIGKILL)
    daemon.process.wait(DEADLINE)
    for pid in workers:
        wait_end(pid)


def test_killed_master_comes_back_with_ports_and_waiting_clients(
    harness: Harness, manager: FakeManager, tmp_path: Path
) -> None:
    listen = (ANY, f"unix:{tmp_path}/with: 100%|é.sock", ANY, "unix:@forkd-test-stored")
    first = managed_daemon(manager, harness, listen=listen).run()
    manager.wait_for("READY")
    addresses = [one["address"] for one in first.status()["listeners"]]
    kill(first)
    waiting = [harness.connect(address) for address in addresses]
    second = managed_daemon(manager, harness, listen=listen)
    manager.start_with_store(second)
    assert [one["address"] for one in second.status()["listeners"]] == addresses
    assert all(echoes(client) for client in waiting)
    heard = len(manager.received)
    manager.wait_for("READY")
    assert [one for one in manager.received[heard:] if "FDNAME" in one] == []  # it has them


def test_clients_that_wait_when_the_master_alone_is_killed_wait_for_the_next(
    harness: Harness, manager: FakeManager
) -> None:
    first = managed_daemon(manager, harness, workers=1).run()
    manager.wait_for("READY")
    first.expect("the master is gone")
    master, (worker,) = first.pid, first.workers().values()
    os.kill(worker, signal.SIGSTOP)
    eventually(lambda: (found := stat_of(worker)) and found[0] == "T", what="a worker that is stopped")
    _, *waiting = [harness.connect(first) for _ in range(4)]  # the event that tells of the first one may come before
    os.kill(master, signal.SIGKILL)
    wait_end(master)
    os.kill(worker, signal.SIGCONT)
    wait_end(worker)
    second = managed_daemon(manager, harness)
    second.expect("the master is gone")  # in the same log
    manager.start_with_store(second)
    assert all(echoes(client) for client in waiting)


def test_names_are_such_as_systemd_takes(harness: Harness, manager: FakeManager, tmp_path: Path) -> None:
    long = f"unix:{tmp_path}/{'é' * 20}"
    managed_daemon(
        manager, harness, listen=("tcp://localhost:0", "tcp://[::1]:0", f"unix:{tmp_path}/a: %b", long)
    ).run()
    manager.wait_for("READY")
    assert len(manager.store) == 4
    assert all(re.fullmatch(r"forkd [!-9;-~]+ [0-9-]+ 0", name) for name in manager.store)
    assert all(len(name) <= 255 for name in manager.store)


def test_an_address_too_long_for_a_name_is_not_kept() -> None:
    address = parse_address(f"unix:/{'é' * 53}")
    assert (
        store_names(
            [BoundListener(Listener(address=address, handler=""), address, [], OwnedPath(address.path, (1, 2)))]
        )
        == {}
    )


def test_reload_changes_what_the_manager_keeps(harness: Harness, manager: FakeManager) -> None:
    daemon = managed_daemon(manager, harness, target="./told.yaml", listen=(), workers=None)
    file = daemon.directory / "told.yaml"

    def write(*addresses: str) -> None:
        lines = "".join(f"- {{address: '{one}', handler: 'forkd.builtin:Echo'}}\n" for one in addresses)
        file.write_text(f"workers: 1\nlisten:\n{lines}")

    write(ANY, "unix:@forkd-test-before")
    daemon.run()
    manager.wait_for("READY")
    address = daemon.address
    before = set(manager.store)
    write(address, "unix:@forkd-test-after")  # the one that it has, by the port that it got
    daemon.signal(signal.SIGHUP)
    manager.wait_for("RELOADING")
    manager.wait_for("READY")
    assert not before & set(manager.store)
    assert [name.rsplit(" ", 2)[0] for name in sorted(manager.store)] == [
        f"forkd {address.replace(':', '%3A')}",
        "forkd unix%3A@forkd-test-after",
    ]


def test_another_image_of_the_master_has_them_kept_too(harness: Harness, manager: FakeManager) -> None:
    first = managed_daemon(manager, harness).run()
    manager.wait_for("READY")
    address = first.address
    first.signal(signal.SIGUSR2)
    manager.wait_for("RELOADING")
    manager.wait_for("READY")
    assert [len(kept) for kept in manager.store.values()] == [1]
    kill(first)
    waiting = harness.connect(address)
    manager.start_with_store(managed_daemon(manager, harness))
    assert echoes(waiting)


def test_kept_sockets_that_are_not_wanted_are_closed(harness: Harness, manager: FakeManager, tmp_path: Path) -> None:
    path = tmp_path / "old.sock"
    first = managed_daemon(manager, harness, listen=(ANY, f"unix:{path}", "unix:@forkd-test-stays")).run()
    manager.wait_for("READY")
    address = first.address
    kill(first)
    first.held.clear()
    second = managed_daemon(manager, harness, listen=("unix:@forkd-test-stays",))
    manager.start_with_store(second)
    manager.wait_for("READY")
    assert [name.split()[1] for name in manager.store] == ["unix%3A@forkd-test-stays"]
    assert refuses(address)
    assert not path.exists()


def test_path_that_is_another_socket_by_now_is_bound_again(
    harness: Harness, manager: FakeManager, tmp_path: Path
) -> None:
    path = tmp_path / "taken.sock"
    first = managed_daemon(manager, harness, listen=(f"unix:{path}",)).run()
    manager.wait_for("READY")
    (before,) = manager.store
    kill(first)
    path.unlink()
    second = managed_daemon(manager, harness, listen=(f"unix:{path}",))
    manager.start_with_store(second)
    manager.wait_for("READY")
    assert [*manager.store] != [before]
    assert len(manager.store) == 1
    with dial(f"unix:{path}") as client:
        assert echoes(client)


def test_no_fd_address_means_what_was_only_kept(harness: Harness, manager: FakeManager) -> None:
    with socket.create_server(("127.0.0.1", 0)) as web:
        with socket.create_server(("127.0.0.1", 0)) as old:
            manager.store = {
                f"forkd tcp%3A//127.0.0.1%3A0 {old.getsockname()[1]} 0": [os.dup(old.fileno())],
                "forkd of another version": [os.dup(old.fileno())],
                "web": [os.dup(web.fileno())],
            }
        daemon = managed_daemon(manager, harness, listen=("fd:",))
        manager.start_with_store(daemon)
        assert daemon.address == f"tcp://127.0.0.1:{web.getsockname()[1]}"
        assert echoes(harness.connect(daemon))
        daemon.held.clear()  # it is the test's
        manager.wait_for("READY")
        assert [*manager.store] == ["web"]
