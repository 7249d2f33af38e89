"""Starts a process in the background, and waits until it is ready or tells why it can't be.

`fork_off` makes a pipe and forks. The child has its end of it as a `Launcher`, sends one message (`LaunchMessage`) and
closes it; end of file without a message means that the child has ended. The starting process has a `Child`, whose
`wait_ready` returns that message. Used by `app.daemon` and `app.once`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar, cast

from forkd import LONGEST_WAIT
from forkd.errors import BootError, ForkdError, is_bug, system_reason
from forkd.messages import InvalidMessage, LaunchFailed, LaunchMessage, decode_launch, encode
from forkd.system.channel import wait_ready
from forkd.system.process import finish_interpreter, flush_output

log = logging.getLogger("forkd")

#: Seconds that threads and atexit functions have at the end of a process that has no deadline of its own.
FINISH_SECONDS = 0.7

M = TypeVar("M", bound=LaunchMessage)


class Launcher:
    """The starting process, as the child sees it: it waits at the other end of the pipe.

    Attributes:
        writer: the pipe's descriptor; -1 when the message is sent.
    """

    def __init__(self, writer: int) -> None:
        self.writer = writer

    def tell(self, message: LaunchMessage) -> bool:
        """Sends the message, once; whether the starting process was there to read it."""
        sent = False
        if self.writer >= 0:
            with contextlib.suppress(OSError):  # the starting process may have been interrupted
                os.write(self.writer, encode(message))
                sent = True
            self.close_pipe()
        return sent

    def failed(self, error: ForkdError) -> None:
        """Tells why the process can't come up."""
        self.tell(LaunchFailed(str(error), getattr(error, "details", ""), error.status))

    def close_pipe(self) -> None:
        """Closes the pipe without a message; for a worker, which would keep it open."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


@dataclass(frozen=True, slots=True)
class Child:
    """The child, as the starting process sees it.

    Attributes:
        pid: its process.
        reader: the pipe's other end.
    """

    pid: int
    reader: int

    def wait_ready(self, expected: type[M], seconds: float | None = None) -> M:
        """The message of the child when it is ready. Where this raises the child has ended.

        Args:
            expected: the class of that message.
            seconds: how long it may take; then the child is killed. None: for ever.

        Raises:
            BootError: the child can't come up, for its own reason and with its own exit status.
        """
        received, late = read_until(self.reader, seconds)
        if late:
            os.kill(self.pid, signal.SIGKILL)
            message: LaunchMessage = LaunchFailed("importing the handler took longer than boot_timeout")
        else:
            message = _message_of(received)
        if not isinstance(message, expected):
            self.wait()
            raise _error_of(message)
        return message

    def wait(self) -> None:
        """Waits until it has ended, if it was not waited for yet."""
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _message_of(received: bytes) -> LaunchMessage:
    if not received:
        return LaunchFailed("it ended without a word")
    try:
        return decode_launch(json.loads(received))
    except (ValueError, InvalidMessage):  # it ended while it wrote
        return LaunchFailed("it ended before it had told all")


def _error_of(message: LaunchMessage) -> BootError:
    failed = cast(LaunchFailed, message)
    error = BootError(failed.reason, failed.details)
    error.status = failed.status
    return error


def fork_off(work: Callable[[Launcher], int]) -> Child:
    """Forks a child that does its work to the end, and exits with the status that this returns. Raises ForkdError."""
    reader, writer = os.pipe()
    flush_output()
    try:
        pid = os.fork()
    except OSError as error:
        os.close(reader)
        os.close(writer)
        raise ForkdError(f"can't start a process: {error.strerror}") from None
    if pid == 0:
        _end_in(work, reader, Launcher(writer))
    os.close(writer)
    return Child(pid, reader)


def _end_in(work: Callable[[Launcher], int], reader: int, launcher: Launcher) -> NoReturn:
    status = 1
    try:
        os.close(reader)
        status = _run(work, launcher)
    finally:  # with nothing beside it: whatever is raised, this process must not go on as its parent
        os._exit(status & 0xFF)


def _run(work: Callable[[Launcher], int], launcher: Launcher) -> int:
    try:
        status = work(launcher)
    except ForkdError as error:
        launcher.failed(error)
        status = error.status
    except OSError as error:  # what the system refuses
        launcher.failed(BootError(system_reason(error)))
        log.error("process ended: %s", system_reason(error), exc_info=log.isEnabledFor(logging.DEBUG))
        status = 1
    except BaseException as error:  # (a daemon has no terminal: it reports to its launcher and its log)
        if isinstance(error, OSError) and not is_bug(error):  # what the system refuses
            log.critical("process ended: %s", system_reason(error))
            launcher.failed(BootError(system_reason(error)))
        else:
            log.critical("process ended by an exception", exc_info=True)
            launcher.failed(BootError(f"{type(error).__name__}: {error}"))
        status = 1
    finish_interpreter(FINISH_SECONDS)
    return status


def read_until(descriptor: int, seconds: float | None) -> tuple[bytes, bool]:
    """What comes up to the end of file, and whether that did not come in time; closes the descriptor."""
    deadline = None if seconds is None else time.monotonic() + seconds
    received = b""
    with open(descriptor, "rb", buffering=0) as pipe:
        while deadline is None or time.monotonic() < deadline:
            left = LONGEST_WAIT if deadline is None else min(max(0.0, deadline - time.monotonic()), LONGEST_WAIT)
            if wait_ready(pipe, select.POLLIN, left):
                portion = pipe.read(65536)
                if not portion:
                    return received, False
                received += portion
    return received, True
