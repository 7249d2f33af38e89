"""Upgrades that are refused: whatever is wrong with the code, the settings or the handlers, the old image goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.changing_daemon import Changing, Untouched, listener
from tests.support.clients import echoes
from tests.support.daemon import Harness
from tests.support.processes import DEADLINE


def test_forkd_that_can_not_start_is_refused_with_its_reason(harness: Harness) -> None:
    site = Changing(harness)
    copy = site.bring_forkd()
    untouched = Untouched(site)
    site.daemon.expect("upgrade: failed, and nothing has changed: ")
    for name, source, *patterns in (
        ("master/plan.py", "1 / 0\n", r'File ".*/forkd/master/plan\.py", line 1, in <module>', "ZeroDivisionError"),
        ("errors.py", "class (\n", "SyntaxError"),
        ("serve/worker.py", "1 / 0\n", r'File ".*/forkd/serve/worker\.py", line 1, in <module>', "ZeroDivisionError"),
        ("system/listeners.py", "import os\nos._exit(7)\n", "the helper has ended: exit status 7"),
        ("system/logs.py", "import os\nos.kill(os.getpid(), 11)\n", "the helper has ended: killed by SIGSEGV"),
    ):
        good = (copy / name).read_text()
        (copy / name).write_text(source)
        untouched.fail("upgrade", name, *patterns)
        (copy / name).write_text(good)
    heritage = copy / "master" / "upgrade.py"
    heritage.write_text(re.sub(r"\nFORMAT = \d+\n", "\nFORMAT = 1234\n", heritage.read_text()))
    words = r"forkd \S+ can't take over from forkd \S+, whose state is of another format; use `forkd restart`"
    untouched.fail("upgrade", "another format", words)
    shutil.move(copy, site.directory / "gone")
    (site.directory / "forkd").mkdir()
    (site.directory / "forkd" / "__init__.py").write_text("")
    untouched.fail("upgrade", "no package", r"No module named forkd\.__main__")
    shutil.rmtree(copy)
    untouched.end("upgrade")


def test_dry_run_finds_broken_settings_and_handlers(harness: Harness) -> None:
    site = Changing(harness)
    untouched = Untouched(site)
    site.daemon.expect("upgrade: failed, and nothing has changed: ")
    site.file.write_text("listen: [\n")
    untouched.fail("upgrade", "no YAML", r"tested\.yaml:2:1: ")
    site.write(wokers=2, boot_timeout="soon")
    untouched.fail(
        "upgrade", "mistakes", r"tested\.yaml:\d+:1: wokers: ", r"tested\.yaml:\d+:\d+: boot_timeout: 'soon'"
    )
    site.write(working_directory="/")
    untouched.fail("upgrade", "needs a restart", "a reload can't change this:")
    for source, *patterns in (
        ("1 / 0\n", "importing says failed: ZeroDivisionError", r'File ".*/says\.py", line 1, in <module>'),
        ("raise SystemExit(3)\n", "importing says failed: SystemExit: 3"),
        ("import os\nos.write(2, b'no more disks\\n')\nos._exit(1)\n", "no more disks"),
    ):
        site.code("later", source)
        untouched.fail("upgrade", source, *patterns)
    with socket.create_server(("127.0.0.1", 0)) as holder:
        held = f"tcp://127.0.0.1:{holder.getsockname()[1]}"
        site.write(listen=[*site.settings["listen"], listener(held)])
        untouched.fail("upgrade", "in use", f"{held} is in use by .*, pid {os.getpid()}")
    untouched.end("upgrade")


def test_dry_run_that_never_ends_is_ended_with_its_stacks(harness: Harness) -> None:
    site = Changing(harness, boot_timeout="3s")  # in which it comes as far as the import
    site.daemon.expect(
        "these are its stacks", "killing helper .* it was not ready by its boot_timeout", "upgrade: failed"
    )
    untouched = Untouched(site)
    with site.gate("later"):
        patterns = ["it was not ready by its boot_timeout", r'File ".*/says\.py", line 4 in <module>']
        untouched.fail("upgrade", "never ends", *patterns)
    site.write(boot_timeout="60s")
    assert site.daemon.command("reload").returncode == 0
    assert echoes(untouched.client)


def test_interpreter_that_is_gone_is_told(harness: Harness, tmp_path: Path) -> None:
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(os.path.realpath(sys.executable))
    (tmp_path / "venv" / "lib").symlink_to(Path(sys.prefix) / "lib")
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", tmp_path / "venv")
    site = Changing(harness)
    daemon = site.daemon
    daemon.expect(f"upgrade: failed, and nothing has changed: .*can't run {python}: No such file or directory")
    command = [python, "-m", "forkd", "start", *daemon.target, *daemon.identity]
    subprocess.run(list(map(str, command)), cwd=tmp_path, check=True, capture_output=True, timeout=DEADLINE)
    client, master = site.greet()[0], daemon.pid
    python.unlink()
    daemon.signal(signal.SIGUSR2)
    daemon.wait_log("upgrade: failed")
    assert (daemon.pid, daemon.status()["generation"]) == (master, 1)
    assert echoes(client)
    assert echoes(site.greet()[0])


def test_file_broken_after_the_dry_run_leaves_the_old_generation(harness: Harness) -> None:
    site = Changing(harness)
    copy = site.bring_forkd()
    untouched = Untouched(site)
    daemon = site.daemon
    daemon.expect(r"forkd: tested\.yaml:\d+:1: wokers: unknown setting", "reload: failed, and nothing has changed: ")
    site.code("later", "import pathlib\nwith open('tested.yaml', 'a') as file:\n    file.write('wokers: 2\\n')\n")
    with (copy / "__init__.py").open("a") as later:
        later.write('__version__ = "99.0"\n')
    untouched.fail("upgrade", "breaks its file", r"tested\.yaml:\d+:1: wokers: unknown setting")
    assert daemon.status()["version"] == "99.0"
    untouched.end("upgrade")


def test_code_broken_after_the_dry_run_is_not_executed(harness: Harness) -> None:
    """As by a package manager that is just replacing the files."""
    site = Changing(harness)
    copy = site.bring_forkd()
    untouched = Untouched(site)
    site.daemon.expect("upgrade: failed, and nothing has changed: ")
    good = (copy / "errors.py").read_text()
    site.code("later", f"with open({str(copy / 'errors.py')!r}, 'w') as file:\n    file.write('class (')\n")
    untouched.fail("upgrade", "breaks the code", r"forkd/errors\.py has changed since it was tried; ask again")
    (copy / "errors.py").write_text(good)
    untouched.end("upgrade")


def test_new_image_enters_its_directory_though_the_file_broke(harness: Harness) -> None:
    place = harness.directory / "place"
    place.mkdir()
    site = Changing(harness, working_directory=str(place), workers=1)
    daemon = site.daemon.start()
    daemon.expect("wokers: unknown setting", "reload: failed, and nothing has changed: ", "killed by SIGKILL")
    site.code("later", f"with open({str(site.file)!r}, 'a') as file:\n    file.write('wokers: 2\\n')\n")
    assert daemon.command("upgrade").returncode == 1
    old = daemon.workers()[1]
    os.kill(old, signal.SIGKILL)
    assert os.readlink(f"/proc/{daemon.wait_workers(1, without={old})[1]}/cwd") == str(place)


def test_upgrade_of_what_does_not_run_fails(harness: Harness) -> None:
    result = Changing(harness).daemon.command("upgrade")
    assert (result.returncode, result.stderr) == (1, "forkd: tested is not running\n")
