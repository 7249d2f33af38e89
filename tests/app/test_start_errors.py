"""What goes wrong at a start: every reason reaches the terminal, and nothing is left behind.

The harness checks the second part after each test: no process, no file in the run directory, nothing in the log but
what the test expects. `check` and `restart` are here for the same mistakes.
"""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import dial, echoes
from tests.support.daemon import Daemon, Harness, forkd
from tests.support.processes import DEADLINE

# Source of the module `broken`, and what the terminal says of it.
BROKEN = {
    "raises": (
        "def f(): 1 / 0\nf()\n",
        ["importing broken failed: ZeroDivisionError", "line 1, in f"],
    ),
    "is no Python": ("Handler = (\n", ["SyntaxError", "broken.py"]),
    "calls sys.exit": ("raise SystemExit(3)\n", ["importing broken failed: SystemExit: 3"]),
    "lacks the attribute": ("", ["has no attribute 'Handler'"]),
    "has something else there": ("Handler = 7\n", ["broken:Handler is an int", "which is not callable"]),
    "has a class of another kind": ("class Handler: ...\n", ["does not host the class Handler"]),
    "wants an argument": ("def Handler(x): ...\n", ["called without arguments, but: missing a required argument: 'x'"]),
    "ends the process": ("import os\nos._exit(7)\n", ["ended before it was ready: exit status 7"]),
    "kills the process": ("import os\nos.kill(os.getpid(), 11)\n", ["ended before it was ready: killed by SIGSEGV"]),
}


