"""`forkd init` begins a project that works as it stands; `forkd run --reload` takes up what changes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from forkd.cli import main
from tests.support.clients import dial, read, refuses, unshared_port
from tests.support.daemon import forkd
from tests.support.needs import needs_package, needs_program
from tests.support.processes import DEADLINE, descendants, eventually


@pytest.fixture
def project(tmp_path: Path) -> Path:
    result = forkd("init", "chat-room", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    return tmp_path / "chat-room"


def test_project_is_in_order_and_its_test_passes(project: Path) -> None:
    names = ["chat_room.py", "chat_room.service", "chat_room.yaml", "test_chat_room.py"]
    assert sorted(path.name for path in project.iterdir()) == names
    assert not [path for path in project.iterdir() if "@" in path.read_text().replace("@pytest", "")]
    found = forkd("check", "chat_room.yaml", "--listen", "tcp://127.0.0.1:0", cwd=project)
    assert (found.returncode, found.stderr) == (0, "")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", "."]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST")}
    ran = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_project_is_in_order_wherever_it_is(tmp_path: Path) -> None:
    directory = tmp_path / """a, b]: #$HOME %n 'c' "d" \\é;""" / "chat_room"
    assert main(["init", str(directory)]) == 0
    found = forkd("check", "chat_room.yaml", "--listen", "tcp://127.0.0.1:0", cwd=directory)
    assert (found.returncode, found.stderr) == (0, "")
    unit = (directory / "chat_room.service").rename(tmp_path / "chat_room.service").read_text()
    (word,) = re.findall(r"forkd run (.*) --run-directory", unit)
    assert word.replace("%%", "%").replace("$$", "$") == json.dumps(
        str(directory / "chat_room.yaml"), ensure_ascii=False
    )
    test_unit_of_a_project_is_taken_by_systemd(tmp_path)


def test_unit_of_a_project_is_taken_by_systemd(project: Path) -> None:
    needs_program("systemd-analyze")
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(project / "chat_room.service")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert [line for line in ran.stderr.splitlines() if "chat_room" in line] == []


def test_what_is_there_is_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "chat_room.py").write_text("mine")
    (project / "chat_room.yaml").unlink()
    assert main(["init", str(project)]) == 1
    assert re.fullmatch(
        r"forkd: left alone, since they are there: .*; name another directory\n", capsys.readouterr().err
    )
    assert (project / "chat_room.py").read_text() == "mine"
    assert not (project / "chat_room.yaml").exists()


@pytest.mark.parametrize("name", ["9lives", "a b", "class", "a.b"])
def test_directory_that_names_no_module_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["init", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err == (f"forkd: {name!r} can't be a Python module's name; name another directory\n")
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["forkd", "json", "pytest"])
def test_directory_with_the_name_of_a_module_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert main(["init", str(tmp_path / name)]) == 1
    said = f"forkd: there is another Python module {name!r} already; name another directory\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / name).exists()


def test_directory_that_can_not_be_printed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(tmp_path / "\udce9" / "chat")]) == 1
    assert "\\udce9/chat' can't stand in a settings file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# run --reload


class Running:
    """`forkd run --reload` of a project; `prefix` is what it is run by."""

    def __init__(self, project: Path, prefix: Sequence[str] = ()) -> None:
        needs_package("watchfiles")
        self.project, self.address = project, f"tcp://127.0.0.1:{unshared_port()}"
        self.settings = project / "chat_room.yaml"
        self.settings.write_text(self.settings.read_text().replace("tcp://127.0.0.1:7007", self.address))
        self.log = project.parent / "log"
        command = [*prefix, sys.executable, "-m", "forkd", "run", "--reload", "chat_room.yaml", "--run-directory", ".."]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=project, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        self.wait("daemon is up")

    def wait(self, text: str, times: int = 1) -> None:
        eventually(lambda: self.log.read_text().count(text) >= times or self.process.poll() is not None, what=text)
        assert self.log.read_text().count(text) == times, self.log.read_text()

    def says(self) -> bytes:
        with dial(self.address) as client:
            client.sendall(b"hello\n")
            return read(client, 6)

    def code(self, before: str, after: str) -> None:
        path = self.project / "chat_room.py"
        path.write_text(path.read_text().replace(before, after))


@contextlib.contextmanager
def reloading(project: Path, prefix: Sequence[str] = ()) -> Iterator[Running]:
    made = Running(project, prefix)
    below = descendants(made.process.pid)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait(DEADLINE)
        # The daemon's parent has died, and so it ends too.
        eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in below), what="the daemon's end")


@pytest.fixture
def running(project: Path) -> Iterator[Running]:
    with reloading(project) as made:
        yield made


def test_change_of_code_or_settings_reloads(running: Running) -> None:
    assert running.says() == b"HELLO\n"
    running.code("line.upper()", "line.title()")
    eventually(lambda: running.says() == b"Hello\n")
    running.code("line.title()", "line.title(")
    running.wait("reload: failed, and nothing has changed")
    assert "SyntaxError" in running.log.read_text()
    assert running.says() == b"Hello\n"
    running.code("line.title(", "line.swapcase()")
    eventually(lambda: running.says() == b"HELLO\n")
    changed = running.project / "new.yaml"  # as editors do it
    changed.write_text(running.settings.read_text().replace("workers: 2", "workers: 1"))
    changed.replace(running.settings)
    status = ("status", "chat_room.yaml", "--run-directory", "..", "--json")
    eventually(lambda: '"wanted": 1' in forkd(*status, cwd=running.project).stdout)


def test_directory_that_can_not_be_read_is_not_watched(project: Path) -> None:
    (project / "private").mkdir(mode=0)
    needs_program("setpriv")  # root may read it, but for these capabilities
    prefix = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
    with reloading(project, prefix) as running:
        running.code("line.upper()", "line.title()")
        eventually(lambda: running.says() == b"Hello\n")
        assert running.process.poll() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_end_is_passed_on(running: Running, number: int) -> None:
    running.process.send_signal(number)
    assert running.process.wait(DEADLINE) == 0
    assert refuses(running.address)


def test_mistake_in_the_settings_is_told_before_a_start(project: Path) -> None:
    needs_package("watchfiles")
    with (project / "chat_room.yaml").open("a") as file:
        file.write("wrong: 1\n")
    found = forkd("run", "--reload", "chat_room.yaml", cwd=project)
    assert found.returncode == 78
    assert "chat_room.yaml" in found.stderr


def test_missing_package_is_told(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    with contextlib.chdir(project):
        assert main(["run", "--reload", "chat_room.yaml"]) == 1
    said = "forkd: --reload needs a package that watches files: "
    said += f"{sys.executable} -m pip install 'forkd-server[reload]'\n"
    assert capsys.readouterr().err == said
