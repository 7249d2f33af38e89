"""`forkd check` tries all that a start would need, changes nothing, and takes as long for many listeners as for one."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkd.app.check import check_addresses
from forkd.config.address import Address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.system import listeners
from tests.support.daemon import Harness, forkd

MANY = 100

# Settings of places that can't be had, and what is said of them; FILE is a file.
PLACES = {
    "run_directory=FILE/x": "run_directory: can't make the directory .*/x: .*/file is not a directory",
    "run_directory=FILE": "run_directory: .*/file is not a directory but should be",
    f"run_directory=/tmp/{'x' * 120}": "run_directory .* is too long",
    "working_directory=/nowhere/at/all": "can't change to working_directory /nowhere/at/all: No such file",
    "working_directory=FILE": "can't change to working_directory .*/file: Not a directory",
    "log.to=FILE/log": "log.to: can't open the log file .*/log: .*/file is not a directory",
    "log.to=/": "log.to: can't open the log file /: Is a directory",
}


@pytest.mark.parametrize("setting", PLACES)
def test_check_tries_the_places_of_a_daemon(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "file"
    file.touch()
    result = forkd("check", "--listen=tcp://127.0.0.1:0", "--set", setting.replace("FILE", str(file)), cwd=tmp_path)
    assert result.returncode == 78
    assert re.search(PLACES[setting], result.stderr), result.stderr
    assert "1 mistake in the settings" in result.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_check_makes_no_directory_and_no_log(tmp_path: Path) -> None:
    places = (f"--set=log.to={tmp_path}/a/b/log", f"--run-directory={tmp_path}/c/d")
    assert forkd("check", "--listen=tcp://127.0.0.1:0", *places, cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_check_of_a_running_daemon_finds_its_places_in_order(harness: Harness) -> None:
    daemon = harness.daemon(workers=1).start()
    result = daemon.command("check")
    assert result.returncode == 0, result.stderr


@pytest.fixture
def held() -> Iterator[list[Address]]:
    """Many addresses that this process listens on."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(MANY)]
        yield [Address("tcp", host="127.0.0.1", port=sock.getsockname()[1]) for sock in made]


def test_holders_of_many_addresses_are_found_in_one_pass(held: list[Address], monkeypatch: pytest.MonkeyPatch) -> None:
    read = listeners._proc_net_rows
    tables: list[str] = []

    def counted(table: str) -> Iterator[list[str]]:
        tables.append(table)
        return read(table)

    monkeypatch.setattr(listeners, "_proc_net_rows", counted)
    settings = Settings(listen=tuple(Listener(address=address, handler="forkd.builtin:Echo") for address in held))
    found = check_addresses(settings.listen, settings, set())
    assert [index for index, _ in found] == list(range(MANY))
    assert all(re.search(rf"is in use by .*, pid {os.getpid()}$", str(error)) for _, error in found)
    assert tables == ["tcp", "tcp6"]


def test_bad_module_of_many_listeners_is_imported_once(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("open('imports', 'a').write('x')\nraise ValueError('oh no')\n")
    (tmp_path / "a.yaml").write_text(
        "listen:\n"
        + "".join(f"  - {{address: 'unix:{tmp_path}/{index}', handler: 'bad:Handler'}}\n" for index in range(MANY))
    )
    result = forkd("check", "a.yaml", cwd=tmp_path)
    assert (tmp_path / "imports").read_text() == "x"
    assert result.stderr.count("Traceback") == 1
    assert result.stderr.count("handler: bad:Handler: importing bad failed: ValueError: oh no") == MANY


def test_handlers_have_no_terminal_in_a_check(tmp_path: Path) -> None:
    (tmp_path / "printing.py").write_text(
        "import os\n"
        "print('\\x1b]0;owned\\x07', [os.isatty(descriptor) for descriptor in range(3)])\n"
        "os.write(2, b'\\x9b31m')\n"
        "async def serve(reader, writer): pass\n"
    )
    code = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    check = ["-m", "forkd", "check", "printing:serve", "--listen=tcp://127.0.0.1:0"]
    result = subprocess.run(
        [sys.executable, "-c", code, sys.executable, *check],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    for said in (rb"\x1b]0;owned\x07 [False, False, False]", rb"\x9b31m"):
        assert said in result.stdout
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", result.stdout)
