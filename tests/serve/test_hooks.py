"""`setup` and `teardown` of a daemon and of its listeners: when they run, what they can ask, and what becomes of those
that fail or take too long.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clients import read
from tests.support.daemon import Daemon, Harness
from tests.support.once_process import OnceProcess
from tests.support.processes import eventually

DAEMON = ("setup=hooked:open_daemon", "teardown=hooked:close_daemon")
LISTENER = ("listen.setup=hooked:open_listener", "listen.teardown=hooked:close_listener")
FACTORY = ("listen.factory=true",)

BOOT = ["import", "open daemon", "open listener after ['daemon']", "make with ['daemon', 'listener']"]
END = ["close listener before ['daemon'], draining True", "close daemon"]


def journal(directory: Path, name: str = "tested 1 1") -> list[str]:
    """What one worker has noted."""
    file = directory / "journal"
    lines = file.read_text().splitlines() if file.exists() else []
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def hooked(harness: Harness, *settings: str, workers: int = 1) -> Daemon:
    """A daemon whose handler is made by a factory, with these hooks."""
    return harness.daemon(target="hooked:make", workers=workers, settings=(*FACTORY, *settings))


def test_hooks_run_around_all_clients_in_order(harness: Harness) -> None:
    daemon = hooked(harness, *DAEMON, *LISTENER, workers=2).run()
    client = harness.connect(daemon)
    slot = int(client.recv(100).split()[0])
    os.kill(daemon.pid, signal.SIGTERM)
    eventually(lambda: journal(harness.directory, f"tested 1 {3 - slot}")[-1] == "close daemon", what="the idle worker")
    assert journal(harness.directory, f"tested 1 {slot}") == BOOT
    client.close()
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    assert journal(harness.directory, f"tested 1 {slot}") == [*BOOT, "client gone, 2 pools", *END]
    assert journal(harness.directory, f"tested 1 {3 - slot}") == [*BOOT, *END]


def test_hooks_run_in_the_workers_of_each_generation(harness: Harness) -> None:
    daemon = hooked(harness, *DAEMON, *LISTENER).start()
    assert daemon.command("reload").returncode == 0
    eventually(lambda: journal(harness.directory) == [*BOOT, *END], what="the end of the first generation")
    assert journal(harness.directory, "tested 2 1") == BOOT
    assert daemon.command("upgrade").returncode == 0
    eventually(lambda: journal(harness.directory, "tested 2 1") == [*BOOT, *END], what="the end of the second")
    assert journal(harness.directory, "tested 3 1") == BOOT


@pytest.mark.parametrize(
    ("hook", "reason", "details"),
    [
        ("fail", "failed: ConnectionRefusedError: no database at 192.0.2.1", r'hooked.py", line \d+, in fail\n'),
        ("leave", "failed: SystemExit: 7", "in leave"),
        ("cancel", "failed: asyncio.exceptions.CancelledError", "in cancel"),
        ("wait", "has not returned by boot_timeout (4 s)", r"in wait\n.*Event"),
    ],
)
def test_setup_that_fails_is_a_failed_boot(harness: Harness, hook: str, reason: str, details: str) -> None:
    daemon = hooked(harness, *DAEMON, f"listen.setup=hooked:{hook}", "boot_timeout=4s")
    result = daemon.command("start")
    assert result.returncode == 1
    assert f"worker 1 could not boot: setup hooked:{hook} {reason}" in result.stderr
    assert re.search(details, result.stderr)
    assert "forkd/serve" not in result.stderr
    daemon.expect(rf"could not boot: setup hooked:{hook} ")
    assert [line for line in journal(harness.directory) if "wait" not in line] == [
        "import",
        "open daemon",
        "close daemon",
    ]


def test_setup_that_blocks_is_killed_with_its_stacks(harness: Harness) -> None:
    daemon = hooked(harness, "setup=hooked:block", "boot_timeout=300ms")
    result = daemon.command("start")
    assert result.returncode == 1
    assert "it was not ready by its boot_timeout" in result.stderr
    assert "hooked.py" in result.stderr
    daemon.expect("these are its stacks", "killing worker 1", "has ended: killed by SIGKILL")


def test_stop_during_a_setup_undoes_what_was_set_up(harness: Harness) -> None:
    daemon = hooked(harness, *DAEMON, "listen.setup=hooked:stop_the_master").begin()
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    assert journal(harness.directory) == ["import", "open daemon", "wait", "waited enough", "close daemon"]


def test_reload_with_a_hook_that_fails_changes_nothing(harness: Harness) -> None:
    file = harness.directory / "tested.yaml"
    text = "workers: 1\nlisten: [{address: 'tcp://127.0.0.1:0', handler: 'hooked:make', factory: true}]\n"
    file.write_text(text)
    daemon = harness.daemon(target=file, listen=(), workers=None).start()
    for name, reason in {
        "hooked:fail": "setup hooked:fail failed: ConnectionRefusedError: no database at 192.0.2.1",
        "hooked:open_demon": "hooked:open_demon: module 'hooked' has no attribute 'open_demon'",
    }.items():
        file.write_text(f"setup: {name}\n{text}")
        result = daemon.command("reload")
        assert result.returncode == 1
        assert reason in result.stderr
        daemon.expect(re.escape(reason))
    assert harness.connect(daemon).recv(100) == b"1 \n"
    assert [one["generation"] for one in daemon.status()["workers"]] == [1]


def test_check_tells_where_a_hook_is_that_cannot_be_had(harness: Harness) -> None:
    file = harness.directory / "tested.yaml"
    file.write_text("""\
