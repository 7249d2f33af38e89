"""Reloads that fail: whatever is wrong, the reason is told and nothing has changed.

The daemon serves on with the same workers and clients, and what was bound for the reload is free again.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.changing_daemon import Changing, Untouched, listener
from tests.support.clients import is_free, unshared_port
from tests.support.daemon import Harness
from tests.support.processes import eventually

Break = Callable[[Changing], object]

#: What is done to the file or the module, and what is said of it, as regular expressions.
BROKEN_FILES: dict[str, tuple[Break, list[str]]] = {
    "is no YAML": (lambda site: site.file.write_text("listen: [\n"), [r"tested\.yaml:2:1: "]),
    "has an unknown key": (
        lambda site: site.write(wokers=2),
        [r"tested\.yaml:\d+:1: wokers: unknown setting; did you mean 'workers'\?"],
    ),
    "has two mistakes": (
        lambda site: site.write(wokers=2, boot_timeout="soon"),
        [r"tested\.yaml:\d+:1: wokers", r"tested\.yaml:\d+:15: boot_timeout: 'soon'"],
    ),
    "is gone": (lambda site: site.file.unlink(), [r"tested\.yaml: can't be read: No such file or directory"]),
    "needs a restart": (
        lambda site: site.write(working_directory="/"),
        ["a reload can't change this:", r"\nworking_directory: .* \(needs a restart\)"],
    ),
    "logs where nobody can": (
        lambda site: site.write(log={"to": "/dev/null/log"}),
        ["can't open the log file /dev/null/log: /dev/null is not a directory"],
    ),
    "names a foreign address": (
        lambda site: site.write(listen=[listener("tcp://192.0.2.1:0")]),
        [r"can't listen on tcp://192\.0\.2\.1:0: 192\.0\.2\.1 is no address of this machine"],
    ),
}
BROKEN_CODE: dict[str, tuple[str, list[str]]] = {
    "raises": ("1 / 0\n", ["importing says failed: ZeroDivisionError", r'File ".*/says\.py", line 1, in <module>']),
    "is no Python": ("Handler = (\n", ["SyntaxError", r"says\.py"]),
    "calls sys.exit": ("raise SystemExit(3)\n", ["importing says failed: SystemExit: 3"]),
    "ends the process": ("import os\nos._exit(7)\n", ["ended before it was ready: exit status 7"]),
    "kills the process": ("import os\nos.kill(os.getpid(), 11)\n", ["ended before it was ready: killed by SIGSEGV"]),
    "writes before it ends": (
        "import os\nos.write(2, b'no more disks\\n')\nos._exit(1)\n",
        ["no more disks", "ended before it was ready: exit status 1"],
    ),
}


def test_reload_with_broken_settings_changes_nothing(harness: Harness) -> None:
    site = Changing(harness)
    untouched = Untouched(site)
    site.write(wokers=2)
    site.daemon.signal(signal.SIGHUP)
    site.daemon.wait_log(r"reload: failed, and nothing has changed: tested\.yaml:\d+:1: wokers: unknown setting")
    untouched.check("a signal")
    for why, (spoil, patterns) in BROKEN_FILES.items():
        spoil(site)
        site.daemon.expect(f"(?s)reload: failed, and nothing has changed: .*{patterns[0]}")
        untouched.fail("reload", why, *patterns)
    untouched.end("reload")


def test_reload_with_a_broken_handler_changes_nothing(harness: Harness) -> None:
    site = Changing(harness)
    site.daemon.expect("reload: failed, and nothing has changed: worker", "worker . .* has ended: ")
    untouched = Untouched(site)
    for why, (source, patterns) in BROKEN_CODE.items():
        site.code("later", source)
        untouched.fail("reload", why, *patterns)
    site.write(listen=[listener("tcp://127.0.0.1:0", handler="nowhere.at_all:Handler")])
    untouched.fail("reload", "is not there", "there is no module 'nowhere'")
    site.write(listen=[listener("tcp://127.0.0.1:0", handler="says:Sags")])
    untouched.fail("reload", "lacks its name", "has no attribute 'Sags'")
    untouched.end("reload")


@pytest.mark.parametrize("why", ["an address in use", "a handler"])
def test_address_bound_for_a_failed_reload_is_free_again(harness: Harness, tmp_path: Path, why: str) -> None:
    path = tmp_path / "sock"
    site = Changing(harness)
    site.daemon.expect("reload: failed, and nothing has changed: ")
    untouched = Untouched(site)
    free = f"tcp://127.0.0.1:{unshared_port()}"
    with socket.create_server(("127.0.0.1", 0)) as holder:
        held = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        listeners = [*site.settings["listen"], listener(free), listener(f"unix:{path}")]
        if why == "a handler":
            site.daemon.expect("worker . .* has ended: .*could not boot")
            site.write(listen=listeners)
            site.code("later", "1 / 0\n")
            untouched.fail("reload", why, "ZeroDivisionError")
        else:
            site.write(listen=[*listeners, listener(held)])
            untouched.fail("reload", why, f"{held} is in use by .*, pid {os.getpid()}")
    assert not path.exists()
    eventually(lambda: is_free(free), what="the port free")
    untouched.end("reload")


def test_workers_that_never_boot_end_a_reload_with_stacks(harness: Harness) -> None:
    site = Changing(harness, boot_timeout="1500ms")
    daemon = site.daemon
    daemon.expect("it was not ready by its boot_timeout; these are its stacks", "killing worker . .* boot_timeout")
    daemon.expect("has ended: killed by SIGKILL, it was not ready by its boot_timeout", "reload: failed")
    untouched = Untouched(site)
    with site.gate("later"):
        untouched.fail("reload", "never boots", "worker . .*it was not ready by its boot_timeout")
        daemon.wait_log(r'worker . \(pid \d+\) output: (.*\n  \| )*.*File ".*/says\.py", line 4 in <module>')
    untouched.end("reload")


def test_reload_of_what_does_not_run_fails(harness: Harness) -> None:
    site = Changing(harness)
    for more in ((), ("--diff",)):
        result = site.daemon.command("reload", *more)
        assert (result.returncode, result.stderr) == (1, "forkd: tested is not running\n")
