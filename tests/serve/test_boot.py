"""A worker that boots, in a process of its own: what can be had of it before it serves."""

from __future__ import annotations

import os
import select
import signal
from contextlib import ExitStack
from pathlib import Path

from forkd import signals
from forkd.config.address import parse_address
from forkd.config.listener import Listener
from forkd.config.settings import Settings
from forkd.serve.boot import boot_worker
from forkd.serve.worker import WorkerContext
from forkd.system.channel import channel_pair
from forkd.system.scoreboard import Scoreboard
from tests.support.forked import start_child
from tests.support.paths import HANDLERS
from tests.support.processes import DEADLINE


def test_stacks_of_a_worker_that_hangs_in_an_import(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    reader, writer = os.pipe()
    ours, theirs = channel_pair()

    def boot() -> None:
        os.chdir(tmp_path)
        os.dup2(writer, 2)
        listener = Listener(address=parse_address("unix:@nobody"), handler="gate:Echo")
        settings = Settings(listen=(listener,), python_path=(HANDLERS,))
        board = Scoreboard(1)
        boot_worker(WorkerContext(settings, [], 2, board, board.claim(), 1, theirs, os.getppid()))

    child = start_child(boot)
    os.close(writer)
    with ExitStack() as stack:
        stack.callback(ours.close)
        stack.callback(theirs.close)
        stack.enter_context(open(tmp_path / "gate", "wb"))  # when both have opened it, the import waits for a byte
        stack.callback(os.waitpid, child, 0)
        stack.callback(os.kill, child, signal.SIGKILL)
        pipe = stack.enter_context(open(reader, "rb", buffering=0))
        os.kill(child, signals.DUMP)
        stacks = b""
        while b"gate.py" not in stacks:
            assert select.select([pipe], [], [], DEADLINE)[0], stacks
            piece = pipe.read(65536)
            assert piece, stacks
            stacks += piece
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
