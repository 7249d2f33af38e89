"""Single-connection mode as root with a `user`: the process that serves is that user before it imports anything."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.clients import dial, echoes
from tests.support.daemon import forkd
from tests.support.needs import needs_python_for_all
from tests.support.processes import wait_end
from tests.support.unprivileged import NOBODY, status_of


@pytest.mark.parametrize("more", [[], ["--set", "no_new_privs=false"]])
def test_the_client_is_served_by_the_user_that_the_settings_name(tmp_path: Path, more: list[str]) -> None:
    needs_python_for_all()
    tmp_path.chmod(0o755)
    told = forkd(
        "once", "--listen", "tcp://127.0.0.1:0", "--log", tmp_path / "log", "--set", "user=nobody",
        "--set", "python_path=[/usr]", *more, cwd=Path("/"),
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    _, address, _, pid = told.stdout.split()
    with dial(address) as client:
        found = status_of(int(pid))
        assert found["Uid"].split() == [str(NOBODY)] * 4
        assert found["Groups"] == ""
        assert found["CapEff"] == found["CapBnd"] == "0" * 16
        assert found["NoNewPrivs"] == ("0" if more else "1")
        assert echoes(client)
    wait_end(int(pid))


def test_unknown_user_is_told_and_no_client_is_served(tmp_path: Path) -> None:
    told = forkd(
        "once", "--listen", "tcp://127.0.0.1:0", "--log", tmp_path / "log", "--set", "user=nobody-here",
        cwd=Path("/"),
    )  # fmt: skip
    assert told.returncode != 0
    assert "nobody-here" in told.stderr
    assert os.listdir(tmp_path) in ([], ["log"])
