"""The network namespace of another process: entered where that may be, and left again."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest
from controlled import in_child, went_well
from needs import needs_program, needs_root
from nobody import NOBODY
from processes import eventually, title

from forkd.errors import ForkdError
from forkd.system.netns import network_of


def namespace() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process of nobody's in a network namespace of its own."""
    needs_root()
    needs_program("setpriv")
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    with subprocess.Popen(["unshare", "--net", *drop, "cat"], stdin=subprocess.PIPE) as process:
        eventually(lambda: title(process.pid) == "cat", what="its start")
        yield process.pid
        process.communicate()


def test_within_it_sockets_are_of_that_namespace_and_after_it_of_ours_again(stranger: int) -> None:
    ours = namespace()
    with network_of(stranger):
        assert namespace() == os.stat(f"/proc/{stranger}/ns/net").st_ino != ours
        assert [name for _, name in socket.if_nameindex()] == ["lo"]
    assert namespace() == ours
    with pytest.raises(LookupError), network_of(stranger):
        raise LookupError
    assert namespace() == ours


def test_who_may_not_enter_it_is_told_so_in_one_sentence(stranger: int) -> None:
    def enter() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        said = f"process {stranger} is in another network namespace, which only root can enter: Operation not permitted"
        with pytest.raises(ForkdError, match=said), network_of(stranger):
            pass

    assert went_well(in_child(enter))


def test_our_own_and_that_of_a_process_that_does_not_show_it_is_where_we_are() -> None:
    ours = namespace()
    for pid in (os.getpid(), 1 << 22):
        with network_of(pid):
            assert namespace() == ours
