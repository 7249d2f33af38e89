"""Signals as something that the master's one loop can wait for.

The Python handlers do nothing: the interpreter's C handler writes each signal's number to a socket, and the loop reads
it there, at a point where the master's state is whole (signal.set_wakeup_fd).
"""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator

from forkd import signals


class Wakeup:
    """The socket that signals are read from. `fileno` makes it fit for a selector."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def install(self) -> None:
        """Has this process's signals of `signals.MASTER` arrive here from now on."""
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for row in signals.MASTER:
            signal.signal(row.signal, lambda *_: None)
        # Whoever replaced this process's image has kept all back until now; so may have who started it.
        signal.pthread_sigmask(signal.SIG_SETMASK, ())

    def fileno(self) -> int:
        """What is readable when a signal has come."""
        return self._reader.fileno()

    def arrived(self) -> Iterator[signals.Row]:
        """The signals that have come, each once, in the table's order."""
        try:
            numbers = set(self._reader.recv(4096))
        except BlockingIOError:
            return
        yield from (row for row in signals.MASTER if row.signal in numbers)

    def close(self) -> None:
        """Closes it; for a forked child."""
        self._reader.close()
        self._writer.close()
