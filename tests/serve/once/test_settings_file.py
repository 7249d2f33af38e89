"""Single-connection mode as a settings file has it: `run` is then `once --foreground`, and `start` is `once`."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.clients import dial, echoes
from tests.support.once_process import OnceProcess

Make = Callable[..., OnceProcess]

FILE = """\
mode: once
listen:
  - address: tcp://127.0.0.1:0
    handler: forms:as_streams
once: {timeout: 20s, from: [127.0.0.0/8], adopt: yes, pid_file: one.pid}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tested.yaml"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize("verb", ["run", "start", "once"])
def test_a_file_of_mode_once_serves_one_client(single: Make, file: Path, verb: str) -> None:
    one = single(file, listen=None, verb=verb)
    if verb == "run":
        one.foreground()
    else:
        one.start()
    assert (file.parent / "one.pid").read_text() == f"{one.pid}\n"
    with dial(one.address) as client:
        assert client.makefile("rb").readline() == b"streams\n"
        assert echoes(client)
    assert one.status() == 0
    assert not (file.parent / "one.pid").exists()


def test_a_file_of_a_pool_can_be_served_to_one(single: Make, file: Path) -> None:
    file.write_text(file.read_text().replace("mode: once", "mode: pool"))
    one = single(file, listen=None).start()
    os.kill(one.pid, signal.SIGTERM)
    assert one.status() == 0


def test_check_tells_what_is_wrong_with_a_file(single: Make, file: Path) -> None:
    right = single(file, listen=None, verb="check").command()
    assert (right.returncode, right.stderr) == (0, "")
    file.write_text(FILE.replace("20s", "20").replace("127.0.0.0/8", "localhost"))
    wrong = single(file, listen=None, verb="check").command()
    assert wrong.returncode == 78
    assert "tested.yaml:5:17: once.timeout: '20' has no unit; did you mean 20s?" in wrong.stderr
    assert "tested.yaml:5:28: once.from[0]: 'localhost' is not a network; write an address or a netw" in wrong.stderr