@pytest.fixture(params=["start", "run"])
def verb(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def holder() -> Iterator[str]:
    """An address that this process holds."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"tcp://127.0.0.1:{sock.getsockname()[1]}"


def refuse(daemon: Daemon, verb: str, status: int = 1) -> str:
    """What a start that fails says."""
    result = daemon.command(verb)
    assert (result.returncode, result.stdout) == (status, "")
    assert result.stderr.splitlines()[-1].startswith("forkd: ")
    assert list(daemon.run_directory.glob("*")) == []
    return result.stderr


def test_limit_of_file_sizes_is_told_of(harness: Harness) -> None:
    options = ["--listen", "tcp://127.0.0.1:0", "--run-directory", harness.directory / "run"]
    command = ["prlimit", "--fsize=1000000", sys.executable, "-m", "forkd", "run", *map(str, options)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    said = "forkd: memory that workers share: File too large (ulimit -f)\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", said)
    assert list(harness.directory.glob("run/*")) == []


@pytest.mark.parametrize("why", BROKEN)
def test_handler_that_can_not_be_loaded_fails_the_start(harness: Harness, why: str) -> None:
    source, words = BROKEN[why]
    (harness.directory / "broken.py").write_text(source)
    daemon = harness.daemon(target="broken:Handler")
    daemon.expect(r"ended before it was ready" if "process" in why else r"could not boot: broken:Handler")
    said = refuse(daemon, "start")
    for word in words:
        assert word in said


def test_import_error_shows_only_the_users_traceback(harness: Harness, verb: str) -> None:
    (harness.directory / "broken.py").write_text("def fail():\n    raise OSError('no database')\n\nfail()\n")
    daemon = harness.daemon(target="broken:Handler")
    daemon.expect("could not boot")
    said = refuse(daemon, verb)
    assert said.startswith("Traceback (most recent call last):\n")
    assert f'File "{harness.directory}/broken.py", line 4, in <module>' in said
    assert "OSError: no database" in said
    assert "importlib" not in said
    assert "forkd/serve" not in said


def test_bad_handler_is_logged_once_for_all_workers(harness: Harness, verb: str) -> None:
    (harness.directory / "broken.py").write_text("raise OSError('no database')\n")
    daemon = harness.daemon(target="broken:Handler", workers=4)
    daemon.expect("could not boot")
    refuse(daemon, verb)
    records = [record for record in daemon.records() if "no database" in record]
    assert len(records) == 1, records
    assert len([record for record in daemon.records() if " ERROR " in record]) == 1


def test_handlers_own_missing_import_is_told_with_traceback(harness: Harness) -> None:
    (harness.directory / "broken.py").write_text("\nimport missing_by_its_own_fault\n")
    daemon = harness.daemon(target="broken:Handler")
    daemon.expect("could not boot")
    assert 'broken.py", line 2' in refuse(daemon, "start")


def test_missing_module_is_named_with_the_paths_searched(harness: Harness, verb: str) -> None:
    daemon = harness.daemon(target="nowhere.at_all:Handler")
    daemon.expect("could not boot")
    said = refuse(daemon, verb)
    assert "there is no module 'nowhere'" in said
    assert "python_path" in said
    assert "Traceback" not in said


def test_worker_that_is_not_ready_in_time_ends_the_start(harness: Harness, verb: str) -> None:
    os.mkfifo(harness.directory / "gate")
    daemon = harness.daemon(target="gate:Echo", workers=1, settings=("boot_timeout=300ms",))
    daemon.expect(
        "worker 1 .*boot_timeout; these are its stacks",
        "killing worker 1 .*boot_timeout",
        "has ended: killed by SIGKILL, it was not ready by its boot_timeout",
    )
    assert "not ready by its boot_timeout" in refuse(daemon, verb)


def test_address_in_use_is_named_with_who_holds_it(harness: Harness, verb: str, holder: str) -> None:
    said = refuse(harness.daemon(listen=(holder,)), verb)
    assert said.startswith(f"forkd: {holder} is in use by ")
    assert said.endswith(f", pid {os.getpid()}\n")


def test_another_daemons_address_is_named_with_its_title(harness: Harness) -> None:
    first = harness.daemon("first").start()
    address = first.address
    said = refuse(harness.daemon("second", listen=(address,)), "start")
    assert f"{address} is in use by forkd: first " in said
    assert echoes(harness.connect(first))


def test_foreign_address_is_told_to_be_one(harness: Harness) -> None:
    said = refuse(harness.daemon(listen=("tcp://192.0.2.1:0",)), "start")
    why = "192.0.2.1 is no address of this machine (freebind: true listens before it comes)"
    assert said == f"forkd: can't listen on tcp://192.0.2.1:0: {why}\n"


def test_unix_path_of_a_live_server_is_left_alone(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        said = refuse(harness.daemon(listen=(f"unix:{path}",)), "start")
        assert said.startswith(f"forkd: unix:{path} is in use by ")
        assert f"pid {os.getpid()}" in said
        dial(f"unix:{path}").close()
    path.unlink()


def test_unix_path_that_is_no_socket_is_left_as_it_is(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    said = refuse(harness.daemon(listen=(f"unix:{path}",)), "start")
    assert str(path) in said
    assert "not a socket" in said
    assert path.read_text() == "data"


def test_listener_that_fails_gives_the_earlier_ones_back(
    harness: Harness, verb: str, tmp_path: Path, holder: str
) -> None:
    refuse(harness.daemon(listen=(f"unix:{tmp_path / 'sock'}", holder)), verb)
    assert not (tmp_path / "sock").exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("log.to=/dev/null/log", "can't open the log file /dev/null/log: /dev/null is not a directory"),
        ("working_directory={}/gone", "{}/gone: No such file or directory"),
        ("listen.owner=nobody-of-this-name", "there is no user 'nobody-of-this-name' on this machine"),
    ],
)
def test_what_the_settings_point_to_must_be_there(harness: Harness, verb: str, setting: str, words: str) -> None:
    listen = f"unix:{harness.directory}/sock"
    daemon = harness.daemon(listen=(listen,), settings=(setting.format(harness.directory),))
    said = refuse(daemon, verb)
    assert words.format(harness.directory) in said
    assert "Error:" not in said
    assert not (harness.directory / "sock").exists()


def test_run_directory_that_can_not_be_made_is_told(harness: Harness, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    daemon = harness.daemon()
    daemon.run_directory = tmp_path / "file" / "run"
    daemon.identity[-1] = daemon.run_directory
    said = refuse(daemon, "start")
    assert f"{tmp_path}/file/run" in said
    assert "Not a directory" in said


def test_run_directory_that_others_may_write_is_refused(harness: Harness) -> None:
    daemon = harness.daemon()
    daemon.run_directory.mkdir()
    daemon.run_directory.chmod(0o777)
    said = refuse(daemon, "start")
    assert f"{daemon.run_directory} is open to others to write" in said


def test_every_mistake_in_a_file_is_told_with_its_place(harness: Harness, verb: str, tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    file.write_text(
        "wokers: 4\n"
        "listen:\n"
        "  - address: tcp://127.0.0.1:0\n"
        "    handler: forkd.builtin:Echo\n"
        "    backlog: many\n"
        "drain_timeout: 5\n"
    )
    said = refuse(harness.daemon(target=file, listen=()), verb, 78).splitlines()
    assert said[0] == f"{file}:1:1: wokers: unknown setting; did you mean 'workers'?"
    assert said[1].startswith(f"{file}:5:14: listen[0].backlog: 'many' is not a whole number")
    assert said[2].startswith(f"{file}:6:16: drain_timeout: '5' has no unit; did you mean 5s?")
    assert said[3:] == ["forkd: 3 mistakes in the settings"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["strat"], "there is no command 'strat'; did you mean 'start'?"),
        (["start", "--bogus"], "unrecognized arguments: --bogus"),
        (["start", "nothing-of-this-name"], "looked for /etc/forkd/nothing-of-this-name.yaml"),
        (["start", "--set", "workers"], "--set workers: write KEY=VALUE"),
        (["scale"], "the following arguments are required: N"),
        (["completion", "sh"], "invalid choice: 'sh'"),
    ],
)
def test_wrong_command_line_says_what_is_wrong_with_it(tmp_path: Path, words: list[str], said: str) -> None:
    result = forkd(*words, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (64, "")
    assert result.stderr.startswith("forkd: ")
    assert said in result.stderr


def test_check_finds_nothing_wrong_where_nothing_is(harness: Harness) -> None:
    daemon = harness.daemon()
    result = daemon.command("check")
    assert (result.returncode, result.stderr) == (0, "")
    assert not daemon.run_directory.exists()
    daemon.start()
    daemon.options.append(f"--listen={daemon.address}")
    assert daemon.command("check").returncode == 0, "a daemon's own address is no mistake"


def test_check_reports_settings_addresses_and_handlers_at_once(harness: Harness, tmp_path: Path, holder: str) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    file = tmp_path / "chat.yaml"
    file.write_text(
        "listen:\n"
        "  - address: 127.0.0.1:7007\n"
        "    handler: forkd.builtin:Echo\n"
        f"  - address: {holder}\n"
        "    handler: forkd.builtin:Echo\n"
        "  - address: tcp://127.0.0.1:0\n"
        "    handler: broken:Handler\n"
        "wokers: 2\n"
    )
    daemon = harness.daemon(target=file, listen=(), workers=None)
    result = daemon.command("check")
    assert (result.returncode, result.stdout) == (78, "")
    places = [line.split(": ")[0] for line in result.stderr.splitlines() if line.startswith(str(file))]
    assert sorted(places) == [f"{file}:2:14", f"{file}:4:14", f"{file}:7:14", f"{file}:8:1"]
    assert f"listen[1].address: {holder} is in use" in result.stderr
    assert "listen[2].handler: broken:Handler: importing broken failed: ZeroDivisionError" in result.stderr
    assert f'File "{tmp_path}/broken.py", line 1' in result.stderr
    assert not daemon.run_directory.exists()


@pytest.mark.parametrize("what", ["the file", "the handler", "an address"])
def test_restart_with_a_mistake_leaves_the_old_daemon_serving(
    harness: Harness, tmp_path: Path, what: str, holder: str
) -> None:
    file, module = tmp_path / "chat.yaml", tmp_path / "mine.py"
    text = "listen: [{{address: '{}', handler: 'mine:Echo'}}]\n"
    file.write_text(text.format("tcp://127.0.0.1:0"))
    module.write_text("from forkd.builtin import Echo\n")
    daemon = harness.daemon(target=file, listen=()).start()
    master, client = daemon.pid, harness.connect(daemon)
    if what == "the file":
        file.write_text("listen: [\n")
    elif what == "an address":
        file.write_text(text.format(holder))
    else:
        module.write_text("from forkd.builtin import Ecko\n")
    result = daemon.command("restart")
    assert result.returncode == 78
    assert "left alone" in result.stderr
    assert daemon.pid == master
    assert echoes(client)
    assert echoes(harness.connect(daemon))


def test_stop_finds_its_daemon_though_the_file_is_broken(harness: Harness, tmp_path: Path) -> None:
    file = tmp_path / "chat.yaml"
    good = "listen: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n"
    file.write_text(good)
    daemon = harness.daemon(target=file, listen=()).start()
    file.write_text(good + "wokers: 3\n")
    assert daemon.command("stop").returncode == 0


def test_stale_socket_of_a_dead_server_is_replaced(harness: Harness, tmp_path: Path) -> None:
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    daemon = harness.daemon(listen=(f"unix:{path}",)).start()
    assert echoes(harness.connect(daemon))


def test_check_survives_what_a_handler_writes_to_its_pipe(harness: Harness) -> None:
    (harness.directory / "noisy.py").write_text(
        "import os\nfrom forkd.builtin import Echo\n"
        "for one in map(int, os.listdir('/proc/self/fd')):\n"
        "    if one > 2:\n"
        "        try: os.write(one, b'[1]\\n')\n"
        "        except OSError: pass\n"
    )
    result = harness.daemon(target="noisy:Echo").command("check")
    assert result.returncode == 78
    assert "importing it ended the process, exit status 0" in result.stderr
    assert "Traceback" not in result.stderr
