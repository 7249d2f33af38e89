"""The pictures of docs/pictures: the same each time, of a daemon that tells what a real one does."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from tests.support import example_daemon, pictures
from tests.support.admin import ask
from tests.support.clients import echoes
from tests.support.daemon import Harness
from tests.support.paths import CHECKOUT


def keys_of(value: Any, at: str = "") -> set[str]:
    """The paths of all keys; in lists, of all that is in them."""
    if isinstance(value, dict):
        return {name for key, one in value.items() for name in (f"{at}.{key}", *keys_of(one, f"{at}.{key}"))}
    return {name for one in value for name in keys_of(one, at)} if isinstance(value, list) else set()


def test_pictures_are_the_same_each_time(tmp_path: Path) -> None:
    made = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        texts = pictures.make(tmp_path / name)
        made.append({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {file.name for file in (CHECKOUT / "docs/pictures").iterdir()}
    assert "chat running · ready 4 of 4 workers" in texts[0] == texts[1]
    assert "chat: running, pid 4709" in texts[2]
    assert [word for word in (os.uname().nodename, str(CHECKOUT), str(tmp_path)) if word in " ".join(texts)] == []


def test_example_tells_what_a_real_daemon_does(harness: Harness) -> None:
    daemon = harness.daemon(settings=("admin.address=tcp://127.0.0.1:0",)).start()
    daemon.expect("has ended: killed by SIGKILL")
    assert daemon.command("reload").returncode == 0
    victim = daemon.workers()[1]
    os.kill(victim, signal.SIGKILL)
    daemon.wait_workers(2, without={victim})
    client = harness.connect(daemon)
    assert echoes(client)
    real = {
        "status": json.loads(daemon.command("status", "--json").stdout),
        "history": json.loads(ask(daemon, "/history.json").body),
        "clients": json.loads(ask(daemon, "/clients.json").body),
    }
    example = {name: getattr(example_daemon, name)() for name in real}
    other = {".status.last_failure.time", ".status.last_failure.text"}  # these are looked at by the test of the status
    other |= {".status.listeners.certificates.names", ".status.listeners.certificates.expires"}
    assert keys_of(example) - keys_of(real) == other
