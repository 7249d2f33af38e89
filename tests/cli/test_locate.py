"""Which daemon a command means, and where it is: asked by another user, in another environment, directory or file than
those that it was started with.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from forkd.cli import main
from tests.support.daemon import Harness, forkd
from tests.support.needs import needs_python_for_all
from tests.support.processes import DEADLINE

NOBODY = 65534
HANDLER = "from forkd.builtin import Echo\nclass Chat(Echo): pass\n"
LISTEN = "workers: 1\nlisten: [{address: 'tcp://127.0.0.1:0', handler: 'forkd.builtin:Echo'}]\n"


@dataclass
class Site:
    """A directory that all users can reach, and commands that are run there with nothing in their environment."""

    root: Path
    name: str = field(default_factory=lambda: f"t{os.getpid()}")

    def project(self, name: str, user: int = 0) -> Path:
        """A directory of a user with a handler `NAME:Chat` and a file `NAME.yaml`, NAME being the site's."""
        directory = self.root / name
        directory.mkdir()
        (directory / f"{self.name}.py").write_text(HANDLER)
        (directory / f"{self.name}.yaml").write_text(LISTEN)
        os.chown(directory, user, user)
        return directory

    def run(self, text: str, cwd: Path, user: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        command = [sys.executable, "-m", "forkd", *text.split()]
        clean = {"PATH": os.environ["PATH"], "HOME": str(cwd), "XDG_STATE_HOME": str(cwd), **environment}
        return subprocess.run(
            command, cwd=cwd, env=clean, user=user, group=user, extra_groups=[], capture_output=True, text=True,
            timeout=DEADLINE, check=False,
        )  # fmt: skip

    def start(self, text: str, cwd: Path, user: int = 0, **environment: str) -> int:
        """Starts a daemon; its pid."""
        result = self.run(f"start {text} --set log.to={cwd}/log --workers 1", cwd, user, **environment)
        assert result.returncode == 0, result.stderr
        return int(result.stdout.split("pid ")[1].split(",")[0])

    def says(self, text: str, cwd: Path, user: int = 0) -> tuple[int, str]:
        """The exit status of a command, and what it has said on either stream."""
        result = self.run(text, cwd, user)
        return result.returncode, result.stdout + result.stderr


@pytest.fixture
def site(harness: Harness, open_directory: Path) -> Iterator[Site]:
    needs_python_for_all()
    with ExitStack() as stack:
        made = Site(open_directory)
        for place in (Path("/run/forkd", made.name), Path(f"/tmp/forkd-{NOBODY}", made.name)):
            stack.callback(shutil.rmtree, place, ignore_errors=True)
        yield made


def test_commands_find_a_daemon_of_another_environment(site: Site) -> None:
    home = site.project("home", NOBODY)
    pid = site.start(f"{site.name}.yaml", home, NOBODY, XDG_RUNTIME_DIR=str(home))
    for text in (f"status {site.name}.yaml --json", f"status {site.name} --json", f"status --name {site.name} --json"):
        result = site.run(text, home, NOBODY)
        assert (result.returncode, json.loads(result.stdout)["pid"]) == (0, pid), result.stderr
    assert site.says(f"reload {site.name}.yaml", home, NOBODY)[0] == 0
    assert site.says(f"stop {site.name}.yaml", home, NOBODY) == (0, f"{site.name} stopped, pid {pid}\n")


def test_start_finds_a_daemon_of_another_environment(site: Site) -> None:
    home = site.project("home", NOBODY)
    pid = site.start(f"{site.name}.yaml", home, NOBODY)
    result = site.run(f"start {site.name}.yaml", home, NOBODY, XDG_RUNTIME_DIR=str(home))
    assert (result.returncode, result.stdout) == (0, f"{site.name} is already running, pid {pid}\n")
    restarted = site.run(f"restart {site.name}.yaml", home, NOBODY, XDG_RUNTIME_DIR=str(home))
    assert restarted.returncode == 0, restarted.stderr
    assert f"{site.name} restarted, pid " in restarted.stdout
    assert site.says(f"upgrade {site.name}", home, NOBODY)[0] == 0
    assert site.says(f"stop {site.name}", home, NOBODY)[0] == 0


def test_another_user_is_told_that_it_runs_with_status_4(site: Site) -> None:
    home, other = site.project("home"), site.project("other", NOBODY)
    pid = site.start(f"{home}/{site.name}.yaml", home)
    for verb in ("status", "stop", "reload", "upgrade", "clients", "restart", "scale", "doctor", "logs", "top"):
        number = " 2" if verb == "scale" else ""
        status, said = site.says(f"{verb} {home}/{site.name}.yaml{number}", other, NOBODY)
        why = f"this user may not ask it at /run/forkd/{site.name}/control.sock"
        assert (status, said) == (4, f"forkd: {site.name} runs, pid {pid}, but {why}\n"), verb
    assert site.says(f"status {site.name}", home)[0] == 0
    assert site.says(f"stop {site.name}", home)[0] == 0


def test_root_finds_the_daemon_of_another_user(site: Site) -> None:
    home, other = site.project("home", NOBODY), site.project("other")
    pid = site.start(f"{site.name}.yaml", home, NOBODY)
    assert site.says(f"status {site.name}", other)[0] == 0
    assert site.says(f"stop {site.name}", other) == (0, f"{site.name} stopped, pid {pid}\n")


@pytest.mark.parametrize("breaking", ["a: [", None])
def test_daemon_is_found_by_a_file_that_is_broken_or_gone(site: Site, breaking: str | None) -> None:
    home = site.project("home")
    file = home / f"{site.name}.yaml"
    file.write_text(f"{LISTEN}name: {site.name}-x\nrun_directory: {home}/run\n")
    pid = site.start(str(file), home)
    file.unlink() if breaking is None else file.write_text(breaking)
    assert site.says(f"status {file}", home)[0] == 0
    assert site.says(f"stop {file}", home) == (0, f"{site.name}-x stopped, pid {pid}\n")


def test_stop_by_a_renamed_file_is_no_success(site: Site) -> None:
    home = site.project("home")
    pid = site.start(f"{site.name}.yaml", home)
    (home / f"{site.name}.yaml").rename(home / "talk.yaml")
    for verb in ("stop", "status"):
        status, said = site.says(f"{verb} talk.yaml", home)
        assert status == 1
        assert f"talk is not running under this name, but {site.name} runs, pid {pid}, whose file {home}/" in said
    other = site.root / "other"
    other.mkdir()
    (other / "unrelated.yaml").write_text(LISTEN)
    assert site.says("status unrelated.yaml", other)[0] == 3  # a file elsewhere with another name is another daemon's
    assert site.says(f"stop {site.name}", home)[0] == 0


def test_stop_says_where_it_looked(site: Site) -> None:
    home = site.project("home", NOBODY)
    places = f"/tmp/forkd-{NOBODY}/{site.name}, /run/user/{NOBODY}/forkd/{site.name} and /run/forkd/{site.name}"
    assert site.says(f"stop {site.name}", home, NOBODY) == (0, f"{site.name} is not running; looked for in {places}\n")
    said = f"{site.name} is stopped; looked for in {places}\n"
    assert site.says(f"status {site.name}", home, NOBODY) == (3, said)


@pytest.mark.parametrize("suffix", [":Chat", ".yaml"])
def test_other_project_of_the_same_name_is_left_alone(site: Site, suffix: str) -> None:
    first, second = site.project("first"), site.project("second")
    target, name = f"{site.name}{suffix}", f"{site.name}{suffix}".removesuffix(".yaml").replace(":", ".")
    listen = " --listen tcp://127.0.0.1:0" if suffix == ":Chat" else ""
    pid = site.start(target + listen, first)
    starting, others = ("start", "restart", "run"), ("stop", "reload", "upgrade", "clients", "scale", "status")
    for verb in (*starting, *others):
        wanted, more = 4 if verb == "status" else 1, " 2" if verb == "scale" else listen if verb in starting else ""
        status, said = site.says(f"{verb} {target}{more}", second)
        assert (status, f"{name} runs, pid {pid}" in said, str(first) in said, str(second) in said) == (
            wanted, True, True, True,
        ), (verb, said)  # fmt: skip
    assert site.says(f"scale {target} 2", first) == (0, f"{name} has 2 workers\n")
    assert site.says(f"status {target}", first)[0] == 0
    assert site.says(f"stop --name {name}", second) == (0, f"{name} stopped, pid {pid}\n")
    shutil.rmtree(f"/run/forkd/{name}", ignore_errors=True)


def test_other_users_can_not_hold_a_start_up(site: Site) -> None:
    home, other = site.project("home"), site.project("other", NOBODY)
    site.start(f"{site.name}.yaml", home)
    pid_file = Path("/run/forkd", site.name, "pid")
    assert pid_file.stat().st_mode & 0o777 == 0o600
    code = f"open({str(pid_file)!r})"
    result = subprocess.run([sys.executable, "-c", code], user=NOBODY, cwd=other, capture_output=True, check=False)
    assert b"PermissionError" in result.stderr
    assert site.says(f"stop {site.name}", home)[0] == 0


FAKE = """
import fcntl, json, socket, sys
from pathlib import Path
run = Path(sys.argv[1])
run.mkdir(exist_ok=True)
sock = socket.socket(socket.AF_UNIX)
sock.bind(str(run / "control.sock"))
(run / "control.sock").chmod(0o777)
sock.listen()

pid = (run / "pid").open("w")
pid.write("1\\n"); pid.flush(); (run / "pid").chmod(0o644)
fcntl.flock(pid, fcntl.LOCK_EX)
print("ready", flush=True)
while True:
    client = sock.accept()[0]
    if not client.recv(1000):
        continue
    status = {"pid": 1, "state": "running", "name": "x", "source": ""}
    client.sendall(json.dumps({"ok": True, "status": status}).encode() + b"\\n")
"""


@pytest.mark.parametrize("own", [True, False], ids=["its own directory", "our directory"])
def test_who_sits_at_the_control_path_is_not_trusted(site: Site, own: bool) -> None:
    home = site.project("home")
    run = site.root / "run"
    run.mkdir()
    os.chown(run, NOBODY, -1)
    command = [sys.executable, "-c", FAKE, str(run)]
    with subprocess.Popen(command, user=NOBODY, cwd=site.root, stdout=subprocess.PIPE) as fake:
        try:
            assert fake.stdout is not None
            assert fake.stdout.readline() == b"ready\n"
            if not own:
                os.chown(run, 0, -1)
            where = f"--name x --run-directory {run}"
            status, said = site.says(f"start forkd.builtin:Echo --listen tcp://127.0.0.1:0 {where}", home)
            assert (status in (1, 78), "running" in said) == (True, False), said
            status, said = site.says(f"restart forkd.builtin:Echo --listen tcp://127.0.0.1:0 {where}", home)
            assert (status in (1, 78), "restarted" in said) == (True, False), said
            if not own:
                status, said = site.says(f"status {where}", home)
                assert (status, f"user {NOBODY} answers at {run}/control.sock" in said) == (1, True), said
        finally:
            fake.kill()


@pytest.mark.parametrize("verb", ["status", "stop"])
def test_directory_is_no_daemons_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    assert main([verb, str(tmp_path)]) == os.EX_USAGE
    assert f"{tmp_path} is a directory; name a settings file, or --run-directory {tmp_path}" in capsys.readouterr().err


def test_run_directory_alone_says_which_daemon_is_meant(harness: Harness) -> None:
    daemon = harness.daemon(name="odd").start()
    for verb, said in (("drain", "odd drained"), ("resume", "odd resumed"), ("scale 1", "odd has 1 worker")):
        done = forkd(*verb.split(), "--run-directory", daemon.run_directory, cwd=harness.directory)
        assert done.stdout.startswith(said), done
    done = forkd("stop", "--run-directory", daemon.run_directory, cwd=harness.directory)
    assert done.stdout.startswith("odd stopped"), done
