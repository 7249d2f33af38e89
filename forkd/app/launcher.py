"""A process that is started in the background, and its starter, who learns that it serves, or why not.

The starter makes a pipe and forks. The child says one thing on it, and closes it: that it is ready, or what was wrong.
End of file without a word means that it died.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from forkd.errors import BootError, ForkdError

log = logging.getLogger("forkd")


class Launcher:
    """The starter, as the child sees it: who waits at the other end of the pipe.

    Attributes:
        writer: the pipe's descriptor; -1 when all is said.
    """

    def __init__(self, writer: int) -> None:
        self.writer = writer

    def say(self, message: dict[str, Any]) -> bool:
        """Tells, once; whether anybody was there to hear it."""
        heard = False
        if self.writer >= 0:
            with contextlib.suppress(OSError):  # the launcher may have been interrupted
                os.write(self.writer, json.dumps(message).encode())
                heard = True
            self.hang_up()
        return heard

    def failed(self, error: ForkdError) -> None:
        """Tells why not."""
        self.say({"reason": str(error), "details": getattr(error, "details", ""), "status": error.status})

    def hang_up(self) -> None:
        """Closes the pipe without a word; for a worker, which would keep it open."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


@dataclass(frozen=True, slots=True)
class Child:
    """The child, as the starter sees it.

    Attributes:
        pid: its process.
        reader: the pipe's other end.
    """

    pid: int
    reader: int

    def hear(self, seconds: float | None = None) -> dict[str, Any]:
        """What it says when it is ready; one that does not become ready has ended when this raises.

        Args:
            seconds: how long it may take; then it is killed. None: for ever.

        Raises:
            BootError: it says why not, or nothing; with its own exit status.
        """
        words, late = read_until(self.reader, seconds)
        if late:
            os.kill(self.pid, signal.SIGKILL)
            words = json.dumps({"reason": "importing the handler took longer than boot_timeout", "status": 1}).encode()
        message: dict[str, Any] = json.loads(words) if words else {"reason": "it ended without a word", "status": 1}
        if "reason" in message:
            self.wait()
            error = BootError(message["reason"], message.get("details", ""))
            error.status = message["status"]
            raise error
        return message

    def wait(self) -> None:
        """Waits until it has ended, if it was not waited for yet."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def fork_off(work: Callable[[Launcher], int]) -> Child:
    """Forks a child that does its work to the end, and exits with the status that this returns. Raises ForkdError."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        raise ForkdError(f"can't start a process: {error.strerror}") from None
    if pid == 0:
        os.close(reader)
        _end_in(work, Launcher(writer))
    os.close(writer)
    return Child(pid, reader)


def _end_in(work: Callable[[Launcher], int], launcher: Launcher) -> NoReturn:
    status = 1
    try:
        status = work(launcher)
    except ForkdError as error:
        launcher.failed(error)
        status = error.status
    except BaseException as error:  # (a daemon has no terminal: its launcher and its log are its border)
        log.critical("ends by an exception", exc_info=True)
        launcher.failed(BootError(f"{type(error).__name__}: {error}"))
    finally:
        os._exit(status)


def read_until(descriptor: int, seconds: float | None) -> tuple[bytes, bool]:
    """What comes up to the end of file, and whether that did not come in time; closes the descriptor."""
    deadline = None if seconds is None else time.monotonic() + seconds
    words = b""
    with open(descriptor, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], None if deadline is None else max(0.0, deadline - time.monotonic()))[0]:
            portion = pipe.read(65536)
            if not portion:
                return words, False
            words += portion
    return words, True
