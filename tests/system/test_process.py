"""What a process says of itself: its stacks, whatever it is held up by, and its memory."""

from __future__ import annotations

import mmap
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forkd import signals
from forkd.system.proc import resident_memory
from tests.support.processes import DEADLINE

STUCK = """
import functools, os, sys, threading
from forkd import signals
from forkd.system.process import dump_stacks_on

def waits_for_a_lock():
    started.set()
    lock.acquire()

def counts_in_c():
    print("stuck", flush=True)
    sum(iter(functools.partial(os.access, sys.argv[1], os.F_OK), True))  # no line of Python runs meanwhile

started, lock = threading.Event(), threading.Lock()
lock.acquire()
dump_stacks_on(signals.DUMP)
{then}
threading.Thread(target=waits_for_a_lock, daemon=True).start()
started.wait()
counts_in_c()
print("lives on")
"""

CRASH = """
import ctypes, resource
from forkd import signals
from forkd.system.process import dump_stacks_on

def follows_a_null_pointer():
    ctypes.string_at(0)

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
dump_stacks_on(signals.DUMP)
follows_a_null_pointer()
"""


@pytest.mark.parametrize("then", ["", "os.close(2)", "os.dup2(os.open(os.devnull, os.O_WRONLY), 2)"])
def test_stacks_are_written_while_python_can_not_run(tmp_path: Path, then: str) -> None:
    end = tmp_path / "end"
    command = [sys.executable, "-c", STUCK.format(then=then), str(end)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == b"stuck\n"
            process.send_signal(signals.DUMP)
            stacks = b""
            while b"in counts_in_c" not in stacks:
                assert select.select([process.stderr], [], [], DEADLINE)[0], stacks
                piece = os.read(process.stderr.fileno(), 65536)
                assert piece, stacks
                stacks += piece
            end.touch()
            said, rest = process.communicate(timeout=DEADLINE)
        finally:
            process.kill()
    assert (said, process.returncode) == (b"lives on\n", 0)
    stacks += rest
    assert stacks.count(b"most recent call first") == 2
    assert b"in waits_for_a_lock" in stacks


def test_a_crash_leaves_its_stacks_and_is_a_crash_all_the_same() -> None:
    result = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, timeout=DEADLINE, check=False)
    assert result.returncode == -signal.SIGSEGV
    assert b"Fatal Python error: Segmentation fault" in result.stderr
    assert b"in follows_a_null_pointer" in result.stderr


def test_stacks_without_a_stderr_raise() -> None:
    program = "import os; from forkd.system.process import dump_stacks_on as dump; os.close(2)\ntry: dump(34)\n"
    program += "except OSError as error: print(error.errno)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=DEADLINE, check=False)
    assert result.stdout == b"9\n"


def test_the_resident_memory_grows_by_what_is_touched() -> None:
    before = resident_memory()
    assert before > 1 << 20
    with mmap.mmap(-1, 32 << 20) as memory:
        assert resident_memory() - before < 24 << 20  # it is there, but was not touched
        memory.write(bytes(len(memory)))
        assert resident_memory() - before > 24 << 20
    assert resident_memory() - before < 24 << 20


def test_resident_memory_is_0_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert resident_memory() == 0
