"""The command line's end of the control socket."""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from types import TracebackType
from typing import Self

from forkd.errors import BootError, ForkdError, NotRunning
from forkd.system.channel import Channel, ChannelClosed
from forkd.system.pidfile import RunDirectory
from forkd.wire import Message

#: Seconds in which a healthy master answers what it need not wait for.
PROMPTLY = 10.0


class Conversation:
    """A connection to a running master.

    Args:
        run: its run directory.

    Raises:
        NotRunning: there is nobody.
        ForkdError: there is somebody who can't be asked.
    """

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(str(run.control))
        except OSError as error:
            sock.close()
            held, pid = run.pid_file.holder()
            if not held:
                raise NotRunning(f"{run.name} is not running") from None
            who = f"{run.name} (pid {pid})" if pid else run.name
            raise ForkdError(f"{who} runs, but can't be asked at {run.control}: {error.strerror}") from None
        self._channel = Channel(sock, takes_descriptors=True)
        self._heard: deque[Message] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._channel.close()

    def ask(self, message: Message, seconds: float = PROMPTLY) -> Message:
        """Sends a request and returns the reply.

        Raises:
            BootError: the master says no, with its reason.
            ForkdError: it says nothing in time, or is gone.
        """
        try:
            self._channel.send(message)
        except ChannelClosed:
            raise ForkdError(f"{self._run.name} closed the connection: only root and its own user may ask") from None
        return self.hear(seconds)

    def hear(self, seconds: float) -> Message:
        """The next reply. Raises as `ask`."""
        deadline = time.monotonic() + seconds
        while not self._heard:
            self._wait(deadline)
            try:
                self._heard.extend(self._channel.receive())
            except ChannelClosed:
                raise ForkdError(f"{self._run.name} closed the connection without an answer") from None
        reply = self._heard.popleft()
        if not reply.get("ok"):
            raise BootError(str(reply.get("error")), str(reply.get("details", "")))
        return reply

    def fileno(self) -> int:
        """The connection's descriptor."""
        return self._channel.fileno()

    def take_descriptors(self) -> list[int]:
        """Those that came with the replies up to now, which are the caller's from now on."""
        taken, self._channel.descriptors = self._channel.descriptors, []
        return taken

    def hear_the_end(self, seconds: float) -> None:
        """Waits until the master's process has ended. Raises ForkdError when it does not in time."""
        deadline = time.monotonic() + seconds
        while True:
            self._wait(deadline)
            try:
                self._channel.receive()
            except ChannelClosed:
                return

    def _wait(self, deadline: float) -> None:
        ready, _, _ = select.select([self._channel], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise ForkdError(f"{self._run.name} does not answer")
