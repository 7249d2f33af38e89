"""`forkd files` writes what comes with forkd, with the path of the command that writes it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forkd.cli import files, main
from forkd.cli.parser import SHELLS
from tests.support.daemon import forkd
from tests.support.paths import CHECKOUT


def test_files_are_those_of_the_checkout_with_the_commands_path(tmp_path: Path) -> None:
    result = forkd("files", tmp_path / "a/b", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    command = str(Path(sys.executable).with_name("forkd"))
    assert command in result.stdout
    for name in files.DIRECTORIES:
        for source in (CHECKOUT / name).iterdir():
            written = (tmp_path / "a/b" / name / source.name).read_text()
            assert written == source.read_text().replace("/usr/bin/forkd", command)
    assert f"ExecStart={command} run " in (tmp_path / "a/b/systemd/forkd@.service").read_text()
    assert {file.name for file in (tmp_path / "a/b/completions").iterdir()} == {f"forkd.{shell}" for shell in SHELLS}


def test_units_have_a_path_of_any_characters_as_one_word(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", '/opt/my 100% \\ "venv"/bin/python')
    assert main(["files", str(tmp_path)]) == 0
    unit = (tmp_path / "systemd/forkd@.service").read_text()
    assert 'ExecStart="/opt/my 100%% \\\\ \\"venv\\"/bin/python" -m forkd run ' in unit


def test_files_that_differ_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["files", str(tmp_path)]) == main(["files", str(tmp_path)]) == 0
    mine = tmp_path / "systemd" / "forkd@.service"
    mine.write_text("mine")
    (tmp_path / "etc/forkd/echo.yaml").unlink()
    assert main(["files", str(tmp_path)]) == 1
    assert f"they are there and differ: {mine}; move them" in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert not (tmp_path / "etc/forkd/echo.yaml").exists()


def test_files_that_can_not_be_written_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["files", str(tmp_path / "file/x")]) == 1
    assert capsys.readouterr().err == f"forkd: can't write the files: {tmp_path}/file/x/systemd: Not a directory\n"


def test_completions_without_shtab_say_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert "pip install '.[completion]' in forkd's checkout" in capsys.readouterr().err
    assert main(["files", str(tmp_path)]) == 0
    assert "pip install '.[completion]' in forkd's checkout" in capsys.readouterr().err
