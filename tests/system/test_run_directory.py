"""Where a daemon's run directory is, and what lies in it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from forkd.system.run_directory import RunDirectory, default_run_directory


def test_default_run_directory_depends_on_user_and_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_run_directory("x") == Path("/run/forkd/x")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert default_run_directory("x") == Path("/run/user/1000/forkd/x")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    assert default_run_directory("x") == tmp_path / "forkd-1000" / "x"


def test_a_run_directory_has_its_files_in_it(tmp_path: Path) -> None:
    run = RunDirectory("x", tmp_path)
    assert (run.name, run.path, run.control) == ("x", tmp_path, tmp_path / "control.sock")
    run.pid_file.acquire()
    run.pid_file.close()
    assert (tmp_path / "pid").exists()
