"""Functions that run in a forked child, which may change itself for good and never returns to the test's own stack."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any

from tests.support.processes import DEADLINE, wait_end


class ChildFailed(Exception):
    """What the child raised, as `TYPE: MESSAGE`."""


def start_child(function: Callable[[], object]) -> int:
    """Forks a child that calls a function and ends.

    Returns:
        Its pid. Its exit status is what the function returns, where that is a number, else 0; it is 1, with the
        traceback on standard error, if the function raises.
    """
    if pid := os.fork():
        return pid
    status = 1
    try:
        value = function()
        status = value if isinstance(value, int) else 0
    except BaseException:  # noqa: BLE001 (the child ends here, whatever it was)
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def exit_code(pid: int) -> int:
    """Waits for a child's end: its exit status, or, if a signal ended it, that signal's negative number."""
    try:
        wait_end(pid)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def run_in_child(function: Callable[[], Any]) -> Any:
    """What a function returns in a child, by way of JSON.

    Raises:
        ChildFailed: the function raised something, or the child died.
    """
    reader, writer = os.pipe()

    def work() -> None:
        try:
            result = {"value": function()}
        except BaseException as error:  # noqa: BLE001 (it is the parent's to judge)
            result = {"error": f"{type(error).__name__}: {error}"}
        os.write(writer, json.dumps(result).encode())

    child = start_child(work)
    os.close(writer)
    try:
        with open(reader, "rb") as pipe:
            assert select.select([pipe], [], [], DEADLINE)[0], "the child hangs"
            result = json.loads(pipe.read() or b'{"error": "it died"}')
    finally:
        exit_code(child)
    if "error" in result:
        raise ChildFailed(result["error"])
    return result["value"]
