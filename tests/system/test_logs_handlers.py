"""What handlers do to logging does not silence forkd's log, nor does forkd take a handler's log away."""

from __future__ import annotations

import os
import signal

import pytest

from tests.support.clients import at_end, echoes
from tests.support.daemon import Harness

HOW = ("dictConfig", "asyncio", "basicConfig", "disable", "handlers")


@pytest.mark.parametrize("preload", ["false", "true"])
@pytest.mark.parametrize("how", HOW)
def test_log_stays_whatever_a_handler_configures(harness: Harness, how: str, preload: str) -> None:
    theirs = harness.directory / "theirs.log"
    daemon = harness.daemon(
        target="quiet:Quiet",
        workers=1,
        settings=(f"preload={preload}", "log.access=true"),
        environment={"QUIET": how, "QUIET_LOG": str(theirs)},
    ).run()
    daemon.expect("ValueError: told to", "killed by SIGKILL")
    client = harness.connect(daemon)
    client.sendall(b"fail")
    assert at_end(client)
    assert "ValueError: told to" in daemon.wait_log("protocol.data_received")
    assert "worker 1[" in daemon.wait_log("forkd.access")
    with harness.connect(daemon) as client:
        assert echoes(client, b"mine")
    if how in ("dictConfig", "asyncio", "basicConfig"):
        assert "said by the handler" in theirs.read_text()
        assert not any("said by the handler" in one for one in daemon.records())
    (pid,) = daemon.workers().values()
    os.kill(pid, signal.SIGKILL)
    daemon.wait_workers(1, without=[pid])
    assert sum("ValueError: told to" in one for one in daemon.records()) == 1
