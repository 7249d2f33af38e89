"""The network namespace of another process: entered where that may be, and left again."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

from forkd.errors import ForkdError
from forkd.system.proc import network_namespace_of
from tests.support.forked import exit_code, start_child
from tests.support.needs import needs_program, needs_root
from tests.support.processes import eventually, title
from tests.support.unprivileged import NOBODY


def namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process of another user in a network namespace of its own."""
    needs_root()
    needs_program("setpriv")
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    with subprocess.Popen(["unshare", "--net", *drop, "cat"], stdin=subprocess.PIPE) as process:
        eventually(lambda: title(process.pid) == "cat", what="its start")
        yield process.pid
        process.communicate()


def test_sockets_are_of_the_namespace_within_the_context(stranger: int) -> None:
    ours = namespace()
    with network_namespace_of(stranger):
        assert namespace() == os.stat(f"/proc/{stranger}/ns/net").st_ino != ours
        assert [name for _, name in socket.if_nameindex()] == ["lo"]
    assert namespace() == ours
    with pytest.raises(LookupError), network_namespace_of(stranger):
        raise LookupError
    assert namespace() == ours


def test_user_that_may_not_enter_is_told_in_one_sentence(stranger: int) -> None:
    def enter() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        said = f"process {stranger} is in another network namespace, which only root can enter: Operation not permitted"
        with pytest.raises(ForkdError, match=said), network_namespace_of(stranger):
            pass

    assert exit_code(start_child(enter)) == 0


def test_own_or_hidden_namespace_changes_nothing() -> None:
    ours = namespace()
    for pid in (os.getpid(), 1 << 22):
        with network_namespace_of(pid):
            assert namespace() == ours