workers: 1
setup: hooked:generate
teardown: hooked:number
listen:
  - {address: 'tcp://127.0.0.1:0', handler: hooked:make, factory: true, setup: hooked:wants}
  - {address: 'tcp://127.0.0.1:0', handler: hooked:make, factory: true, teardown: nowhere:close}
""")
    result = harness.daemon(target=file, listen=(), workers=None).command("check")
    assert result.returncode == 78
    told = [line.split(": ", 1)[1] for line in result.stderr.splitlines() if "tested.yaml" in line]
    assert [line.split(";")[0] for line in told] == [
        "setup: hooked:generate has a yield",
        "teardown: hooked:number is an int, which is not callable",
        "listen[0].setup: hooked:wants: setup and teardown are called without arguments, but: "
        "missing a required argument: 'argument'",
        "listen[1].teardown: nowhere:close: there is no module 'nowhere'",
    ]


def test_teardown_that_fails_or_is_late_is_told_of(harness: Harness) -> None:
    settings = ("teardown=hooked:close_daemon", "listen.teardown=hooked:wait", "drain_timeout=200ms")
    daemon = hooked(harness, "setup=hooked:open_daemon", *settings).run()
    daemon.expect(r"teardown hooked:wait has not returned by the end of the drain\n(.*\n)*.* in wait")
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    assert time.monotonic() - began < 15
    assert journal(harness.directory)[-3:] == ["wait", "waited enough", "close daemon"]


def test_teardown_that_blocks_is_not_taken_for_a_stall(harness: Harness) -> None:
    daemon = hooked(harness, "teardown=hooked:block_a_while", "stall_timeout=500ms").run()
    daemon.signal(signal.SIGTERM)
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    assert journal(harness.directory)[-1] == "blocked a while"


@pytest.mark.parametrize("listen", ["udp://127.0.0.1:0", "tcp://127.0.0.1:0"])
def test_task_of_a_setup_runs_until_its_teardown(harness: Harness, listen: str) -> None:
    settings = ("setup=hooked:start_ticking", "teardown=hooked:stop_ticking")
    daemon = harness.daemon(listen=(listen,), workers=1, settings=settings).run()
    began = time.monotonic()
    daemon.signal(signal.SIGTERM)
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0
    assert time.monotonic() - began < 20  # of the drain's half a minute
    assert journal(harness.directory)[-1] == "ticking True"


CONTEXTUAL = ("setup=contextual:prepare", "listen.factory=true")


def test_context_variables_of_a_boot_hold_for_clients(harness: Harness) -> None:
    daemon = harness.daemon(target="contextual:make", workers=1, settings=CONTEXTUAL).start()
    assert harness.connect(daemon).recv(100) == b"0.33333 setup factory"


def test_each_client_of_a_thread_has_its_context_variables(harness: Harness) -> None:
    settings = (*CONTEXTUAL, "listen.threads=1")
    daemon = harness.daemon(target="contextual:make_blocking", workers=1, settings=settings).start()
    for _ in range(2):
        assert read(harness.connect(daemon), 100) == b"0.33333 setup factory nobody"


Single = Callable[..., OnceProcess]


def once_hooked(single: Single, *settings: str) -> OnceProcess:
    """One client's process with these hooks."""
    return single("hooked:make", "--name", "tested", *(f"--set={one}" for one in (*FACTORY, *settings)))


@pytest.mark.parametrize(("teardown", "status"), [("close_listener", 0), ("fail", 1), ("leave", 7)])
def test_once_runs_its_hooks_around_its_client(single: Single, harness: Harness, teardown: str, status: int) -> None:
    one = once_hooked(single, *DAEMON, LISTENER[0], f"listen.teardown=hooked:{teardown}")
    if teardown == "fail":
        one.expect(r"ERROR \S+ once\[\d+\] asyncio: teardown hooked:fail failed\.\n(.*\n)+.*ConnectionRefusedError")
    one.start()
    client = harness.connect(one.address)
    assert client.recv(100) == b"1 daemon listener\n"
    assert journal(harness.directory) == BOOT
    client.close()
    assert one.status() == status
    noted = journal(harness.directory)
    assert noted[len(BOOT)] == "client gone, 2 pools"
    assert noted[-1] == "close daemon"


def test_once_does_not_start_without_its_setup(single: Single, harness: Harness) -> None:
    one = once_hooked(single, *DAEMON, "listen.setup=hooked:fail")
    result = one.command()
    assert result.returncode == 1
    assert result.stderr.endswith("forkd: setup hooked:fail failed: ConnectionRefusedError: no database at 192.0.2.1\n")
    assert journal(harness.directory) == ["import", "open daemon", "close daemon"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_once_that_is_told_to_end_during_its_setup(single: Single, harness: Harness, signum: int) -> None:
    one = once_hooked(single, *DAEMON, "listen.setup=hooked:wait").expect("told to end before it was ready").open()
    eventually(lambda: "wait" in journal(harness.directory), what="its setup")
    assert one.process is not None
    one.process.send_signal(signum)
    assert one.status() == 1
    assert journal(harness.directory)[-2:] == ["waited enough", "close daemon"]


def test_once_has_the_context_variables_of_its_boot(single: Single, harness: Harness) -> None:
    one = single("contextual:make", *(f"--set={setting}" for setting in CONTEXTUAL)).start()
    assert harness.connect(one.address).recv(100) == b"0.33333 setup factory"
    assert one.status() == 0
