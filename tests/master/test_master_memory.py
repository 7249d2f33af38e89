"""The master's memory: what its children's ends and its changes leave of garbage, and that it is collected."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.support.daemon import Harness
from tests.support.processes import eventually

#: Imported by the master: it writes down how many objects each full collection there has found.
COLLECTIONS = """
import gc, os
from forkd.builtin import Echo
PID = os.getpid()

def note(phase, found):
    if phase == "stop" and found["generation"] == 2 and os.getpid() == PID:
        with open({path!r}, "a") as file:
            file.write(f"{{found['collected']}}\\n")

gc.callbacks.append(note)
"""


def test_master_collects_garbage_after_each_change_and_exit(harness: Harness, tmp_path: Path) -> None:
    found = tmp_path / "collections"
    (tmp_path / "watched.py").write_text(COLLECTIONS.format(path=str(found)))
    daemon = harness.daemon(target="watched:Echo", workers=1, settings=("preload=true",)).start()
    daemon.expect("worker 1 .* killed by SIGKILL")

    def check(before: list[str]) -> None:
        eventually(lambda: len(found.read_text().splitlines()) > len(before), what="a collection")
        assert all(int(one) < 50 for one in found.read_text().splitlines()[len(before) :]), "much garbage in cycles"

    before, former = found.read_text().splitlines(), daemon.workers()
    assert daemon.command("reload").returncode == 0
    last = daemon.wait_workers(1, without=former.values())
    check(before)
    before = found.read_text().splitlines()
    os.kill(last[1], signal.SIGKILL)
    daemon.wait_workers(1, without=last.values())
    check(before)
