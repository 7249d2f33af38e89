"""The admin endpoint and the agent check of a running daemon: who may ask, what changes make of them, their bounds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forkd.master.admin.server import MOST_CLIENTS
from tests.support.admin import Answer, Connection, ask, check, service_of
from tests.support.changing_daemon import Changing
from tests.support.clients import at_end, dial, echoes, is_free, read, refuses
from tests.support.daemon import Daemon, Harness
from tests.support.needs import needs_root
from tests.support.processes import alive, eventually, links_of, wait_end
from tests.support.unprivileged import NOBODY

ADMIN = "admin.address=tcp://127.0.0.1:0"
AGENT = "agent=tcp://127.0.0.1:0"


def test_pages_are_answered_to_get_and_head_alone(harness: Harness) -> None:
    daemon = harness.daemon(settings=(ADMIN, AGENT)).start()
    connection = Connection(service_of(daemon))
    assert connection.ask("/live").body == "live\n"
    first = connection.sock
    assert connection.ask("/ready?from=balancer")[::2] == (200, "ready\n")
    status = connection.ask("/status.json")
    assert (json.loads(status.body)["pid"], status.headers["Content-Type"]) == (daemon.pid, "application/json")
    # They are asked for their memory one after another, as far as there is time.
    eventually(lambda: None not in [one["pss"] for one in json.loads(connection.ask("/status.json").body)["workers"]])
    workers = json.loads(connection.ask("/status.json").body)["workers"]
    assert all(0 < one["pss"] <= one["rss"] for one in workers)
    page = connection.ask("/")
    assert (page.status, "<!doctype html>" in page.body) == (200, True)
    head = connection.ask("/status.json", "HEAD")
    assert (head.status, head.body, int(head.headers["Content-Length"]) > 1000) == (200, "", True)
    assert connection.ask("/nothing").status == 404
    wrong = connection.ask("/live", "DELETE")
    assert (wrong.status, wrong.headers["Allow"]) == (405, "GET, HEAD")
    assert connection.sock is first
    assert connection.ask("/live", "POST", body=b"x" * 9000).status == 405
    connection.close()
    assert check(daemon) == "up ready weight:100% 100%\n"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GARBAGE\r\n\r\n", b"400"),
        (b"GET /" + b"x" * 9000, b"431"),
        (b"GET /live HTTP/1.1\r\nBad Name: x\r\n\r\n", b"400"),
    ],
)
def test_request_that_is_none_is_answered_and_closed(harness: Harness, sent: bytes, status: bytes) -> None:
    daemon = harness.daemon(settings=(ADMIN,)).start()
    with dial(service_of(daemon)) as sock:
        sock.sendall(sent)
        with sock.makefile("rb") as lines:
            assert lines.read().startswith(b"HTTP/1.1 " + status)
    assert ask(daemon, "/live").status == 200


def test_client_of_half_a_connection_is_answered(harness: Harness) -> None:
    with dial(service_of(harness.daemon(settings=(ADMIN,)).start())) as sock:
        sock.sendall(b"GET /live HTTP/1.0\r\n\r\n")
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile("rb") as lines:
            assert lines.read().endswith(b"live\n")


def test_more_clients_than_fit_make_room(harness: Harness) -> None:
    where = service_of(harness.daemon(settings=(ADMIN,)).start())
    first = harness.connect(where)
    others = [harness.connect(where) for _ in range(MOST_CLIENTS)]
    assert at_end(first)
    assert ask(where, "/live").status == 200
    others[-1].sendall(b"GET /live HTTP/1.0\r\n\r\n")
    assert read(others[-1], 12) == b"HTTP/1.1 200"


def test_allow_names_who_may_ask(harness: Harness) -> None:
    daemon = harness.daemon(settings=(ADMIN, "admin.allow=[10.0.0.0/8, 127.0.0.2]")).start()
    where = service_of(daemon)
    refused = ask(where, "/status.json")
    assert (refused.status, "admin.allow" in refused.body) == (403, True)
    port = int(where.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) as sock:
        sock.sendall(b"GET /live HTTP/1.0\r\n\r\n")
        assert read(sock, 12) == b"HTTP/1.1 200"


def test_endpoint_that_everybody_reaches_is_warned_of(harness: Harness) -> None:
    everywhere = harness.daemon("open", settings=("admin.address=tcp://0.0.0.0:0",)).start()
    told = "admin: everybody who reaches tcp://0.0.0.0:0 can ask there; set admin.allow"
    everywhere.wait_log(f"WARNING .*: {told}")
    assert everywhere.command("check").stderr == f"warning: {told}\n"
    closed = harness.daemon(
        "closed", settings=("admin.address=[tcp://0.0.0.0:0, 0]", "admin.allow=[10.0.0.0/8]")
    ).start()
    assert "everybody" not in closed.log.read_text()


@contextmanager
def as_user(group: int) -> Iterator[None]:
    """This thread as another user, of one supplementary group."""
    groups = os.getgroups()
    os.setgroups([group])
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
        os.setgroups(groups)


def test_control_group_may_use_both_sockets_but_not_restart(open_harness: Harness) -> None:
    needs_root()
    path = open_harness.directory / "admin.sock"
    group = 4322
    settings = (f"admin.address=unix:{path}", f"control_group={group}")
    daemon = open_harness.daemon(settings=settings).start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    with as_user(group):
        assert daemon.status()["state"] == "running"
        assert ask(f"unix:{path}", "/ready").status == 200
        with dial(f"unix:{daemon.run_directory / 'control.sock'}") as sock:
            sock.sendall(b'{"verb": "hand over"}\n')
            assert b"only the daemon's own user and root" in sock.recv(4096)
    with as_user(group + 1):
        for refusing in (path, daemon.run_directory / "control.sock"):
            with pytest.raises(PermissionError):
                dial(f"unix:{refusing}")


def test_control_socket_is_shared_and_not_by_reload(harness: Harness) -> None:
    needs_root()
    site = Changing(harness)
    daemon = site.daemon.start()
    control = daemon.run_directory / "control.sock"
    for settings, mode in (({"control_group": 4322}, 0o660), ({"control_group": 0}, 0o660)):
        site.write(**settings)
        assert daemon.command("reload").returncode == 0
        assert (stat.S_IMODE(control.stat().st_mode), control.stat().st_gid) == (mode, settings["control_group"])
    del site.settings["control_group"]
    site.write()
    assert daemon.command("reload").returncode == 0
    assert stat.S_IMODE(control.stat().st_mode) == 0o600


def test_agent_tells_how_many_places_are_free(harness: Harness) -> None:
    limited = {"address": "tcp://127.0.0.1:0", "handler": "forkd.builtin:Echo", "limits": {"connections": 4}}
    daemon = Changing(harness, listen=[limited], agent="tcp://127.0.0.1:0").daemon.start()
    for weight in (100, 75, 50, 25, 1):
        assert check(daemon) == f"up ready weight:{weight}% {weight}%\n"
        assert weight == 1 or echoes(harness.connect(daemon))


def unready(where: str, why: str) -> Answer:
    """Waits until a daemon is not ready for this reason."""

    def asked() -> Answer | None:
        answer = ask(where, "/ready")
        return answer if answer.status == 503 and why in answer.body else None

    found = eventually(asked, what=f"a daemon that is not ready: {why}")
    assert found is not None
    return found


def test_stuck_worker_is_not_ready_until_it_is_replaced(harness: Harness) -> None:
    daemon = harness.daemon(settings=(ADMIN, AGENT, "admin.ready_workers=2", "stall_timeout=900ms")).start()
    daemon.expect("these are its stacks", "killing worker 1", "worker 1 .* has ended: killed by SIGKILL")
    where, agent, victim = service_of(daemon), service_of(daemon, "agent"), daemon.workers()[1]
    os.kill(victim, signal.SIGSTOP)
    found = unready(where, "stuck")
    assert (found.status, found.body) == (503, "not ready: 1 workers serve, and ready_workers is 2; stuck: worker 1\n")
    assert check(agent).startswith(
        "down#1_workers_serve_and_ready_workers_is_2;_stuck:_worker_1 down #1 workers serve, and"
    )
    assert ask(where, "/live").status == 200
    daemon.wait_workers(2, without={victim})
    assert ask(where, "/ready").status == 200
    assert check(agent).startswith("up ready")


def test_daemon_that_stops_is_not_ready_but_lives(harness: Harness) -> None:
    daemon = harness.daemon(settings=(ADMIN, AGENT)).start()
    where, agent = service_of(daemon), service_of(daemon, "agent")
    client = harness.connect(daemon)
    assert echoes(client)
    daemon.signal(signal.SIGTERM)
    eventually(lambda: ask(where, "/ready").body == "not ready: the daemon is draining\n", what="draining")
    assert check(agent) == "drain\n"
    assert ask(where, "/live").status == 200
    assert "forkd_draining 1.0" in ask(where, "/metrics").body
    assert json.loads(ask(where, "/status.json").body)["state"] == "draining"
    client.close()
    eventually(lambda: refuses(where), what="the daemon's end")


def test_listener_without_its_path_is_not_ready(harness: Harness, tmp_path: Path) -> None:
    directory = tmp_path / "gone"
    directory.mkdir()
    daemon = harness.daemon(listen=(f"unix:{directory}/s",), settings=(ADMIN,)).start()
    daemon.expect("its path was removed, and it can't be made again")
    where = service_of(daemon)
    shutil.rmtree(directory)
    unready(where, str(directory))
    daemon.wait_log("can't be made again")
    directory.mkdir()
    eventually(lambda: ask(where, "/ready").status == 200, what="the path's return")


def test_path_of_the_endpoint_is_made_again(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    daemon = harness.daemon(settings=(f"admin.address=unix:{path}",)).start()
    path.unlink()
    eventually(path.exists, what="the path's return")
    assert ask(f"unix:{path}", "/live").status == 200
    daemon.stop()
    assert not path.exists()


def test_reload_adds_moves_and_removes_addresses(harness: Harness, tmp_path: Path) -> None:
    site = Changing(harness)
    daemon = site.daemon.start()
    first, second = f"unix:{tmp_path}/a", f"unix:{tmp_path}/b"
    site.write(admin={"address": first})
    assert daemon.command("reload").returncode == 0
    assert ask(first, "/ready").status == 200
    kept = Connection(first)
    assert kept.ask("/live").status == 200
    site.write(admin={"address": [second, first]}, agent="tcp://127.0.0.1:0")
    assert daemon.command("reload").returncode == 0
    agent = service_of(daemon, "agent")
    assert [ask(one, "/ready").status for one in (first, second)] == [200, 200]
    assert kept.ask("/live").status == 200
    kept.close()
    site.write(admin={"address": second})
    del site.settings["agent"]
    site.write()
    assert daemon.command("reload").returncode == 0
    assert refuses(agent)
    assert not (tmp_path / "a").exists()
    assert ask(second, "/ready").status == 200
    assert [one["address"] for one in daemon.status()["services"]] == [second]


def test_reload_to_an_address_in_use_changes_nothing(harness: Harness) -> None:
    site = Changing(harness, admin={"address": "tcp://127.0.0.1:0"})
    daemon = site.daemon.start()
    daemon.expect("reload: failed, and nothing has changed: tcp://127.0.0.1:.* is in use")
    where, workers = service_of(daemon), daemon.workers()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        site.write(admin={"address": [where, port], "ready_workers": 512})
        result = daemon.command("reload")
    assert (result.returncode, f"tcp://127.0.0.1:{port} is in use by" in result.stderr) == (1, True)
    assert (service_of(daemon), daemon.workers()) == (where, workers)
    assert ask(where, "/ready").status == 200


@pytest.mark.parametrize("verb", ["upgrade", "restart"])
def test_addresses_are_handed_over_without_a_gap(harness: Harness, verb: str) -> None:
    site = Changing(harness, admin={"address": "tcp://127.0.0.1:0"}, agent="tcp://127.0.0.1:0")
    daemon = site.daemon.start()
    where, agent = service_of(daemon), service_of(daemon, "agent")
    stop, wrong = threading.Event(), list[str]()

    def run() -> None:
        while not stop.is_set():
            try:
                if (said := check(agent)) not in ("up ready weight:100% 100%\n", ""):
                    wrong.append(said)
            except ConnectionRefusedError as error:
                wrong.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        result = daemon.command(verb)
    finally:
        stop.set()
        thread.join()
    assert (result.returncode, result.stderr, wrong) == (0, "", [])
    assert (service_of(daemon), service_of(daemon, "agent")) == (where, agent)
    assert ask(where, "/ready").status == 200


def test_addresses_are_free_when_the_successor_ends_before_the_old_master(harness: Harness) -> None:
    site = Changing(harness, admin={"address": "tcp://127.0.0.1:0"}, agent="tcp://127.0.0.1:0")
    daemon = site.daemon.start()
    addresses = [daemon.address, service_of(daemon), service_of(daemon, "agent")]
    client, old = site.greet()[0], daemon.pid
    for verb in ("restart", "stop"):
        result = daemon.command(verb)
        assert (result.returncode, result.stderr) == (0, "")
    assert [address for address in addresses if not is_free(address)] == []
    assert alive(old)
    assert echoes(client)
    client.close()
    wait_end(old)


def test_workers_have_no_socket_of_the_endpoint(harness: Harness) -> None:
    daemon = harness.daemon(settings=(ADMIN,)).start()
    connection = Connection(service_of(daemon))
    assert connection.ask("/live").status == 200
    before = daemon.workers()
    daemon.expect("worker 1 .* has ended: killed by SIGKILL")
    os.kill(before[1], signal.SIGKILL)
    after = daemon.wait_workers(2, without={before[1]})
    port = connection.address.rpartition(":")[2]
    tables = Path("/proc/net/tcp").read_text().splitlines()
    ours = {f"socket:[{line.split()[9]}]" for line in tables if f":{int(port):04X} " in line}
    assert ours & {*links_of(daemon.pid)}
    assert [ours & {*links_of(pid)} for pid in {*before.values(), *after.values()} - {before[1]}] == [set(), set()]
    connection.close()


@pytest.mark.parametrize("package", ["h11"])
def test_missing_package_is_told_before_anything_changes(harness: Harness, package: str) -> None:
    site = Changing(harness)
    (site.directory / f"{package}.py").write_text("raise ModuleNotFoundError('away', name=__name__)\n")
    daemon = Daemon.start(site.daemon)
    daemon.expect("reload: failed, and nothing has changed: admin: needs h11")
    site.write(admin={"address": "tcp://127.0.0.1:0"})
    for verb, status in (("reload", 1), ("check", 78), ("restart", 78)):
        result = daemon.command(verb)
        told = f"{package} can't be imported; {sys.executable} -m pip install 'forkd-server[admin]'"
        assert (result.returncode, told in result.stderr) == (status, True), result.stderr
    assert daemon.status()["services"] == []
